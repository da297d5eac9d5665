"""The loads of ``tunnels.c`` as functions, and what processes take meanwhile: memory, processor time, listeners.

Each load is bounded and ends by itself; one that fails ends the benchmark, so that no figure is of half the work.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stunnel_mgr.model import IPAddress

SOURCE = Path(__file__).with_name("tunnels.c")
PROGRAM = Path("/srv/tunnels")
PATIENCE = 20.0
_LISTEN = "0A"

Place = tuple[str, int]


def compile_program() -> None:
    """Make the program of the loads."""
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", PROGRAM, SOURCE], check=True)


def words(*arguments: object) -> list[str]:
    """The command of a load."""
    return [str(PROGRAM), *map(str, arguments)]


def numbers(*arguments: object) -> list[float]:
    """Run a load to its end; return the numbers that it prints."""
    done = subprocess.run(words(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"tunnels.c {' '.join(map(str, arguments))} exited {done.returncode}: {done.stderr}")
    return [float(one) for one in done.stdout.split()]


@contextmanager
def serving(place: Place, uid: int = 0) -> Iterator[None]:
    """The service behind the bridge."""
    with _talking("serve", *place, uid=uid) as service:
        if _line(service) != ["ready"]:
            sys.exit(f"no service at {place}")
        yield


@dataclass(frozen=True, slots=True)
class Held:
    """Sessions that are open: how many, and the seconds it took to open them."""

    count: int
    seconds: float
    process: subprocess.Popen[str]

    def answered(self) -> int:
        """Ask each session once; how many answered."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(_line(self.process)[1])


@contextmanager
def holding(place: Place, count: int, uid: int = 0) -> Iterator[Held]:
    """Open so many sessions at once, each of which has answered."""
    with _talking("hold", *place, count, uid=uid) as process:
        _, held, seconds = _line(process)
        yield Held(int(held), float(seconds), process)


@contextmanager
def _talking(*arguments: object, uid: int) -> Iterator[subprocess.Popen[str]]:
    """A load that ends with its stdin."""
    process = subprocess.Popen(
        words(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=uid,
        group=uid,
        extra_groups=[],
    )
    with process:
        yield process


def _line(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    line = process.stdout.readline().split()
    if not line:
        sys.exit(f"{process.args!r} exited {process.wait()}")
    return line


# --- what processes take ----------------------------------------------------------------------------------------------


def pss(pids: Iterable[int]) -> float:
    """Proportional memory of processes in KiB: what several share is counted once among them."""
    total = 0
    for pid in pids:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert found is not None
        total += int(found[1])
    return float(total)


def stunnels(uid: int | None = None) -> list[int]:
    """The stunnels of this private namespace, or of one user of them."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            name = (directory / "comm").read_text().strip()
            owner = directory.stat().st_uid
        except FileNotFoundError:
            continue
        if name in ("stunnel", "stunnel4") and uid in (None, owner):
            found.append(int(directory.name))
    return found


def listening() -> set[tuple[IPAddress, int]]:
    """Where somebody listens."""
    found: set[tuple[IPAddress, int]] = set()
    for name, decode in (("tcp", _ipv4), ("tcp6", _ipv6)):
        for row in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == _LISTEN:
                host, port = fields[1].split(":")
                found.add((decode(bytes.fromhex(host)), int(port, 16)))
    return found


def _ipv4(raw: bytes) -> IPv4Address:
    return IPv4Address(raw[::-1])


def _ipv6(raw: bytes) -> IPv6Address:
    # four words, each as this machine's processor has it
    return IPv6Address(
        b"".join(raw[at : at + 4][:: -1 if sys.byteorder == "little" else 1] for at in range(0, 16, 4))
    )


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.02)


def cpu(pids: Iterable[int]) -> float:
    """Processor seconds of processes, their threads included, also those that ended."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
