"""Tunnels of a real node: what ``partitiond apply`` makes of declarations, under its own supervisord.

- **scale**: so many partitions with three tunnels each, from declared to listening; once more after a reboot; their memory;
- **sessions**: so many at once through one tunnel, each of which answers afterwards;
- **reload**: what is refused while a stunnel with many listeners reads its configuration again, and after it was killed.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import node
import tunnel_load as load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stunnel_mgr.model import IPAddress

SERVICE_PORT = 7000
FIRST_PORT = 7001
EACH = 3
# supervisord starts at once again only what ran for a second
STEADY = 1.5
RELOAD_SECONDS = 0.6


@dataclass(frozen=True, slots=True)
class Tenant:
    """A partition as its own software finds it."""

    directory: Path
    uid: int
    ipv4: IPv4Address
    ipv6: IPv6Address
    fingerprint: str

    def declare(self, name: str, text: str) -> None:
        """Write a declaration, as the buildout of an instance does."""
        directory = self.directory / "etc" / "tunnel"
        for path in (directory.parent, directory):
            path.mkdir(exist_ok=True)
            os.chown(path, self.uid, self.uid)
        file = directory / f"{name}.cfg"
        file.write_text(f"[tunnel]\n{text}")
        os.chown(file, self.uid, self.uid)

    def serve(self, name: str, port: int, allowed: Tenant) -> tuple[IPAddress, int]:
        """Declare the server's end of a tunnel; return where it is to listen."""
        self.declare(
            name, f"mode = server\nlisten = {port}\nconnect = {SERVICE_PORT}\nallow = {allowed.fingerprint}\n"
        )
        return self.ipv6, port

    def use(self, name: str, port: int, other: Tenant, far: int) -> tuple[IPAddress, int]:
        """Declare the client's end."""
        self.declare(
            name,
            f"mode = client\nlisten = {port}\nconnect = [{other.ipv6}]:{far}\npeer = {other.fingerprint}\n",
        )
        return self.ipv4, port


@contextmanager
def tenants(count: int) -> Iterator[list[Tenant]]:
    """A node with so many partitions, without any tunnel; everything is removed afterwards."""
    path = node.configuration(count)
    node.measured(node.command(path, "apply"))
    try:
        yield [_tenant(index) for index in range(count)]
    finally:
        node.measured(node.command(path, "teardown", "--purge"))


def _tenant(index: int) -> Tenant:
    directory = node.ROOT / "instance" / f"slappart{index}"
    published = json.loads((directory / ".slapos-resource").read_text())
    addresses = [ip_address(one["addr"]) for one in published["address_list"]]
    return Tenant(
        directory,
        pwd.getpwnam(f"slapuser{index}").pw_uid,
        next(one for one in addresses if isinstance(one, IPv4Address)),
        next(one for one in addresses if isinstance(one, IPv6Address)),
        published["certificate_fingerprint"],
    )


def apply(count: int) -> float:
    """Seconds that ``partitiond apply`` takes."""
    return node.measured(node.command(node.configuration(count), "apply")).wall


@dataclass(frozen=True, slots=True)
class Scale:
    """So many tunnels: seconds from declared to listening, the same from nothing but files, and all stunnels in MiB."""

    partitions: int
    declared: float
    rebooted: float
    memory: float


def scale(count: int) -> Scale:
    """Two servers and a client in each partition, whose peers are the neighbours."""
    with tenants(count) as everybody:
        wanted = {place for index in range(count) for place in _three(everybody, index)}
        declared = apply(count)
        _check(wanted)
        memory = load.pss(load.stunnels()) / 1024
        if len(load.stunnels()) != count:
            sys.exit(f"{len(load.stunnels())} stunnels for {count} partitions")
        node.reboot(count)
        rebooted = apply(count)
        _check(wanted)
    return Scale(count, declared, rebooted, memory)


def _three(everybody: list[Tenant], index: int) -> list[tuple[IPAddress, int]]:
    own, other = everybody[index], everybody[(index + 1) % len(everybody)]
    before = everybody[index - 1]
    return [
        own.serve("one", FIRST_PORT, before),
        own.serve("two", FIRST_PORT + 1, before),
        own.use("three", FIRST_PORT + 2, other, FIRST_PORT),
    ]


def _check(wanted: set[tuple[IPAddress, int]]) -> None:
    if missing := wanted - load.listening():
        sys.exit(f"{len(missing)} of {len(wanted)} tunnels do not listen")


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions through one tunnel: asked for, open, answering afterwards; KiB of either end for each."""

    asked: int
    held: int
    answered: int
    seconds: float
    server: float
    client: float
    descriptors: int


def sessions(asked: int) -> Sessions:
    """Open so many at once through the tunnel between two partitions."""
    with tenants(2) as (server, client):
        server.serve("far", FIRST_PORT, client)
        entry = client.use("near", FIRST_PORT, server, FIRST_PORT)
        apply(2)
        ends = [pid for one in (server, client) for pid in load.stunnels(one.uid)]
        idle = [load.pss([pid]) for pid in ends]
        with (
            load.serving((str(server.ipv4), SERVICE_PORT), server.uid),
            load.holding((str(entry[0]), entry[1]), asked, client.uid) as held,
        ):
            far, near = (
                (load.pss([pid]) - before) / max(held.count, 1)
                for pid, before in zip(ends, idle, strict=True)
            )
            answered = held.answered()
        return Sessions(asked, held.count, answered, held.seconds, far, near, _descriptors(ends[0]))


def _descriptors(pid: int) -> int:
    found = re.search(r"^Max open files\s+(\d+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class Outage:
    """What a client met that connects again and again.

    How many connections, how many refused, and milliseconds without a listener; how many were reset that the kernel had
    taken for stunnel, and for how long (milliseconds) the slowest waited for it.
    """

    connects: float
    refused: float
    window: float
    reset: float
    wait: float


def reloads(tunnels: int, repetitions: int) -> tuple[list[Outage], list[Outage]]:
    """Send SIGHUP to a stunnel with so many listeners, and then kill it, as often."""
    with tenants(1) as (own,):
        ports = [own.serve(f"t{one}", FIRST_PORT + one, own)[1] for one in range(tunnels)]
        apply(1)
        time.sleep(STEADY)
        reloaded = [_outage(own, ports, signal.SIGHUP, RELOAD_SECONDS) for _ in range(repetitions)]
        killed = []
        for _ in range(repetitions):
            killed.append(_outage(own, ports[:1], signal.SIGKILL, 3.0))
            time.sleep(STEADY)
    return reloaded, killed


def _outage(own: Tenant, ports: list[int], number: signal.Signals, seconds: float) -> Outage:
    """Send the signal while another process connects; it tells what it met."""
    (pid,) = load.stunnels(own.uid)
    with subprocess.Popen(
        load.words("probe", seconds, own.ipv6, *ports), stdout=subprocess.PIPE, text=True
    ) as probe:
        time.sleep(0.2)
        os.kill(pid, number)
        said, _ = probe.communicate()
    if probe.returncode:
        sys.exit(f"the probe exited {probe.returncode}")
    outage = Outage(*map(float, said.split()))
    if outage.window < 0:
        sys.exit(f"{number.name}: nobody listens after {seconds} s")
    return outage
