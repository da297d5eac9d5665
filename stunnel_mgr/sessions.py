"""Which tunnels listen, and how many sessions go through each, from the kernel's own table of TCP sockets.

``/proc/net/tcp`` and ``tcp6`` are read once for all tunnels of the node
(Documentation/networking/proc_net_tcp.rst). They show the network namespace of the process's first thread.
"""

import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import TunnelError
from .model import Endpoint, IPAddress

PROC_NET = Path("/proc/net")
_ESTABLISHED = "01"  # enum in include/net/tcp_states.h
_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class TunnelSockets:
    """Of the endpoints asked for: the users (uid) that listen there, where somebody does, and the established
    sessions at each (0 included).
    """

    owners: Mapping[Endpoint, frozenset[int]]
    sessions: Mapping[Endpoint, int]

    @property
    def listening(self) -> frozenset[Endpoint]:
        """The endpoints that somebody listens on."""
        return frozenset(self.owners)


def observe_sockets(endpoints: Collection[Endpoint], *, proc_net: Path = PROC_NET) -> TunnelSockets:
    """Look at all ``endpoints`` (``Tunnel.listen``) at once. Raises TunnelError ``tunnel.observe``.

    A listener on *all* addresses is not counted: stunnel is given one address, so such a listener is somebody
    else.
    """
    wanted = {_kernel_text(endpoint): endpoint for endpoint in endpoints}
    owners: dict[Endpoint, frozenset[int]] = {}
    sessions = Counter[Endpoint]()
    for local, state, uid in _sockets(proc_net) if wanted else ():
        if endpoint := wanted.get(local):
            if state == _LISTEN:
                owners[endpoint] = owners.get(endpoint, frozenset()) | {uid}
            elif state == _ESTABLISHED:
                sessions[endpoint] += 1
    return TunnelSockets(owners, {endpoint: sessions[endpoint] for endpoint in endpoints})


def count_sessions(endpoints: Collection[Endpoint], *, proc_net: Path = PROC_NET) -> Mapping[Endpoint, int]:
    """Count the established sessions at each endpoint; those without any are there with 0."""
    return observe_sockets(endpoints, proc_net=proc_net).sessions


def listening(endpoints: Collection[Endpoint], *, proc_net: Path = PROC_NET) -> frozenset[Endpoint]:
    """Find the endpoints that somebody listens on."""
    return observe_sockets(endpoints, proc_net=proc_net).listening


def _kernel_text(endpoint: Endpoint) -> str:
    """Write an endpoint as the tables do: 32-bit words in the machine's own byte order, then the port, all in
    hex.
    """
    host, port = endpoint
    return f"{_words(host)}:{port:04X}"


def _words(host: IPAddress) -> str:
    packed = host.packed
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def _sockets(proc_net: Path) -> Iterator[tuple[str, str, int]]:
    """Give local address, state and user of each socket, as the kernel writes them."""
    for name in ("tcp", "tcp6"):
        path = proc_net / name
        try:
            with path.open(encoding="ascii", errors="replace") as table:
                next(table, None)  # the heading
                for line in table:
                    fields = line.split(None, 8)
                    if len(fields) == 9 and fields[7].isdigit():
                        yield fields[1], fields[3], int(fields[7])
        except FileNotFoundError:
            continue  # a kernel without IPv6
        except OSError as error:
            message = f"{path} cannot be read: {error.strerror}"
            raise TunnelError("tunnel.observe", message, resource=str(path), retryable=True) from error
