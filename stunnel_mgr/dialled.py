"""Which connections a user has made to a place: the proof that a stunnel takes what it accepts any further.

The kernel accepts connections for a program that hangs, so to be let in by a local listener proves nothing.
"""

import struct
from pathlib import Path

from .errors import TunnelError
from .model import Endpoint

PROC_NET = Path("/proc/net")
_ESTABLISHED = "01"  # enum in include/net/tcp_states.h


def connections(endpoint: Endpoint, uid: int, *, proc_net: Path = PROC_NET) -> frozenset[str]:
    """The established connections of user ``uid`` to ``endpoint``, each by the number of its socket.

    Raises TunnelError ``tunnel.observe``.
    """
    path = proc_net / ("tcp6" if endpoint[0].version == 6 else "tcp")
    remote = _kernel_text(endpoint)
    found = set()
    try:
        with path.open(encoding="ascii", errors="replace") as table:
            for line in table:
                # Documentation/networking/proc_net_tcp.rst: sl, local, remote, state, …, uid, timeout, inode
                fields = line.split(None, 10)
                if len(fields) > 9 and fields[2:4] == [remote, _ESTABLISHED] and fields[7] == str(uid):
                    found.add(fields[9])
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}"
        raise TunnelError("tunnel.observe", message, resource=str(path), retryable=True) from error
    return frozenset(found)


def _kernel_text(endpoint: Endpoint) -> str:
    """Write an endpoint as the tables do: 32-bit words in the machine's own byte order, then the port, in hex."""
    host, port = endpoint
    words = struct.unpack(f"={len(host.packed) // 4}I", host.packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
