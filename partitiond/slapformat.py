"""What slapos.core chose for this node: its ``computer_xml``, or the JSON beside it, read once and strictly.

slapformat draws private IPv4 addresses by lot, and also an IPv6 where the natural one was taken or still tentative
(4.6 % of partitions, measured), and remembers them in these files alone. A node that switches keeps them; a file that
is there but cannot be read stops everything, for without it every service would be renumbered.

The XML is the master copy, it is what slapformat reads; of both it writes the JSON first, neither of them atomically.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import files
from partitiond.errors import PartitiondError
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from partitiond.config import Config

DEFAULT_XML = Path("/opt/slapos/slapos.xml")
"""Where the example configuration of slapos.core has it; the program itself has no default."""

# of 10 000 partitions, the most that a configuration may have, slapformat writes 29 MB
_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FormattedTap:
    """A tap: its name, the host's end with the network that is routed to the guest, and the guest's IPv4."""

    name: str
    ipv6: IPv6Interface | None = None
    ipv4: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class FormattedTun:
    """A tun: its name and the host's addresses on it."""

    name: str
    ipv6: IPv6Interface | None = None
    ipv4: IPv4Interface | None = None


@dataclass(frozen=True, slots=True)
class FormattedPartition:
    """What slapformat gave to a partition; ``user`` None: root."""

    reference: str
    user: str | None = None
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    ipv6_range: IPv6Network | None = None
    tap: FormattedTap | None = None
    tun: FormattedTun | None = None


@dataclass(frozen=True, slots=True)
class FormattedNode:
    """A node as slapformat left it: the file that says so, the address of the node's own that it chose (or one of a
    partition's in the same network), the partitions by index.
    """

    file: Path
    base: IPv6Interface | None
    instance_root: Path | None
    partitions: tuple[FormattedPartition, ...]
    warnings: tuple[str, ...] = ()


class Copies:
    """The files of a configuration, read again when one of them is another."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._paths = [config.computer_xml or DEFAULT_XML]
        if config.computer_json is not None:
            self._paths.append(config.computer_json)
        self._marks: list[object] = []
        self._found: FormattedNode | None = None

    def read(self) -> FormattedNode | None:
        """Like :func:`read`; the same object as long as the files are the same."""
        marks = [_mark(path) for path in self._paths]
        if marks != self._marks:
            self._found = read(self._config)
            self._marks = marks
        return self._found


def _mark(path: Path) -> object:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read(config: Config) -> FormattedNode | None:
    """Return what slapos.core left, or None where it was never here.

    Raises PartitiondError ``slapformat.unreadable`` when neither file can be used, ``slapformat.other_node`` when it is
    that of a node with other roots, ``slapformat.other_names`` when it gave names that the configuration does not.
    """
    copies: list[tuple[Path | None, Callable[[bytes], object]]] = [
        (config.computer_xml or DEFAULT_XML, _unmarshalled),
        (config.computer_json, json.loads),
    ]
    trouble: PartitiondError | None = None
    for path, decode in copies:
        if path is None:
            continue
        try:
            found = _load(path, decode, () if trouble is None else (f"{trouble.resource}: {trouble}",))
        except FileNotFoundError:
            continue
        except PartitiondError as error:
            trouble = trouble or error
            continue
        return _checked(config, found)
    if trouble is not None:
        raise trouble
    return None


def _unmarshalled(content: bytes) -> object:
    from slap_client import marshal  # noqa: PLC0415 - a node that never was slapos.core's needs no XML

    return marshal.loads(content)


def _load(path: Path, decode: Callable[[bytes], object], before: tuple[str, ...]) -> FormattedNode:
    """Read one copy. Raises FileNotFoundError, or PartitiondError ``slapformat.unreadable``."""
    try:
        node = _node(decode(_content(path)), path)
    except FileNotFoundError:
        raise
    # RecursionError: JSON of a thousand brackets
    except (PartitiondError, SlapError, OSError, ValueError, RecursionError) as error:
        raise PartitiondError(
            "slapformat.unreadable",
            f"says which addresses slapos.core gave to the partitions, but cannot be read: {error}",
            resource=str(path),
            hint=f"repair it (slapos.core keeps older copies in {path.name}.zip, if it is the XML), or move it away: then all "
            "addresses are derived anew, and services that know the old ones must be told",
        ) from error
    warnings = tuple(f"{one}; {path} is used instead" for one in before)
    return FormattedNode(path, node.base, node.instance_root, node.partitions, warnings)


def _content(path: Path) -> bytes:
    """The bytes of a file that root alone can have written."""
    with files.directory(path.parent) as descriptor:
        return files.read(path.name, dir_fd=descriptor, limit=_LIMIT, owners=frozenset((0,)))


def _checked(config: Config, node: FormattedNode) -> FormattedNode | None:
    """Hold the names against those of the configuration: slapformat goes on with the old ones, we have one source."""
    if node.instance_root is not None and node.instance_root != config.instance_root:
        if config.computer_xml is None and node.file == DEFAULT_XML:
            return None  # nobody said that it is this node's
        raise PartitiondError(
            "slapformat.other_node",
            f"describes a node in {node.instance_root}, not in {config.instance_root}",
            resource=str(node.file),
            hint=f"set instance_root = {node.instance_root} as slapos.core goes on to use it, or name another computer_xml",
        )
    for index, partition in enumerate(node.partitions[: config.partition_amount]):
        names = [("partition_base_name", config.partition_base, partition.reference)]
        if partition.user is not None:
            names.append(("user_base_name", config.user_base, partition.user))
        if partition.tap is not None and config.create_tap:
            names.append(("tap_base_name", config.tap_base, partition.tap.name))
        for key, base, name in names:
            if name != f"{base}{index}":
                raise PartitiondError(
                    "slapformat.other_names",
                    f"calls {name} what {key} = {base} calls {base}{index}",
                    resource=str(node.file),
                    hint=f"set {key} in [slapformat] so that number {index} is {name}",
                )
    return node


# --- decoding -----------------------------------------------------------------------------------------------------------


class _UnfitError(ValueError):
    """What is wrong with a document, and where."""


def _node(value: object, path: Path) -> FormattedNode:
    node = _mapping(value, "the document")
    partitions = tuple(
        _partition(_mapping(one, f"partition {index}"), f"partition {index}: ")
        for index, one in enumerate(_list(node.get("partition_list"), "partition_list"))
    )
    if len({one.reference for one in partitions}) < len(partitions):
        raise _UnfitError("two partitions have one reference")
    address, root = _text(node, "address", ""), _text(node, "instance_root", "")
    return FormattedNode(
        file=path,
        base=_interface6(node, "address", "netmask", "") if address else None,
        instance_root=Path(root) if root else None,
        partitions=partitions,
    )


def _partition(value: Mapping[str, Any], where: str) -> FormattedPartition:
    reference = _text(value, "reference", where)
    if reference is None:
        raise _UnfitError(f"{where}no reference")
    where = f"{reference}: "
    ipv4, ipv6 = _addresses(_list(value.get("address_list"), f"{where}address_list"), where)
    user = _mapping(value.get("user") or {}, f"{where}user")
    tap, tun = (_mapping(value.get(key) or {}, where + key) for key in ("tap", "tun"))
    ranged = _mapping(value.get("ipv6_range") or {}, f"{where}ipv6_range")
    return FormattedPartition(
        reference=reference,
        user=_text(user, "name", f"{where}user "),
        ipv4=ipv4,
        ipv6=ipv6,
        ipv6_range=_interface6(ranged, "addr", "netmask", f"{where}ipv6_range ").network if ranged else None,
        tap=_tap(tap, f"{where}tap ") if tap else None,
        tun=_tun(tun, f"{where}tun ") if tun else None,
    )


def _addresses(found: list[Any], where: str) -> tuple[IPv4Address | None, IPv6Address | None]:
    """The private IPv4 and the IPv6: one of each, or none at all where slapformat was told to leave the network alone."""
    texts = [_text(_mapping(one, f"{where}address_list"), "addr", where) or "" for one in found]
    ipv6 = [_parsed(IPv6Address, text, where) for text in texts if ":" in text]
    ipv4 = [_parsed(IPv4Address, text, where) for text in texts if ":" not in text]
    if not found:
        return None, None
    if (len(ipv4), len(ipv6)) != (1, 1):
        raise _UnfitError(f"{where}{len(ipv4)} IPv4 and {len(ipv6)} IPv6 addresses, not one of each")
    return ipv4[0], ipv6[0]


def _tap(value: Mapping[str, Any], where: str) -> FormattedTap:
    ipv6 = None
    if _text(value, "ipv6_addr", where):
        ipv6 = _interface6(value, "ipv6_addr", "ipv6_netmask", where)
        # What is routed to the guest has 16 bits more than the node's network whatever ipv6_prefixshift is: with
        # another shift not the tap's whole range, and the guest is the first of that.
        routed = _text(value, "ipv6_network", where)
        if routed:
            ipv6 = IPv6Interface((int(ipv6.ip), _parsed(IPv6Interface, routed, where).network.prefixlen))
    ipv4 = _text(value, "ipv4_addr", where)
    return FormattedTap(_name(value, where), ipv6, _parsed(IPv4Address, ipv4, where) if ipv4 else None)


def _tun(value: Mapping[str, Any], where: str) -> FormattedTun:
    ipv6 = (
        _interface6(value, "ipv6_addr", "ipv6_netmask", where) if _text(value, "ipv6_addr", where) else None
    )
    ipv4 = None
    if address := _text(value, "ipv4_addr", where):
        ipv4 = _parsed(IPv4Interface, f"{address}/{_text(value, 'ipv4_netmask', where)}", where)
    return FormattedTun(_name(value, where), ipv6, ipv4)


def _interface6(value: Mapping[str, Any], address: str, netmask: str, where: str) -> IPv6Interface:
    """An address and its netmask, which is written as an address: ``ffff:ffff::``, by some versions with ``/32`` behind."""
    mask, _, length = (_text(value, netmask, where) or "").partition("/")
    number = int(_parsed(IPv6Address, mask, f"{where}{netmask} "))
    zeros = number ^ ((1 << 128) - 1)
    prefixlen = 128 - zeros.bit_length()
    if zeros & (zeros + 1) or (length and length != str(prefixlen)):
        raise _UnfitError(f"{where}{netmask} {mask!r} is no netmask")
    ip = _parsed(IPv6Address, _text(value, address, where) or "", f"{where}{address} ")
    return IPv6Interface((int(ip), prefixlen))


def _name(value: Mapping[str, Any], where: str) -> str:
    name = _text(value, "name", where)
    if name is None:
        raise _UnfitError(f"{where}has no name")
    return name


def _parsed(kind: Callable[[str], Any], text: str, where: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise _UnfitError(f"{where}{error}") from error


def _text(value: Mapping[str, Any], key: str, where: str) -> str | None:
    """A text; None where there is none, also as slapformat writes that: empty."""
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise _UnfitError(f"{where}{key} is {found!r}, not a text")
    return found or None


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _UnfitError(f"{what} is no dictionary")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _UnfitError(f"{what} is no list")
    return value
