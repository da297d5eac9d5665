"""The text of ``mesh status``: what tincd believes of a peer, and what came of asking that peer."""

import pytest

from partitiond import present_mesh


def peer(**differences):
    return {
        "name": "B",
        "ranges": ["10.64.2.0/24"],
        "addresses": ["192.0.2.2"],
        "reachable": True,
        "address": "192.0.2.2 port 655",
        "via": None,
        "direct": True,
        "round_trip_ms": 1.5,
        "problem": None,
    } | differences


def said_of(one):
    value = {
        "name": "A",
        "address": "10.64.1.1",
        "range": "10.64.1.0/24",
        "network": "10.64.0.0/16",
        "interface": "slapmesh",
        "port": 655,
        "fingerprint": "sha256:" + "0" * 64,
        "tincd": {"state": "running", "pid": 7},
        "relays": False,
        "peers": [one],
        "strangers": [],
        "problems": [],
        "refused": [],
        "dropped": [],
    }
    (line,) = (line for line in present_mesh.status(value).splitlines() if line.startswith("B "))
    return line


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ({}, " yes "),
        ({"direct": False}, " by TCP "),
        ({"round_trip_ms": None}, " no answer "),
        ({"round_trip_ms": None, "reachable": False}, " no "),
        ({"round_trip_ms": None, "reachable": None}, " ? "),
    ],
    ids=["reached", "slowly", "silent", "unreachable", "unknown"],
)
def test_a_peer_that_does_not_answer_is_not_said_to_be_reached(differences, words):
    line = said_of(peer(**differences))
    assert words in line
    assert (" 1.5" in line) is (differences.get("round_trip_ms", 1.5) is not None)
