"""slapgrid's managers (``manager_list``) and its firewall: what stands in their place here, said to whoever still names them.

Nothing that they ask for is left out silently: some of it is done anyhow, some is the operator's to allow, some has no place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partitiond.config_reader import Reader

KEY = "manager_list"
# by their names in slapos.core 1.26; what needs no word is empty: it is done for every instance
_INSTEAD = {
    "prerm": "",
    "devperm": "block devices are given by [block_devices], to the partitions named there",
    "portredir": "nothing runs as root for a partition: etc/tunnel/*.cfg and [tunnel NAME] forward ports, those"
    " below 1024 are not given",
    "whitelistfirewall": "addresses are their partition's alone (address_ownership); .slapos-whitelist-firewall"
    " is not read, so nothing limits where a partition connects to",
    "cpuset": "no processors are set apart",
}
_FIREWALL = (
    "addresses are their partition's alone (address_ownership, tap_guard); the firewall of firewalld is not touched, so"
    " fw_restricted_access of an instance limits nobody"
)


def warn(reader: Reader) -> None:
    """Say of each manager that is named, and of the firewall, what does its work here or that nothing does."""
    for name in reader.raw("slapos", KEY).replace(",", " ").split():
        instead = _INSTEAD.get(name, "partitiond runs no managers")
        if instead:
            reader.warnings.append(f"{reader.place('slapos', KEY)}: {name} is not run: {instead}")
    if reader.parser.has_section("firewall") and reader.parser.items("firewall"):
        reader.warnings.append(f"{reader.place('firewall', '')}: {_FIREWALL}")
