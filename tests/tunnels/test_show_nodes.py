"""Tunnels between nodes: clients on another node, nodes with IPv4 alone, two tunnels in chain; and what the wire shows."""

import secrets

import pytest
from tunnel_world import standing

SERVICE, LISTEN, ENTRY, SHARED = 5000, 4000, 6000, 6001
# of each exchange, both ways; more than one packet holds
TIMES, EACH = 100, 64


def bridge(server, inner, client, outer):
    """Declare a tunnel from a partition of one node to one of another, each pinned by the certificate that it publishes."""
    server.serve(inner, "in", LISTEN, SERVICE, [client.pin(outer)])
    client.reach(outer, "out", ENTRY, (server.public(inner), LISTEN), server.pin(inner))


def said(node, partition, host, port, content, times=TIMES):
    """What came of sending some content there and back, as the partition's user."""
    (answer,) = node.agent(partition, "probe").ask(
        [{"to": [host, port], "send": (content * EACH).hex(), "times": times}]
    )
    return answer


def both_ways(family, world):
    marker = secrets.token_bytes(32)
    here, there = world.here, world.there
    bridge(here, "slappart0", there, "slappart0")  # of one name, and so of one subject in other respects
    bridge(there, "slappart1", here, "slappart1")
    there.reach("slappart2", "out", ENTRY, (here.public("slappart0"), LISTEN), here.pin("slappart0"))
    # and two of one name, both of whom a third allows
    namesakes = ((there, "slappart0"), (here, "slappart0"))
    here.serve("slappart2", "both", LISTEN, SERVICE, [node.pin(partition) for node, partition in namesakes])
    for node, partition in namesakes:
        node.reach(partition, "shared", SHARED, (here.public("slappart2"), LISTEN), here.pin("slappart2"))
    here.apply()
    there.apply()
    services = [
        node.service(partition, node.private(partition), SERVICE)
        for node, partition in ((here, "slappart0"), (there, "slappart1"), (here, "slappart2"))
    ]
    with world.heard() as capture:
        for node, partition in ((there, "slappart0"), (here, "slappart1")):
            answer = said(node, partition, node.private(partition), ENTRY, marker)
            assert answer["echo"], answer
        # whom nobody allowed, on that node
        assert not said(there, "slappart2", there.private("slappart2"), ENTRY, marker)["echo"]
        for node, partition in namesakes:
            answer = said(node, partition, node.private(partition), SHARED, marker)
            assert answer["echo"], answer
    amount = TIMES * EACH * len(marker)
    assert [(seen["connections"], seen["bytes"]) for seen in (one.ask() for one in services)] == [
        (1, amount),
        (1, amount),
        (2, 2 * amount),
    ]
    assert capture.lost == 0
    assert capture.size > 6 * amount  # both ways, at both links of the router
    assert capture.count(marker) == 0

    # the same without a tunnel: so the marker would have been seen
    here.service("slappart0", here.public("slappart0"), SERVICE)
    with world.heard() as control:
        assert said(there, "slappart0", here.public("slappart0"), SERVICE, marker)["echo"]
    assert control.count(marker) >= TIMES
    print(
        f"{family}: {capture.size} bytes in {len(capture.packets)} packets between the nodes, in 0 of them plaintext;"
        f" without a tunnel in {control.count(marker)} of {len(control.packets)}"
    )


def chain(world):
    marker = secrets.token_bytes(32)
    here, there = world.here, world.there
    # there/1 → here/1, whose service is the tunnel here/1 → there/2, whose service echoes
    first, second = here.public("slappart1"), there.public("slappart2")
    here.serve("slappart1", "chained", 4100, 6200, [there.pin("slappart1")])
    there.reach("slappart1", "chain", 6100, (first, 4100), here.pin("slappart1"))
    there.serve("slappart2", "last", 4100, SERVICE, [here.pin("slappart1")])
    here.reach("slappart1", "next", 6200, (second, 4100), there.pin("slappart2"))
    here.apply()
    there.apply()
    service = there.service("slappart2", there.private("slappart2"), SERVICE)
    with world.heard() as capture:
        answer = said(there, "slappart1", there.private("slappart1"), 6100, marker)
    assert answer["echo"], answer
    amount = TIMES * EACH * len(marker)
    assert service.ask() == {"connections": 1, "bytes": amount, "needles": 0}
    assert (capture.lost, capture.count(marker)) == (0, 0)
    assert capture.size > 8 * amount  # through the router twice
    # one link less, and nothing gets through: that it came by both was no accident
    here.withdraw("slappart1", "next")
    here.apply()
    assert not said(there, "slappart1", there.private("slappart1"), 6100, marker)["echo"]
    assert service.ask()["connections"] == 1


@pytest.mark.parametrize("family", ["IPv6", "IPv4"])
def test_clients_on_another_node_tunnels_in_chain_and_nothing_to_read_between_them(family):
    with standing(family) as world:
        both_ways(family, world)
        chain(world)
