"""Partitions whose tunnels carry load while something happens: who serves, who calls, and what came of it."""

import time
from pathlib import Path

# between two exchanges of a session: two cores have to do the same for both ends, and for what happens meanwhile
PAUSE, STREAM_PAUSE = 0.05, 0.02
SERVICE = 5000
# (of the serving partition, its port, of the calling partition, its port): their tunnels are declared once
STEADY = (
    ("slappart0", 4000, "slappart1", 6000),
    ("slappart0", 4001, "slappart2", 6001),
    ("slappart2", 4002, "slappart1", 6002),
)


def declare(node):
    """The steady tunnels, up when this returns, and the services behind them."""
    for server, listen, client, entry in STEADY:
        node.serve(server, f"steady-{listen}", listen, SERVICE, [node.pin(client)])
        node.reach(client, f"steady-{entry}", entry, (node.public(server), listen), node.pin(server))
    node.apply()
    for server in sorted({row[0] for row in STEADY}):
        node.service(server, node.private(server), SERVICE)


def stunnels(node):
    """The pids of each partition's stunnel, by partition."""
    owners = {node.uid(f"slappart{index}"): f"slappart{index}" for index in range(3)}
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it ended
        owner = owners.get(int(text.partition("\nUid:")[2].split()[0]))
        if owner and text.startswith("Name:\tstunnel"):
            found.setdefault(owner, []).append(int(path.parent.name))
    return found


class Load:
    """Long sessions over each steady tunnel, and with ``streams`` new connections all the time."""

    def __init__(self, node, sessions, *, streams=False):
        self.agents = {}
        shares = [sessions // 2, sessions // 4, sessions - sessions // 2 - sessions // 4]
        for share, (_, _, client, entry) in zip(shares, STEADY, strict=True):
            end = [node.private(client), entry]
            options = {"sessions": [[*end, share]], "pause": PAUSE}
            if streams:
                options |= {"streams": [end], "stream_pause": STREAM_PAUSE}
            self.agents[client, entry] = node.agent(client, "load", options)
        self.sessions = sessions
        self.seen()  # what was before the first exchange

    def seen(self):
        """What was seen since the last time, by tunnel."""
        return {entry: agent.ask() for (_, entry), agent in self.agents.items()}

    def for_a_while(self, seconds=1.0):
        """What is seen within some time from now."""
        self.seen()
        time.sleep(seconds)
        return self.seen()

    def close(self):
        for agent in self.agents.values():
            agent.close()
