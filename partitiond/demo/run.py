"""The steps of the demonstration, each seen to work before the next; exit status 0 only if all were."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from netplan import counters
from partitiond import control, execute, present, sandbox, usage_text
from partitiond.demo import scenario, scene, source
from partitiond.demo.scenario import Scenario
from partitiond.demo.telling import Telling, check, say
from partitiond.errors import FAMILY, PartitiondError, sentence

if TYPE_CHECKING:
    from collections.abc import Callable

DAEMON_LOG = Path("/var/log/partitiond/daemon.log")
_ITEMS = 5
_SERVER, _CLIENT = "server", "client"


def outside(*, keep: bool, nodes: int = 1, mesh: bool = False) -> int:
    """Make the namespaces and run the demonstration in them: that of one node, or of several."""
    if nodes > 1:
        scenario.check_programs(mesh=mesh)
    home = sandbox.home_of_environment() / "bin" / "python3"
    arguments = [
        str(home),
        *source.python("partitiond")[1:],
        "demo",
        "--inside",
        *(["--keep"] if keep else []),
        *(["--nodes", str(nodes)] if nodes > 1 else []),
        *(["--mesh"] if mesh else []),
    ]
    binds = sandbox.environment_binds()
    return sandbox.run(arguments, binds=[*binds, *source.binds()], keep_opt=not binds)


def inside(*, keep: bool, nodes: int = 1, mesh: bool = False) -> int:
    """Run the demonstration in the namespaces that :func:`outside` made."""
    if not sandbox.inside():
        raise PartitiondError(
            "demo.not_inside", "--inside is for the demonstration's own use", hint="partitiond demo"
        )
    if nodes > 1:
        return _several(Scenario(nodes, mesh=mesh), keep=keep)
    demo = Demo()
    return _play(demo, lambda: f"the daemon's log ends:\n{_tail(DAEMON_LOG)}", keep=keep)


def _several(play: Scenario, *, keep: bool) -> int:
    with contextlib.closing(play):
        return _play(play, play.logs, keep=keep)


class _Play(Protocol):
    """A demonstration: steps, a state in which it may be looked at, and an end."""

    def play(self) -> None: ...
    def clear_up(self) -> None: ...
    def ways_in(self) -> list[str]: ...


def _play(demo: _Play, logs: Callable[[], str], *, keep: bool) -> int:
    """Exit status 0 only if all was seen."""
    try:
        demo.play()
        if keep:
            _hold(demo.ways_in())
        demo.clear_up()
    except (*FAMILY, subprocess.SubprocessError, OSError) as error:
        say(f"\n{present.colour('✗', 'red')} {sentence(error)}")
        say(logs())
        if keep:
            _hold(demo.ways_in())
        return 1
    say(_NEXT)
    return 0


def _hold(ways_in: list[str]) -> None:
    """Leave everything up until Enter is pressed."""
    program = Path(sys.prefix) / "bin" / "partitiond"
    inner = "".join(f"  {line}\n" for line in ways_in)
    say(
        "\nIt is up. Enter it from another terminal with\n"
        f"  nsenter -a -t {os.environ.get(sandbox.OUTSIDE_PID, 'PID')} bash\n"
        + (f"and from there, as they are machines of their own,\n{inner}" if inner else "")
        + f"and there, for example, {program} status. Press Enter here to end it."
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.readline()


_NEXT = """
Every step was seen to work. Next:
  make demo ARGS=--keep      leaves it up, with lines that tell how to enter it
  make demo ARGS="--nodes 3" services across three nodes; with --mesh without IPv6, over tinc
  make install               an environment in /opt/partitiond; then write /etc/opt/slapos/slapos.cfg,
                             look with `partitiond plan`, and converge with `partitiond apply`
  partitiond --help          all verbs"""


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.exists() else "(no log)"


def partitiond(*arguments: str, expect: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run a verb with ``--json`` as an operator would; fail when it exits otherwise than expected."""
    command = [*source.python("partitiond"), "--json", *arguments]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, timeout=120)
    if done.returncode not in expect:
        raise PartitiondError(
            "demo.unexpected",
            f"partitiond {' '.join(arguments)} exited {done.returncode}: {done.stdout} {done.stderr}",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(slots=True)
class Demo(Telling):
    """The demonstration under way."""

    daemon: subprocess.Popen[bytes] | None = None
    master: subprocess.Popen[bytes] | None = None
    links_before: set[str] = field(default_factory=set)

    def play(self) -> None:
        """All steps but the last."""
        self.step(
            "A bridge with an Ethernet, a router at its other end, and a standard master (slapos proxy)"
        )
        scene.network()
        self.links_before = _links()
        scene.echo_server()
        scene.files()
        self.master = scene.start_master()
        self.seen(
            f"{scene.BRIDGE} has {scene.HOST}/{scene.PREFIXLEN}, the router {scene.ROUTER}; the master answers"
        )
        self._bring_up()
        self._instances()
        self._traffic()
        self._crash()
        self._refusals()
        self.step("What the node says")
        say(present.status(partitiond("status")))
        say("")
        say(present.tunnels(partitiond("tunnel", "list")))
        say("")
        say(usage_text.usage(self._usage()))

    def _bring_up(self) -> None:
        self.step("partitiond plan, then partitiond run: five partitions")
        todo = partitiond("plan", expect=(2,))["operations"]
        self.seen(f"the plan has {len(todo)} operations, the first: {todo[0]['id']} ({todo[0]['reason']})")
        self.daemon = scene.start_daemon(DAEMON_LOG)
        scene.wait_for(_offered, "the capacity to be posted", DAEMON_LOG)
        self.seen(
            "partitions, taps, addresses and the packet filter are there; the master knows their capacity"
        )
        check(not partitiond("plan")["operations"], "a plan after apply is not empty")
        self.seen("a second plan is empty")

    def _instances(self) -> None:
        self.step("slapos supply and slapos request: a server and a client of one Software Release")
        url = str(scene.RELEASE)
        _stock("supply", url, scene.COMPUTER)
        _stock("request", "memcached", url, "--type", _SERVER)
        server = _published("memcached", "certificate")
        self.seen(f"software built, memcached runs in its partition and published {server['url']}")
        peer = [
            f"server-host={server['host']}",
            f"server-port={server['port']}",
            f"server-certificate={server['certificate']}",
        ]
        _stock("request", "application", url, "--type", _CLIENT, "--parameters", *peer)
        client = _published("application", "certificate")
        self.seen("the client has the server's address and certificate, and published its own certificate")
        _stock(
            "request", "memcached", url, "--type", _SERVER, "--parameters", f"allow={client['certificate']}"
        )
        scene.wait_for(_tunnels_up, "both tunnels to be up", DAEMON_LOG)
        self.seen("the server lets exactly that certificate in; both tunnels are up")
        daemons = [pid for pid in _supervisord_pids() if _parent(pid) == 1]
        check(daemons, "supervisord is a child of the daemon")
        self.seen(f"supervisord (process {daemons[0]}) is no child of the daemon")

    def _traffic(self) -> None:
        self.step("Traffic: memcached through TLS over IPv6, and plain TCP with the router")
        server, client = _partition(_SERVER), _partition(_CLIENT)
        before = self._bytes(client["id"], client["ipv6"])
        self.seen(_as_user(client, "memcached", client["ipv4"], "11211", str(_ITEMS), "0"))
        self.seen(_as_user(client, "echo", client["ipv6"], scene.ROUTER, str(scene.ECHO_PORT), "1000000"))
        after = self._bytes(client["id"], client["ipv6"])
        check(
            after - before > 2 * _ITEMS * 900_000 + 1_000_000,
            "the bytes of the exchange are not in the usage",
        )
        check(
            self._bytes(server["id"], server["ipv6"]) > _ITEMS * 900_000,
            "the server's bytes are not in the usage",
        )
        self.seen(f"metered at the client's IPv6 address: {after - before} bytes")

    def _crash(self) -> None:
        self.step("kill -9 of the daemon in the middle of traffic")
        client = _partition(_CLIENT)
        pids = _tenants()
        running = _start_as_user(client, "memcached", client["ipv4"], "11211", "8", "0.25")
        time.sleep(0.7)
        if self.daemon:
            scene.kill(self.daemon)
        said = _finish(running)
        self.seen(f"meanwhile: {said}")
        check(_tenants() == pids, "a tenant's process ended or began")
        self.seen(f"memcached and both stunnels ran on: processes {', '.join(map(str, sorted(pids)))}")
        self.daemon = scene.start_daemon(DAEMON_LOG)
        scene.wait_for(_daemon_answers, "the daemon to be back", DAEMON_LOG)
        check(not partitiond("plan")["operations"], "a plan after apply is not empty")
        self.seen("the restarted daemon's plan is empty")
        self._compare_with_kernel()

    def _compare_with_kernel(self) -> None:
        partitiond("sync", "usage")
        kernel = {
            (one.partition, one.scope): one.bytes_in + one.bytes_out
            for one in counters.read_counters().traffic
            if one.family == "ipv6"
        }
        ledger: dict[tuple[str, str], int] = {}
        for item in partitiond("usage")["partitions"]:
            for one in item["addresses"]:
                if one["family"] == "ipv6" and "/" not in one["address"]:
                    key = (item["id"], one["scope"])
                    ledger[key] = ledger.get(key, 0) + one["bytes_in"] + one["bytes_out"]
        behind = {
            key: value - ledger.get(key, 0)
            for key, value in kernel.items()
            if value > ledger.get(key, 0) + 2000
        }
        check(not behind, f"the ledger misses bytes: {behind}")
        self.seen(f"the ledger has every byte that the kernel counted: {sum(kernel.values())}")

    def _refusals(self) -> None:
        self.step("A third partition's user tries what it must not")
        server, client, third = _partition(_SERVER), _partition(_CLIENT), _free()
        own = f"{third['id']} ({third['user']['name']})"
        said = _as_user(third, "refused-connect", server["ipv4"], "11211")
        self.seen(f"{own} → memcached's private IPv4 {server['ipv4']}: {said}")
        said = _as_user(third, "refused-source", client["ipv6"], scene.ROUTER, str(scene.ECHO_PORT))
        self.seen(f"{own} from {client['ipv6']}, an address of {client['id']}: {said}")
        said = _as_user(third, "echo", third["ipv6"], scene.ROUTER, str(scene.ECHO_PORT), "1000")
        self.seen(f"{own} from its own address: {said}")
        denied = next(
            item["denied_packets"] for item in self._usage()["partitions"] if item["id"] == third["id"]
        )
        check(denied >= 2, "refused packets are not counted")
        self.seen(f"{denied} refused packets are counted at {third['id']}")

    def _usage(self) -> dict[str, Any]:
        partitiond("sync", "usage")
        return partitiond("usage")

    def _bytes(self, partition: str, address: str) -> int:
        return sum(
            one["bytes_in"] + one["bytes_out"]
            for item in self._usage()["partitions"]
            for one in item["addresses"]
            if item["id"] == partition and one["address"] == address
        )

    def clear_up(self) -> None:
        """The last step: everything goes."""
        self.step("partitiond teardown --purge")
        partitiond("teardown", "--purge")
        if self.daemon and self.master:
            self.daemon.wait(30)
            self.master.terminate()
            self.master.wait(10)
        check(_links() == self.links_before, f"links are left: {_links() - self.links_before}")
        with Path("/etc/passwd").open() as stream:
            check("slapuser" not in stream.read(), "users are left")
        check(not counters.read_counters().epoch, "the packet filter is left")
        for path in ("/srv/slapgrid/instance", "/srv/slapgrid/software", "/var/lib/partitiond"):
            check(not Path(path).exists(), f"{path} is left")
        self.seen("links, users, packet filter, processes and data are gone")

    @staticmethod
    def ways_in() -> list[str]:
        """Nothing to enter but the sandbox."""
        return []


def _links() -> set[str]:
    return set(os.listdir("/sys/class/net"))  # noqa: PTH208 - names suffice


def _stock(*arguments: str) -> None:
    done = scene.slapos(*arguments)
    if done.returncode != 0:
        raise PartitiondError(
            "demo.unexpected", f"slapos {' '.join(arguments)} exited {done.returncode}: {done.stderr[-2000:]}"
        )


def _daemon_answers() -> bool:
    return control.call(Path("/run/partitiond/control.sock"), "GET", "/1/status") is not None


def _offered() -> bool:
    """Whether the master knows the node's partitions: a supply to an unknown computer would be refused."""
    return _daemon_answers() and bool(partitiond("status")["node"]["master"]["reachable"])


def _published(title: str, key: str) -> dict[str, str]:
    def found() -> dict[str, str]:
        parameters = scene.connection_parameters(title)
        return parameters if parameters.get(key) else {}

    parameters: dict[str, str] = scene.wait_for(found, f"{title} to publish its {key}", DAEMON_LOG)
    return parameters


def _tunnels_up() -> bool:
    found = partitiond("tunnel", "list")["tunnels"]
    return len(found) == 2 and all(one["state"] == "up" for one in found)


def _partition(kind: str) -> dict[str, Any]:
    """The partition that holds the server (it has processes) or the client (it has a tunnel only)."""
    for item in partitiond("status")["partitions"]:
        if item["tunnels"] and bool(item["processes"]) == (kind == _SERVER):
            return dict(item)
    raise PartitiondError("demo.unexpected", f"no partition holds the {kind}")


def _free() -> dict[str, Any]:
    return next(dict(item) for item in partitiond("status")["partitions"] if item["state"] == "free")


def _command(item: dict[str, Any], *arguments: str) -> list[str]:
    user = item["user"]["name"]
    return [
        *(execute.SETPRIV, "--reuid", user, "--regid", user, "--init-groups", "--no-new-privs", "--"),
        *(*source.python("partitiond.demo.traffic"), *arguments),
    ]


def _start_as_user(item: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(item, *arguments), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=60)
    if process.returncode != 0:
        raise PartitiondError("demo.unexpected", f"{' '.join(map(str, process.args))}: {said.strip()}")  # type: ignore[arg-type]
    return said.strip()


def _as_user(item: dict[str, Any], *arguments: str) -> str:
    return _finish(_start_as_user(item, *arguments))


def _processes() -> list[tuple[int, str]]:
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - names suffice
        if name.isdigit():
            try:
                line = (
                    Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            found.append((int(name), line))
    return found


def _tenants() -> set[int]:
    return {
        pid
        for pid, line in _processes()
        if "stunnel" in line.split(" ")[0] or line.startswith("/usr/bin/memcached")
    }


def _supervisord_pids() -> list[int]:
    return [pid for pid, line in _processes() if "supervisor.supervisord" in line]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
