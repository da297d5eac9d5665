"""What slapos.core chose: read from its own files, strictly, and never from somebody else's."""

import json
import os
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network

import pytest

from partitiond import slapformat
from partitiond.errors import PartitiondError
from partitiond.slapformat import FormattedPartition, FormattedTap, FormattedTun
from slap_client.marshal import dumps


def partition(index, root, **changes):
    """One as slapos.core 1.26 writes it, tap and tun included."""
    name = f"slappart{index}"
    return {
        "reference": name,
        "path": f"{root}/{name}",
        "user": {
            "name": f"slapuser{index}",
            "path": f"{root}/{name}",
            "shell": "/bin/sh",
            "additional_group_list": ["slapsoft"],
        },
        "address_list": [
            {"addr": f"10.0.102.{index}", "netmask": "255.255.255.255"},
            {"addr": f"2001:db8:1::{index + 2:x}", "netmask": "ffff:ffff:ffff:ffff::"},
        ],
        "ipv6_range": {
            "addr": f"2001:db8:1:0:{0x4001 + index:x}::",
            "netmask": "ffff:ffff:ffff:ffff:ffff::",
            "network": f"2001:db8:1:0:{0x4001 + index:x}::/80",
            "prefixlen": 80,
        },
        "tap": {
            "name": f"slaptap{index}",
            "ipv4_addr": f"10.8.0.{index + 2}",
            "ipv4_netmask": "255.255.255.0",
            "ipv4_gateway": "10.8.0.1",
            "ipv4_network": "10.8.0.0",
            "ipv6_addr": f"2001:db8:1:0:{0x8001 + index:x}:ffff:ffff:ffff",
            "ipv6_netmask": "ffff:ffff:ffff:ffff:ffff::",
            "ipv6_gateway": f"2001:db8:1:0:{0x8001 + index:x}::1",
            "ipv6_network": f"2001:db8:1:0:{0x8001 + index:x}::1/80",
        },
        "tun": {
            "name": f"slaptun{index}",
            "ipv4_addr": "172.24.0.1",
            "ipv4_netmask": "255.248.0.0",
            "ipv4_network": "172.24.0.1/255.248.0.0",
            "ipv6_addr": f"2001:db8:1:0:{0xC001 + index:x}::1",
            "ipv6_netmask": "ffff:ffff:ffff:ffff:ffff::",
            "ipv6_network": f"2001:db8:1:0:{0xC001 + index:x}::1/80",
        },
        "external_storage_list": [],
    } | changes


def computer(root, count=2, **changes):
    return {
        "reference": "COMP-1",
        "address": "2001:db8:1::10",
        "netmask": "ffff:ffff:ffff:ffff::",
        "instance_root": str(root),
        "software_root": "/srv/software",
        "partition_list": [partition(index, root) for index in range(count)],
        "tap_ipv6": True,
    } | changes


BARE = {"ipv6_range": {}, "tun": None, "address_list": []}


class Files:
    def __init__(self, node):
        self.node = node
        self.xml, self.json = node.root / "slapos.xml", node.root / "slapos.json"

    def write(self, value, *, xml=True, as_json=False):
        if xml:
            self.xml.write_bytes(dumps(value))
        if as_json:
            self.json.write_text(json.dumps(value))

    def read(self):
        return slapformat.read(self.node.load())

    def refusal(self):
        with pytest.raises(PartitiondError) as caught:
            self.read()
        return caught.value


@pytest.fixture
def files(node_config):
    node = node_config(2)
    made = Files(node)
    node.write(slapformat={"computer_xml": made.xml, "computer_json": made.json})
    return made


def one(files, **changes):
    """The one partition of a file, with changes."""
    root = files.node.instance
    files.write(computer(root, partition_list=[partition(0, root, **changes)]))
    return files.read().partitions[0]


WHOLE = FormattedPartition(
    reference="slappart0",
    user="slapuser0",
    ipv4=IPv4Address("10.0.102.0"),
    ipv6=IPv6Address("2001:db8:1::2"),
    ipv6_range=IPv6Network("2001:db8:1:0:4001::/80"),
    tap=FormattedTap(
        "slaptap0", IPv6Interface("2001:db8:1:0:8001:ffff:ffff:ffff/80"), IPv4Address("10.8.0.2")
    ),
    tun=FormattedTun("slaptun0", IPv6Interface("2001:db8:1:0:c001::1/80"), IPv4Interface("172.24.0.1/13")),
)


@pytest.mark.parametrize("kind", ["xml", "json"])
def test_a_whole_file(files, kind):
    files.write(computer(files.node.instance), xml=kind == "xml", as_json=kind == "json")
    found = files.read()
    assert (found.base, found.instance_root) == (IPv6Interface("2001:db8:1::10/64"), files.node.instance)
    assert (found.partitions[0], found.warnings) == (WHOLE, ())
    assert [each.reference for each in found.partitions] == ["slappart0", "slappart1"]


def test_without_any_file_slapos_core_was_never_here(files):
    assert files.read() is None
    files.node.write(
        slapformat={"computer_xml": files.node.root / "nowhere" / "x.xml", "computer_json": None}
    )
    assert files.read() is None


def test_the_files_are_read_again_when_they_change(files):
    copies = slapformat.Copies(files.node.load())
    assert copies.read() is None
    files.write(computer(files.node.instance))
    found = copies.read()
    assert found.partitions[0] == WHOLE
    assert copies.read() is found
    files.xml.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(PartitiondError):
            copies.read()
    files.write(computer(files.node.instance, address="2001:db8:1::99"), xml=False, as_json=True)
    assert copies.read().base == IPv6Interface("2001:db8:1::99/64")
    files.xml.unlink()
    files.json.unlink()
    assert copies.read() is None


def test_what_older_versions_and_other_options_leave_out(files):
    bare = one(files, **BARE, user=None, tap={"name": "slaptap0"})
    assert bare == FormattedPartition("slappart0", tap=FormattedTap("slaptap0"))
    # netifaces 0.10.7 and later
    long = [{"addr": "10.0.1.1"}, {"addr": "2001:db8:1::9", "netmask": "ffff:ffff:ffff:ffff::/64"}]
    assert one(files, address_list=long).ipv6 == IPv6Address("2001:db8:1::9")
    empty = dict.fromkeys(partition(0, "/")["tap"], "") | {"name": "slaptap0"}
    assert one(files, tap=empty).tap == FormattedTap("slaptap0")
    assert one(files, tun={"name": "slaptun0"}).tun == FormattedTun("slaptun0")
    files.write(computer(files.node.instance, address=None, netmask=None))
    assert files.read().base is None
    files.write(computer(files.node.instance, netmask="ffff:ffff:ffff:ffff::/64"))
    assert files.read().base == IPv6Interface("2001:db8:1::10/64")


def test_what_is_routed_to_the_guest_is_what_counts(files):
    """With a prefix shift of 8 slapos.core routes but the last /80 of the tap's /72."""
    tap = partition(0, "/")["tap"] | {
        "ipv6_addr": "2001:db8:1:0:81ff:ffff:ffff:ffff",
        "ipv6_netmask": "ffff:ffff:ffff:ffff:ff00::",
        "ipv6_gateway": "2001:db8:1:0:81ff::1",
        "ipv6_network": "2001:db8:1:0:81ff::1/80",
    }
    assert one(files, tap=tap).tap.ipv6 == IPv6Interface("2001:db8:1:0:81ff:ffff:ffff:ffff/80")


def test_the_xml_is_the_master_copy_and_the_json_the_spare(files):
    root = files.node.instance
    files.write(computer(root))
    files.write(computer(root, address="2001:db8:1::99"), xml=False, as_json=True)
    assert files.read().base == IPv6Interface("2001:db8:1::10/64")
    files.xml.write_bytes(files.xml.read_bytes()[:-40])
    found = files.read()
    assert (found.file, found.base) == (files.json, IPv6Interface("2001:db8:1::99/64"))
    assert len(found.warnings) == 1
    assert str(files.xml) in found.warnings[0]
    assert found.warnings[0].endswith(f"{files.json} is used instead")
    files.json.write_bytes(files.json.read_bytes()[:-40])
    assert files.refusal().resource == str(files.xml)
    files.xml.unlink()
    assert files.refusal().resource == str(files.json)


def test_a_file_cut_anywhere_is_no_file(files):
    files.node.write(slapformat={"computer_json": None})
    files.write(computer(files.node.instance))
    whole = files.xml.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        files.xml.write_bytes(whole[:length])
        error = files.refusal()
        assert (error.code, error.resource) == ("slapformat.unreadable", str(files.xml)), length
        assert "slapos.xml.zip" in error.hint
    files.xml.write_bytes(whole)
    assert len(files.read().partitions) == 2


def linked(path):
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")


def of_a_tenant(path):
    os.chown(path, 5000, 5000)


def in_a_directory(path):
    path.unlink()
    path.mkdir()


def a_fifo(path):
    path.unlink()
    os.mkfifo(path)


def endless(path):
    os.truncate(path, 65 * 1024 * 1024)


@pytest.mark.parametrize("change", [linked, of_a_tenant, in_a_directory, a_fifo, endless])
def test_only_a_plain_file_of_roots(files, change):
    files.write(computer(files.node.instance))
    change(files.xml)
    error = files.refusal()
    assert (error.code, error.resource) == ("slapformat.unreadable", str(files.xml))


TAP = partition(0, "/")["tap"]
V4, V6 = partition(0, "/")["address_list"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": None}, "no reference"),
        ({"reference": 3}, "not a text"),
        ({"address_list": None}, "no list"),
        ({"address_list": [V4]}, "not one of each"),
        ({"address_list": [V4, V6, V6]}, "not one of each"),
        ({"address_list": [V4, "2001:db8::1"]}, "no dictionary"),
        ({"address_list": [V4, {"addr": "2001:db8::g"}]}, "2001:db8::g"),
        ({"address_list": [{"addr": "10.0.0.256"}, V6]}, "10.0.0.256"),
        ({"address_list": [V4, {"addr": 5}]}, "not a text"),
        ({"ipv6_range": {"addr": "2001:db8:1::", "netmask": "ffff::ffff"}}, "no netmask"),
        ({"ipv6_range": {"addr": "2001:db8:1::", "netmask": "ffff::/17"}}, "no netmask"),
        ({"ipv6_range": {"addr": "2001:db8:1::"}}, "netmask"),
        ({"ipv6_range": "2001:db8:1::/80"}, "no dictionary"),
        ({"tap": TAP | {"name": ""}}, "no name"),
        ({"tap": TAP | {"ipv6_network": "2001:db8::1/129"}}, "slappart0: tap"),
        ({"tap": TAP | {"ipv4_addr": "10.8"}}, "10.8"),
        ({"tun": {"name": "slaptun0", "ipv4_addr": "172.16.0.1"}}, "slappart0: tun"),
        ({"user": "slapuser0"}, "no dictionary"),
    ],
)
def test_a_partition_that_makes_no_sense(files, changes, words):
    root = files.node.instance
    files.write(computer(root, partition_list=[partition(0, root, **changes)]))
    error = files.refusal()
    assert error.code == "slapformat.unreadable"
    assert words in str(error)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "no dictionary"),
        ({}, "partition_list is no list"),
        ({"partition_list": [None]}, "partition 0 is no dictionary"),
        ({"partition_list": [partition(0, "/"), partition(0, "/")]}, "one reference"),
        ({"partition_list": [], "address": "2001:db8::1"}, "netmask"),
        ({"partition_list": [], "address": 1}, "not a text"),
    ],
)
def test_a_document_that_makes_no_sense(files, value, words):
    for as_json in (False, True):
        files.write(value, xml=not as_json, as_json=as_json)
        error = files.refusal()
        assert error.code == "slapformat.unreadable"
        assert words in str(error)
        files.xml.unlink(missing_ok=True)


def test_json_of_a_thousand_brackets(files):
    files.json.write_text("[" * 100_000)
    assert files.refusal().code == "slapformat.unreadable"


def test_names_that_the_configuration_does_not_give(files):
    root = files.node.instance
    for section, name in (
        ({"reference": "part1"}, "part1"),
        ({"user": {"name": "joe"}}, "joe"),
        ({"tap": {"name": "tap1"}}, "tap1"),
    ):
        files.write(computer(root, partition_list=[partition(0, root), partition(1, root, **section)]))
        error = files.refusal()
        assert (error.code, error.resource) == ("slapformat.other_names", str(files.xml))
        assert name in str(error)
        assert "base_name" in error.hint
    # who has none is not asked for, and more than there are need no names
    files.node.write(slapformat={"create_tap": "false"})
    assert files.read().partitions[1].tap == FormattedTap("tap1")
    files.node.write(slapformat={"partition_amount": 1})
    files.write(computer(root, partition_list=[partition(0, root), partition(1, root, reference="else")]))
    assert len(files.read().partitions) == 2


def test_the_file_of_another_node(files, monkeypatch):
    files.write(computer("/srv/elsewhere"))
    error = files.refusal()
    assert (error.code, error.resource) == ("slapformat.other_node", str(files.xml))
    assert "/srv/elsewhere" in error.hint
    # where it is only usual to have one, it says nothing about this node
    monkeypatch.setattr(slapformat, "DEFAULT_XML", files.xml)
    files.node.write(slapformat={"computer_xml": None, "computer_json": None})
    assert files.read() is None
    files.write(computer(f"{files.node.instance}/"))
    assert files.read().partitions[0] == WHOLE
