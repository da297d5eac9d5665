"""The "internet" that joins the machines of a world: a network namespace that routes between them, by way of a slow wire.

Promises: it ends with whoever made it; nobody hears what is for others; machines have one address each, of the one family that
there is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partitiond.demo import source
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_IP, _NSENTER = "/usr/sbin/ip", "/usr/bin/nsenter"
_PATIENCE = 30.0
_MASTER = 255  # where the master stands; nodes are counted from 1


@dataclass(frozen=True, slots=True)
class Site:
    """Where a machine is joined: its address, its router's, and the network that is its own (a /64, or in IPv4 a /30)."""

    address: str
    gateway: str
    network: str

    @property
    def length(self) -> int:
        """The prefix length of the network."""
        return int(self.network.partition("/")[2])

    @property
    def in_url(self) -> str:
        """The address as it stands in a URL."""
        return f"[{self.address}]" if ":" in self.address else self.address


def site(number: int, *, ipv6: bool) -> Site:
    """The site of a number: of nodes from 1, up to 60; of documentation networks (RFC 3849, RFC 5737)."""
    if ipv6:
        base = f"2001:db8:{number:x}::"
        return Site(f"{base}2", f"{base}1", f"{base}/64")
    block, last = ("203.0.113", 0) if number == _MASTER else ("198.51.100", 4 * number)
    return Site(f"{block}.{last + 2}", f"{block}.{last + 1}", f"{block}.{last}/30")


def master_site(*, ipv6: bool) -> Site:
    """The site of the master."""
    return site(_MASTER, ipv6=ipv6)


@dataclass(frozen=True, slots=True)
class Capture:
    """A file in the format of pcap(3) with all that the wire carried while it was kept."""

    path: Path

    def packets(self) -> Iterator[bytes]:
        """The packets, from their IP header on."""
        with self.path.open("rb") as stream:
            stream.seek(24)
            while head := stream.read(16):
                yield stream.read(struct.unpack("=IIII", head)[2])

    def count(self, words: bytes) -> int:
        """In how many packets these bytes stand as they are."""
        return sum(words in packet for packet in self.packets())


class Internet:
    """Up from its making to ``close``; delay in seconds one way, loss as a share."""

    def __init__(self, *, delay: float = 0.005, loss: float = 0.002, seed: int = 8) -> None:
        self._cut: dict[str, str] = {}
        self._sites: dict[str, Site] = {}
        self._wire = subprocess.Popen(
            [*source.ending_with_us(), *source.python("partitiond.demo.wire"), str(seed)],
            cwd="/",
            env=source.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the world's maker alone, who ends it all in order
        )
        try:
            self._heard()
            self.tell(delay=delay, loss=loss)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process that holds the network namespace."""
        return self._wire.pid

    # --- machines

    def attach(self, name: str, pid: int, where: Site) -> None:
        """Join the network namespace of a process: it gets ``eth0``, up and with its address and a way to all others."""
        nodad = " nodad" if ":" in where.address else ""
        far = f"to-{name}"
        self._sites[name] = where
        self._ip(
            f"link add {far} type veth peer name eth0 netns {pid}",
            f"link set {far} up",
            f"address add {where.gateway}/{where.length} dev {far}{nodad}",
        )
        lines = (
            "link set lo up",
            "link set eth0 up",
            f"address add {where.address}/{where.length} dev eth0{nodad}",
            f"route add default via {where.gateway} dev eth0",
        )
        _batch([_NSENTER, "-t", str(pid), "-n", "--", _IP], lines)

    def detach(self, name: str) -> None:
        """Take a machine's link away; it may be gone with the machine."""
        self._sites.pop(name, None)
        self.join(name)
        done = self.run(_IP, "link", "delete", f"to-{name}", check=False)
        if done.returncode and "Cannot find device" not in done.stderr:
            raise PartitiondError("demo.link", done.stderr.strip(), resource=f"to-{name}")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program at the router."""
        words = [_NSENTER, "-t", str(self.pid), "-n", "--", *command]
        return subprocess.run(words, cwd="/", check=check, capture_output=True, text=True, timeout=_PATIENCE)

    def _ip(self, *lines: str) -> None:
        _batch([_NSENTER, "-t", str(self.pid), "-n", "--", _IP], lines)

    # --- the wire

    def tell(self, **order: Any) -> dict[str, int]:
        """Tell the wire something (``partitiond.demo.wire.Order``); what it has carried so far (``Counts``)."""
        if self._wire.stdin is None:
            raise RuntimeError("the wire has no standard input")
        self._wire.stdin.write(json.dumps(order).encode() + b"\n")
        self._wire.stdin.flush()
        found: dict[str, int] = self._heard()
        return found

    def _heard(self) -> Any:
        if self._wire.stdout is None:
            raise RuntimeError("the wire has no standard output")
        ready, _, _ = select.select([self._wire.stdout], [], [], _PATIENCE)
        line = self._wire.stdout.readline() if ready else b""
        if not line:
            raise PartitiondError(
                "demo.wire",
                f"the wire does not answer (exit status {self._wire.poll()})",
                hint="does this kernel have TUN devices (/dev/net/tun)?",
            )
        return json.loads(line)

    def counts(self) -> dict[str, int]:
        """What the wire carried (``partitiond.demo.wire.Counts``)."""
        return self.tell()

    def cut(self, name: str) -> None:
        """Let nothing come from a machine, or go to it."""
        self._cut[name] = self._sites[name].network
        self.tell(cut=list(self._cut.values()))

    def join(self, name: str) -> None:
        """Take a cut back; without one nothing is done."""
        if self._cut.pop(name, None):
            self.tell(cut=list(self._cut.values()))

    @contextlib.contextmanager
    def captured(self, path: Path) -> Iterator[Capture]:
        """Keep what is carried in a file, which is whole after the ``with``."""
        self.tell(capture=str(path))
        try:
            yield Capture(path)
        finally:
            self.tell(capture="")

    def close(self) -> None:
        """End it, and with it all links."""
        for stream in (self._wire.stdin, self._wire.stdout):
            if stream is not None:
                stream.close()
        self._wire.kill()
        self._wire.wait()


def _batch(command: list[str], lines: tuple[str, ...]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        [*command, "-batch", "-"],
        cwd="/",
        input=text,
        text=True,
        check=False,
        capture_output=True,
        timeout=_PATIENCE,
        env=dict(os.environ),
    )
    if done.returncode:
        raise PartitiondError("demo.link", done.stderr.strip(), resource=lines[0])
