"""The scene of the demonstration: a bridge with an "Ethernet", a router at its other end, a release, a standard master.

Everything is real: the kernel's bridge and veth, a router in a network namespace of its own, ``slapos proxy`` of slapos.core.
Made only inside the sandbox.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from partitiond import execute
from partitiond.demo import source
from partitiond.errors import PartitiondError

BRIDGE, UPLINK = "br0", "eth0"
HOST, ROUTER, PREFIXLEN = "2001:db8:51a9::1", "2001:db8:51a9::ffff", 64
ECHO_PORT = 7
MASTER_PORT = 18080
MASTER = f"http://127.0.0.1:{MASTER_PORT}/"
COMPUTER = "COMP-DEMO"
CONFIGURATION = Path("/etc/opt/slapos/slapos.cfg")
RELEASE = Path("/srv/release/software.cfg")
CLIENT_CONFIGURATION = Path("/srv/master/client.cfg")

_CONFIGURATION = f"""\
[slapos]
computer_id = {COMPUTER}
master_url = {MASTER}
software_root = /srv/slapgrid/software
instance_root = /srv/slapgrid/instance

[slapformat]
interface_name = {BRIDGE}
create_tap = true
partition_amount = 5

[partitiond]
bridge = {BRIDGE}
offline_builds = true   ; the namespaces have no way out
software_interval = 2   ; a demonstration does not wait for five minutes
instances_interval = 2
meter_interval = 1
"""


def network() -> None:
    """Make the bridge, the Ethernet and the router."""
    from pyroute2 import IPRoute, netns  # noqa: PLC0415 - 150 ms that only this verb pays

    Path("/run/netns").mkdir(exist_ok=True)
    netns.create("router")
    with IPRoute() as host:
        index = {link.get_attr("IFLA_IFNAME"): link["index"] for link in host.get_links()}
        host.link("set", index=index["lo"], state="up")
        host.link("add", ifname=BRIDGE, kind="bridge")
        host.link("add", ifname=UPLINK, kind="veth", peer={"ifname": "lan", "net_ns_fd": "router"})
        bridge, uplink = (host.link_lookup(ifname=name)[0] for name in (BRIDGE, UPLINK))
        host.link("set", index=uplink, master=bridge, state="up")
        host.link("set", index=bridge, state="up")
        # 0x02: IFA_F_NODAD, as there is nobody else
        host.addr("add", index=bridge, address=HOST, prefixlen=PREFIXLEN, flags=0x02)
    _in_router(_router_links)
    with IPRoute() as host:
        host.route(
            "add", dst="::/0", gateway=ROUTER, oif=host.link_lookup(ifname=BRIDGE)[0], family=socket.AF_INET6
        )


def _router_links() -> None:
    from pyroute2 import IPRoute  # noqa: PLC0415 - as above

    with IPRoute() as router:
        for name in ("lo", "lan"):
            router.link("set", index=router.link_lookup(ifname=name)[0], state="up")
        router.addr(
            "add", index=router.link_lookup(ifname="lan")[0], address=ROUTER, prefixlen=PREFIXLEN, flags=0x02
        )


def _in_router(body: Any) -> None:
    """Run a function in the router's network namespace: a thread has a namespace of its own, and ends with it."""
    from pyroute2 import netns  # noqa: PLC0415 - as above

    failed: list[BaseException] = []

    def enter() -> None:
        try:
            netns.setns("router")
            body()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def echo_server() -> None:
    """Answer what the router is sent on its echo port, until the demonstration ends."""
    listener: list[socket.socket] = []

    def listen() -> None:
        listener.append(socket.create_server((ROUTER, ECHO_PORT), family=socket.AF_INET6))

    _in_router(listen)
    threading.Thread(target=_answer, args=(listener[0],), daemon=True).start()


def _answer(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)


def files() -> None:
    """Write the configuration and lay out the software release where its users can read it."""
    CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
    CONFIGURATION.write_text(_CONFIGURATION)
    shutil.copytree(Path(__file__).parent / "release", RELEASE.parent)
    for path in (RELEASE.parent, *RELEASE.parent.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    CLIENT_CONFIGURATION.parent.mkdir()
    CLIENT_CONFIGURATION.write_text(f"[slapos]\nmaster_url = {MASTER}\n\n[slapconsole]\n")
    CLIENT_CONFIGURATION.with_name("proxy.cfg").write_text(
        f"[slapos]\ncomputer_id = {COMPUTER}\nmaster_url = {MASTER}\nsoftware_root = /srv/slapgrid/software\n"
        "instance_root = /srv/slapgrid/instance\n\n"
        f"[slapproxy]\nhost = 127.0.0.1\nport = {MASTER_PORT}\ndatabase_uri = /srv/master/proxy.db\n"
    )


def master_program() -> Path:
    """The ``slapos`` program of the reference master. Raises PartitiondError ``demo.no_master``."""
    program = Path(sys.prefix) / "master" / "bin" / "slapos"
    if not program.is_file():
        raise PartitiondError(
            "demo.no_master",
            "the reference master is not installed",
            resource=str(program),
            hint="make install, or make demo in a checkout, installs it",
        )
    return program


def slapos(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the stock client."""
    command = [str(master_program()), *arguments, "--cfg", str(CLIENT_CONFIGURATION)]
    env = execute.environment("/root", "root")
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def start_master() -> subprocess.Popen[bytes]:
    """Start ``slapos proxy`` and wait until it answers. Raises PartitiondError ``demo.master``."""
    log = CLIENT_CONFIGURATION.with_name("proxy.log")
    command = [
        str(master_program()),
        "proxy",
        "start",
        "--cfg",
        str(CLIENT_CONFIGURATION.with_name("proxy.cfg")),
    ]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=execute.environment("/root", "root"),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    wait_for(lambda: _answers(process), "the master to answer", log)
    return process


def _answers(process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise PartitiondError(
            "demo.master", f"the master ended with status {process.returncode}", hint="see its log"
        )
    try:
        with urllib.request.urlopen(f"{MASTER}getRunId", timeout=5) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def connection_parameters(title: str) -> dict[str, str]:
    """What an instance has published, by the master's own API; empty when there is none yet."""
    request = urllib.request.Request(  # noqa: S310 - loopback
        f"{MASTER}slapos.get.v0.instance_tree",
        data=json.dumps({"title": title}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - loopback
            found = json.load(answer).get("connection_parameters") or {}
    except urllib.error.HTTPError:
        return {}
    return {str(key): str(value) for key, value in found.items()}


def start_daemon(log: Path) -> subprocess.Popen[bytes]:
    """Start ``partitiond run`` in the background."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*source.python("partitiond"), "run"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the daemon as a crash would."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Any, what: str, log: Path, seconds: float = 90.0) -> Any:
    """Wait until a condition holds and return what it gave. Raises PartitiondError ``demo.waited`` with the log's end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2500:] if log.exists() else "(no log)"
    raise PartitiondError("demo.waited", f"waited {seconds:.0f} s for {what}; {log} ends:\n{tail}")
