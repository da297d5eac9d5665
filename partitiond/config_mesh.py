"""The section ``[tinc]``: the flat IPv4 space that nodes share by a VPN, and this node's part of it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netplan.model import MeshSpec
from netplan.tinc_syntax import CIPHERS, DIGESTS, NAME, is_host

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config_reader import Reader

SECTION = "tinc"
TINCD_USER = "slapmesh"
"""Whose tincd is once it has its sockets and the interface."""

_PRIVILEGED = 1024  # root alone takes a port below (PROT_SOCK, include/net/sock.h)
_KEYS = frozenset(
    "name network range index port cipher digest address connect_to relay interface directory replaces_ipv6".split()
)
_INDEXED = 23  # 509 partitions and the node
_DECIDED = {"auto": None, "yes": True, "no": False}
_INTERFACE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,14}")
_LIST = re.compile(r"[\s,]+")


@dataclass(frozen=True, slots=True)
class MeshKeys:
    """What the operator decides about the mesh.

    ``network`` is the whole space, ``own`` this node's part: its first address is the node's, those from the third on are the
    partitions'. ``addresses`` are where others reach this node ("": what its interface has), ``connect_to`` the peers that it
    connects to by itself (none: all that say where they are). ``directory`` holds the key and the host blocks of peers.
    ``relay``: this node passes on between peers; None: where two of them may need that.
    ``replaces_ipv6``: partitions have no IPv6 and are reached by the mesh; None: where the interface has no global IPv6.
    """

    name: str
    network: ipaddress.IPv4Network
    own: ipaddress.IPv4Network
    interface: str
    directory: Path
    port: int = 655
    cipher: str = CIPHERS[0]
    digest: str = DIGESTS[0]
    addresses: tuple[str, ...] = ()
    connect_to: tuple[str, ...] = ()
    replaces_ipv6: bool | None = None
    relay: bool | None = None

    @property
    def address(self) -> ipaddress.IPv4Address:
        """The node's own address."""
        return self.own.network_address + 1

    def own_interface(self) -> ipaddress.IPv4Interface:
        """The node's own address, in the whole network."""
        return ipaddress.IPv4Interface((int(self.address), self.network.prefixlen))

    def spec(self) -> MeshSpec:
        """What netplan should make."""
        return MeshSpec(self.interface, self.network, self.own, self.address, self.port)


def read(reader: Reader, beside: Path, amount: int) -> MeshKeys | None:
    """Read the section; None where there is no mesh. ``beside`` is the directory of the configuration file.

    What is bad is among the reader's problems afterwards.
    """
    if not reader.parser.has_section(SECTION) or not reader.parser[SECTION]:
        return None
    for key in reader.parser[SECTION]:
        if key not in _KEYS:
            reader.warn_unknown(SECTION, key, _KEYS)
    network = _network(reader)
    if network is None:
        return None
    own = _own(reader, network, amount)
    port = reader.number(SECTION, "port", 655, 1, 65535)
    if port >= _PRIVILEGED:
        words = f"port {port} can be taken by any user of this node, and tincd hears nothing then"
        words += f"; below {_PRIVILEGED} only by root"
        reader.warnings.append(f"{reader.place(SECTION, 'port')}: {words}")
    words = "a name of letters, digits and _, at most 60"
    name = reader.text(SECTION, "name", _name_of(reader.raw("slapos", "computer_id")), NAME, words)
    words = "a name of a network interface, which begins with a letter, at most 15 characters"
    return MeshKeys(
        name=name,
        network=network,
        own=own,
        interface=reader.text(SECTION, "interface", "sltinc", _INTERFACE, words),
        directory=reader.own_path(SECTION, "directory", str(beside / "tinc")),
        port=port,
        cipher=reader.choice(SECTION, "cipher", CIPHERS[0], CIPHERS),
        digest=reader.choice(SECTION, "digest", DIGESTS[0], DIGESTS),
        addresses=_addresses(reader),
        connect_to=_connect_to(reader, name),
        replaces_ipv6=_DECIDED.get(reader.choice(SECTION, "replaces_ipv6", "auto", tuple(_DECIDED))),
        relay=_DECIDED.get(reader.choice(SECTION, "relay", "auto", tuple(_DECIDED))),
    )


def _name_of(computer_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", computer_id)[:60]


def _network(reader: Reader) -> ipaddress.IPv4Network | None:
    words = "the IPv4 network of the whole mesh, such as 10.64.0.0/16"
    value = reader.text(SECTION, "network", None, None, words)
    return _parse(reader, "network", value, words) if value else None


def _parse(reader: Reader, key: str, value: str, words: str) -> ipaddress.IPv4Network | None:
    try:
        found = ipaddress.IPv4Network(value)
    except ValueError:
        found = None
    special = found and any(
        (
            found.is_loopback,
            found.is_link_local,
            found.is_multicast,
            found.is_reserved,
            not found[0].packed[0],
        )
    )
    if found is None or special or not 8 <= found.prefixlen <= 29:
        reader.bad(SECTION, key, value, words)
        return None
    return found


def _own(reader: Reader, network: ipaddress.IPv4Network, amount: int) -> ipaddress.IPv4Network:
    """This node's part; where it is bad, the whole, so that the rest can be looked at."""
    value, index = reader.raw(SECTION, "range"), reader.raw(SECTION, "index")
    words = f"a part of {network} with room for {amount} partitions, such as {_example(network)}"
    if bool(value) == bool(index):
        reader.problems.append(
            f"{reader.place(SECTION, '')}: either range or index says which part of {network} is this node's;"
            f" allowed: range = {_example(network)}, or index = a number"
        )
        return network
    if index:
        if network.prefixlen > _INDEXED:
            reader.bad(SECTION, "index", index, f"range instead: {network} has no part of /{_INDEXED}")
            return network
        last = 2 ** (_INDEXED - network.prefixlen) - 1
        number = min(reader.number(SECTION, "index", None, 0, last), last)
        found = ipaddress.IPv4Network(
            (int(network.network_address) + max(number, 0) * 2 ** (32 - _INDEXED), _INDEXED)
        )
    else:
        given = _parse(reader, "range", value, words)
        if given is None:
            return network
        found = given
        if not found.subnet_of(network):
            reader.bad(SECTION, "range", value, words)
            return network
    if found.num_addresses < amount + 3:
        reader.bad(SECTION, "range" if value else "index", value or index, words)
    return found


def _example(network: ipaddress.IPv4Network) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network((int(network.network_address), max(network.prefixlen, _INDEXED)))


def _addresses(reader: Reader) -> tuple[str, ...]:
    found = tuple(filter(None, _LIST.split(reader.raw(SECTION, "address"))))
    for one in found:
        if not is_host(one):
            reader.bad(SECTION, "address", one, "addresses or names of this host, without ports")
    return found


def _connect_to(reader: Reader, own: str) -> tuple[str, ...]:
    found = tuple(filter(None, _LIST.split(reader.raw(SECTION, "connect_to"))))
    for one in found:
        if not NAME.fullmatch(one) or one == own:
            reader.bad(SECTION, "connect_to", one, "names of other nodes of the mesh")
    return found
