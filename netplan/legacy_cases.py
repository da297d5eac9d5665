"""What the packet filter of legacy hosts cannot hold, by name: for ``status``, the documents and the tests.

``tests/netplan/test_netplan_legacy_cases.py`` has a proof for each, so the list neither lacks nor overstates.
"""

from collections.abc import Mapping

OPEN_CASES: Mapping[str, str] = {
    "tap-guard": "what guests send through taps and tuns is not filtered: no rule of iptables sees the frames of a bridge",
    "late-notice": "the kernel tells nobody of changed rules: a flush, or a rule more or less, is noticed within a second"
    " and not at once, what leaves their number and size as they were within a minute; until then it is in force",
    "rules-before-ours": "a rule that somebody puts before ours and that accepts goes past ownership and meters until"
    " the next look",
    "metered-then-dropped": "what a rule of the node's own drops behind ours is metered all the same",
    "refusals-of-others": "what is refused to users who are no partition's is not counted",
    "own-address-in": "what partitions receive at the node's own addresses is metered by the programs at the cgroup alone:"
    " on input iptables knows of no owner",
    "quota-limit": "who has used up a quota is not limited, whatever [quota] says: limit acts as warn",
    "two-commits": "IPv6 and IPv4 change one after the other, not at once",
    "unlocked-writer": "a program that changes rules without the lock of iptables takes back what we change meanwhile,"
    " where the number of rules stays the same",
    "scattered-addresses": "the cost of a packet grows with the number of partitions where their addresses are not"
    " neighbours",
}
