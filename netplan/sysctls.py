"""The few kernel settings that partitions need, each noted in our table with what it was before we came.

All of the network namespace of the thread that reads them (net/sysctl_net.c).
"""

from pathlib import Path
from typing import NamedTuple

from netplan.model import DesiredNetwork
from netplan.netlink import NetlinkSocket
from netplan.nfnetlink import has_counter


class Sysctl(NamedTuple):
    """A setting with two values: ``wanted`` while it is needed, ``other`` what we may find."""

    name: str
    wanted: str
    other: str
    why: str

    @property
    def path(self) -> Path:
        """Where the kernel has it."""
        return Path("/proc/sys", *self.name.split("."))

    @property
    def note(self) -> str:
        """The counter in our table that says that we found ``other``.

        It lives as long as the setting itself, until a reboot.
        """
        return f"{NOTES}{self.name}/{self.other}"


NOTES = "found/"
"""What the name of each note starts with."""

NONLOCAL_BIND = Sysctl(
    "net.ipv6.ip_nonlocal_bind",
    "1",
    "0",
    "partitions have ranges, and without it nobody can bind to their addresses",
)
# With br_netfilter loaded, as container engines do, frames between two ports of a bridge meet the host's own
# IP filters (Documentation/networking/ip-sysctl, bridge-nf-call-*): a policy made for the host would drop what
# guests send.
BRIDGE_FILTERS = tuple(
    Sysctl(
        f"net.bridge.bridge-nf-call-{tool}", "0", "1", "frames of guests would meet the host's own filters"
    )
    for tool in ("iptables", "ip6tables", "arptables")
)
ALL = (NONLOCAL_BIND, *BRIDGE_FILTERS)


def ipv6_switch(link: str) -> Path:
    """Return where the kernel has whether a link is to have no IPv6; it goes with the link, and is not noted."""
    return Path("/proc/sys/net/ipv6/conf", link, "disable_ipv6")


def needed(desired: DesiredNetwork) -> tuple[Sysctl, ...]:
    """Return the settings that a network needs."""
    found: tuple[Sysctl, ...] = ()
    if any(one.ipv6_range for one in desired.partitions):
        found += (NONLOCAL_BIND,)
    if any(one.tap and one.tap.bridge for one in desired.partitions):
        found += BRIDGE_FILTERS
    return found


def read() -> dict[str, str]:
    """Return the values by name; without those that this kernel does not have (no IPv6, no br_netfilter)."""
    found = {}
    for one in ALL:
        try:
            value = one.path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            continue
        # any other number means the same as 1
        found[one.name] = "0" if value == "0" else "1"
    return found


def read_notes(sock: NetlinkSocket) -> frozenset[str]:
    """Return the names of the settings that we changed."""
    return frozenset(one.name for one in ALL if has_counter(sock, one.note))
