"""A real kvm tenant: a guest on a partition's tap lives on the LAN as it should, and can be nobody but itself.

qemu runs as the partition's user; the kernel in it is Debian's own. What a spoof would reach is watched at the node, at the
router and at another guest's tap. The guest's console stands at the end of the log.
"""

import contextlib
import json
import pwd

import pytest
from kvm_guest import booted
from kvm_image import needed, place
from kvm_scene import ROUTER4, ROUTER6, mac_of, standing_router, standing_sinks
from kvm_spoofs import Lan, link_local, marker, spoofs, strangers

OWN_MAC = "52:54:00:12:34:56"  # made up by the guest's release, as qemu's default is


class Consoles:
    """What guests said and where their spoofs were seen, shown at the end of the run whatever came of it."""

    def __init__(self):
        self._sections = []

    def add(self, guard, what, text):
        self._sections.append((f"kvm guest, tap_guard = {guard}: {what}", text))

    def pytest_terminal_summary(self, terminalreporter):
        for title, text in self._sections:
            terminalreporter.section(title)
            terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def consoles(request):
    made = Consoles()
    request.config.pluginmanager.register(made)
    return made


class Tenant:
    """A whole node with a guest on its first partition's tap."""

    def __init__(self, bridge, node, command):
        self.bridge, self.node, self._command = bridge, node, command
        self.apply()
        self.status = self._said("status")["partitions"]
        owner = pwd.getpwnam("slapuser0")
        self.images = place(node.instance / "slappart0", owner.pw_uid, owner.pw_gid)

    def _said(self, verb):
        done = self._command(verb, "--json", "-c", self.node.path)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def apply(self):
        assert self._said("apply")["left"] == []

    def nothing_to_do(self):
        assert self._said("plan")["operations"] == []

    def boot(self, mac):
        return booted("slapuser0", "slaptap0", mac, self.images)

    def sinks(self):
        return standing_sinks(self.bridge, "slaptap1")

    def lan(self, router, guest, ipv4, ipv6):
        return Lan(
            mac=guest.mac,
            ipv4=ipv4,
            ipv6=ipv6,
            link_local=link_local(guest.mac),
            router_mac=router.mac,
            node_mac=mac_of(self.bridge.name),
            tap_mac=self.status[1]["tap"]["mac"],
            partition6=self.status[1]["ipv6"],
        )


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


def reaches_the_router(guest, page):
    """Echo and TCP over both families, by whatever addresses the guest has."""
    for address in (ROUTER4, ROUTER6):
        where = f"[{address}]" if ":" in address else address
        guest.does(f"again ping -c 1 -W 1 {address}")
        assert guest.does(f"wget -q -O - http://{where}/page") == page


def attacked(guest, sinks, lan, attempts):
    """Where each attempt was seen, by its name.

    An honest frame follows each: frames of one queue of a card keep their order, so what a sink sees before it came from
    the attempt.  That it is seen at all shows that the sinks work.
    """
    found = {}
    for number, one in enumerate(attempts):
        for line in one.lines:
            guest.does(line)  # a guest is not told what a guard drops
        send, mark = marker(lan, f"honest {number}.")
        guest.does(send)
        found[one.name] = [sink.name for sink in sinks if any(map(one.seen_in, sink.until(mark)))]
    return found


def seen_at_any_time(sinks, attempts):
    """Names of attempts of which something was seen, be it late."""
    return {one.name for one in attempts for sink in sinks if any(map(one.seen_in, sink.frames))}


def table(found):
    width = max(map(len, found))
    seen = sum(map(bool, found.values()))
    rows = [f"{name:<{width}}  {', '.join(where) or '-'}" for name, where in found.items()]
    return "\n".join([*rows, f"{len(found)} tried from inside, {seen} seen outside"])


@contextlib.contextmanager
def logged(consoles, guest, guard):
    """Keep the guest's console, whatever comes of it."""
    try:
        yield
    finally:
        consoles.add(guard, "its console", guest.text())


# --- with assigned addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ["off"])
def test_a_guest_with_assigned_addresses_uses_those_alone(guard, tenant, router, consoles):
    """Without a guard everything that is tried arrives: else the same with one, here or in ``lan``, would prove nothing."""
    ipv4, ipv6 = "192.0.2.50", "2001:db8:1::50"
    here = tenant(
        partitiond={"bridge": "br0", "tap_guard": guard},
        tap_allow={"slappart0": f"{OWN_MAC} {ipv4} {ipv6}"},
    )
    with here.sinks() as sinks, here.boot(OWN_MAC) as guest, logged(consoles, guest, guard):
        # an address made of the router's prefix would be none of the assigned ones
        guest.does("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_ra; ip link set lo up; ip link set eth0 up")
        guest.does(f"ip address add {ipv4}/24 dev eth0; ip address add {ipv6}/64 dev eth0")
        guest.does(f"again settled 'inet6 {ipv6}'")
        reaches_the_router(guest, router.page)
        lan = here.lan(router, guest, ipv4, ipv6)
        hostile = strangers(lan) + spoofs(lan)
        found = attacked(guest, sinks, lan, hostile)
        consoles.add(guard, "what was seen of it", table(found))
        reaches_the_router(guest, router.page)
        guest.power_off()
    if guard == "off":
        assert [name for name, where in found.items() if not where] == []
    else:
        assert seen_at_any_time(sinks, hostile) == set()
    here.nothing_to_do()
