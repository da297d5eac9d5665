"""What is wrong in a mesh, and who is not honest: each with its message, while the rest of the mesh stays up."""

import pytest
from mesh_world import PYTHON, TINC, Stranger, standing, until

from netplan import tinc, tinc_keys

PORT = 7000
COUNT = 20


@pytest.fixture(scope="module")
def world():
    """A and B are nodes, C is one that runs tinc by hand and that both have imported."""
    with standing() as made:
        a, b = made["A"], made["B"]
        for node in (a, b):
            node.verb("apply")
        made.stranger = Stranger(made["C"], "C", "10.64.6.0/23")
        a.take_in(b.export(), made.stranger.text)
        b.take_in(a.export(), made.stranger.text)
        made.stranger.start(a.export(), b.export())
        until(lambda: a.reaches("B", "C") and b.reaches("A", "C"), "all to reach each other")
        yield made


@pytest.fixture(autouse=True)
def the_rest_stays_up(world):
    yield
    assert world["A"].reaches("B")
    assert world["B"].reaches("A")


def arrivals(sender, receiver, sources):
    """How many of COUNT datagrams with each source arrive at a partition; what comes last is known to arrive."""
    target = receiver.vpn("slappart0")
    known = sources[-1]
    with (
        receiver.agent("listen", target, PORT, partition="slappart0") as listener,
        sender.agent("forge") as forger,
    ):
        for source in sources:
            forger.ask([source, target, PORT, COUNT])
        until(lambda: listener.ask().get(known, 0) == COUNT, "what is known to arrive")
        found = listener.ask()
    return {source: found.get(source, 0) for source in sources}


def dropped(node):
    found = node.verb("mesh", "status")["dropped"]
    return {(one["direction"], one["reason"]): one["packets"] for one in found}


def test_an_honest_node_sends_nothing_from_anothers_range(world):
    a, b = world["A"], world["B"]
    foreign = ("10.64.6.9", b.vpn("slappart1"), "192.0.2.1", "10.64.200.1")
    found = arrivals(a, b, (*foreign, "10.64.2.1"))
    print(f"\nfrom a node of partitiond, of {COUNT} each: {found}")
    assert {found[source] for source in foreign} == {0}
    assert dropped(a)["out", "source"] >= COUNT * len(foreign)
    assert "packets that were to leave by the mesh with a source that is not this node's" in a.say(
        "mesh", "status"
    )


def test_what_a_node_that_is_not_honest_can_do(world):
    """Who has a key in the mesh can send from any range of it but the receiver's own: tinc looks at no sources."""
    a, b = world["A"], world["B"]
    sources = {
        "the receiver's own range": b.vpn("slappart1"),
        "the receiver's own address": b.vpn("slappart0"),
        "outside of the mesh": "192.0.2.1",
        "another node's range": a.vpn("slappart0"),
        "its own range": "10.64.6.1",
    }
    found = arrivals(world.stranger.node, b, tuple(sources.values()))
    told = {words: found[source] for words, source in sources.items()}
    print(f"\nfrom a node that is not honest, of {COUNT} each: {told}")
    assert dropped(b)["in", "source"] >= COUNT
    assert told == {**dict.fromkeys(list(sources)[:3], 0), **dict.fromkeys(list(sources)[3:], COUNT)}


def test_a_range_of_anothers_that_is_announced_gets_nothing(world):
    a, b = world["A"], world["B"]
    part = "10.64.2.0/25"
    world.stranger.start(a.export(), b.export(), also=(part,))
    until(lambda: b.reaches("A", "C"), "C to be back")
    problem = b.peers()["C"]["problem"]
    assert problem.startswith(f"passes on the range {part}"), problem
    assert any(f"the range {part}" in one for one in b.verb("status")["node"]["open_cases"])
    target = a.vpn("slappart0")
    with (
        a.agent("serve", f"{target}:{PORT}", partition="slappart0"),
        b.agent("ask", partition="slappart0") as agent,
    ):
        assert agent.ask([["", target, PORT]]) == [b.vpn("slappart0")]
    world.stranger.start(a.export(), b.export())
    until(lambda: b.reaches("A", "C"), "C to be honest again")


def test_blocks_that_are_not_taken_in(world):
    a, b = world["A"], world["B"]
    before = sorted(path.name for path in a.seen(TINC / "hosts").iterdir())
    key = tinc_keys.public_of(tinc_keys.make(2048))
    good = f"Name = D\nSubnet = 10.64.8.0/23\n{key}"
    cases = {
        "mesh.clash": f"Name = E\nSubnet = 10.64.4.0/24\n{key}",
        "mesh.range": f"Name = E\nSubnet = 10.99.0.0/24\n{key}",
        "mesh.name": f"Name = ../../../etc/cron.d/x\nSubnet = 10.64.10.0/24\n{key}",
        "mesh.key": f"Name = E\nSubnet = 10.64.10.0/24\n{key[:300]}\n-----END RSA PUBLIC KEY-----\n",
        "mesh.block": "From: somebody\nSubject: the block\n\nHello\n",
        "mesh.known": f"Name = B\nSubnet = 10.64.4.0/23\n{tinc_keys.public_of(tinc_keys.make(2048))}",
    }
    for code, text in cases.items():
        error = a.refuses("mesh", "import", "-", said=good + text if text.startswith("Name") else text)
        assert error["code"] == code, error
        assert error["hint"]
        print(f"\n{code}: {error['resource']}: {error['message']}")
    assert (
        a.refuses("mesh", "import", "-", said=b.export().replace("Name = B", "Name = A"))["code"]
        == "mesh.name"
    )
    assert a.refuses("mesh", "import", "/nowhere")["code"] == "mesh.unreadable"
    assert a.refuses("mesh", "remove", "B", "nobody")["code"] == "mesh.unknown_peer"
    assert sorted(path.name for path in a.seen(TINC / "hosts").iterdir()) == before


def test_a_key_that_does_not_match(world):
    """The block of C is replaced by one with a key that C does not have: C is out, and says so at both ends."""
    a = world["A"]
    other = tinc_keys.public_of(tinc_keys.make(2048))
    text = world.stranger.text.replace(world.stranger.block.key, other)
    assert a.refuses("mesh", "import", "-", said=text)["code"] == "mesh.known"
    assert a.take_in(text, words=("--replace",))["changed"] == ["C"]

    def told():
        one = a.peers()["C"]
        return one["problem"] and "another key than its host block says" in one["problem"] and one

    one = until(told, "the key to be told of")
    print(f"\nC at A: {one['problem']}")
    assert one["via"] == "B" or not one["reachable"]
    assert a.take_in(world.stranger.text, words=("--replace",))["changed"] == ["C"]

    def back():
        one = a.peers()["C"]
        # one that is away has no via either
        return one["reachable"] and one["via"] is None and one["round_trip_ms"] is not None and one

    assert until(back, "C to be back by itself")["problem"] is None


def test_a_peer_that_is_nowhere(world):
    a = world["A"]
    key = tinc_keys.public_of(tinc_keys.make(2048))
    blocks = (
        f"Name = D\nAddress = 198.51.100.6 1\nSubnet = 10.64.8.0/23\n{key}",
        f"Name = E\nSubnet = 10.64.10.0/23\n{tinc_keys.public_of(tinc_keys.make(2048))}",
    )
    a.take_in(*blocks)
    one = until(lambda: (one := a.peers()["D"])["problem"] and one, "D to be tried")
    assert (one["reachable"], one["round_trip_ms"]) == (False, None)
    assert one["problem"].startswith("cannot be reached at 198.51.100.6 port 1: Connection refused")
    a.configure({"tinc": {"connect_to": "B E nobody"}})
    value = a.verb("apply", expect=(3,))
    assert {one["name"]: one["code"] for one in value["refused"]} == {
        "connect_to E": "mesh.connect_to",
        "connect_to nobody": "mesh.connect_to",
    }
    assert a.verb("plan")["operations"] == []
    a.configure({"tinc": {"connect_to": None}})
    assert a.verb("mesh", "remove", "D", "E")["removed"] == ["D", "E"]


def test_files_that_are_damaged_cost_themselves(world):
    a = world["A"]
    hosts = a.seen(TINC / "hosts")
    good = tinc.render(world.stranger.block)
    (hosts / "D").write_bytes(b"\x00\x01garbage")
    (hosts / "E").write_text(good)  # the key and the range of C, by another name
    (hosts / "x-y").write_text(good)
    (hosts / "F").symlink_to("/etc/shadow")
    value = a.verb("apply", expect=(3,))
    assert {one["name"]: one["code"] for one in value["refused"]} == {
        "mesh: peer D": "mesh.block",
        "mesh: peer E": "mesh.clash",
        "mesh: peer F": "files.refused",
        "mesh: peer x-y": "mesh.name",
    }
    assert a.verb("plan")["operations"] == []
    assert len(a.verb("mesh", "status")["refused"]) == 4
    assert sum("mesh: peer" in one for one in a.verb("status")["node"]["open_cases"]) == 4
    for name in ("D", "E", "F", "x-y"):
        (hosts / name).unlink()
    a.verb("apply")


def test_a_key_of_this_node_that_others_may_read(world):
    a = world["A"]
    path, pid = a.seen(TINC / "rsa_key.priv"), a.tincd()
    path.chmod(0o644)
    value = a.verb("apply", expect=(3,))
    assert [one["code"] for one in value["refused"]] == ["mesh.key"]
    assert "mode 0644" in value["refused"][0]["reason"]
    assert a.refuses("mesh", "export")["code"] == "mesh.no_key"
    assert a.tincd() == pid
    path.chmod(0o600)
    a.verb("apply")


def test_somebody_with_the_name_of_a_node(world):
    a, b = world["A"], world["B"]
    # it knows the real one by another name, else it would never call it
    double = b.export().replace("Name = B", "Name = X")
    world.stranger.start(a.export(), double, name="B")
    words = "it has the name of this node"
    until(
        lambda: any(words in one for one in b.verb("mesh", "status")["problems"]), "B to hear of its double"
    )
    # whoever reaches the port can say so
    assert not any(words in one for one in b.verb("status")["node"]["open_cases"])
    world.stranger.start(a.export(), b.export())
    until(lambda: a.reaches("B", "C") and b.reaches("A", "C"), "C to be itself again")


def test_somebody_who_is_no_tincd(world):
    """What reaches the port without a key makes no case of it."""
    a = world["A"]
    program = (
        "import socket, sys\n"
        "with socket.create_connection((sys.argv[1], 655), 5) as channel:\n"
        "    channel.sendall(sys.argv[2].encode())\n"
        "    channel.settimeout(5)\n"
        "    channel.recv(1000)\n"
    )
    address = a.site.address
    for text in ("GET / HTTP/1.0\r\n\r\n", "0 a-b 17\n", "0 nobody 17\n"):
        world["C"].run(PYTHON, "-I", "-c", program, address, text, check=False)
    said = until(
        lambda: (found := a.verb("mesh", "status")["problems"]) and "nobody" in str(found) and found,
        "it to be told",
    )
    assert not any("<unknown>" in one for one in said), said
    assert not any(one.startswith("mesh") for one in a.verb("status")["node"]["open_cases"])


def test_a_port_that_is_taken(world):
    a = world["A"]
    with a.agent("serve", "0.0.0.0:1655"):
        a.configure({"tinc": {"port": 1655}})
        value = a.verb("apply", expect=(3,))
        assert [one["code"] for one in value["failures"]] == ["mesh.port"]
        print(f"\n{value['failures'][0]['message']}")
        assert "Address already in use" in value["failures"][0]["message"]
        assert a.verb("plan")["operations"] == []
        assert any("Address already in use" in one for one in a.verb("mesh", "status")["problems"])
    a.configure({"tinc": {"port": None}})
    a.verb("apply")
    until(lambda: a.reaches("B"), "A to be back at its port")


def test_a_node_without_tincd(world):
    a = world["A"]
    a.run("mount", "--bind", "/dev/null", "/usr/sbin/tincd")
    try:
        value = a.verb("apply", expect=(3,))
        assert [one["code"] for one in value["refused"]] == ["mesh.no_tincd"]
        assert "apt-get install" in value["refused"][0]["hint"]
        assert a.verb("mesh", "status")["tincd"]["state"] == "not installed"
    finally:
        a.run("umount", "/usr/sbin/tincd")
    a.verb("apply")
