"""The node that owns nothing of the machine: whoever runs it has its partitions as directories of its own.

That is what ``alter_user = false`` together with ``alter_network = false`` means to slapos.core, whose StandaloneSlapOS (its
tests, those of Software Releases, developers) writes such configurations: addresses are given by a definition file, everything
runs as the calling user. Root is refused: what releases run would be root's.
"""

from __future__ import annotations

import configparser
import os
import pwd
import re
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, IPv6Network, ip_interface
from typing import TYPE_CHECKING

from partitiond import config_reader
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address
    from pathlib import Path

    from partitiond.config_reader import Reader

KEYS = ("alter_user", "alter_network")
_HERE = ("slapformat", "input_definition_file")
_SECTION = re.compile(r"partition_([0-9]{1,5})")
_COMMENT = re.compile(r"\s[;#]")
_BASE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,24}?")


@dataclass(frozen=True, slots=True)
class DefinedPartition:
    """A partition as the definition file has it."""

    id: str
    ipv4: IPv4Address
    ipv6: IPv6Interface | None = None
    ipv6_range: IPv6Network | None = None


@dataclass(frozen=True, slots=True)
class Unmanaged:
    """Whose node it is, and its partitions by index; ``base`` is what their names begin with.

    ``starts_supervisord``: false where somebody else runs the supervisord of the instances.
    """

    user: str
    uid: int
    gid: int
    address: IPv4Interface | IPv6Interface | None
    base: str
    partitions: tuple[DefinedPartition, ...]
    starts_supervisord: bool


def chosen(reader: Reader) -> bool:
    """Whether the configuration is one of these, and who reads it may have such a node."""
    return os.geteuid() != 0 and not any(reader.truth("slapformat", key, True) for key in KEYS)


def read(reader: Reader) -> Unmanaged | None:
    """Read the definition file of such a node; what is wrong in it is the reader's to collect.

    Raises PartitiondError ``node.nameless``, and as :func:`partitiond.config_reader.read` for the definition.
    """
    if not chosen(reader):
        return None
    uid, gid = os.geteuid(), os.getegid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container; builds and supervisord ask for the user by its name
        raise PartitiondError(
            "node.nameless",
            "whose node it is has no name in the user database",
            resource=f"uid {uid}",
            hint="give it a line in /etc/passwd, or the files of libnss-wrapper",
        ) from None
    file = reader.optional_path(*_HERE)
    if file is None:
        reader.bad(*_HERE, "", f"the file of the partitions' addresses: {' and '.join(KEYS)} are false")
    own = str(reader.files[0].absolute())
    if not own.isprintable() or _COMMENT.search(own):
        # it stands in the configuration of supervisord, as the watchdog's to read
        reader.problems.append(f"{own!r}: the file must lie at a path without line breaks, ' ;' and ' #'")
    parser = configparser.ConfigParser(interpolation=None)
    if file is not None:
        config_reader.read(parser, file)
    found = _Definition(reader, parser, user)
    base, partitions = found.partitions()
    address = found.addresses("computer")
    if reader.truth("slapformat", "create_tap", True) or reader.truth("slapformat", "create_tun", False):
        words = f"false, as {' and '.join(KEYS)} are: a tap is root's to make"
        reader.bad("slapformat", "create_tap", reader.raw("slapformat", "create_tap") or "true", words)
    return Unmanaged(
        user=user,
        uid=uid,
        gid=gid,
        address=next(iter(address), None),
        base=base,
        partitions=partitions,
        starts_supervisord=not reader.truth("slapos", "forbid_supervisord_automatic_launch", False),
    )


def directory(instance_root: Path, name: str) -> str:
    """Where such a node has what a managed one has below /var and /run."""
    return f"{instance_root}/var/partitiond/{name}"


class _Definition:
    def __init__(self, reader: Reader, parser: configparser.ConfigParser, user: str) -> None:
        self._reader, self._parser, self._user = reader, parser, user

    def addresses(self, section: str) -> list[IPv4Interface | IPv6Interface]:
        words = "addresses with their netmasks, such as 10.0.0.1/255.255.255.255 2001:db8::1/64"
        value = self._parser.get(section, "address", fallback="")
        try:
            return [_interface(word) for word in value.split()]
        except ValueError:
            self._bad(section, "address", value, words)
            return []

    def partitions(self) -> tuple[str, tuple[DefinedPartition, ...]]:
        sections = sorted(
            (int(match[1]), name) for name in self._parser.sections() if (match := _SECTION.fullmatch(name))
        )
        found: list[DefinedPartition] = []
        bases: set[str] = set()
        for index, (number, section) in enumerate(sections):
            name = self._parser.get(section, "pathname", fallback="")
            base = name.removesuffix(str(index))
            bases.add(base)
            if number != index or base == name or not _BASE.fullmatch(base) or len(bases) > 1:
                words = "the same letters for all partitions, and the number of the section, from 0 on"
                self._bad(section, "pathname", name, words)
            if self._parser.get(section, "user", fallback=self._user) != self._user:
                words = f"{self._user}, who runs this"
                self._bad(section, "user", self._parser.get(section, "user"), words)
            found += self._partition(section, name)
        return (bases or {"slappart"}).pop(), tuple(found)

    def _partition(self, section: str, name: str) -> Iterator[DefinedPartition]:
        addresses = self.addresses(section)
        ipv4 = [one for one in addresses if isinstance(one, IPv4Interface)]
        ipv6 = [one for one in addresses if isinstance(one, IPv6Interface)]
        if len(ipv4) != 1 or len(ipv6) > 1:
            value = self._parser.get(section, "address", fallback="")
            self._bad(section, "address", value, "one IPv4 address, and at most one of IPv6")
            return
        text = self._parser.get(section, "ipv6_range", fallback="")
        try:
            spread = IPv6Network(text, strict=False) if text else None
        except ValueError:
            self._bad(section, "ipv6_range", text, "an IPv6 network")
            return
        yield DefinedPartition(name, ipv4[0].ip, ipv6[0] if ipv6 else None, spread)

    def _bad(self, section: str, key: str, value: str, words: str) -> None:
        file = self._reader.raw(*_HERE)
        self._reader.problems.append(f"{file}: [{section}]: {key} = {value!r}; allowed: {words}")


def _interface(text: str) -> IPv4Interface | IPv6Interface:
    """An address with its netmask; slapformat writes that of IPv6 as an address. Raises ValueError."""
    address, slash, mask = text.partition("/")
    if ":" in mask:
        bits = f"{int(IPv6Address(mask)):0128b}"
        if "01" in bits:
            raise ValueError(mask)
        mask = str(bits.count("1"))
    return ip_interface(f"{address}{slash}{mask}")
