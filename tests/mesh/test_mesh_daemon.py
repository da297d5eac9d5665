"""What the daemon tells of its peers: events when one answers no more and when it is back, and a metric."""

import json
import urllib.request

from mesh_world import standing, until


def _read():
    with urllib.request.urlopen("http://127.0.0.1:9816/metrics", timeout=20) as answer:
        return answer.read().decode()


def metric(node, name='partitiond_mesh_peer_up{peer="B"}'):
    """A metric, of the peer; None while there is none."""
    text = node.within(_read)
    head = f"{name} "
    return next((line.removeprefix(head) for line in text.splitlines() if line.startswith(head)), None)


def events(node):
    lines = node.say("events", "--json").splitlines()
    found = (json.loads(line) for line in lines)
    return [(one["event"], one["resource"]) for one in found if one["event"].startswith("mesh.")]


def test_a_peer_that_goes_and_comes_back():
    with standing(names="AB") as world:
        a, b = world["A"], world["B"]
        world.apply().join()
        until(lambda: a.reaches("B"), "B to be reached")
        a.start()
        until(lambda: metric(a) == "1", "the metric to say that B is up")
        assert events(a) == []
        head = "partitiond_mesh_dropped_packets_total"
        by_source = f'{head}{{direction="out",reason="source"}}'
        assert metric(a, f'{head}{{direction="forward",reason="any"}}') == "0"
        before = int(metric(a, by_source))
        with a.agent("forge") as forger:
            forger.ask(["192.0.2.1", b.vpn("slappart0"), 7000, 3])
        until(lambda: int(metric(a, by_source)) == before + 3, "what was forged to be counted")
        world.internet.cut("B")
        until(lambda: metric(a) == "0", "the metric to say that B is down")
        assert events(a) == [("mesh.peer_down", "mesh/B")]
        assert a.verb("apply")["refused"] == [], "a peer that is away is no fault of this node's"
        world.internet.join("B")
        until(lambda: metric(a) == "1", "B to be back")
        assert events(a) == [("mesh.peer_down", "mesh/B"), ("mesh.peer_up", "mesh/B")]
        a.stop()
        assert b.tincd()
