"""``make bench``: what ``apply`` costs beside the floor, in one run on this machine.

For each number of partitions (with taps in a bridge): ``apply`` from nothing, ``apply`` with no change, and the floor: the same
taps and addresses by ioctl and one raw netlink batch, without users, directories, packet filter, identities or
supervisord. Wall and CPU seconds are medians; ``processes`` counts what was started (processes and threads), told from the
pids of this private pid namespace.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from netplan import rtnetlink
from netplan.model import Address
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket
from netplan.taps import make_taps
from partitiond import sandbox

ROOT = Path("/srv/bench")
BRIDGE = "br0"
# include/uapi/linux/if_addr.h: IFA_F_NODAD
NODAD = 0x02


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured run."""

    wall: float
    cpu: float
    processes: int


def ip(*arguments: str) -> None:
    """Run ``ip`` to set the scene (not measured)."""
    subprocess.run(["/usr/sbin/ip", *arguments], check=True)


def scene() -> None:
    """A bridge with a veth as the Ethernet and a default route."""
    ip("link", "set", "lo", "up")
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "add", "eth0", "type", "veth", "peer", "name", "far")
    for link in ("eth0", "far", BRIDGE):
        ip("link", "set", link, "up")
    ip("link", "set", "eth0", "master", BRIDGE)
    ip("address", "add", "2001:db8:1::1/64", "dev", BRIDGE, "nodad")
    ip("route", "add", "default", "via", "2001:db8:1::ffff", "dev", BRIDGE)


def configuration(count: int) -> Path:
    """Write a configuration for so many partitions."""
    ROOT.mkdir(parents=True, exist_ok=True)
    path = ROOT / f"slapos-{count}.cfg"
    path.write_text(
        "[slapos]\ncomputer_id = COMP-BENCH\nmaster_url = http://127.0.0.1:9/\n"
        f"software_root = {ROOT}/software\ninstance_root = {ROOT}/instance\n"
        f"[slapformat]\ninterface_name = {BRIDGE}\npartition_amount = {count}\ncreate_tap = true\n"
        f"[partitiond]\nbridge = {BRIDGE}\n"
    )
    return path


def next_pid() -> int:
    """The pid that the next process of this namespace gets, roughly: that of one just started."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    return process.pid


def measured(command: list[str]) -> Figure:
    """Run a command to its end."""
    first = next_pid()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figure(wall, cpu, next_pid() - first - 1)


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
    for name in names:
        ip("link", "delete", name)
    return figure


def row(count: int, what: str, figures: list[Figure]) -> str:
    """One line of the table: medians, with the range of the wall time."""
    walls = [figure.wall for figure in figures]
    return (
        f"{count:>10}  {what:<24}{statistics.median(walls):>8.3f}  [{min(walls):.3f}-{max(walls):.3f}]"
        f"{statistics.median(figure.cpu for figure in figures):>9.3f}"
        f"{max(figure.processes for figure in figures):>11}"
    )


def bench(counts: list[int], repetitions: int) -> None:
    """Measure and print."""
    program = shutil.which("partitiond", path=str(Path(sys.prefix) / "bin"))
    if program is None:
        sys.exit("partitiond is not installed in this environment: make bench installs it")
    print(f"{'partitions':>10}  {'':<24}{'wall s':>8}  {'min-max':^13}{'CPU s':>9}{'processes':>11}")
    for count in counts:
        apply = [program, "-q", "-c", str(configuration(count)), "apply"]
        runs: dict[str, list[Figure]] = {"apply, from nothing": [], "apply, no change": [], "floor": []}
        for _ in range(repetitions):
            runs["floor"].append(floor(count))
            runs["apply, from nothing"].append(measured(apply))
            runs["apply, no change"].append(measured(apply))
            measured([program, "-q", "-c", str(configuration(count)), "teardown", "--purge"])
        for what, figures in runs.items():
            print(row(count, what, figures), flush=True)
    start = [measured([sys.executable, "-I", "-c", "pass"]) for _ in range(5)]
    print(row(0, "interpreter's start", start))


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench runs this in private namespaces")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=[10, 100])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    scene()
    bench(options.counts or [10, 100], options.repetitions)
