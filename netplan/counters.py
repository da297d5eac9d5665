"""The meters: bytes and packets of every address and tap since their counters were made.

Values only grow and are never reset.  They begin anew when the table was made again or the host was started:
compare values of one ``epoch`` only.  Bytes are IP lengths (of taps: Ethernet frames); an aggregate of
segmentation offload counts one header.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from netplan import legacy_tables, nfnetlink, rtnetlink
from netplan.elements import SIZES
from netplan.errors import NetplanError
from netplan.legacy_filter import read_legacy_counters
from netplan.legacy_rules import REFUSED as LEGACY_REFUSED
from netplan.legacy_rules import SHARED as LEGACY_SHARED
from netplan.mesh_guard import COUNTED as OF_MESH
from netplan.mesh_guard import Verdict, parse
from netplan.metering import DIRECTIONS, SHARED, address_of
from netplan.model import ALIAS_MARK, Backend
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket
from netplan.observe import has_nft
from netplan.rate_limits import COUNTED
from netplan.ruleset import REFUSED

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TRIES = 3


class Traffic(NamedTuple):
    """What one address of a partition carried; ``family`` is ``ipv6``, ``range``, ``ipv4`` (the private
    one), ``public4``, ``vpn4`` or ``routable4``, ``scope`` ``remote`` or ``local``.

    ``in`` is towards the partition.  ``address`` is that of the counters themselves, whatever the partition has by now.  Values
    of one epoch and ``life`` can be compared: counters that went and came again have another.  Both are empty for counters of
    a release that did not name them so, which stay until the next load of the filter.
    """

    partition: str
    family: str
    scope: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int
    address: str
    life: str


class Refused(NamedTuple):
    """Packets of a user (``uid``), or frames of a guest (``tap``), that a rule refused."""

    uid: int | None
    tap: str | None
    rule: str
    packets: int


class Shared(NamedTuple):
    """What a partition's user exchanged with other hosts from the host's own addresses of ``family``."""

    uid: int
    family: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int


@dataclass(frozen=True, slots=True)
class CounterReading:
    """One reading of all counters.  ``epoch`` is empty when there is no packet filter; that of what was refused
    at taps is ``tap_epoch``.  ``mesh`` is what the mesh's own rules dropped, without those that never did.
    """

    epoch: str
    traffic: tuple[Traffic, ...] = ()
    refused: tuple[Refused, ...] = ()
    shared: tuple[Shared, ...] = ()
    tap_epoch: str = ""
    mesh: Mapping[Verdict, int] = field(default_factory=dict)


class TapTraffic(NamedTuple):
    """What went through a tap; ``in`` is towards the guest.  Values of one ``epoch`` can be compared."""

    partition: str
    tap: str
    epoch: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int


def read_counters(backend: Backend = "nftables") -> CounterReading:
    """Read all counters of the packet filter, which is a dump for the named ones and a small one for each set."""
    if backend == "iptables":
        return _legacy_reading()
    with nfnetlink.nft_socket() as sock:
        for _ in range(_TRIES):
            before = _handles(sock)
            if "inet" not in before:
                return CounterReading("")
            keys, values = nfnetlink.counter_values(sock)
            sets = {
                nfnetlink.full_name(family, name): nfnetlink.counted(sock, family, name)
                for family in before
                for name in nfnetlink.dynamic_sets(sock, family)
                if name.startswith((REFUSED, SHARED))
            }
            if _handles(sock) == before:
                boot = _boot_id()
                return CounterReading(
                    f"{boot}/{before['inet']}",
                    _traffic_of(keys, values),
                    (*_refused(sets), *_named_refusals(keys, values)),
                    tuple(_shared(sets)),
                    # where one table of several is made again, frames refused before count once more
                    f"{boot}/" + ".".join(map(str, before.values())),
                    _of_mesh(zip((key.name for key in keys), values[1::2], strict=True)),
                )
    raise NetplanError(
        "network.packet_filter",
        "the packet filter is made anew each time that its counters are read",
        resource="filter/partitiond",
        retryable=True,
    )


def read_in_force(backend: Backend) -> CounterReading:
    """Read all counters of the packet filter that is loaded: where a node is to go over to ``backend``, still the other one."""
    found = read_counters(backend)
    if found.epoch:
        return found
    if backend == "iptables":
        return read_counters("nftables") if has_nft() else found
    return _legacy_reading() if any(map(legacy_tables.is_there, legacy_tables.families())) else found


def _legacy_reading() -> CounterReading:
    """The same of iptables; it has no rules about taps."""
    since, values, lives = read_legacy_counters()
    if not since:
        return CounterReading("")
    refused = []
    shared = []
    traffic = []
    for one in values:
        if one.name.startswith("traffic/"):
            traffic.append(one)
        elif one.packets:  # there is one for each user, but few ever count; others' comments may say anything
            match one.name.split("/"):
                case [kind, rule, uid] if kind == LEGACY_REFUSED and uid.isdecimal():
                    refused.append(Refused(int(uid), None, rule, one.packets))
                case [kind, family, uid] if kind == LEGACY_SHARED and uid.isdecimal():
                    shared.append(Shared(int(uid), family, 0, one.bytes, 0, one.packets))
    told = (
        one._replace(life=lives.get(_of_life(one), one.life)) if one.life else one
        for one in _traffic(traffic)
    )
    return CounterReading(
        f"{_boot_id()}/{since}",
        tuple(told),
        tuple(refused),
        tuple(shared),
        mesh=_of_mesh((one.name, one.packets) for one in values),
    )


def _of_life(one: Traffic) -> str:
    return f"{one.partition}/{one.family}/{one.scope}/{one.address.replace(':', '.')}"


def _handles(sock: NetlinkSocket) -> dict[str, int]:
    found = {family: nfnetlink.table(sock, family) for family in nfnetlink.FAMILIES}
    return {family: info.handle for family, info in found.items() if info is not None}


def _traffic(values: Iterable[nfnetlink.CounterValue]) -> tuple[Traffic, ...]:
    found = tuple(values)
    return _traffic_of(
        tuple(nfnetlink.CounterKey(one.name, 0) for one in found),  # rules have no handles
        tuple(number for one in found for number in (one.bytes, one.packets)),
    )


def _traffic_of(keys: tuple[nfnetlink.CounterKey, ...], values: tuple[int, ...]) -> tuple[Traffic, ...]:
    """Put together what counts for one address; ``values`` has bytes and packets for each of the counters."""
    both = (*values, 0, 0)  # a direction without a counter has none
    return tuple(
        Traffic(partition, family, scope, both[in_], both[out], both[in_ + 1], both[out + 1], address, life)
        for partition, family, scope, address, life, in_, out in _places(keys)
    )


class _Place(NamedTuple):
    """Where among the values those of one address are, in and out."""

    partition: str
    family: str
    scope: str
    address: str
    life: str
    in_: int
    out: int


# the counters of the last reading, which are the same object as long as they are the same, and what follows from them
_placed: tuple[tuple[nfnetlink.CounterKey, ...], tuple[_Place, ...]] = ((), ())


def _places(keys: tuple[nfnetlink.CounterKey, ...]) -> tuple[_Place, ...]:
    global _placed  # noqa: PLW0603 - the last answer; a tuple, replaced whole
    of, places = _placed
    if of is not keys:
        found: dict[tuple[str, ...], dict[str, int]] = {}
        for number, key in enumerate(keys):
            what, *rest = key.name.split("/", 5)  # a range ends with its length
            if what == "traffic" and len(rest) in (4, 5):
                partition, family, scope, direction, *named = rest
                found.setdefault((partition, family, scope, *named), {})[direction] = number
        none = 2 * len(keys)
        places = tuple(
            _Place(
                *(partition, family, scope, address_of(family, "".join(address))),
                ".".join(str(keys[number].handle) for _, number in sorted(ways.items())) if address else "",
                *(2 * ways[way] if way in ways else none for way in DIRECTIONS),
            )
            for (partition, family, scope, *address), ways in found.items()
        )
        _placed = (keys, places)
    return places


def _refused(sets: Mapping[str, Iterable[nfnetlink.Counted]]) -> Iterator[Refused]:
    for full, counted in sets.items():
        _, name = nfnetlink.split_name(full)
        if name.startswith(REFUSED):
            rule = name.removeprefix(REFUSED)
            for key, packets, _ in counted:
                if len(key) == SIZES["uid"]:
                    yield Refused(int.from_bytes(key, sys.byteorder), None, rule, packets)
                else:
                    yield Refused(None, key.rstrip(b"\0").decode(), rule, packets)


# as _placed
_named: tuple[tuple[nfnetlink.CounterKey, ...], tuple[tuple[int, str, int], ...]] = ((), ())


def _named_refusals(keys: tuple[nfnetlink.CounterKey, ...], values: tuple[int, ...]) -> Iterator[Refused]:
    """Read the named counters of what was refused to a user; those that never counted are not told."""
    global _named  # noqa: PLW0603 - as above
    of, places = _named
    if of is not keys:
        split = ((number, key.name.split("/")) for number, key in enumerate(keys))
        places = tuple(
            (int(name[2]), name[1], 2 * number + 1)
            for number, name in split
            if len(name) == 3 and name[0] == COUNTED and name[2].isdecimal()
        )
        _named = (keys, places)
    for user, rule, place in places:
        if values[place]:
            yield Refused(user, None, rule, values[place])


def _of_mesh(counted: Iterable[tuple[str, int]]) -> dict[Verdict, int]:
    found: dict[Verdict, int] = {}
    for name, packets in counted:
        verdict = parse(name) if packets and name.startswith(OF_MESH) else None
        if verdict is not None:
            found[verdict] = packets
    return found


def _shared(sets: Mapping[str, Iterable[nfnetlink.Counted]]) -> Iterator[Shared]:
    found: dict[tuple[int, str], dict[str, nfnetlink.Counted]] = {}
    for name, counted in sets.items():
        if name.startswith(SHARED):
            family, _, direction = name.removeprefix(SHARED).partition("_")
            for one in counted:
                uid = int.from_bytes(one.key, sys.byteorder)
                found.setdefault((uid, family), {})[direction] = one
    nothing = nfnetlink.Counted(b"", 0, 0)
    for (uid, family), ways in sorted(found.items()):
        came, went = (ways.get(direction, nothing) for direction in DIRECTIONS)
        yield Shared(uid, family, came.bytes, went.bytes, came.packets, went.packets)


def read_taps() -> tuple[TapTraffic, ...]:
    """Read the counters of all our taps and tuns in one dump.

    What the guest sends is counted before anything is filtered; what it is sent is counted when it reads it.
    """
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        links = rtnetlink.link_counters(sock)
    boot = _boot_id()
    return tuple(
        TapTraffic(
            link.alias.removeprefix(ALIAS_MARK),
            link.name,
            f"{boot}/{link.ifindex}",  # a tap that was made again has another index
            link.tx_bytes,
            link.rx_bytes,
            link.tx_packets,
            link.rx_packets,
        )
        for link in links
        if link.alias.startswith(ALIAS_MARK) and "/" not in link.alias
    )


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
