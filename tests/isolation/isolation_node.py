"""A whole node for the isolation matrix: partitions with everything that a partition can have, and the agents of all users.

The product makes it from a configuration and a master's wishes; the instances' processes are agents, started by
supervisord.  Besides them: an ordinary user, the same partition users outside of what the product starts, root, and root
at the wire's other end.
"""

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from device_loops import disks
from network_scene import NEIGHBOUR4, NEIGHBOUR6, NODE4, NODE6, SYS, Master, standing_wire

from partitiond import converge
from partitiond.context import Context
from partitiond.state import software_name

COUNT = 8
PATIENCE = 30.0
# in the environment of whoever calls the product
SECRET = "MATRIX_SECRET"
VISITOR, VISITOR_UID = "visitor", 4242
RELEASE = "https://lab.example/isolation.cfg"
PROGRAMS = ("isolation_agent.py", "isolation_files.py", "isolation_network.py", "isolation_processes.py")
SWITCHED_OFF = {
    "address_ownership": "off",
    "tap_guard": "off",
    "private_namespaces": "off",
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_KEYCTL = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
# what buildout of the release does for an instance, as its user
_BUILDOUT = """\
#!/bin/sh
set -e
umask 022
mkdir -p etc/run etc/tunnel etc/service var srv
cat > etc/run/agent <<END
#!/bin/sh
exec {python} -B -E -s -S {programs}/isolation_agent.py {hub} $(basename "$PWD")
END
chmod 755 etc/run/agent
echo secret > etc/secret
cat > etc/tunnel/db.cfg <<END
[tunnel]
mode = server
listen = 3306
connect = 3306
END
"""


class Agent:
    """The channel to one agent."""

    def __init__(self, channel):
        self._stream = channel.makefile("rw")
        self._channel = channel
        hello = json.loads(self._stream.readline())
        self.name, self.pid, self.uid, self.groups = (hello[key] for key in ("name", "pid", "uid", "groups"))

    def ask(self, verb, *words):
        print(json.dumps([verb, *words]), file=self._stream, flush=True)

    def answer(self):
        line = self._stream.readline()
        assert line, f"the agent {self.name} is gone"
        value, mistake = json.loads(line)
        assert not mistake, f"{self.name}: {mistake}"
        return value

    def __call__(self, verb, *words):
        self.ask(verb, *words)
        return self.answer()

    def close(self):
        self._stream.close()
        self._channel.close()


class Tenant:
    """What a partition has."""

    def __init__(self, partition, device):
        self.id, self.index, self.uid, self.path = (
            partition.id,
            partition.index,
            partition.uid,
            partition.path,
        )
        self.user, self.network, self.guest_mac = partition.user, partition.network, partition.guest_mac
        self.device = device

    @property
    def addresses(self):
        """{kind: address}; of a range some address in it."""
        one = self.network
        found = {
            "IPv6": one.ipv6.ip,
            "range": one.ipv6_range[0x77],
            "private IPv4": one.ipv4,
            "routable IPv4": one.routable_ipv4.interface.ip,
            "tun IPv6": one.tun.ipv6.ip,
            "tun IPv4": one.tun.ipv4.ip,
        }
        return {kind: str(address) for kind, address in found.items()}


def _join_session_keyring():
    """As a login through PAM does (pam_keyinit(8)): everything that is started from here inherits this keyring."""
    if _LIBC.syscall(_KEYCTL, 1, None) < 0:  # KEYCTL_JOIN_SESSION_KEYRING
        raise OSError(ctypes.get_errno(), "KEYCTL_JOIN_SESSION_KEYRING")


class Scene:
    """The node and its agents; ``enforced`` False: the same with every wall of the product switched off."""

    def __init__(self, node, wire, master, devices, command, *, enforced, backend="nftables"):
        self.node, self.wire, self.master, self.command, self.enforced = node, wire, master, command, enforced
        self.devices, self.backend = devices, backend
        self.programs = node.root / "programs"
        self.hub_path = str(node.root / "hub")
        self.agents, self.started, self.tenants = {}, [], []
        self.daemon = None

    # --- up

    def up(self):
        for name in PROGRAMS:
            self.programs.mkdir(exist_ok=True)
            shutil.copy(Path(__file__).with_name(name), self.programs / name)
        self._hub = socket.socket(socket.AF_UNIX)
        self._hub.bind(self.hub_path)
        os.chmod(self.hub_path, 0o777)
        self._hub.listen(64)
        self._hub.settimeout(PATIENCE)
        self._write()
        self.verb("apply")
        self._release()
        self.verb("sync", "capacity")
        names = [f"slappart{index}" for index in range(COUNT)]
        self.master.as_production_does("COMP-1", RELEASE, started=set(names))
        self.verb("sync", "instances")
        self._start_agents()
        for _ in range(2 * COUNT + 3):
            channel, _ = self._hub.accept()
            agent = Agent(channel)
            self.agents[agent.name] = agent
        context = Context.of(self.node.load())
        partitions = converge.observe(context).node.partitions
        context.meters.close()
        self.tenants = [Tenant(one, disk.node) for one, disk in zip(partitions, self.devices, strict=True)]
        self._start_daemon()
        return self

    def _write(self):
        count = range(COUNT)
        self.node.write(
            slapos={"master_url": self.master.url},
            slapformat={"create_tun": "true"},
            partitiond={
                "bridge": "br0",
                "bridge_ports": "eth0",
                "packet_filter": self.backend,
                "offline_builds": "true",
                **({} if self.enforced else SWITCHED_OFF),
            },
            routable_ipv4={f"slappart{n}": f"203.0.113.{10 + n}/24 via 203.0.113.1" for n in count},
            block_devices={f"slappart{n}": self.devices[n].node for n in count},
        )

    def verb(self, *words):
        how = {"env": {**self.command.environment, SECRET: "1"}, "preexec_fn": _join_session_keyring}
        done = self.command(*words, "--json", "-c", self.node.path, **how)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def _release(self):
        """A release that is built already: one program, which configures an instance."""
        owner = pwd.getpwnam("slapsoft")
        directory = self.node.root / "software" / software_name(RELEASE)
        (directory / "bin").mkdir(parents=True)
        (directory / "bin" / "buildout").write_text(
            _BUILDOUT.format(python=sys.executable, programs=self.programs, hub=self.hub_path)
        )
        (directory / "bin" / "buildout").chmod(0o755)
        (directory / "instance.cfg").write_text("[buildout]\nparts =\n")
        (directory / ".completed").write_text("now\n")
        for path in (directory, *directory.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid)

    def _start_agents(self):
        """Those that the product does not start."""
        for index in range(COUNT):
            self._start(f"outside{index}", *_as_user(f"slapuser{index}"))
        self._start(VISITOR, *_as_user(VISITOR))
        with open(self.node.path, "rb") as stream:  # by which root shows that something left open is seen
            self._start("root", pass_fds=(stream.fileno(),), env={**os.environ, SECRET: "1"})
        self._start("wire", "/usr/sbin/ip", "netns", "exec", self.wire.name)

    def _start(self, name, *switch, **how):
        program = [sys.executable, "-B", "-E", "-s", "-S", str(self.programs / "isolation_agent.py")]
        started = subprocess.Popen(
            [*switch, *program, self.hub_path, name], cwd="/", stdin=subprocess.DEVNULL, **how
        )
        self.started.append(started)

    def _start_daemon(self):
        self.daemon = subprocess.Popen(
            self.command.line("run", "-q", "-c", self.node.path),
            env=self.command.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + PATIENCE
        with socket.socket(socket.AF_UNIX) as channel:
            while channel.connect_ex(str(self.control)) != 0:
                assert self.daemon.poll() is None, "the daemon ended"
                assert time.monotonic() < end, "the daemon does not come up"
                time.sleep(0.02)

    # --- down

    def down(self):
        for agent in self.agents.values():
            agent.close()
        self._hub.close()
        for one in self.started:
            one.kill() if not self.agents else None
            one.wait(PATIENCE)
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(PATIENCE)

    # --- looking

    @property
    def control(self):
        return self.node.root / "run" / "control.sock"

    @property
    def attackers(self):
        """The columns; where nothing is in force some of them are enough."""
        users = tuple(one.user for one in self.tenants)
        return (*(users if self.enforced else users[::3]), VISITOR)

    def agent_name(self, attacker):
        """The agent of a column: of a partition's user the one that supervisord started."""
        return attacker.replace("slapuser", "slappart")

    def ask_all(self, questions):
        """Ask several agents at once: {agent: (verb, words…)} gives {agent: answer}."""
        for name, question in questions.items():
            self.agents[name].ask(*question)
        return {name: self.agents[name].answer() for name in questions}

    def attempt(self, jobs):
        """Do the jobs, each agent its own, all agents at once; return their outcomes in the order of the jobs."""
        places = {}
        for place, job in enumerate(jobs):
            places.setdefault(job.agent, []).append(place)
        answers = self.ask_all(
            {name: ("attempt", [jobs[one].words for one in own]) for name, own in places.items()}
        )
        outcomes = [""] * len(jobs)
        for name, own in places.items():
            for place, outcome in zip(own, answers[name], strict=True):
                outcomes[place] = outcome
        return outcomes

    def connect(self, jobs, patience=0.4, most=400):
        """Connect [variant, source, target, port, token] by each agent, hundreds at once."""
        outcomes, places = [""] * len(jobs), {}
        for place, job in enumerate(jobs):
            places.setdefault(job.agent, []).append(place)
        while places:
            turn = {name: own[:most] for name, own in places.items()}
            places = {name: own[most:] for name, own in places.items() if own[most:]}
            answers = self.ask_all(
                {name: ("connect", [jobs[one].words for one in own], patience) for name, own in turn.items()}
            )
            for name, own in turn.items():
                for place, outcome in zip(own, answers[name], strict=True):
                    outcomes[place] = outcome
        return outcomes

    def listen(self, jobs):
        """Open sockets [name, variant, address, port] and keep them."""
        outcomes, places = [""] * len(jobs), {}
        for place, job in enumerate(jobs):
            places.setdefault(job.agent, []).append(place)
        answers = self.ask_all(
            {name: ("listen", [jobs[one].words for one in own]) for name, own in places.items()}
        )
        for name, own in places.items():
            for place, outcome in zip(own, answers[name], strict=True):
                outcomes[place] = outcome
        return outcomes

    def sightings(self):
        """What arrived anywhere since the last time: {token: {(agent, socket, source)}}; waits until it is quiet."""
        found, quiet = {}, 0
        while quiet < 3:
            time.sleep(0.05)
            arrived = self.ask_all(dict.fromkeys(self.agents, ("received",)))
            quiet = 0 if any(arrived.values()) else quiet + 1
            for agent, rows in arrived.items():
                for where, token, source in rows:
                    found.setdefault(token, set()).add((agent, where, source.removeprefix("::ffff:")))
        return found

    def cells(self, jobs):
        """Cells of jobs whose outcome says all."""
        return [
            job.cell(outcome.startswith("ok"), outcome)
            for job, outcome in zip(jobs, self.attempt(jobs), strict=True)
        ]


def _as_user(name):
    return (*("/usr/bin/setpriv", "--reuid", name, "--regid", name, "--init-groups", "--"),)


@contextlib.contextmanager
def _visitor():
    """An ordinary user of the machine, with a home of its own."""
    lines = {
        "/etc/passwd": f"{VISITOR}:x:{VISITOR_UID}:{VISITOR_UID}::/srv/{VISITOR}:/bin/sh\n",
        "/etc/group": f"{VISITOR}:x:{VISITOR_UID}:\n",
    }
    home = Path("/srv", VISITOR)
    home.mkdir()
    os.chown(home, VISITOR_UID, VISITOR_UID)
    for path, line in lines.items():
        with open(path, "a") as file:
            file.write(line)
    try:
        yield
    finally:
        for path, line in lines.items():
            Path(path).write_text(Path(path).read_text().replace(line, ""))
        shutil.rmtree(home)


def _world(wire):
    """The wire's other end is the gateway of everything, and tries to reach the private networks too."""
    wire.sees(
        "address add 203.0.113.1/24 dev wire",
        "route add 2001:db8:1:0:4000::/66 via " + NODE6,
        "route add 2001:db8:1:0:c000::/66 via " + NODE6,
        "route add 172.16.0.0/12 via " + NODE4,
        "route add 10.0.0.0/8 via " + NODE4,
    )


@contextlib.contextmanager
def _locks_for_all():
    """/run/lock is open to all on Debian, and so no private place."""
    path = Path("/run/lock")
    there = path.exists()
    path.mkdir(exist_ok=True)
    path.chmod(0o1777)
    try:
        yield
    finally:
        for one in path.iterdir():
            one.unlink()
        if not there:
            path.rmdir()


@contextlib.contextmanager
def _settings(wire):
    """Everybody may ping, as systemd sets it on Debian; and the node forwards, as many do: the worst case."""
    pings = "ipv4/ping_group_range"
    wanted = {pings: "0 2147483647", "ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
    with wire.inside():
        (SYS / pings).write_text(wanted[pings])
    before = {name: (SYS / name).read_text() for name in wanted}
    for name, value in wanted.items():
        (SYS / name).write_text(value)
    try:
        yield
    finally:
        for name, value in before.items():
            (SYS / name).write_text(value)


@dataclass(frozen=True)
class Ground:
    """What a scene stands on."""

    wire: object
    master: object
    devices: list


@contextlib.contextmanager
def standing_ground(directory):
    """A wire with the world behind it, a master, disks, an ordinary user."""
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(standing_wire())
        _world(wire)
        stack.enter_context(_settings(wire))
        stack.enter_context(_locks_for_all())
        stack.enter_context(_visitor())
        make = stack.enter_context(disks(directory))
        master = Master()
        stack.callback(master.close)
        yield Ground(wire, master, [make() for _ in range(COUNT)])


@contextlib.contextmanager
def standing_scene(ground, node, command, **how):
    """A scene that is up, made of the files of a node (tests/conftest.py)."""
    scene = Scene(node, ground.wire, ground.master, ground.devices, command, **how)
    try:
        yield scene.up()
    finally:
        scene.down()


WIRE = {True: NEIGHBOUR6, False: NEIGHBOUR4}
HOST = {True: NODE6, False: NODE4}
