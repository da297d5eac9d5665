"""Ports that no outgoing connection gets by itself: ``net.ipv4.ip_local_reserved_ports``, of which some are ours.

A port that a client happened to get is one that nobody can listen on any more.  The kernel passes over reserved ones
when it chooses, for IPv6 as well; whoever names such a port gets it (Documentation/networking/ip-sysctl).  The setting
is one of the network namespace, and anybody may have put something there: it has no room for a mark of ours, so a
record outside says which ports we added.  Promises:

* what others have there is never taken away, nor claimed: what is not surely ours is theirs
* the record is written before the setting is, and names whatever may be ours from then on

How the kernel takes a write (kernel/sysctl.c, proc_do_large_bitmap): it works on a page at a time, and says how far it
came; what is written from the beginning replaces all, what is written behind it is added.  So adding needs no knowledge
of what is there, and cannot undo what somebody else does meanwhile.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from netplan.errors import NetplanError
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket

SETTING = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/thread-self/ns/net")

_PIECE = 4000  # less than the smallest page, and room for one more range
_USUAL = 4096
_MOST = 1 << 18  # each second port of all has 190 KB; a reading must take all at once
_LONGEST = len("65534-65535,")

Ports = frozenset[int]
NONE: Ports = frozenset()


@dataclass(frozen=True, slots=True)
class Record:
    """Which ports we added, in the network namespace ``place`` (:func:`here`).

    Not ``settled``: we may have been about to; any of them may not be there yet, or no more.
    """

    place: str
    ports: Ports
    settled: bool

    def encode(self) -> bytes:
        """Write it as JSON."""
        value = {"place": self.place, "ports": render(self.ports), "settled": self.settled}
        return json.dumps(value, sort_keys=True).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> "Record":
        """Read it back.  Raises ValueError."""
        match json.loads(content):
            case {"place": str(place), "ports": str(ports), "settled": bool(settled)}:
                return cls(place, parse(ports), settled)
        raise ValueError("is no record of reserved ports")


@dataclass(frozen=True, slots=True)
class Reserved:
    """What is reserved now, and by whom; ``settled``: the record says just that."""

    ours: Ports = NONE
    others: Ports = NONE
    settled: bool = True

    @property
    def ports(self) -> Ports:
        """All of them."""
        return self.ours | self.others

    def is_right(self, wanted: Ports) -> bool:
        """Whether all that is wanted is reserved, nothing else is by us, and the record says so."""
        return self.settled and self.ours == wanted - self.others


@lru_cache(maxsize=8)  # it is the same in nearly every pass
def parse(text: str) -> Ports:
    """Read a list of ports and ranges as the kernel writes it.  Raises ValueError."""
    found: set[int] = set()
    for one in filter(None, text.strip().split(",")):
        first, _, last = one.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[0] < 0 or numbers[-1] > 65535:
            raise ValueError(f"{one!r} are no ports")
        found.update(numbers)
    return frozenset(found)


def render(ports: Iterable[int]) -> str:
    """Write ports as the kernel does: ``80,8080-8090``."""
    return ",".join(_ranges(ports))


def _ranges(ports: Iterable[int]) -> Iterator[str]:
    first = last = -1
    for port in (*sorted(ports), 1 << 16):
        if first >= 0 and port == last + 1 < 1 << 16:
            last = port
            continue
        if first >= 0:
            yield f"{first}" if first == last else f"{first}-{last}"
        first = last = port


def here() -> str:
    """Name this network namespace as no other of any boot is named."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        cookie = sock.namespace()
    # before Linux 5.14 it has no number of its own, and its inode's may be given again
    number = str(cookie) if cookie >= 0 else f"inode {_NAMESPACE.stat().st_ino}"
    return f"{_BOOT_ID.read_text(encoding='ascii').strip()}/{number}"


def ephemeral() -> range:
    """Return the ports of which outgoing connections get theirs."""
    first, last = map(int, _RANGE.read_text(encoding="ascii").split())
    return range(first, last + 1)


def read(setting: Path = SETTING) -> Ports | None:
    """Return what is reserved; None where the kernel does not know how.  Raises OSError."""
    for size in (_USUAL, _MOST):
        try:
            # the kernel cuts off what the buffer cannot take, and gives nothing to who asks for the rest
            with setting.open("rb", buffering=0) as file:
                content = file.read(size) or b""
        except FileNotFoundError:
            return None
        if len(content) < size - _LONGEST:
            break
    return parse(content.decode("ascii"))


def observe(record: Record | None, setting: Path = SETTING) -> Reserved | None:
    """Tell ours from others'; None where the kernel has no such setting.  Raises OSError."""
    ports = read(setting)
    if ports is None:
        return None
    if record is None:
        return Reserved(NONE, ports)
    ours = _ours(ports, record) if record.place == here() else NONE
    return Reserved(ours, ports - ours, bool(ours) and record.settled and record.ports == ours)


def _ours(ports: Ports, record: Record) -> Ports:
    """Return those of the record that are surely ours.

    When one of them is missing, somebody else has written the whole list since, and all that is there is by his wish.
    """
    if record.settled and not record.ports <= ports:
        return NONE
    return record.ports & ports


def apply(
    wanted: Ports,
    record: Record | None,
    save: Callable[[Record | None], None],
    setting: Path = SETTING,
) -> None:
    """Reserve the wanted ports, and let go of all others of ours; without the setting, only of the record.

    ``save`` keeps a record for good, in one step (None: there is none any more).  Raises NetplanError
    ``network.sysctl``, OSError, and what ``save`` raises.
    """
    found = observe(record, setting)
    if found is None:
        save(None)
        return
    ours = wanted - found.others
    if found.ours != ours:
        save(Record(here(), found.ours | ours, settled=False))
        with _explaining(setting):
            if new := ours - found.ours:
                _add(setting, new)
            if found.ours - ours:
                # as late as can be: what somebody adds between this reading and the writing is lost
                _replace(setting, (read(setting) or NONE) - found.ours - ours, ours)
    save(Record(here(), ours, settled=True) if ours else None)


@contextmanager
def _explaining(setting: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NetplanError(
            "network.sysctl",
            f"cannot write {setting}: {error.strerror}",
            resource="ports/reserved",
            hint="is /proc/sys read-only, as in a container?",
        ) from error


def _add(setting: Path, ports: Ports) -> None:
    with setting.open("r+b", buffering=0) as file:
        for piece in _pieces(ports):
            file.seek(1)
            file.write(piece)


def _replace(setting: Path, others: Ports, ours: Ports) -> None:
    """Write all in one go where it fits into a page; else what others have comes first."""
    pieces = _pieces(others | ours)
    if len(pieces) > 1:
        pieces = [*_pieces(others), *_pieces(ours)]
    with setting.open("r+b", buffering=0) as file:
        for piece in pieces or [b"\n"]:
            file.write(piece)  # all but the first are behind the beginning


def _pieces(ports: Collection[int]) -> list[bytes]:
    """Write ports as lists that the kernel takes at once."""
    pieces = [""]
    for one in _ranges(ports):
        if len(pieces[-1]) > _PIECE:
            pieces.append("")
        pieces[-1] += f",{one}" if pieces[-1] else one
    return [piece.encode() + b"\n" for piece in pieces if piece]
