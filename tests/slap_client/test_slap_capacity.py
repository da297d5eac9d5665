from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network

from slap_client.capacity import CapacityNode, CapacityPartition, CapacityTap, capacity_description
from slap_client.marshal import dumps, loads

NODE = CapacityNode(
    reference="COMP-7",
    address=IPv6Interface("2001:db8:1::1/64"),
    instance_root="/srv/slapgrid",
    software_root="/opt/slapgrid",
    software_user="slapsoft",
    interface_name="br0",
    ipv6_interface="br0",
    ipv4_local_network="10.0.0.0/16",
    os_type=("Linux-6.1-x86_64-with-glibc2.36", "debian", "12", "Debian GNU/Linux"),
    python_version="3.11.2",
    version="partitiond/0.1.0",
)
PARTITION = CapacityPartition(
    reference="slappart0",
    path="/srv/slapgrid/slappart0",
    user="slapuser0",
    ipv4=IPv4Address("10.0.102.114"),
    ipv6=IPv6Address("2001:db8:1::2"),
    ipv6_prefixlen=64,
    tap=CapacityTap(
        "slaptap0",
        ipv6=IPv6Interface("2001:db8:1:0:8001:ffff:ffff:ffff/80"),
        ipv6_gateway=IPv6Address("2001:db8:1:0:8001::1"),
    ),
    ipv6_range=IPv6Network("2001:db8:1:0:4001::/80"),
)
# Keys and forms as slapformat 1.26 dumped them on such a node.
EXPECTED = {
    "address": "2001:db8:1::1",
    "instance_root": "/srv/slapgrid",
    "instance_storage_home": None,
    "interface": {
        "ipv4_local_network": "10.0.0.0/16",
        "ipv6_interface": "br0",
        "ipv6_prefixshift": 16,
        "name": "br0",
    },
    "ipv6_interface": None,
    "netmask": "ffff:ffff:ffff:ffff::",
    "os_type": '["Linux-6.1-x86_64-with-glibc2.36", "debian", "12", "Debian GNU/Linux"]',
    "partition_has_ipv6_range": True,
    "partition_list": [
        {
            "address_list": [
                {"addr": "10.0.102.114", "netmask": "255.255.255.255"},
                {"addr": "2001:db8:1::2", "netmask": "ffff:ffff:ffff:ffff::"},
            ],
            "external_storage_list": [],
            "ipv6_range": {
                "addr": "2001:db8:1:0:4001::",
                "netmask": "ffff:ffff:ffff:ffff:ffff::",
                "network": "2001:db8:1:0:4001::/80",
                "prefixlen": 80,
            },
            "path": "/srv/slapgrid/slappart0",
            "reference": "slappart0",
            "tap": {
                "ipv4_addr": "",
                "ipv4_gateway": "",
                "ipv4_netmask": "",
                "ipv4_network": "",
                "ipv6_addr": "2001:db8:1:0:8001:ffff:ffff:ffff",
                "ipv6_gateway": "2001:db8:1:0:8001::1",
                "ipv6_netmask": "ffff:ffff:ffff:ffff:ffff::",
                "ipv6_network": "2001:db8:1:0:8001::1/80",
                "name": "slaptap0",
            },
            "tun": None,
            "user": {
                "additional_group_list": ["slapsoft"],
                "name": "slapuser0",
                "path": "/srv/slapgrid/slappart0",
                "shell": "/bin/sh",
            },
        }
    ],
    "public_ipv4_address": None,
    "python_version": "3.11.2",
    "reference": "COMP-7",
    "slapos_version": "partitiond/0.1.0",
    "software_root": "/opt/slapgrid",
    "software_user": "slapsoft",
    "tap_gateway_interface": "",
    "tap_ipv6": True,
}


def test_the_description_has_the_form_of_slapformat():
    description = capacity_description(NODE, [PARTITION])
    assert description == EXPECTED
    assert loads(dumps(description)) == EXPECTED


def one(**changes):
    (result,) = capacity_description(NODE, [replace(PARTITION, **changes)])["partition_list"]
    return result


def test_a_partition_with_a_bare_tap_and_no_range():
    result = one(tap=CapacityTap("slaptap0"), ipv6_range=None)
    assert result["ipv6_range"] == {}
    assert result["tap"].pop("name") == "slaptap0"
    assert set(result["tap"].values()) == {""}


def test_a_routable_ipv4_behind_the_tap():
    tap = CapacityTap("slaptap0", IPv4Interface("198.51.100.9/24"), IPv4Address("198.51.100.1"))
    result = one(tap=tap)["tap"]
    assert {key: value for key, value in result.items() if key.startswith("ipv4")} == {
        "ipv4_addr": "198.51.100.9",
        "ipv4_gateway": "198.51.100.1",
        "ipv4_netmask": "255.255.255.0",
        "ipv4_network": "198.51.100.0",
    }


def test_a_node_without_ipv6():
    node = replace(NODE, address=IPv4Interface("192.0.2.7/24"))
    partition = replace(
        PARTITION, ipv6=None, ipv6_prefixlen=0, ipv6_range=None, public_ipv4=IPv4Interface("192.0.2.20/24")
    )
    description = capacity_description(node, [partition])
    assert (description["address"], description["netmask"]) == ("192.0.2.7", "255.255.255.0")
    assert description["partition_list"][0]["address_list"][1] == {
        "addr": "192.0.2.20",
        "netmask": "255.255.255.0",
    }
    only = capacity_description(node, [replace(partition, public_ipv4=None)])
    assert len(only["partition_list"][0]["address_list"]) == 1


def test_what_is_only_there_when_it_was_chosen():
    assert one(capabilities=("ssd",))["capability_list"] == ["ssd"]
    assert "capability_list" not in one()
    assert one(external_storage=("/data0/slappart0",))["external_storage_list"] == ["/data0/slappart0"]
    description = capacity_description(replace(NODE, ipv6_interface="eth1"), [])
    assert description["ipv6_interface"] == description["interface"]["ipv6_interface"] == "eth1"
