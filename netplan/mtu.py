"""How large a frame an interface carries, read and set by ioctl.

Layouts: include/uapi/linux/{if,sockios,if_ether}.h.
"""

import fcntl
import socket
import struct

_SIOCGIFMTU, _SIOCSIFMTU = 0x8921, 0x8922
_REQUEST = struct.Struct("16si20x")  # struct ifreq: name, MTU
_ETH_DATA_LEN = 1500  # the MTU of a new tap


def keep_jumbo(port: str, bridge: str) -> None:
    """Let the bridge send frames as large as its port does; raises OSError.

    By itself a bridge takes the smallest MTU of its ports (net/bridge/br_if.c, br_mtu_auto_adjust), so taps
    would cost a node its jumbo frames.  One that was set stays; setting what it has already does not count,
    so this comes before the port does.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = fcntl.ioctl(sock, _SIOCGIFMTU, _REQUEST.pack(port.encode(), 0))
        _, mtu = _REQUEST.unpack(found)
        if mtu > _ETH_DATA_LEN:
            fcntl.ioctl(sock, _SIOCSIFMTU, _REQUEST.pack(bridge.encode(), mtu))
