"""What the configuration says of guests, tap_guard and [tap_allow], becomes what each tap is held to."""

from ipaddress import IPv4Interface, IPv6Interface, ip_network

import pytest

from netplan import addresses
from netplan.model import Protected
from partitiond import choices, config, node
from partitiond.errors import PartitiondError

GOOD = """\
[slapos]
computer_id = COMP-1
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance
[slapformat]
interface_name = br0
partition_amount = 3
"""
ALLOW = "[tap_allow]\n"


@pytest.fixture
def load(tmp_path):
    def read(text):
        path = tmp_path / "slapos.cfg"
        path.write_text(GOOD + text)
        return config.load(path)

    return read


def complaint(load, text):
    with pytest.raises(PartitiondError) as caught:
        load(text)
    assert caught.value.code == "config.value"
    return str(caught.value)


def build(found, last=None, protected=None):
    base = IPv6Interface("2001:db8:1::1/64")
    routed = found.network.bridge is None
    rules = choices.Rules(
        partitions=node.names(found),
        base=base,
        prefixshift=16,
        ipv4_network=found.ipv4_network,
        partition_network=None,
        ipv6_range=True,
        tap_ipv6=routed,
        tap_gateway=IPv4Interface("192.0.2.1/24") if routed else None,
        tun_ipv6=False,
        tun_ipv4=False,
        taken=frozenset(),
        elsewhere=(),
    )
    choice = last.choice if last else choices.choose(rules, {}, {}, None)
    return node.build(found, True, {}, choice, None, last, protected or Protected())


def guards(found):
    return [one.network.tap.guard for one in build(found).partitions]


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("", "strict"),
        ("[partitiond]\nbridge = br0\n", "lan"),
        ("[partitiond]\nbridge = br0\ntap_guard = strict\n", "strict"),
        ("[partitiond]\ntap_guard = lan\n", "lan"),
        ("[partitiond]\ntap_guard = off\n", "off"),
    ],
)
def test_lan_where_bridged_and_strict_where_routed(load, text, mode):
    found = load(text)
    assert (found.guard.mode, found.warnings) == (mode, ())
    for guard in guards(found):
        assert (guard is None) if mode == "off" else (guard.strict == (mode == "strict"))


def test_no_guard_by_legacy_iptables(load):
    assert guards(load("[partitiond]\npacket_filter = iptables\n")) == [None] * 3


def test_what_is_the_guests_own(load):
    text = (
        "[partitiond]\nbridge = br0\ntap_guard = strict\n"
        "[routable_ipv4]\nslappart1 = 203.0.113.7/24 via 203.0.113.1\n"
        "[tap_allow]\nslappart2 = 52:54:00:AB:cd:ef 192.0.2.7 2001:db8:7::/64, 198.51.100.0/28\n"
    )
    found = build(load(text)).partitions
    first, second, third = (one.network.tap.guard for one in found)
    assert first.own == (found[0].network.ipv6_range,)
    assert second.own == (found[1].network.ipv6_range, ip_network("203.0.113.7"))
    assert set(third.own) == {
        found[2].network.ipv6_range,
        *map(ip_network, ("192.0.2.7", "2001:db8:7::/64", "198.51.100.0/28")),
    }
    assert (first.mac, third.mac) == (None, "52:54:00:ab:cd:ef")
    assert first.proposed == addresses.tap_mac("COMP-1", "slappart0")


def test_a_routed_guest_has_its_network_and_its_address(load):
    first = build(load("")).partitions[0].network
    assert set(first.tap.guard.own) == {
        first.ipv6_range,
        first.tap.ipv6.network,
        ip_network(first.tap.ipv4),
    }


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("", "''"),
        ("52:54:00:12:34", "'52:54:00:12:34'"),
        ("53:54:00:12:34:56 192.0.2.7", "'53:54:00:12:34:56'"),
        ("00:00:00:00:00:00", "'00:00:00:00:00:00'"),
        ("192.0.2.7 52:54:00:12:34:56", "'52:54:00:12:34:56'"),
        ("192.0.2.300", "'192.0.2.300'"),
        ("192.0.2.7/24", "'192.0.2.7/24'"),
        ("0.0.0.0/0", "'0.0.0.0/0'"),
        ("::/0", "'::/0'"),
        ("127.0.0.1", "'127.0.0.1'"),
        ("::1", "'::1'"),
        ("224.0.0.1", "'224.0.0.1'"),
        ("ff02::1", "'ff02::1'"),
        ("10.0.0.0/7", "'10.0.0.0/7'"),
        ("2000::/3", "'2000::/3'"),
        ("everything", "'everything'"),
    ],
)
def test_what_cannot_be_allowed_is_placed(load, value, word):
    said = complaint(load, f"{ALLOW}slappart1 = {value}\n")
    assert f"slapos.cfg:10: slappart1 = {word}; allowed: a MAC" in said


@pytest.mark.parametrize(
    ("second", "word"),
    [
        ("52:54:00:12:34:56", "another MAC: this one is slappart0's"),
        ("192.0.2.7", "other addresses: some of these are slappart0's"),
        ("192.0.2.0/28", "other addresses: some of these are slappart0's"),
    ],
)
def test_two_guests_share_nothing(load, second, word):
    said = complaint(load, f"{ALLOW}slappart0 = 52:54:00:12:34:56 192.0.2.0/24\nslappart1 = {second}\n")
    assert f"slapos.cfg:11: slappart1 = {second!r}; allowed: {word}" in said


def test_of_no_partition(load):
    found = load(f"{ALLOW}slappart7 = 192.0.2.7\n")
    assert found.guard.allowed == {}
    assert "slapos.cfg:10: there is no partition slappart7" in found.warnings[0]


def test_what_has_not_changed_is_not_built_again(load):
    text = f"{ALLOW}slappart2 = 192.0.2.7\n"
    first = build(load(text))
    again = build(load(text), first)
    assert all(one is two for one, two in zip(first.partitions, again.partitions, strict=True))
    other = build(load(text.replace("192.0.2.7", "192.0.2.8")), first)
    assert [one is two for one, two in zip(first.partitions, other.partitions, strict=True)] == [
        True,
        True,
        False,
    ]
    off = build(load(text + "[partitiond]\ntap_guard = off\n"), first)
    assert [one.network.tap.guard for one in off.partitions] == [None] * 3


def test_what_is_protected_makes_another_network(load):
    found = load("")
    first = build(found)
    protected = Protected((ip_network("192.0.2.9"),), ())
    second = build(found, first, protected)
    assert second.network().protected is protected
    assert build(found, second, protected) is second
