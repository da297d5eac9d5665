"""A real kvm tenant: a guest on a partition's tap lives on the LAN as it should, and can be nobody but itself.

qemu runs as the partition's user; the kernel in it is Debian's own. What a spoof would reach is watched at the node, at the
router and at another guest's tap. The guest's console stands at the end of the log.
"""

import pytest
from kvm_image import needed
from kvm_scene import GATEWAY4, ROUTER4, ROUTER6, forwarding, mac_of, standing_router
from kvm_spoofs import routed, spoofs, strangers
from kvm_tenant import Consoles, Tenant, attacked, logged, reaches_the_router, seen_at_any_time, table

OWN_MAC = "52:54:00:12:34:56"  # made up by the guest's release, as qemu's default is


@pytest.fixture(scope="session")
def consoles(request):
    made = Consoles()
    request.config.pluginmanager.register(made)
    return made


@pytest.fixture
def tenant(bridge, node_config, command):
    """Make the tenant of a node with such settings."""
    needed()
    return lambda **settings: Tenant(bridge, node_config(2, **settings), command)


@pytest.fixture
def router(bridge, tmp_path):
    needed()
    with standing_router(bridge, tmp_path) as made:
        yield made


# --- on a home network ----------------------------------------------------------------------------------------------------


def takes_its_addresses(guest):
    """As any machine that is plugged in: DHCP, and an address made of the prefix that the router advertises."""
    guest.does("ip link set lo up; ip link set eth0 up")
    words = guest.does("udhcpc -i eth0 -f -q -n -t 10 -T 1 -s /lease").split()
    leased = words[words.index("leased") + 1].partition("/")[0]
    return leased, guest.does("again settled 'inet6 2001:'").split()[1].partition("/")[0]


def test_a_guest_on_a_home_network_takes_any_free_address_and_no_other(tenant, router, consoles):
    here = tenant(partitiond={"bridge": "br0", "tap_guard": "lan"})
    with here.sinks() as sinks, here.boot(OWN_MAC) as guest, logged(consoles, guest, "lan"):
        ipv4, ipv6 = takes_its_addresses(guest)
        assert ipv4.startswith("192.0.2.1")  # the range of the leases
        assert ipv6.startswith("2001:db8:1:0:")
        reaches_the_router(guest, router.page)
        lan = here.lan(router, guest, ipv4, ipv6)
        free, hostile = strangers(lan), spoofs(lan)
        found = attacked(guest, sinks, lan, free + hostile)
        refused = here.refused()
        consoles.add("lan", "what was seen of it", table(found, refused))
        reaches_the_router(guest, router.page)
        guest.power_off()
    assert seen_at_any_time(sinks, hostile) == set()
    assert {name for name, where in found.items() if where} == {one.name for one in free}
    assert sum(refused.values()) >= len(hostile)  # each has come as far as the guard, and is counted
    here.nothing_to_do()


# --- with assigned addresses ----------------------------------------------------------------------------------------------


def test_a_guest_with_assigned_addresses_uses_those_alone(tenant, router, consoles):
    """First without a guard, and all that is tried arrives: else that nothing does with one, here or in ``lan``, would prove
    nothing. The guard comes while the guest runs.
    """
    ipv4, ipv6 = "192.0.2.50", "2001:db8:1::50"
    here = tenant(
        partitiond={"bridge": "br0", "tap_guard": "off"},
        tap_allow={"slappart0": f"{OWN_MAC} {ipv4} {ipv6}"},
    )
    with here.boot(OWN_MAC) as guest, logged(consoles, guest, "off, then strict"):
        # an address made of the router's prefix would be none of the assigned ones
        guest.does("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_ra; ip link set lo up; ip link set eth0 up")
        guest.does(f"ip address add {ipv4}/24 dev eth0; ip address add {ipv6}/64 dev eth0")
        guest.does(f"again settled 'inet6 {ipv6}'")
        lan = here.lan(router, guest, ipv4, ipv6)
        hostile = strangers(lan) + spoofs(lan)
        for guard in ("off", "strict"):
            here.guard_by(guard)
            reaches_the_router(guest, router.page)
            with here.sinks() as sinks:
                found = attacked(guest, sinks, lan, hostile)
            refused = here.refused()
            consoles.add(guard, "what was seen of it", table(found, refused))
            reaches_the_router(guest, router.page)
            here.nothing_to_do()
            if guard == "off":
                assert [name for name, where in found.items() if not where] == []
                assert refused == {}
            else:
                assert seen_at_any_time(sinks, hostile) == set()
                assert sum(refused.values()) >= len(hostile)
        guest.power_off()


# --- behind a routed tap --------------------------------------------------------------------------------------------------

BEYOND4, BEYOND6 = "203.0.113.9", "2001:db8:9::9"  # somewhere behind the router


@pytest.fixture
def gateway(router, bridge):
    with forwarding(bridge, ("198.51.100.0/24", "2001:db8:1:0:8000::/66")):
        yield


def takes_what_it_is_given(guest, tap):
    """As .slapos-resource has it: an IPv4 address behind a gateway, and the first address of a range."""
    guest.does(f"ip link set lo up; ip link set eth0 up; ip address add {tap['ipv4_addr']}/32 dev eth0")
    guest.does(f"ip route add {GATEWAY4} dev eth0; ip route add default via {GATEWAY4}")
    guest.does(f"ip address add {tap['ipv6_gateway']}/80 dev eth0")
    guest.does(f"ip -6 route add default via {tap['ipv6_addr']}; again settled 'inet6 {tap['ipv6_gateway']}'")


@pytest.mark.full
def test_a_guest_behind_a_routed_tap_uses_its_own_addresses_alone(gateway, tenant, router, consoles):
    """As slapformat makes taps. Where nothing is said, the guard is ``strict``; without one all that is tried arrives."""
    here = tenant(slapformat={"tap_gateway_interface": "gw0"}, partitiond={"tap_guard": "off"})
    tap = here.resource()["tap"]
    with here.boot(tap["mac"]) as guest, logged(consoles, guest, "off, then none named, routed"):
        takes_what_it_is_given(guest, tap)
        lan = here.lan(router, guest, tap["ipv4_addr"], tap["ipv6_gateway"])
        own = (routed(f"{tap['ipv6_gateway']}77", BEYOND6),)
        hostile = (
            *(routed(one, BEYOND4) for one in (ROUTER4, "198.51.100.3", "198.51.100.77", "203.0.113.50")),
            *(routed(one, BEYOND6) for one in (ROUTER6, "2001:db8:1:0:8002::77", "2001:db8:77::1")),
        )
        for guard in ("off", None):
            here.guard_by(guard)
            reaches_the_router(guest, router.page)
            with here.sinks() as sinks:
                there = [
                    one for one in sinks if one.name == "router"
                ]  # the others are on the way, or not on it
                found = attacked(guest, there, lan, own + hostile, to=(mac_of("slaptap0"), BEYOND4))
            refused = here.refused()
            consoles.add(f"{guard or 'none named'}, routed", "what was seen of it", table(found, refused))
            reaches_the_router(guest, router.page)
            here.nothing_to_do()
            if guard == "off":
                assert [name for name, where in found.items() if not where] == []
                assert refused == {}
            else:
                assert seen_at_any_time(there, hostile) == set()
                assert [name for name, where in found.items() if where] == [one.name for one in own]
                assert sum(refused.values()) >= len(hostile)
        guest.power_off()
