"""What tincd 1.0.36 says, read; the texts are of real daemons."""

import pytest

from netplan import tinc_status

DUMP = """Nodes:
 A at MYSELF cipher 0 digest 0 maclength 0 compression 0 options c status 0018 nexthop A via A pmtu 1518 (min 0 max 1518)
 B at 198.51.100.10 port 655 cipher 427 digest 672 maclength 16 compression 0 options c status 001a nexthop B via B \
pmtu 1451 (min 1451 max 1451)
 C at 198.51.100.14 port 655 cipher 427 digest 672 maclength 16 compression 0 options c status 0018 nexthop B via C \
pmtu 1518 (min 0 max 1518)
 D at (null) cipher 0 digest 0 maclength 0 compression 0 options 0 status 0000 nexthop - via - pmtu 1518 (min 0 max 1518)
End of nodes.
Edges:
 A to B at 198.51.100.10 port 655 options c weight 36
End of edges.
Subnet list:
 10.64.2.0/23#10 owner A
 10.64.4.0/23#10 owner B
 10.64.8.0/24 owner B
End of subnet list.
"""
PLACE = "198.51.100.14 port 655"


def test_a_dump():
    older = DUMP.replace("10.64.4.0", "10.64.99.0")
    nodes, subnets = tinc_status.read_dump(f"Ready\n{older}noise\n{DUMP}Nodes:\n cut off")
    assert subnets == {"A": ("10.64.2.0/23",), "B": ("10.64.4.0/23", "10.64.8.0/24")}
    found = {name: (one.reachable, one.address, one.nexthop, one.direct) for name, one in nodes.items()}
    assert found == {
        "A": (True, None, "A", False),
        "B": (True, "198.51.100.10 port 655", "B", True),
        "C": (True, "198.51.100.14 port 655", "B", False),
        "D": (False, None, None, False),
    }
    assert tinc_status.read_dump("Ready\nNodes:\n") is None


@pytest.mark.parametrize(
    ("lines", "kind", "peer", "words"),
    [
        (
            (f"Ignoring unauthorized ADD_SUBNET from C ({PLACE}): 10.64.2.0/25#10",),
            "range",
            "C",
            "10.64.2.0/25",
        ),
        ((f"Peer {PLACE} had unknown identity (C)",), "identity", "C", "no host block"),
        ((f"Possible intruder C ({PLACE}): wrong challenge reply",), "key", "C", "wrong challenge reply"),
        ((f"Bogus data received from C ({PLACE})",), "key", "C", "does not understand"),
        (
            (f"Connected to C ({PLACE})", f"Timeout from C ({PLACE}) during authentication"),
            "key",
            "C",
            "another key",
        ),
        (
            (f"Connection from {PLACE}", f"Timeout from C ({PLACE}) during authentication"),
            "key",
            "C",
            "another key",
        ),
        ((f"Timeout from C ({PLACE}) during authentication",), "unreachable", "C", "does not answer"),
        ((f"Got bad ID from <unknown> ({PLACE}): invalid name",), "identity", "", "the name of this node"),
        (
            ("Possible node with same Name as us! Sleeping 10 seconds.",),
            "same_name",
            "",
            "the name of this node",
        ),
        (
            (f"Error while connecting to C ({PLACE}): Connection refused",),
            "unreachable",
            "C",
            "Connection refused",
        ),
        (
            (f"Trying to connect to C ({PLACE})", f"{PLACE}: Network is unreachable"),
            "unreachable",
            "C",
            "Network is unreachable",
        ),
        (
            ("Can't bind to 0.0.0.0 port 655/tcp: Address already in use",),
            "own",
            "",
            "Address already in use",
        ),
    ],
)
def test_a_problem(lines, kind, peer, words):
    (found,) = tinc_status.problems(("tincd 1.0.36 starting, debug level 1", *lines))
    assert (found.kind, found.peer, words in found.words) == (kind, peer, True), found
    assert tinc_status.problems((*lines, "tincd 1.0.36 starting, debug level 1")) == ()
    activated = tinc_status.problems((*lines, f"Connection with C ({PLACE}) activated"))
    assert len(activated) == (0 if peer else 1)


def test_what_is_said_again_is_told_once():
    one = f"Peer {PLACE} had unknown identity (C)"
    assert len(tinc_status.problems([one] * 5)) == 1
    ranges = [
        f"Ignoring unauthorized ADD_SUBNET from C ({PLACE}): 10.64.{number}.0/24" for number in (1, 2, 1)
    ]
    assert [found.subject for found in tinc_status.problems(ranges)] == ["10.64.2.0/24", "10.64.1.0/24"]


def test_a_range_is_over_when_the_connection_ends_that_it_was_said_over():
    said = (
        f"Connection with C ({PLACE}) activated",
        f"Ignoring unauthorized ADD_SUBNET from C ({PLACE}): 10.64.2.0/25#10",
        f"Possible intruder C ({PLACE}): wrong challenge reply",
    )
    assert [one.kind for one in tinc_status.problems(said)] == ["range", "key"]
    assert [one.kind for one in tinc_status.problems((*said, f"Closing connection with B ({PLACE})"))] == [
        "range",
        "key",
    ]
    assert [one.kind for one in tinc_status.problems((*said, f"Closing connection with C ({PLACE})"))] == [
        "key"
    ]


def test_who_says_much_is_not_told_at_length():
    names = [f"Peer {PLACE} had unknown identity (X{number})" for number in range(100)]
    ranges = [
        f"Ignoring unauthorized ADD_SUBNET from C ({PLACE}): 10.64.{number}.0/24" for number in range(100)
    ]
    found = tinc_status.problems((f"Possible intruder B ({PLACE}): wrong reply", *names, *ranges))
    assert len(found) == 41
    assert [one.subject for one in found if one.peer == "C"] == [
        f"10.64.{number}.0/24" for number in range(80, 100)
    ]
    assert [one.peer for one in found if one.kind == "identity"] == [
        f"X{number}" for number in range(80, 100)
    ]


def test_two_nodes_of_one_name_and_key_take_turns():
    def come(number, *, second=True):
        place = f"198.51.100.{number} port 40000"
        over = [f"Established a second connection with B ({PLACE}), closing old connection"] if second else []
        return [*over, f"Closing connection with B ({PLACE})", f"Connection with B ({place}) activated"]

    found = [*come(10, second=False), *come(14), *come(10)]
    assert tinc_status.problems(found) == ()
    (told,) = tinc_status.problems((*found, *come(14)))
    assert (told.kind, told.peer) == ("same_name", "B")
    assert "from 198.51.100.10 and 198.51.100.14 in turn" in told.words
    # one whose address changes, or that begins anew
    assert tinc_status.problems((*found, *come(18))) == ()
    assert tinc_status.problems((*found, *come(14), *come(10, second=False))) == ()
