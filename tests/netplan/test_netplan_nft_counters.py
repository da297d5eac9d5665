"""Counters of nftables that are not quite like ours."""

from netplan_scene import wanted

from netplan import nfnetlink
from netplan.netlink import NETLINK_NETFILTER, NetlinkSocket
from netplan.nftables import run


def test_a_counter_with_a_comment_is_read_too(node):
    """The comment stands behind the value, where the value stands otherwise."""
    node.converge(wanted(1))
    run('add counter inet partitiond commented { comment "whose?"; packets 5 bytes 7; }\n')
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        found = {one.name: one for one in nfnetlink.counters_of(sock)}
    assert found["commented"] == ("commented", 5, 7)
    assert found["private_in"] == ("private_in", 0, 0)
