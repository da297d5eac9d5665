"""The same addresses as slapformat: its own test data, and thousands of cases put to the installed slapos.core.

slapos.core runs once, in its own interpreter; nothing of it enters this one. Where it wraps around, or gives two ends one
address, or the host's own, we refuse or step aside: which of these it is in a case is told from its own answer.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path

import pytest

from netplan import addresses
from netplan.errors import NetplanError
from partitiond.addressing import choose_base
from partitiond.resource_file import netmask6

PEER = Path(sys.prefix) / "master" / "bin" / "python3"

# Its functions, called as slapos.format calls them. An answer is what it returned, or the name of what it raised.
_ASK = """
import json, socket, sys
import slapos.format, slapos.util as util

def base(length, address, **rest):
    return {"addr": address, "prefixlen": length}

def six(length, address, index, shift):
    given = {"addr": address, "prefixlen": length}
    ranges = [util.getPartitionIpv6Range, util.getTapIpv6Range, util.getTunIpv6Range]
    return {
        "address": attempt(lambda: util.getPartitionIpv6Addr(dict(given), index)),
        **{
            name: attempt(lambda: rule(dict(given), index, shift))
            for name, rule in zip(("range", "tap", "tun"), ranges)
        },
    }

def first(address, length):
    return util.getIpv6RangeFirstAddr(address, length)

def tun(index, amount):
    made = slapos.format.Tun("slaptun", index, amount)
    return [made.ipv4_addr, made.ipv4_netmask, made.ipv4_network]

def taps(address, netmask, size):
    return [str(one) for one in slapos.format.getIPv4SubnetAddressRange(address, netmask, size)]

def own(there, before):
    found = [{"addr": address, "netmask": util.netmaskFromLenIPv6(length)} for address, length in there]
    slapos.format.netifaces.ifaddresses = lambda name: {socket.AF_INET6: found}
    return slapos.format.Interface(None, "br0", "10.0.0.0/16").getAddress(before)["addr"]

def netmask(length):
    return util.netmaskFromLenIPv6(length)

def attempt(call):
    try:
        return call()
    except (Exception, SystemExit) as error:
        return type(error).__name__

known = {one.__name__: one for one in (six, first, tun, taps, own, netmask)}
json.dump([[attempt(lambda: known[name](*case)) for case in cases] for name, cases in json.load(sys.stdin)], sys.stdout)
"""


def _six_cases(dice):
    for _ in range(4000):
        length = dice.randint(3, 127)
        ip = IPv6Address((1 << 125) | dice.getrandbits(125))  # 2000::/3
        shift = dice.choice((16, 16, dice.randint(0, 12), dice.randint(2, 40)))
        quarter, size = 1 << max(shift - 2, 0), 1 << (128 - length)
        index = dice.choice(
            (dice.randint(0, 20), dice.randint(0, 10000), quarter - dice.randint(0, 2), size - 2)
        )
        index = min(max(index, 0), 65533)
        where = dice.random()
        network = int(IPv6Network((int(ip), length), strict=False).network_address)
        if where < 0.3:  # a host like any: ::1
            ip = IPv6Address(network + 1)
        elif where < 0.4 and index + 2 < size:  # on the partition's place
            ip = IPv6Address(network + index + 2)
        yield str(ip), length, index, shift


@pytest.fixture(scope="module")
def asked():
    """All questions and the answers of slapos.core, by the name of what was asked."""
    dice = random.Random(20261122)  # noqa: S311 - the same cases each time
    questions = {
        "six": [(length, ip, index, shift) for ip, length, index, shift in _six_cases(dice)],
        "first": [
            (str(network.network_address), length)
            for length in range(4, 128)
            for network in [
                IPv6Network(((1 << 125) | dice.getrandbits(125), length), strict=False) for _ in range(8)
            ]
        ],
        "tun": [
            (index, amount)
            for amount in (*range(1, 70), 127, 128, 129, 500, 512, 513, 1024, 4097, 10000)
            for index in {0, amount // 2, amount - 1}
        ],
        "taps": [
            (str(one.ip), str(one.netmask), size)
            for length in (*range(20, 31), 31, 32)
            for one in [IPv4Interface((0x0A080000 + dice.getrandbits(12), length)) for _ in range(4)]
            for size in [dice.randint(1, min(one.network.num_addresses, 40))]
        ],
        "own": [_own_case(dice) for _ in range(300)],
        "netmask": [(length,) for length in range(129)],
    }
    answer = subprocess.run(
        [PEER, "-I", "-c", _ASK],
        input=json.dumps(list(questions.items())),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answers = json.loads(answer.stdout)
    return {
        name: list(zip(cases, found, strict=True))
        for (name, cases), found in zip(questions.items(), answers, strict=True)
    }


def _own_case(dice):
    """Some addresses of an interface in networks that do not overlap, and what was stored of one of the networks."""
    there = []
    for network in dice.sample(range(200), dice.randint(1, 4)):
        length = dice.choice((56, 64, 64, 80, 112))
        first = int(IPv6Address("2001:db8::")) + (network << 80)
        there += [(str(IPv6Address(first + dice.getrandbits(16))), length) for _ in range(dice.randint(1, 3))]
    ip, length = dice.choice(there)
    stored = IPv6Network((int(IPv6Address(ip)), length), strict=False)[dice.getrandbits(15)]
    return there, dice.choice((None, ip, str(stored), "2001:db9::1"))


def tried(rule, *arguments):
    """What one of ours gives, or the code of its error."""
    try:
        return rule(*arguments)
    except NetplanError as error:
        return error.code


def test_partition_addresses(asked):
    seen = Counter()
    for (length, ip, index, _), answer in asked["six"]:
        base = IPv6Interface(f"{ip}/{length}")
        first, size = int(base.network.network_address), base.network.num_addresses
        ours, theirs = tried(addresses.partition_ipv6, base, index), answer["address"]
        where = f"{base}, partition {index}"
        assert theirs["prefixlen"] == length, where
        assert IPv6Address(theirs["addr"]) in base.network, where
        if index + 2 >= size:
            case = "wraps around"
            assert ours == "network.prefix_too_small", where
            assert int(IPv6Address(theirs["addr"])) != first + index + 2, where
        elif IPv6Address(theirs["addr"]) == base.ip:
            case = "the host's own"
            aside = first + index + 2 + 0x10000
            small = aside >= first + size
            assert ours == ("network.prefix_too_small" if small else IPv6Interface((aside, length))), where
        else:
            case = "the same"
            assert ours == IPv6Interface(f"{theirs['addr']}/{length}"), where
        seen[case] += 1
    assert seen["the same"] > 2000
    assert min(seen["wraps around"], seen["the host's own"]) > 50


@pytest.mark.parametrize(
    ("kind", "quarter", "rule"),
    [
        ("range", 1, addresses.partition_range),
        ("tap", 2, addresses.tap_range),
        ("tun", 3, addresses.tun_range),
    ],
)
def test_ranges(asked, kind, quarter, rule):
    seen = Counter()
    for (length, ip, index, shift), answer in asked["six"]:
        base = IPv6Interface(f"{ip}/{length}")
        ours, theirs = tried(rule, base, index, shift), answer[kind]
        where = f"{base}, partition {index}, shift {shift}"
        if isinstance(theirs, str):
            # it raises for 2 addresses and less, for a negative shift, and beyond the last quarter
            assert theirs in ("ValueError", "SystemExit"), where
            assert ours == "network.prefix_too_small", where
            seen["refused by both"] += 1
            continue
        assert theirs["prefixlen"] == length + shift, where
        found = IPv6Network((int(IPv6Address(theirs["addr"])), length + shift), strict=False)
        number = (int(found.network_address) - int(base.network.network_address)) >> (128 - length - shift)
        if index >= 1 << (shift - 2):
            # it goes on in what is the next kind's
            assert number > (quarter + 1) << (shift - 2), where
            assert ours == "network.prefix_too_small", where
            seen["wraps around"] += 1
        elif base.ip in found:
            assert ours == "network.address_collision", where
            seen["the host's own"] += 1
        else:
            assert ours == found, where
            seen["the same"] += 1
        end = found.broadcast_address if kind == "tap" else found.network_address
        assert IPv6Address(theirs["addr"]) == end, where
    assert seen["the same"] > 1500
    assert seen["refused by both"] > 500
    assert seen["wraps around"] > 50 or kind == "tun"


def test_the_ends_of_taps_and_tuns(asked):
    seen = Counter()
    for (length, ip, index, shift), answer in asked["six"]:
        base = IPv6Interface(f"{ip}/{length}")
        for kind, rule, ranged in (
            ("tap", addresses.tap_ipv6, addresses.tap_range),
            ("tun", addresses.tun_ipv6, addresses.tun_range),
        ):
            network, ours = (tried(one, base, index, shift) for one in (ranged, rule))
            if isinstance(network, str):
                assert ours == network
            elif kind == "tap" and network.prefixlen == 127:
                assert ours == "network.prefix_too_small", "the guest would have the host's address"
                assert IPv6Address(answer["tap"]["addr"]) == addresses.range_gateway(network)
                seen["two addresses"] += 1
            elif kind == "tap":
                assert ours == IPv6Interface(f"{answer['tap']['addr']}/{answer['tap']['prefixlen']}")
                seen[kind] += 1
            else:
                assert ours == IPv6Interface((int(addresses.range_gateway(network)), network.prefixlen))
                assert network.network_address == IPv6Address(answer["tun"]["addr"])
                seen[kind] += 1
    assert min(seen["tap"], seen["tun"]) > 1500
    assert seen["two addresses"] > 5


def test_the_first_address_of_a_range(asked):
    seen = Counter()
    for (network, length), theirs in asked["first"]:
        ours = addresses.range_gateway(IPv6Network(f"{network}/{length}"))
        last = int(IPv6Address(network)) & 0xFFFF
        if last == 0:
            assert ours == IPv6Address(theirs)
            seen["the same"] += 1
        else:
            # it writes a 1 behind the text of the network, into its last group: another address, or none
            wrong = last * 16 + 1
            assert ours == IPv6Address(network) + 1
            assert theirs == "OSError" if wrong > 0xFFFF else int(IPv6Address(theirs)) & 0xFFFF == wrong
            seen["another"] += 1
    assert seen["the same"] > 800
    assert seen["another"] > 50


def test_tun_ipv4(asked):
    for (index, amount), (address, netmask, network) in asked["tun"]:
        ours = addresses.tun_ipv4(index, amount)
        assert (str(ours.ip), str(ours.netmask)) == (address, netmask), (index, amount)
        assert network == f"{ours.ip}/{ours.netmask}"


def test_tap_ipv4(asked):
    seen = Counter()
    for (address, netmask, size), theirs in asked["taps"]:
        gateway = IPv4Interface(f"{address}/{netmask}")
        if theirs == "ValueError":
            assert tried(addresses.tap_ipv4, gateway, size - 1) == "network.prefix_too_small"
            seen["refused by both"] += 1
            continue
        for index, one in enumerate(theirs):
            ours = tried(addresses.tap_ipv4, gateway, index)
            if gateway.network.prefixlen < 31 and IPv4Address(one) == gateway.network.broadcast_address:
                assert ours == "network.prefix_too_small", "nobody should get the broadcast address"
                assert index == len(theirs) - 1
                seen["broadcast"] += 1
            else:
                assert ours == IPv4Address(one), (gateway, index)
                seen["the same"] += 1
        assert tried(addresses.tap_ipv4, gateway, len(theirs)) == "network.prefix_too_small"
    assert seen["the same"] > 1000
    assert min(seen["broadcast"], seen["refused by both"]) > 3


def test_the_nodes_own_address(asked):
    for (there, before), theirs in asked["own"]:
        here = [IPv6Interface(f"{address}/{length}") for address, length in there]
        stored = None if before is None else IPv6Interface(f"{before}/64")
        ours = choose_base(here, None, stored)
        found = next(one for one in here if str(one.ip) == theirs)
        assert ours.network == found.network, (here, stored)
        if stored and stored.ip in {one.ip for one in here}:
            # it takes the lowest of that network, which may be a partition's
            assert ours.ip in (stored.ip, found.ip)
        else:
            assert ours == found, (here, stored)


def test_netmasks(asked):
    for (length,), theirs in asked["netmask"]:
        assert netmask6(length) == theirs


# --- the numbers in its own tests (slapos/tests/test_slapformat.py and test_standalone.py of 1.26) -----------------------


def test_its_own_choice_of_an_address():
    there = [
        IPv6Interface(one) for one in ("2a01:e35:1234::1/96", "2a01:e35:2e27::1/64", "2a01:e35:5678::1/80")
    ]
    assert str(choose_base(there, None).ip) == "2a01:e35:2e27::1"
    there = [IPv6Interface("2a01:e35:abcd::1/64"), IPv6Interface("2a01:e35:2e27::1/64")]
    assert choose_base(there, None, IPv6Interface("2a01:e35:2e27::1/64")) == there[1]
    assert addresses.partition_ipv6(there[1], 0) == IPv6Interface("2a01:e35:2e27::2/64")


def test_its_own_taps():
    for base, length in (("2a01:e35:2e27::e59c/64", 80), ("2a01:e35:2e27:3456:1357::e59c/80", 96)):
        assert addresses.tap_ipv6(IPv6Interface(base), 0, 16).network.prefixlen == length
    assert addresses.tap_ipv4(IPv4Interface("10.8.0.1/24"), 0) == IPv4Address("10.8.0.2")


def test_its_own_small_networks():
    base = IPv6Interface("2001:db8:1::1/96")
    found = {addresses.partition_range(base, index, 16) for index in range(3)}
    assert (len(found), {one.prefixlen for one in found}) == (3, {112})
    # with 112 bits a partition has no range there; with 126 two addresses are dealt out again and again
    small = IPv6Interface("2001:db8:1::1/112")
    assert tried(addresses.partition_range, small, 0, 16) == "network.prefix_too_small"
    tiny = IPv6Interface("2001:db8:1::1/126")
    assert [str(addresses.partition_ipv6(tiny, index).ip) for index in (0, 1)] == [
        "2001:db8:1::2",
        "2001:db8:1::3",
    ]
    assert tried(addresses.partition_ipv6, tiny, 2) == "network.prefix_too_small"
