"""Three nodes that know each other by export and import alone, on machines without any IPv6."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from mesh_world import LOG, STATE, TINC, standing, until

PORT = 7000


@pytest.fixture(scope="module")
def world():
    with standing() as made:
        made.apply().join()
        until(made.whole, "everybody to reach everybody")
        yield made


@pytest.fixture(scope="module")
def served(world):
    """By each partition its node, its address in the mesh, and a service there."""
    with contextlib.ExitStack() as stack:
        found = {}
        for node in world.nodes.values():
            for partition in node.ids():
                address = node.vpn(partition)
                stack.enter_context(node.agent("serve", f"{address}:{PORT}", partition=partition))
                found[node.name, partition] = address
        yield found


def ask(node, partition, questions):
    with node.agent("ask", partition=partition) as agent:
        return agent.ask(questions)


def test_a_second_import_says_that_there_is_nothing_to_do(world):
    blocks = [node.export() for node in world.nodes.values()]
    value = world["A"].take_in(*blocks)
    assert (value["added"], value["changed"], value["unchanged"], value["own"]) == ([], [], ["B", "C"], ["A"])
    assert value["applied"]["done"] == 0
    for node in world.nodes.values():
        assert node.verb("plan")["operations"] == []


def test_what_tincd_reads_is_for_nobody_else(world):
    node = world["A"]
    uid = node.seen("/var/lib/partitiond/mesh/tinc.conf").stat().st_gid
    for name, mode in (("tinc.conf", 0o640), ("hosts/B", 0o640), ("tinc-up", 0o755), ("start", 0o700)):
        found = node.seen(STATE / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (0, uid, mode), name
    assert node.seen(STATE).stat().st_mode & 0o777 == 0o750
    assert node.seen(TINC / "rsa_key.priv").stat().st_mode & 0o777 == 0o600
    # tincd has given up being root
    status = Path(f"/proc/{node.tincd()}/status").read_text()
    uids = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    assert uids == [str(uid)] * 4
    assert "CapEff:\t0000000000000000" in status


def test_every_partition_talks_to_every_other(world, served):
    """As its user, bound and unbound; the other end sees the partition's own address."""
    pairs = 0
    for (name, partition), own in served.items():
        node = world[name]
        others = [address for one, address in served.items() if one[0] != name]
        questions = [[source, other, PORT] for other in others for source in (own, "")]
        answers = ask(node, partition, questions)
        assert answers == [own] * len(questions), f"{name}/{partition}: {answers}"
        pairs += len(others)
    print(f"\n{pairs} directed pairs of partitions of {len(world.nodes)} nodes talked, bound and unbound")
    for (name, partition), own in served.items():
        found = world[name].usage()[partition]["addresses"]
        metered = [one for one in found if one["address"] == own and one["scope"] == "remote"]
        assert [one["family"] for one in metered] == ["ipv4"]
        assert metered[0]["bytes_in"] > 8 * 2000
        assert metered[0]["bytes_out"] > 8 * 2000


def test_an_address_is_its_partitions_alone(world, served):
    node = world["A"]
    theirs = served["A", "slappart1"]
    answers = ask(node, "slappart0", [[theirs, served["B", "slappart0"], PORT]])
    assert "Error" in answers[0], answers


def test_tincd_is_killed_in_turn_and_flows_go_on(world, served):
    with contextlib.ExitStack() as stack:
        flows = [
            stack.enter_context(
                world[name].agent("flow", served[other, "slappart0"], PORT, partition="slappart0")
            )
            for name, other in (("A", "B"), ("B", "C"), ("C", "A"))
        ]
        for node in world.nodes.values():
            began = time.monotonic()
            now, seconds = node.kill_tincd()
            for flow in flows:
                assert flow.ask("over the same connection as before") is True
            whole = time.monotonic() - began
            assert node.tincd() == now
            print(
                f"\ntincd of {node.name}: back {seconds:.2f} s after kill -9, all flows go on after {whole:.2f} s"
            )
            assert node.verb("plan")["operations"] == []


def test_tincd_outlives_supervisord(world, served):
    node = world["B"]
    before = node.tincd()
    with world["A"].agent("flow", served["B", "slappart1"], PORT, partition="slappart1") as flow:
        os.kill(node.supervisord(), signal.SIGKILL)
        assert flow.ask("without anybody who looks after tincd") is True
    node.verb("apply")
    assert node.tincd() == before
    assert node.verb("plan")["operations"] == []
    assert node.verb("mesh", "status")["tincd"]["state"] == "running"


def test_a_reload_costs_nobody_a_connection(world, served):
    """A peer that comes and one that goes: the connections of the others are the same as before."""
    node = world["A"]
    marks = node.log_of_tincd().count("activated")
    pid, block = node.tincd(), world["C"].export()
    with node.agent("flow", served["B", "slappart0"], PORT, partition="slappart0") as flow:
        assert node.verb("mesh", "remove", "C")["removed"] == ["C"]
        assert not (node.seen(STATE) / "hosts" / "C").exists()
        assert flow.ask("while C is away") is True
        assert "Error" in ask(node, "slappart0", [["", served["C", "slappart0"], PORT]])[0]
        assert node.take_in(block)["added"] == ["C"]
        until(lambda: node.reaches("B", "C"), "C to be back")
        assert flow.ask("and when it is back") is True
    assert node.tincd() == pid
    again = node.log_of_tincd().split("activated", marks)[-1]
    assert "Connection with B" not in again


def test_what_is_changed_by_hand_is_put_right(world):
    node = world["A"]
    pid = node.tincd()
    (node.seen(STATE) / "hosts" / "B").write_text("Subnet = 0.0.0.0/0\n")
    (node.seen(STATE) / "hosts" / "X").write_text("Subnet = 10.64.9.0/24\n")
    planned = [one["id"] for one in node.verb("plan", expect=(2,))["operations"]]
    assert planned == ["tinc/configuration", "tinc/tincd"]
    node.verb("apply")
    until(lambda: node.reaches("B", "C"), "B to be reached again")
    assert node.tincd() == pid
    node.configure({"tinc": {"cipher": "aes-128-cbc"}})
    node.verb("apply")
    assert node.tincd() != pid, "what is read once makes it start anew"
    until(world.whole, "a node with another cipher to be reached")
    assert node.verb("plan")["operations"] == []


def test_a_daemon_takes_peers_in(world):
    node = world["C"]
    node.start()
    try:
        block = world["B"].export()
        assert node.verb("mesh", "remove", "B")["removed"] == ["B"]
        assert set(node.peers()) == {"A"}
        assert node.take_in(block)["added"] == ["B"]
        until(lambda: node.reaches("A", "B"), "B to be back")
        # tincd that ends is started by supervisord, and the interface that goes is made anew by the daemon
        node.kill_tincd()
        node.run("ip", "link", "delete", "sltinc")
        until(lambda: node.reaches("A", "B"), "the mesh to be back on an interface that was made anew")
    finally:
        node.stop()


def test_teardown_takes_all_but_the_configuration(world):
    node = world["C"]
    key = node.seen(TINC / "rsa_key.priv").read_text()
    node.verb("teardown")
    assert not node.tincd()
    assert not node.seen(STATE).exists()
    assert "slapmesh" not in node.seen("/etc/passwd").read_text()
    assert "sltinc" not in node.run("ip", "-br", "link").stdout
    node.verb("teardown", "--purge")
    assert not node.seen(LOG).exists()
    node.verb("apply")
    assert node.seen(TINC / "rsa_key.priv").read_text() == key
    until(world.whole, "a node that was made anew by its configuration to be reached")


def test_a_mesh_that_is_given_up_goes(world):
    node = world["C"]
    node.configure({"tinc": dict.fromkeys(node.sections["tinc"])})
    node.verb("apply")
    assert not node.tincd()
    assert not node.seen(STATE).exists()
    assert "slapmesh" not in node.seen("/etc/passwd").read_text()
    assert node.verb("plan")["operations"] == []
    assert node.refuses("mesh", "status")["code"] == "mesh.off"
