"""What of a change to the rules of iptables can be told without reading them: that their number or size is another.

The kernel tells nobody of such changes.  A glance costs two requests that it answers from what it has at hand
(Linux, net/ipv4/netfilter/ip_tables.c, get_info), so it can be taken each second: a flush, a rule more or less.
"""

from socket import AddressFamily

from netplan.legacy_tables import Size, families, is_there, size
from netplan.relevance import Notice

GLANCE_SECONDS = 1.0
"""How often to look."""


class LegacyMonitor:
    """Glances at the tables of the network namespace of the thread; begins with what is there when it is made."""

    def __init__(self) -> None:
        self._known = _glance()

    def read(self) -> list[Notice]:
        """Return a notice if something has changed since, whoever did it.  Raises ``network.packet_filter``."""
        before, self._known = self._known, _glance()
        return [] if before == self._known else [Notice("filter/iptables", "changed", ours=True)]


def _glance() -> dict[AddressFamily, Size]:
    return {family: size(family) for family in families() if is_there(family)}
