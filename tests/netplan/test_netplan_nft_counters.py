"""Counters of nftables that are not quite like ours."""

import json
import socket
import subprocess

import pytest
from netplan_scene import wanted

from netplan import counters, nfnetlink
from netplan.errors import NetplanError
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


def told_by_nft():
    listing = subprocess.run(
        ["/usr/sbin/nft", "-j", "list", "counters", "table", "inet", "partitiond"],
        check=True,
        capture_output=True,
    )
    found = [one["counter"] for one in json.loads(listing.stdout)["nftables"] if "counter" in one]
    return {one["name"]: (one["packets"], one["bytes"]) for one in found}


def read():
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        return {one.name: (one.packets, one.bytes) for one in nfnetlink.counters_of(sock)}


def test_what_is_known_of_a_dump_goes_with_the_next_change(node):
    """Where the values are is remembered; it must hold whatever happens to the table, also by other hands."""
    node.converge(wanted(20))
    assert read() == told_by_nft()
    for change in (
        "add counter inet partitiond another { packets 1 bytes 2; }",
        'add counter inet partitiond third { comment "long"; packets 3 bytes 4; }',
        "delete counter inet partitiond another",
        # as many bytes in all, another name
        "add counter inet partitiond anothes { packets 8 bytes 9; }",
        "delete counter inet partitiond anothes; add counter inet partitiond anothet { packets 8 bytes 9; }",
        "add table inet somebodys; add counter inet somebodys traffic { packets 5 bytes 5; }",
        "delete table inet somebodys",
    ):
        run(change.replace("; ", "\n") + "\n" if "delete counter" in change else change + "\n")
        assert read() == told_by_nft(), change
        assert read() == told_by_nft(), change
    node.converge(wanted(19))
    assert read() == told_by_nft()


def test_values_of_known_places_are_todays(node):
    node.converge(wanted(2))
    before = counters.read_counters()
    for _ in range(3):
        run("reset counter inet partitiond private_in\n")  # no change of the generation
        run(
            "add counter inet partitiond grows { packets 1 bytes 1; }\n"
            "add chain inet partitiond once { type filter hook output priority 5; }\n"
            "add rule inet partitiond once counter name grows\n"
        )
        first = read()["grows"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.sendto(b"x", ("127.0.0.1", 9))
        second = read()["grows"]
        assert second[0] > first[0]
        assert second[1] > first[1]
        run("delete chain inet partitiond once\ndelete counter inet partitiond grows\n")
    assert counters.read_counters() == before


def test_the_places_are_looked_for_anew_only_when_what_is_there_changes(node):
    node.converge(wanted(3))
    read()
    known = nfnetlink._layout
    with NetlinkSocket(NETLINK_NETFILTER):  # another port, another sequence
        read()
    run("add table inet somebodys\n")  # another generation
    read()
    run("delete table inet somebodys\n")
    read()
    assert nfnetlink._layout is known
    run("add counter inet partitiond one { packets 1 bytes 2; }\n")
    read()
    changed = nfnetlink._layout
    assert changed.keys != known.keys
    run("delete counter inet partitiond one\nadd counter inet partitiond two { packets 3 bytes 4; }\n")
    assert read()["two"] == (3, 4)
    assert nfnetlink._layout.length == changed.length
    assert nfnetlink._layout.keys != changed.keys


def test_a_dump_that_the_kernel_refuses_is_an_error(node):
    with NetlinkSocket(NETLINK_NETFILTER) as sock, pytest.raises(NetplanError) as caught:
        sock.stream(0x0AFF, nfnetlink._GENMSG)
    assert caught.value.code == "network.netlink"


def test_an_empty_dump_ends(node):
    node.converge(wanted(0))
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        keys, values = nfnetlink.counter_values(sock)
        assert len(values) == 2 * len(keys)
        assert sock.stream(nfnetlink._GETOBJ, nfnetlink._GENMSGS["arp"])
