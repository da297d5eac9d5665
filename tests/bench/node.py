"""``make bench-node``: what partitions cost, beside the floor and beside slapos.core, in one run on this machine.

For each number of partitions, with taps in a bridge, IPv6 ranges, packet filter, identities and supervisord:

- **from nothing**, **no change**, **after a reboot** (users and directories there, network empty): ``partitiond apply`` as a
  command, its interpreter included; so many processes and threads were started, told from the pids of this private namespace;
- **a partition more** and **no change, in the daemon**: what a running daemon takes for a ``POST /1/apply``;
- **floor**: the same taps and addresses by ioctl and raw netlink alone;
- **slapos.core**: ``slapos node format`` where it is installed, without its pauses, which are counted.

Then a daemon at rest: processor time and memory, without meters and with them. Wall and CPU seconds are medians.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from netplan import rtnetlink
from netplan.model import Address
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket
from netplan.taps import make_taps
from partitiond import control, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path("/srv/bench")
BRIDGE = "br0"
BASE = "2001:db8:1::1/64"
# include/uapi/linux/if_addr.h: IFA_F_NODAD
NODAD = 0x02
PEER = Path(sys.prefix) / "master" / "bin" / "python3"
PREPARED_BUT_NOT_POSTED = 2
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
# taps come up one by one, and the kernel tells each of it within the first seconds
SETTLED = 6.0
# after a partition more the daemon looks at everything, and tells the master
AFTERWARDS = 1.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured run."""

    wall: float
    cpu: float
    processes: int | None
    pauses: float = 0.0


def ip(*arguments: str) -> None:
    """Run ``ip`` to set the scene (not measured)."""
    subprocess.run(["/usr/sbin/ip", *arguments], check=True)


def ip_batch(lines: list[str]) -> None:
    """Run many lines of ``ip``, going on where one has nothing to do."""
    subprocess.run(
        ["/usr/sbin/ip", "-force", "-batch", "-"],
        input="\n".join(lines) + "\n",
        text=True,
        check=False,
        stderr=subprocess.DEVNULL,
    )


def scene() -> None:
    """A bridge with a veth as the Ethernet and a default route."""
    ip("link", "set", "lo", "up")
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "add", "eth0", "type", "veth", "peer", "name", "far")
    for link in ("eth0", "far", BRIDGE):
        ip("link", "set", link, "up")
    ip("link", "set", "eth0", "master", BRIDGE)
    ip("address", "add", BASE, "dev", BRIDGE, "nodad")
    ip("route", "add", "default", "via", "2001:db8:1::ffff", "dev", BRIDGE)


def configuration(count: int, meters: int = 10) -> Path:
    """Write a configuration for so many partitions."""
    ROOT.mkdir(parents=True, exist_ok=True)
    path = ROOT / "slapos.cfg"
    path.write_text(
        "[slapos]\ncomputer_id = COMP-BENCH\nmaster_url = http://127.0.0.1:9/\n"
        f"software_root = {ROOT}/software\ninstance_root = {ROOT}/instance\n"
        f"[slapformat]\ninterface_name = {BRIDGE}\npartition_amount = {count}\ncreate_tap = true\n"
        "partition_base_name = slappart\nuser_base_name = slapuser\ntap_base_name = slaptap\n"
        f"ipv4_local_network = 10.0.0.0/16\ncomputer_xml = {ROOT}/slapos.xml\n"
        f"[partitiond]\nbridge = {BRIDGE}\nmeter_interval = {meters}\n"
    )
    return path


def next_pid() -> int:
    """The pid that the next process of this namespace gets, roughly: that of one just started."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    return process.pid


def measured(command: list[str], fine: tuple[int, ...] = (0,)) -> Figure:
    """Run a command to its end."""
    first = next_pid()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in fine:
        sys.exit(f"{' '.join(command)[:200]} exited {done.returncode}:\n{done.stdout}{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    pauses = re.search(r"PAUSES (\S+)", done.stdout)
    return Figure(wall, cpu, next_pid() - first - 1, float(pauses[1]) if pauses else 0.0)


# --- the floor --------------------------------------------------------------------------------------------------------


def floor(count: int) -> Figure:
    """Make and remove the taps and addresses alone; only the making is measured."""
    names = [f"floor{index}" for index in range(count)]
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        bridge = rtnetlink.links(sock)[BRIDGE].ifindex
        first = int(ipaddress.IPv6Address("2001:db8:1::2"))
        wanted = [
            address
            for index in range(count)
            for address in (
                Address(bridge, (first + index).to_bytes(16), 64, 112, NODAD),
                Address(bridge, (0x0A000002 + index).to_bytes(4), 32, 112, 0),
            )
        ]
        start, cpu = time.perf_counter(), time.process_time()
        refused = make_taps((name, 5000 + index) for index, name in enumerate(names))
        requests = [
            *(rtnetlink.set_link(name, alias=None, mac=None, master=bridge, up=True) for name in names),
            *(rtnetlink.set_address(address) for address in wanted),
        ]
        errors = sock.batch(requests)
        figure = Figure(time.perf_counter() - start, time.process_time() - cpu, 0)
        if refused or errors:
            sys.exit(f"the floor failed: {refused or errors}")
        sock.batch([rtnetlink.delete_address(address) for address in wanted])
    ip_batch([f"link delete {name}" for name in names])
    return figure


# --- partitiond -------------------------------------------------------------------------------------------------------


def program() -> str:
    """The installed program."""
    found = shutil.which("partitiond", path=str(Path(sys.prefix) / "bin"))
    if found is None:
        sys.exit("partitiond is not installed in this environment: make bench-node installs it")
    return found


def command(path: Path, *words: str) -> list[str]:
    """A quiet command of partitiond."""
    return [program(), "-q", "-c", str(path), *words]


def reboot(count: int) -> None:
    """Take away what a reboot takes: supervisord, taps, addresses, routes, rules and the packet filter."""
    supervisord = int((ROOT / "instance" / "var" / "run" / "supervisord.pid").read_text())
    # itself first, which would start the others again
    pids = [
        supervisord,
        *map(int, Path(f"/proc/{supervisord}/task/{supervisord}/children").read_text().split()),
    ]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    subprocess.run(["/usr/sbin/nft", "delete", "table", "inet", "partitiond"], check=True)
    ip_batch(
        [
            *(f"link delete slaptap{index}" for index in range(count)),
            "-6 rule add pref 0 lookup local",
            "-6 rule delete pref 0 lookup 11200",
            "-6 rule delete pref 1 lookup local",
            "-6 route flush proto 112 table all",
        ]
    )
    addresses = subprocess.run(
        ["/usr/sbin/ip", "-o", "address", "show", "dev", BRIDGE], check=True, capture_output=True, text=True
    ).stdout
    ours = [line.split()[3] for line in addresses.splitlines() if "proto 112" in line or "proto 0x70" in line]
    ip_batch([f"address delete {one} dev {BRIDGE}" for one in ours])
    Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("0")


@contextmanager
def daemon(path: Path) -> Iterator[int]:
    """A running daemon; its pid."""
    process = subprocess.Popen(
        [program(), "-q", "-c", str(path), "run"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while answered("GET", "/1/events?limit=1") is None:
            if process.poll() is not None or time.monotonic() > end:
                sys.exit("the daemon does not start")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def answered(method: str, target: str) -> dict[str, object] | None:
    """Ask the daemon."""
    return control.call(
        Path("/run/partitiond/control.sock"), method, target, {} if method == "POST" else None
    )


def cpu_of(pid: int) -> float:
    """Processor seconds of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def asked(pid: int) -> Figure:
    """One ``POST /1/apply``, as the daemon takes it."""
    cpu, start = cpu_of(pid), time.perf_counter()
    answer = answered("POST", "/1/apply")
    wall = time.perf_counter() - start
    if not answer or answer["failures"] or answer["left"]:
        sys.exit(f"the daemon could not apply: {answer}")
    return Figure(wall, cpu_of(pid) - cpu, None)


def in_the_daemon(count: int, repetitions: int) -> dict[str, list[Figure]]:
    """A partition more, again and again, and no change."""
    more, same = [], []
    with daemon(configuration(count, meters=100_000)) as pid:
        time.sleep(SETTLED)
        same += (asked(pid) for _ in range(repetitions))
        for one in range(repetitions):
            configuration(count + 1 + one, meters=100_000)
            more.append(asked(pid))
            time.sleep(AFTERWARDS)
    return {"a partition more, in the daemon": more, "no change, in the daemon": same}


def commands(count: int, repetitions: int) -> dict[str, list[Figure]]:
    """What the command costs; everything is torn down at the end of each repetition but the last."""
    path = configuration(count)
    rows: dict[str, list[Figure]] = {"from nothing": [], "no change": [], "after a reboot": []}
    for one in range(repetitions):
        rows["from nothing"].append(measured(command(path, "apply")))
        rows["no change"].append(measured(command(path, "apply")))
        reboot(count)
        rows["after a reboot"].append(measured(command(path, "apply")))
        if one + 1 < repetitions:
            measured(command(path, "teardown", "--purge"))
    return rows


def at_rest(count: int, seconds: float) -> None:
    """Print what a daemon takes that has nothing to do."""
    for what, meters in (("without meters", 100_000), ("with meters every 10 s", 10)):
        with daemon(configuration(count, meters)) as pid:
            time.sleep(SETTLED + 10)
            cpu, start = cpu_of(pid), time.monotonic()
            time.sleep(seconds)
            share = (cpu_of(pid) - cpu) / (time.monotonic() - start) * 100
            rss = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            size = int(rss[1]) // 1024 if rss else 0
        line = f"daemon at rest, {what} ({seconds:.0f} s)"
        print(f"{count:>10}  {line:<48}{share:>6.2f} % of a core{size:>6} MiB", flush=True)


# --- slapos.core ------------------------------------------------------------------------------------------------------


def peer(count: int, repetitions: int) -> dict[str, list[Figure]]:
    """What ``slapos node format`` costs; what it leaves is removed by hand, for it cannot."""
    path = configuration(count)
    Path(f"/proc/sys/net/ipv6/conf/{BRIDGE}/accept_dad").write_text("0")
    line = [str(PEER), "-I", str(Path(__file__).with_name("peer.py")), str(path)]
    rows: dict[str, list[Figure]] = {"slapos.core, from nothing": [], "slapos.core, no change": []}
    users = {
        one: one.read_bytes()
        for one in map(Path, ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"))
    }
    for _ in range(repetitions):
        rows["slapos.core, from nothing"].append(measured(line, (PREPARED_BUT_NOT_POSTED,)))
        rows["slapos.core, no change"].append(measured(line, (PREPARED_BUT_NOT_POSTED,)))
        ip_batch([f"link delete slaptap{index}" for index in range(count)])
        ip("address", "flush", "dev", BRIDGE, "scope", "global")
        ip("address", "add", BASE, "dev", BRIDGE, "nodad")
        ip("route", "replace", "default", "via", "2001:db8:1::ffff", "dev", BRIDGE)
        ip_batch(["-6 route flush table local proto boot", "-6 route flush table local proto static"])
        for one, content in users.items():
            one.write_bytes(content)
        shutil.rmtree(ROOT)
        configuration(count)
    return rows


# --- the table --------------------------------------------------------------------------------------------------------


def head() -> str:
    """The head of the table."""
    return f"{'partitions':>10}  {'':<34}{'wall s':>8}  {'min-max':^15}{'CPU s':>8}{'processes':>11}"


def row(count: int, what: str, figures: list[Figure]) -> str:
    """One line of the table: medians, with the range of the wall time."""
    walls = [figure.wall for figure in figures]
    processes = [figure.processes for figure in figures if figure.processes is not None]
    pauses = statistics.median(figure.pauses for figure in figures)
    return (
        f"{count:>10}  {what:<34}{statistics.median(walls):>8.3f}  {f'[{min(walls):.3f}-{max(walls):.3f}]':^15}"
        f"{statistics.median(figure.cpu for figure in figures):>8.3f}"
        f"{max(processes) if processes else '-':>11}" + (f"  and waits {pauses:.0f} s" if pauses else "")
    )


def bench(counts: list[int], repetitions: int, peers: list[int], rest: float) -> None:
    """Measure and print."""
    print(head())
    for count in counts:
        rows = {"floor": [floor(count) for _ in range(repetitions)]}
        rows |= commands(count, repetitions)
        rows |= in_the_daemon(count, repetitions)
        for what, figures in rows.items():
            print(row(count, what, figures), flush=True)
        measured(command(configuration(count), "teardown", "--purge"))
    start = [measured([sys.executable, "-I", "-c", "pass"]) for _ in range(5)]
    print(row(0, "interpreter's start", start))
    for count in peers if PEER.exists() else ():
        for what, figures in peer(count, max(1, repetitions // 3)).items():
            print(row(count, what, figures), flush=True)
    if rest:
        at_rest(counts[-1] if 300 not in counts else 300, rest)
        measured(command(configuration(counts[-1]), "teardown", "--purge"))


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench-node runs this in private namespaces")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", nargs="*", type=int, default=[10, 100, 300, 500])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer", type=int, nargs="*", default=[10, 100], help="partitions for slapos.core")
    parser.add_argument(
        "--rest", type=float, default=60.0, help="seconds to watch a daemon at rest; 0: do not"
    )
    options = parser.parse_args()
    scene()
    bench(options.counts, options.repetitions, options.peer, options.rest)
