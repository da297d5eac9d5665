"""``metrics_listen``: where ``/metrics`` is served by HTTP."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from netplan.model import ClosedPort

if TYPE_CHECKING:
    from partitiond.config_reader import Reader

_DEFAULT = ClosedPort(ipaddress.IPv4Address("127.0.0.1"), 9816)
_SHAPE = re.compile(
    r"(?P<four>[0-9.]+):(?P<port4>[0-9]{1,5})|\[(?P<six>[0-9a-fA-F:.]+)\]:(?P<port6>[0-9]{1,5})"
)
_ALLOWED = "an address of the node and a port such as 127.0.0.1:9816 or [::1]:9816, or empty"


def read(reader: Reader) -> ClosedPort | None:
    """Return the address and port, which partitions' users cannot reach; None: nothing listens."""
    if not reader.parser.has_option("partitiond", "metrics_listen"):
        return _DEFAULT
    value = reader.raw("partitiond", "metrics_listen")
    if not value:
        return None
    found = _SHAPE.fullmatch(value)
    try:
        if found is None:
            raise ValueError
        address = ipaddress.ip_address(found["four"] or found["six"])
        port = int(found["port4"] or found["port6"])
        # what is said of IPv4 in the words of IPv6 would be filtered as IPv6, and come as IPv4
        mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
        if mapped or address.is_multicast or not 0 < port < 65536:
            raise ValueError
    except ValueError:
        reader.bad("partitiond", "metrics_listen", value, _ALLOWED)
        return None
    return ClosedPort(address, port)
