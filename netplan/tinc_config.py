"""What tincd 1.0.36 reads: tinc.conf, host files, and what it is started by; pure.

All of it is rendered from checked values. What tincd takes in when it is told to (SIGHUP) and what only when it starts are told
apart (main_loop in net.c, setup_myself in net_setup.c of 1.0.36): a reload reads tinc.conf for ``ConnectTo`` and the host files
for keys, addresses and ranges; all else, this node's own host file and key included, is read once.

``TunnelServer``: a node tells nobody of anybody else, and passes nobody's requests on (send_everything, add_edge_h, req_key_h).
Without it a node gets the key of a peer by each way that leads there, a third node's among them, and of two the one that
comes last counts: where that is the older one, the pair is silent for a minute, and over TCP for as long as keys last.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netplan import tinc

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from netplan.tinc import HostBlock

TINC_CONF, TINC_UP, START, PID = "tinc.conf", "tinc-up", "start", "tincd.pid"
HOSTS = "hosts"
_HEAD = "# written by partitiond, which writes it anew; hosts come from partitiond mesh import\n"

# each beside its reason, as far as it is not tinc's own default
_OPTIONS = (
    ("Mode", "router"),  # only IPv4 of known ranges passes
    ("DeviceType", "tun"),
    ("AddressFamily", "any"),
    ("StrictSubnets", "yes"),  # what a peer says of ranges is not believed: only host blocks count
    ("Hostnames", "no"),  # no question to a resolver for a line of the log
    ("Broadcast", "no"),
    ("MACLength", "16"),  # 4 by default: one forged packet in 2^32 would pass
    (
        "PingInterval",
        "20",
    ),  # 60: a peer that vanished is noticed in 25 s, and what goes by it takes another way
    ("PingTimeout", "5"),
    (
        "MaxTimeout",
        "30",
    ),  # 900: a node that was cut off would stay so for a quarter of an hour after the cable is back
    (
        "ReplayWindow",
        "64",
    ),  # bytes of one bit a packet, 16: on fast links more than 128 packets overtake each other
    ("PMTUDiscovery", "yes"),
    ("ClampMSS", "yes"),
)


@dataclass(frozen=True, slots=True)
class Mesh:
    """A node of the mesh as tincd is to run it; ``connect_to`` are the peers that it connects to by itself.

    ``relays``: it tells its peers of each other, and passes on for those that have no connection of their own.
    """

    own: HostBlock
    peers: tuple[HostBlock, ...]
    connect_to: tuple[str, ...]
    interface: str
    private_key: Path
    relays: bool = True

    def files(self) -> dict[str, str]:
        """The files below its directory by their paths, but the start, which knows where that is."""
        hosts = {f"{HOSTS}/{one.name}": tinc.render(one) for one in (self.own, *self.peers)}
        return {TINC_CONF: self.tinc_conf(), TINC_UP: _up(), **hosts}

    def tinc_conf(self) -> str:
        """The text of tinc.conf."""
        connect = "".join(f"ConnectTo = {name}\n" for name in self.connect_to)
        return f"{_HEAD}{self._fixed()}{connect}"

    def _fixed(self) -> str:
        own = (
            ("Name", self.own.name),
            ("Interface", self.interface),
            ("PrivateKeyFile", str(self.private_key)),
            ("TunnelServer", "no" if self.relays else "yes"),
        )
        return "".join(f"{name} = {value}\n" for name, value in (*own, *_OPTIONS))

    def fixed_digest(self) -> str:
        """What tells apart configurations for which tincd has to be started anew."""
        return _digest((self._fixed(), tinc.render(self.own)))

    def peers_digest(self) -> str:
        """What tells apart those for which a reload does."""
        return _digest(text for name, text in sorted(self.files().items()) if name != TINC_UP)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _up() -> str:
    """For who runs tincd by hand: the interface, its address and its routes are made by partitiond and stay."""
    return '#!/bin/sh\n# the interface, its addresses and routes are partitiond\'s\nip link set dev "$INTERFACE" up\n'


def start(program: str, directory: Path, user: str, interface: str) -> str:
    """The text of the script that becomes tincd.

    tincd leaves its pid behind when it is killed, or has no right to remove it any more (it is written before the user is
    changed), and would not start where that number is another process's by then (``check_pid`` in pidfile.c): that there is
    one only is supervisord's care. And a tun that is missing would be made by tincd itself, which is not its to make.
    """
    pid = directory / PID
    return (
        "#!/bin/sh\n"
        f"until grep -q '^ *{interface}:' /proc/net/dev; do sleep 0.2; done\n"
        f"rm -f {pid}\n"
        f"exec {program} -D -d1 -c {directory} -U {user} --pidfile={pid}\n"
    )


def connect_to(wanted: Collection[str], peers: Mapping[str, HostBlock]) -> tuple[str, ...]:
    """Whom to connect to: who is ``wanted`` or, where nobody is, all; of these who says where it is."""
    return tuple(
        name for name, one in sorted(peers.items()) if one.addresses and (name in wanted or not wanted)
    )


_VERSIONS = (4, 6)
# behind a router that translates, two such are not on one link just because they look so
_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)


def need_a_relay(peers: Iterable[HostBlock]) -> bool:
    """Whether two of these may be unable to connect to each other, so that somebody has to pass on between them.

    All can where they use one version of IP, and all but one at most are reached by a public address of it. How this node is
    reached does not matter: whom it cannot connect to is passed on by peers, which see the two of them among theirs.
    """
    found = [_reached(one) for one in peers]
    return not any(
        all(version in one for one in found) and sum(not one[version] for one in found) <= 1
        for version in _VERSIONS
    )


def _reached(block: HostBlock) -> dict[int, bool]:
    """Versions of IP that a node uses, and whether it has a public address of each; a host's name may have any."""
    found: dict[int, bool] = {}
    for one in block.addresses:
        try:
            address = ipaddress.ip_address(one.host)
        except ValueError:
            return dict.fromkeys(_VERSIONS, True)
        public = not any(address in network for network in _PRIVATE)
        found[address.version] = found.get(address.version, False) or public
    return found or dict.fromkeys(_VERSIONS, False)
