"""Host blocks: what one node of the mesh tells another of itself, read, judged and written.

The text is the export format of tinc 1.1 (``Name = x``, then the host file) or a host file of tinc 1.0 as it is. What comes
from another machine is data: of its variables only those that say who and where a node is are taken over, each as a value
that was checked, and all that tincd reads is rendered anew from these. So nothing in it can run or open anything
(``PublicKeyFile``), change how we run, or become a path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netplan import tinc_keys
from netplan.errors import NetplanError
from netplan.tinc_syntax import CIPHERS, DIGESTS, NAME, is_host

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOST_BLOCK = 16 * 1024
"""Bytes of one block."""
MOST_INPUT = 4 * 1024 * 1024
"""Bytes of one import."""
_MOST_VALUES = 32  # addresses, or subnets, of one node
_LONGEST_SHOWN = 60
_LINE = re.compile(r"([A-Za-z0-9]+)(?:[\t ]*=[\t ]*|[\t ]+)(\S.*)")
_AGAIN = "export the block anew on that node: partitiond mesh export"
# what is told when it is passed over would be told of every node of tinc 1.1
_SILENT = frozenset(("ed25519publickey", "maclength", "compression", "pmtu", "pmtudiscovery", "clampmss"))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a node can be reached: an address or a host's name; ``port`` None is the node's own."""

    host: str
    port: int | None = None

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host} {self.port}"


@dataclass(frozen=True, slots=True)
class HostBlock:
    """A node of the mesh as the others know it. ``key`` is a PEM (``RSA PUBLIC KEY``).

    ``cipher`` and ``digest`` are how it wants to be sent to, which nodes tell each other again when they talk.

    ``passed_over`` are variables that stood there and are not taken over.
    """

    name: str
    key: str
    subnets: tuple[ipaddress.IPv4Network, ...]
    addresses: tuple[Endpoint, ...] = ()
    port: int = 655
    cipher: str | None = None
    digest: str | None = None
    passed_over: tuple[str, ...] = field(default=(), compare=False)

    @property
    def resource(self) -> str:
        """What errors about it name."""
        return f"mesh/{self.name}"

    @property
    def node_address(self) -> ipaddress.IPv4Address:
        """The node's own address, as partitiond deals them out: the first of its range behind that of the network."""
        first = self.subnets[0]
        return first[1] if first.num_addresses > 1 else first[0]


def render(block: HostBlock, *, named: bool = False) -> str:
    """The text of a host file; ``named``: as a block to hand to others."""
    lines = [f"Name = {block.name}"] if named else []
    lines += [f"Address = {one}" for one in block.addresses]
    lines.append(f"Port = {block.port}")
    lines += [f"Subnet = {one}" for one in block.subnets]
    lines += [f"Cipher = {block.cipher}"] if block.cipher else []
    lines += [f"Digest = {block.digest}"] if block.digest else []
    return "\n".join(lines) + f"\n{block.key}"


# --- reading ------------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """A text of somebody else's, short enough for a message and without anything that steers a terminal."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= _LONGEST_SHOWN else plain[:_LONGEST_SHOWN] + "…"


@dataclass(frozen=True, slots=True)
class _Item:
    """A variable with its value, or (no ``variable``) a key with its armour; ``line`` is where it begins, ``size`` in bytes."""

    line: int
    variable: str
    value: str
    size: int


def parse(content: bytes, *, file_name: str = "") -> tuple[HostBlock, ...]:
    """Read blocks that each begin with ``Name``; what stands before the first one is the host file of ``file_name``.

    Raises NetplanError ``mesh.name``, ``mesh.block``, ``mesh.key``, ``mesh.range``: of the first thing that is wrong.
    """
    if len(content) > MOST_INPUT:
        raise _bad("mesh", f"has more than {MOST_INPUT >> 20} MiB")
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _bad("mesh", f"line {line}: is no plain text") from error
    drafts: list[tuple[str, list[_Item]]] = []
    for item in _items(text):
        if item.variable.lower() == "name":
            if drafts and not drafts[-1][1]:
                raise _bad_name(drafts[-1][0], f"line {item.line}: two names for one block")
            drafts.append((item.value, []))
            continue
        if not drafts:
            if not file_name:
                raise _bad_name("", f"line {item.line}: no Name stands before it")
            drafts.append((file_name, []))
        drafts[-1][1].append(item)
    if not drafts:
        raise _bad("mesh", "holds no host block")
    return tuple(_block(name, items) for name, items in drafts)


def _items(text: str) -> Iterator[_Item]:
    """Cut a text into variables and keys; comments and empty lines count for none."""
    armour: list[str] = []
    begun = 0
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.removesuffix("\r").rstrip("\t ")
        if not line.replace("\t", " ").isprintable():
            raise _bad("mesh", f"line {number}: has a control character")
        if armour:
            armour.append(line)
            if line.startswith("-----END "):
                pem = "\n".join(armour) + "\n"
                yield _Item(begun, "", pem, len(pem))
                armour = []
        elif line.startswith("-----BEGIN "):
            armour, begun = [line], number
        elif line and not line.startswith("#"):
            found = _LINE.fullmatch(line)
            if found is None:
                raise _bad("mesh", f"line {number}: is no variable with a value: {shown(line)}")
            yield _Item(number, found[1], found[2], len(raw) + 1)
    if armour:
        raise _bad("mesh", f"line {begun}: a key begins there and does not end")


def _block(name: str, items: list[_Item]) -> HostBlock:
    if not NAME.fullmatch(name):
        raise _bad_name(name, "is no name of a node")
    resource = f"mesh/{name}"
    if sum(item.size for item in items) > MOST_BLOCK:
        raise _bad(resource, f"has more than {MOST_BLOCK >> 10} KiB")
    by_name: dict[str, list[_Item]] = {}
    for item in items:
        by_name.setdefault(item.variable.lower(), []).append(item)
    key = _key(resource, by_name)
    ports = [_port(resource, item, item.value) for item in by_name.pop("port", ())]
    if len(ports) > 1:
        raise _bad(resource, "names more than one port")
    addresses = [_address(resource, item) for item in by_name.pop("address", ())]
    subnets = [_subnet(resource, item) for item in by_name.pop("subnet", ())]
    if not subnets:
        raise _bad_range(resource, "names no range (Subnet)")
    if len(addresses) > _MOST_VALUES or len(subnets) > _MOST_VALUES:
        raise _bad(resource, f"names more than {_MOST_VALUES} addresses or ranges")
    for number, one in enumerate(subnets):
        if any(one.overlaps(other) for other in subnets[:number]):
            raise _bad_range(resource, f"names {one} twice")
    return HostBlock(
        name=name,
        key=key,
        subnets=tuple(subnets),
        addresses=tuple(dict.fromkeys(addresses)),
        port=ports[0] if ports else 655,
        cipher=_algorithm(resource, by_name.pop("cipher", []), CIPHERS),
        digest=_algorithm(resource, by_name.pop("digest", []), DIGESTS),
        passed_over=tuple(found[0].variable for low, found in by_name.items() if low not in _SILENT),
    )


def _key(resource: str, by_name: dict[str, list[_Item]]) -> str:
    for name in ("publickey", "publickeyfile"):
        if name in by_name:
            item = by_name[name][0]
            words = f"line {item.line}: {item.variable} is not taken over: the key has to stand in the block"
            raise tinc_keys.refused(words, resource)
    pems = by_name.pop("", [])
    if not pems:
        raise tinc_keys.refused("has no public key", resource)
    for one in pems:
        if "PRIVATE KEY" in one.value:
            words = f"line {one.line}: holds a private key, which is no secret any more"
            hint = "make another key on that node (remove rsa_key.priv, partitiond apply), and export anew"
            raise tinc_keys.refused(words, resource, hint)
    if len(pems) > 1:
        raise tinc_keys.refused(f"line {pems[1].line}: has more than one key", resource)
    return tinc_keys.read_public(pems[0].value, resource)


def _port(resource: str, item: _Item, text: str) -> int:
    if not (text.isdigit() and len(text) <= 5 and 0 < int(text) < 1 << 16):
        raise _bad(resource, f"line {item.line}: {shown(text)} is no port, which is a number from 1 to 65535")
    return int(text)


def _address(resource: str, item: _Item) -> Endpoint:
    host, _, port = item.value.replace("\t", " ").partition(" ")
    if not is_host(host):
        raise _bad(
            resource, f"line {item.line}: {shown(item.value)} is neither an address nor the name of a host"
        )
    return Endpoint(host, _port(resource, item, port.strip()) if port.strip() else None)


def _subnet(resource: str, item: _Item) -> ipaddress.IPv4Network:
    """Read ``10.64.2.0/23#10``; the weight is not taken over, as ranges overlap nowhere."""
    text = item.value.partition("#")[0].strip()
    where = f"line {item.line}: {shown(text)}"
    try:
        found = ipaddress.ip_network(text)
    except ValueError as error:
        raise _bad_range(resource, f"{where} is no IPv4 network: {shown(str(error))}") from error
    if not isinstance(found, ipaddress.IPv4Network):
        raise _bad_range(resource, f"{where}: the mesh has IPv4 only")
    return found


def _algorithm(resource: str, items: list[_Item], known: tuple[str, ...]) -> str | None:
    """One that we may use ourselves; another one is the node's own affair, but none at all is everybody's."""
    for item in items:
        if item.value.lower() == "none":
            raise _bad(
                resource, f"line {item.line}: {item.variable} is none: all would be sent to it in the clear"
            )
    found = items[-1].value.lower() if items else ""
    return found if found in known else None


# --- judging ------------------------------------------------------------------------------------------------------------


def judge(
    block: HostBlock, *, own: HostBlock, network: ipaddress.IPv4Network, others: Iterable[HostBlock]
) -> None:
    """Whether a peer may join: ``own`` is this node, ``network`` the whole mesh, ``others`` are the peers that are known.

    One of the block's own name among them is passed over. Raises NetplanError ``mesh.name``, ``mesh.range``, ``mesh.clash``.
    """
    if block.name == own.name:
        raise NetplanError(
            "mesh.name",
            "is the name of this node, and the block is another's",
            resource=block.resource,
            hint="give one of the two another name in [tinc]",
        )
    for subnet in block.subnets:
        if not subnet.subnet_of(network):
            raise _bad_range(block.resource, f"{subnet} is no part of the mesh, which is {network}")
    for other in (own, *others):
        if other is not own and other.name == block.name:
            continue
        whose = "this node" if other is own else other.name
        if other.key == block.key:
            raise _clash(
                block, f"has the key of {whose}", "each node makes a key of its own: remove the copied one"
            )
        for subnet in block.subnets:
            taken = next((one for one in other.subnets if one.overlaps(subnet)), None)
            if taken is not None:
                hint = "give each node a range of its own in [tinc]; partitiond mesh remove takes a peer that is gone away"
                raise _clash(block, f"{subnet} overlaps {taken}, which is that of {whose}", hint)


def _clash(block: HostBlock, message: str, hint: str) -> NetplanError:
    return NetplanError("mesh.clash", message, resource=block.resource, hint=hint)


def _bad(resource: str, message: str) -> NetplanError:
    return NetplanError("mesh.block", message, resource=resource, hint=_AGAIN)


def _bad_range(resource: str, message: str) -> NetplanError:
    return NetplanError(
        "mesh.range",
        message,
        resource=resource,
        hint="set network and range in [tinc] there, then export anew",
    )


def _bad_name(name: str, message: str) -> NetplanError:
    about = f"mesh/{shown(name)}" if name else "mesh"
    hint = "a name has letters, digits and _, at most 60; a block begins with Name = …"
    return NetplanError("mesh.name", message, resource=about, hint=hint)
