"""The spoof matrix of routed taps: what gets past the guard into the host, and through it to others.

A guest behind a routed tap is alone on its link with the host. So what differs from a bridge: each link has link-local
addresses of its own, a tag of number 0 is none, and much never gets anywhere because the host takes no such frames.
"""

import pytest
from guard_cast import LAN, STRICT
from guard_kinds import KINDS
from guard_kinds_protocols import FRAMES
from guard_routed import Routed
from guard_scene import standing
from guard_tally import row

FINE_HERE = {
    "IPv6 link-local of the other tap",
    "NA of the other tap's link-local",
    "DAD for the other tap's link-local",
    "VLAN tag of number 0",
}
# the host drops them by itself: arp_rcv, ip_rcv_core, ip6_rcv_core, or no receiver for such frames
NEVER_TAKEN = {
    *{kind.name for kind in FRAMES}
    - {"VLAN tag of number 0", "tag around ARP as the router", "IPv6 with headers that do not end"},
    *("ARP cut before the target", "ARP cut in the target", "ARP of other sizes"),
    *("IPv6 loopback", "IPv6 multicast", "NA cut in the option", "NA cut in the target"),
}


def send_everything(routed, row):
    """Send every kind everywhere; return which came where: kind, where it was sent, where it was seen."""
    found = set()
    cast, ends = routed.cast(), routed.ends()
    for kind in KINDS:
        row.kinds += 1
        for where, end in ends.items():
            row.cells += 1
            found |= {(kind.name, where, seen) for seen in routed.hits(kind, cast, where, end)}
    return found


def split(row, found, without, fine):
    """Note in the row how much of what arrives without the guard has arrived; return both parts."""
    good, bad = (
        {one for one in without if one[0] in fine},
        {one for one in without | found if one[0] not in fine},
    )
    row.fine, row.fine_seen = len(good), len(good & found)
    row.hostile, row.hostile_seen = len(bad), len(bad & found)
    row.never = 3 * len({kind.name for kind in KINDS} - {name for name, _, _ in without})
    return good - found, bad & found


@pytest.mark.parametrize("mode", [STRICT, LAN])
def test_every_kind_of_frame(mode, request):
    on, off = row(request.config, f"routed, {mode}"), row(request.config, f"routed, {mode}: off")
    with standing() as scene:
        routed = Routed(scene)
        scene.converge(scene.desired(strict=mode == STRICT, guarded=False, bridge=None))
        routed.open()
        without = send_everything(routed, off)
        scene.converge(scene.desired(strict=mode == STRICT, bridge=None))
        found = send_everything(routed, on)
    fine = {kind.name for kind in KINDS if mode in kind.passes} | FINE_HERE
    split(off, without, without, fine)
    assert split(on, found, without, fine) == (set(), set())
    assert {kind.name for kind in KINDS} - {name for name, _, _ in without} == NEVER_TAKEN
    # through the host, too, the same sources arrive when nobody guards
    spoofed = {cell for cell in without if cell[0].startswith(("IPv4 of the", "IPv6 of the"))}
    assert {where for _, _, where in spoofed} == {"host", "other tap", "wire"}
