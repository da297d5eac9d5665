"""A kvm tenant on a whole node: its guest lives on the network, and is attacked from inside; both go into the log."""

import contextlib
import json
import pwd

from kvm_guest import booted
from kvm_image import place
from kvm_scene import ROUTER4, ROUTER6, mac_of, standing_sinks
from kvm_spoofs import Lan, honest, link_local

from netplan.counters import read_counters


class Consoles:
    """What guests said and where their spoofs were seen, shown at the end of the run whatever came of it."""

    def __init__(self):
        self._sections = []

    def add(self, guard, what, text):
        self._sections.append((f"kvm guest, tap_guard = {guard}: {what}", text))

    def pytest_terminal_summary(self, terminalreporter):
        for title, text in self._sections:
            terminalreporter.section(title)
            terminalreporter.write_line(text)


class Tenant:
    """A whole node with a guest on its first partition's tap."""

    def __init__(self, bridge, node, command):
        self.bridge, self.node, self._command = bridge, node, command
        self.apply()
        self.status = self._said("status")["partitions"]
        owner = pwd.getpwnam("slapuser0")
        self.images = place(node.instance / "slappart0", owner.pw_uid, owner.pw_gid)

    def _said(self, verb):
        done = self._command(verb, "--json", "-c", self.node.path)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def apply(self):
        assert self._said("apply")["left"] == []

    def guard_by(self, guard):
        """Change the configuration, and have it applied."""
        self.node.write(partitiond={"tap_guard": guard})
        self.apply()

    def nothing_to_do(self):
        assert self._said("plan")["operations"] == []

    def resource(self):
        return json.loads((self.node.instance / "slappart0/.slapos-resource").read_bytes())

    def refused(self):
        """Frames of the guest that the guard refused, by rule."""
        return {one.rule: one.packets for one in read_counters().refused if one.tap == "slaptap0"}

    def boot(self, mac):
        return booted("slapuser0", "slaptap0", mac, self.images)

    def sinks(self):
        return standing_sinks(self.bridge, "slaptap1")

    def lan(self, router, guest, ipv4, ipv6):
        return Lan(
            mac=guest.mac,
            ipv4=ipv4,
            ipv6=ipv6,
            link_local=link_local(guest.mac),
            router_mac=router.mac,
            node_mac=mac_of(self.bridge.name),
            tap_mac=self.status[1]["tap"]["mac"],
            partition6=self.status[1]["ipv6"],
        )


# --- what the guest does -----------------------------------------------------------------------------------------------


def reaches_the_router(guest, page):
    """Echo and TCP over both families, by whatever addresses the guest has."""
    for address in (ROUTER4, ROUTER6):
        where = f"[{address}]" if ":" in address else address
        guest.does(f"again ping -c 1 -W 1 {address}")
        assert guest.does(f"wget -q -O - http://{where}/page") == page


def attacked(guest, sinks, lan, attempts, **how):
    """Where each attempt was seen, by its name.

    An honest frame follows each: frames of one queue of a card keep their order, so what a sink sees before it came from
    the attempt.  That it is seen at all shows that the sinks work.
    """
    found = {}
    for number, one in enumerate(attempts):
        for line in one.lines:
            guest.does(line)  # a guest is not told what a guard drops
        mark = f"honest {number}."
        guest.does(honest(lan, mark, **how))
        found[one.name] = [sink.name for sink in sinks if any(map(one.seen_in, sink.until(mark.encode())))]
    return found


def seen_at_any_time(sinks, attempts):
    """Names of attempts of which something was seen, be it late."""
    return {one.name for one in attempts for sink in sinks if any(map(one.seen_in, sink.frames))}


def table(found, refused):
    width = max(map(len, found))
    seen = sum(map(bool, found.values()))
    rows = [f"{name:<{width}}  {', '.join(where) or '-'}" for name, where in found.items()]
    rules = ", ".join(f"{rule} {frames}" for rule, frames in sorted(refused.items())) or "none"
    return "\n".join([*rows, f"{len(found)} tried from inside, {seen} seen outside; frames refused: {rules}"])


@contextlib.contextmanager
def logged(consoles, guest, guard):
    """Keep the guest's console, whatever comes of it."""
    try:
        yield
    finally:
        consoles.add(guard, "its console", guest.text())
