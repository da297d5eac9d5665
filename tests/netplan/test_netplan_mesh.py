"""The interface of the mesh: made, repaired, taken away, and what is on it."""

import errno
import json
import os
import subprocess
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from mesh_scene import (
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TUN,
    INTERFACE,
    NETWORK,
    NODE4,
    OTHER,
    OWN,
    attach,
    attached,
    mesh,
    meshed,
    vpn,
)
from netplan_scene import HOST4, NEIGHBOUR4, NOTHING, UID, as_user, ask, echoing, send, wanted

from netplan.apply import apply
from netplan.errors import NetplanError
from netplan.model import DesiredNetwork, MeshSpec
from netplan.observe import observe
from netplan.plan import plan

pytestmark = pytest.mark.usefixtures("backend")


def ip(*words):
    line = ["/usr/sbin/ip", *(part for word in words for part in word.split())]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def picture():
    """All that the kernel says of links, addresses, routes and rules."""
    commands = (
        "link show",
        "address show",
        "route show table all",
        "-6 route show table all",
        "rule show",
    )
    return [ip("-o " + one) for one in commands]


def test_the_interface_is_roots_and_has_what_is_of_the_mesh(node):
    operations = node.converge(meshed(2, tap=False))
    assert list(operations)[1:] == [
        f"mesh/{INTERFACE}",
        "address/2001:db8:1::2",
        "address/10.0.0.2",
        "address/2001:db8:1::3",
        "address/10.0.0.3",
        f"address/{NODE4}",
        f"address/{vpn(0)}",
        f"address/{vpn(1)}",
        "route/10.64.0.0/16",
        "unreachable/10.64.0.0/16",
        "route/default",
    ]
    assert operations[f"mesh/{INTERFACE}"].after == "tun of root, without IPv6, for 10.64.0.0/16"
    assert operations[f"mesh/{INTERFACE}"].partition is None
    assert operations["route/10.64.0.0/16"].after == f"10.64.0.0/16 dev {INTERFACE} src {NODE4} metric 112"
    assert operations["unreachable/10.64.0.0/16"].after == "unreachable 10.64.0.0/16 metric 11200"
    (link,) = json.loads(ip("-d -json address show", INTERFACE))
    assert link["linkinfo"]["info_data"]["type"] == "tun"
    assert link["linkinfo"]["info_data"]["user"] == "root"
    assert not link["linkinfo"]["info_data"]["multi_queue"]
    assert (link["ifalias"], "UP" in link["flags"]) == ("partitiond:mesh/", True)
    assert [(one["local"], one["prefixlen"]) for one in link["addr_info"]] == [
        (NODE4, 32),
        (vpn(0), 32),
        (vpn(1), 32),
    ]
    (way,) = json.loads(ip("-json route get 10.64.9.9"))
    assert (way["dev"], way["prefsrc"]) == (INTERFACE, NODE4)


def test_tincd_attaches_and_nobody_else(node):
    node.converge(meshed(1))
    Path("/dev/net/tun").chmod(0o666)
    assert as_user(UID, attach) == "EPERM"
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        attach(IFF_TUN | IFF_MULTI_QUEUE)
    for flags in (IFF_TUN, IFF_TUN | IFF_NO_PI):  # with and without the four bytes before each packet
        os.close(attach(flags))
    with attached():
        assert not node.plan(meshed(1))


def test_it_comes_and_goes_with_the_mesh_and_leaves_nothing(node):
    node.converge(wanted(2, tap=False, local_source_table=True))
    before = picture()
    node.converge(meshed(2, tap=False, local_source_table=True))
    assert picture() != before
    operations = node.converge(wanted(2, tap=False, local_source_table=True))
    assert operations[f"mesh/{INTERFACE}"].action == "remove"
    assert [one.partition("default")[0] for one in picture()] == [
        one.partition("default")[0] for one in before
    ]
    node.converge(NOTHING)


def test_teardown_leaves_the_node_as_it_was(node):
    before = picture()
    node.converge(meshed(2, tap=False, local_source_table=True))
    node.converge(DesiredNetwork())
    assert picture() == before


DAMAGES = {
    "delete": lambda: ip("link delete", INTERFACE),
    "down": lambda: ip("link set", INTERFACE, "down"),
    "alias": lambda: ip("link set", INTERFACE, "alias mine"),
    "address": lambda: ip("address delete", f"{vpn(1)}/32", "dev", INTERFACE),
    "own address": lambda: ip("address delete", f"{NODE4}/32", "dev", INTERFACE),
    "route": lambda: ip("route delete 10.64.0.0/16 metric 112"),
    "unreachable": lambda: ip("route delete unreachable 10.64.0.0/16 metric 11200"),
    "ipv6": lambda: Path(f"/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6").write_text("0"),
    "name": lambda: (ip("link set", INTERFACE, "down"), ip("link set", INTERFACE, "name mine0")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_drift_is_repaired(node, damage):
    desired = meshed(2, local_source_table=True)
    node.converge(desired)
    whole = ip("-o address show", INTERFACE).count("inet ")
    DAMAGES[damage]()
    assert node.converge(desired)
    found = ip("-o address show", INTERFACE)
    assert (found.count("inet "), found.count("inet6")) == (whole, 0)
    assert json.loads(ip("-json route get 10.64.9.9"))[0]["prefsrc"] == NODE4


def test_a_tun_that_was_given_away_is_made_again(node):
    import fcntl

    node.converge(meshed(1))
    with attached() as device:
        fcntl.ioctl(device, 0x400454CC, UID)  # TUNSETOWNER, which needs no privilege
        assert node.plan(meshed(1))[f"mesh/{INTERFACE}"].reason == f"owner is uid {UID}, should be root"
        assert not apply(node.last)
    node.converge(meshed(1))
    assert json.loads(ip("-d -json link show", INTERFACE))[0]["linkinfo"]["info_data"]["user"] == "root"


def test_without_the_interface_nothing_goes_by_the_default_route(node):
    node.converge(meshed(1))
    ip("link delete", INTERFACE)
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
        ip("route get 10.64.9.9")
    assert as_user(UID, lambda: ask("10.64.9.9", 9, 1)) in {"EHOSTUNREACH", "ENETUNREACH"}


@pytest.mark.parametrize(
    "made", [f"link add {INTERFACE} type bridge", f"tuntap add {INTERFACE} mode tap user root"]
)
def test_somebody_elses_link_of_the_name_is_left_alone_and_the_rest_goes_on(node, made):
    ip(made)
    before = ip("-d link show", INTERFACE)
    desired = meshed(2)
    operations = node.plan(desired)
    failures = apply(node.last)
    assert [(one.operation.id, one.error.code) for one in failures] == [
        (f"mesh/{INTERFACE}", "network.name_taken")
    ]
    assert f"ip link delete {INTERFACE}" in failures[0].error.hint
    assert operations["unreachable/10.64.0.0/16"].action == "create"
    assert list(node.plan(desired)) == [f"mesh/{INTERFACE}"]
    assert (ip("-d link show", INTERFACE), ip("-o address show", INTERFACE).count("inet ")) == (before, 0)
    ip("link delete", INTERFACE)
    assert f"address/{vpn(1)}" in node.converge(desired)


def test_a_node_that_is_itself_in_the_network_is_not_cut_off(node):
    """Its rules would drop all that it sends by its own address, to whom it is administered from as well."""
    lan = IPv4Network(f"{HOST4}/16", strict=False)
    own = IPv4Network((int(lan[0]) + (200 << 8), 23))
    usual = wanted(2, tap=False, local_source_table=True)
    partitions = tuple(replace(one, vpn_ipv4=own[2 + one.index]) for one in usual.partitions)
    desired = replace(usual, partitions=partitions, mesh=MeshSpec(INTERFACE, lan, own, own[1]))
    node.plan(desired)
    (failure,) = apply(node.last)
    assert (failure.operation.id, failure.error.code) == (f"mesh/{INTERFACE}", "network.range_taken")
    assert HOST4 in failure.error.message
    assert as_user(UID, lambda: send(None, NEIGHBOUR4)) == "ok"
    assert list(node.plan(desired)) == [f"mesh/{INTERFACE}"]
    assert not node.plan(usual)


def test_an_address_of_the_network_that_comes_later_does_not_end_the_mesh(node):
    desired = meshed(2, tap=False)
    ip(f"address add {OTHER[1]}/24 dev br0")
    assert node.plan(desired)[f"mesh/{INTERFACE}"].error.code == "network.range_taken"
    ip(f"address delete {OTHER[1]}/24 dev br0")
    node.converge(desired)
    ip(f"address add {OTHER[1]}/24 dev br0")
    assert not node.plan(desired)


def test_what_was_cut_off_is_taken_up(node):
    """Whoever dies before the tun is persistent takes it along; afterwards it has its mark, and is not up."""
    desired = meshed(1)
    node.plan(desired)
    whole = list(node.last)
    place = next(number for number, one in enumerate(whole) if one.id == f"mesh/{INTERFACE}")
    apply(whole[:place])
    apply([replace(whole[place], up=False)])
    assert node.plan(desired)[f"mesh/{INTERFACE}"].reason == "is down"
    node.converge(desired)


def test_another_name_moves_everything(node):
    node.converge(meshed(2))
    other = replace(meshed(2), mesh=replace(mesh(), interface="tinc9"))
    node.converge(other)
    assert node.link(INTERFACE) is None
    assert ip("-o address show tinc9").count("inet ") == 3


def test_unbound_clients_on_the_node_reach_its_partitions_from_the_nodes_address(node):
    node.converge(meshed(2, local_source_table=True))
    with echoing(UID, vpn(0), 1) as port:
        assert as_user(UID + 1, lambda: ask(vpn(0), port, 1)) == NODE4
        assert as_user(0, lambda: ask(vpn(0), port, 1)) == NODE4
        assert as_user(UID + 1, lambda: ask(vpn(0), port, 1, bound=vpn(1))) == vpn(1)


@pytest.mark.parametrize(
    ("own", "address", "words"),
    [(NETWORK.supernet(), OWN[1], "is no part of"), (OWN, NETWORK[1], "is not in")],
)
def test_nonsense_is_refused(own, address, words):
    with pytest.raises(NetplanError, match=words):
        MeshSpec(INTERFACE, NETWORK, own, address)


def test_a_partition_whose_address_is_not_of_the_nodes_part_is_refused():
    with pytest.raises(NetplanError, match="not of this node's part"):
        replace(meshed(1), mesh=None)


def test_a_dump_of_the_plan_is_empty_for_what_is_there(node):
    desired = meshed(3, local_source_table=True)
    apply(plan(desired, observe(desired)))
    assert plan(desired, observe(desired)) == ()
