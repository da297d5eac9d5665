"""The ports of tunnels are kept out of what outgoing connections get: a node of its own, and this sandbox's kernel."""

import json
import os
import pwd
import socket
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest
from json_schemas import parsed
from test_node_tunnels import declare

from netplan.reserved_ports import NONE, SETTING, Reserved
from partitiond import converge, port_reservation, status, teardown, verbs
from partitiond.context import Context
from partitiond.node_plan import Plan
from partitiond.port_reservation import Observed, deal, open_cases
from partitiond.state import InstanceState
from partitiond.tunnel_declarations import PartitionTunnels
from stunnel_mgr.model import Tunnel

SPAN = SETTING.with_name("ip_local_port_range")
IDLE = "mode = server\nlisten = {}\nconnect = 5000\nallow =\n"


@pytest.fixture(autouse=True)
def settings():
    before = [(path, path.read_text()) for path in (SPAN, SETTING)]
    SETTING.write_text("8080-8081\n")  # an operator's
    yield
    for path, text in before:
        path.write_text(text)


def reserved():
    return SETTING.read_text().strip()


def operators(port, partition="slappart0"):
    """Settings of a tunnel of the operator's that nobody may use yet: no stunnel is needed for it."""
    return {"partition": partition, "mode": "server", "listen": port, "connect": 5000, "allow": ""}


def planned(node):
    return verbs.plan(Context.of(node.load()))["operations"]


def apply(node, **options):
    outcome = verbs.apply(Context.of(node.load()), [], **options)
    assert (outcome["failures"], outcome["left"]) == ([], [])
    return outcome


def record(node):
    return node.state / "reserved-ports.json"


def test_no_outgoing_connection_gets_a_tunnels_port(bridge, node_config):
    node = node_config(2)
    apply(node)
    assert not record(node).exists()
    SPAN.write_text("20000 20003\n")
    declare(node, "slappart1", "in", IDLE.format(20001))
    (one,) = planned(node)
    assert one | {"reason": ""} == {
        "id": "ports/reserved",
        "resource": "ports",
        "action": "create",
        "partition": None,
        "before": "8080-8081",
        "after": "8080-8081,20001",
        "reason": "",
    }
    assert apply(node)["done"] == 1
    assert planned(node) == []
    assert apply(node)["done"] == 0
    assert record(node).stat().st_mode & 0o777 == 0o600
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with ExitStack() as stack:
            stack.enter_context(socket.create_server((host, 19999), family=family))
            clients = [stack.enter_context(socket.socket(family)) for _ in range(4)]
            for client in clients[:3]:
                client.connect((host, 19999))
            assert {client.getsockname()[1] for client in clients[:3]} == {20000, 20002, 20003}
            with pytest.raises(OSError, match="Cannot assign requested address"):
                clients[3].connect((host, 19999))
            stack.enter_context(socket.create_server((host, 20001), family=family))


def test_what_an_operator_reserved_stays(bridge, node_config, command):
    node = node_config(1)
    node.write(**{"tunnel a": operators(20001), "tunnel b": operators(8080)})
    apply(node)
    assert reserved() == "8080-8081,20001"
    SETTING.write_text("8080-8082,20001\n")
    assert planned(node) == []
    # the tunnel moves, and goes
    node.write(**{"tunnel a": operators(20002)})
    (one,) = planned(node)
    assert (one["action"], one["before"], one["after"]) == ("change", "8080-8082,20001", "8080-8082,20002")
    apply(node)
    assert reserved() == "8080-8082,20002"
    node.write(**{"tunnel a": dict.fromkeys(operators(0))})
    node.sections.pop("tunnel a")
    node.write()
    (one,) = planned(node)
    assert (one["action"], one["after"]) == ("remove", "8080-8082")
    apply(node)
    assert (reserved(), record(node).exists(), planned(node)) == ("8080-8082", False, [])
    # and teardown
    node.write(**{"tunnel a": operators(20001)})
    apply(node)
    assert reserved() == "8080-8082,20001"
    assert command("teardown", "-q", "-c", node.path).returncode == 0
    assert (reserved(), record(node).exists()) == ("8080-8082", False)


def test_a_stopped_partition_reserves_nothing_and_a_purge_takes_all_back(bridge, node_config):
    node = node_config(2, **{"tunnel a": operators(20001, "slappart1")})
    context = Context.of(node.load())
    verbs.apply(context, [])
    assert reserved() == "8080-8081,20001"
    context.store.save_instance(InstanceState("slappart1", life="stopped", wanted="stopped"))
    assert [one["action"] for one in planned(node) if one["resource"] == "ports"] == ["remove"]
    context.store.save_instance(InstanceState("slappart1", life="started", wanted="started"))
    assert teardown.run(context, purge=True).failures == []
    assert reserved() == "8080-8081"


def test_what_somebody_wrote_over_is_put_back(bridge, node_config):
    node = node_config(1, **{"tunnel a": operators(20001), "tunnel b": operators(20003)})
    apply(node)
    SETTING.write_text("20003,30000\n")  # as sysctl --system does, with a list of the operator's own
    (one,) = planned(node)
    assert (one["id"], one["before"], one["after"]) == ("ports/reserved", "20003,30000", "20001,20003,30000")
    apply(node)
    assert (reserved(), planned(node)) == ("20001,20003,30000", [])
    node.sections = {name: keys for name, keys in node.sections.items() if not name.startswith("tunnel")}
    node.write()
    apply(node)
    assert reserved() == "20003,30000"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"place": 1}', b"[]"])
def test_a_damaged_record_loses_nothing(bridge, node_config, caplog, content):
    node = node_config(1, **{"tunnel a": operators(20001)})
    apply(node)
    record(node).write_bytes(content)
    (one,) = planned(node)
    assert one["before"] == one["after"] == "8080-8081,20001"
    assert "reserved-ports.json is damaged" in caplog.text
    caplog.clear()
    apply(node)
    caplog.clear()
    assert (planned(node), caplog.text) == ([], "")
    node.sections.pop("tunnel a")
    node.write()
    apply(node)
    assert reserved() == "8080-8081,20001"  # nobody knows any more whose it is


def test_a_record_of_another_boot_makes_nothing_ours(bridge, node_config):
    node = node_config(1, **{"tunnel a": operators(20001)})
    apply(node)
    found = json.loads(record(node).read_bytes())
    record(node).write_text(json.dumps(found | {"place": "another boot/1"}))
    SETTING.write_text("20001\n")
    (one,) = planned(node)
    assert (one["action"], one["before"], one["after"]) == ("remove", "20001", "20001")
    apply(node)
    assert (reserved(), record(node).exists(), planned(node)) == ("20001", False, [])
    SETTING.write_text("\n")
    apply(node)
    assert (reserved(), record(node).exists()) == ("20001", True)


@pytest.mark.parametrize("saves", [0, 1])
def test_killed_between_the_writes(bridge, node_config, monkeypatch, saves):
    node = node_config(1, **{"tunnel a": operators(20001)})
    apply(node)
    node.write(**{"tunnel a": operators(20002)})
    seen, original = [], port_reservation._save

    def dies(config, kept):
        if len(seen) == saves:
            raise KeyboardInterrupt
        seen.append(kept)
        original(config, kept)

    with monkeypatch.context() as patched:
        patched.setattr(port_reservation, "_save", dies)
        with pytest.raises(KeyboardInterrupt):
            apply(node)
    assert reserved() == ("8080-8081,20001", "8080-8081,20002")[saves]
    (one,) = planned(node)
    assert (one["id"], one["after"]) == ("ports/reserved", "8080-8081,20002")
    apply(node)
    assert (reserved(), planned(node)) == ("8080-8081,20002", [])
    node.sections.pop("tunnel a")
    node.write()
    apply(node)
    assert (reserved(), record(node).exists()) == ("8080-8081", False)


def test_a_kernel_without_the_setting(bridge, node_config, monkeypatch, tmp_path):
    node = node_config(1, **{"tunnel a": operators(20001)})
    original = port_reservation.reserved_ports.observe
    monkeypatch.setattr(
        port_reservation.reserved_ports, "observe", lambda found: original(found, tmp_path / "missing")
    )
    apply(node)
    assert (reserved(), record(node).exists(), planned(node)) == ("8080-8081", False, [])
    assert status.node(Context.of(node.load()))["partitions"][0]["tunnels"] == ["slappart0/a"]


def test_a_setting_that_cannot_be_written_keeps_nobody_from_a_tunnel(bridge, node_config, monkeypatch):
    node = node_config(1, **{"tunnel a": operators(20001)})
    monkeypatch.setattr(port_reservation.reserved_ports, "_pieces", lambda _: [b"70000\n"])
    outcome = verbs.apply(Context.of(node.load()), [])
    assert [(one["resource"], one["code"]) for one in outcome["failures"]] == [
        ("ports/reserved", "network.sysctl")
    ]
    monkeypatch.undo()
    apply(node)
    assert reserved() == "8080-8081,20001"


def test_reserving_lets_the_next_look_pass_over_what_stays(bridge, node_config):
    """It is an operation of the whole node and about nobody's files."""
    node = node_config(3, **{"tunnel a": operators(20001)})
    context = Context.of(node.load())
    seen, whole = converge.look(context)
    assert [one.id for one in whole.ports] == ["ports/reserved"]
    done = Plan(ports=whole.ports, declared=whole.declared, published=whole.published)
    assert [one.id for one in converge._to_look_at(seen.node, done)] == ["slappart0"]


def test_tenants_leave_half_of_the_range(bridge, node_config, command):
    node = node_config(3)
    apply(node)
    SPAN.write_text("20000 20009\n")
    SETTING.write_text("20009\n")
    for index in range(3):
        for number in range(3):
            declare(node, f"slappart{index}", f"t{number}", IDLE.format(20000 + 3 * index + number))
    declare(node, "slappart0", "free", IDLE.format(4000))
    os.chown(node.instance / "slappart0" / "etc", pwd.getpwnam("slapuser0").pw_uid, 0)
    apply(node)
    # names are dealt in their order: free, t0, t1, t2
    assert reserved() == "4000,20000,20003-20004,20006,20009"
    answer = parsed(command("status", "--json", "-c", node.path))
    (line,) = [one for one in answer["node"]["open_cases"] if "outgoing connections" in one]
    assert all(f"slappart{index}/t2" in line for index in range(3))
    assert "slappart0/t0" not in line
    assert planned(node) == []


# --- dealing, without a node ------------------------------------------------------------------------------------------


def of(*ports_by_partition):
    """Partitions whose tunnels have these ports."""

    def tunnel(index, port):
        host = IPv4Address("10.0.0.1")
        name = f"p{index}/{port}"
        return Tunnel(name, str(port), f"p{index}", "server", host, port, host, 1, None, ())

    return [
        PartitionTunnels(None, tuple(tunnel(index, port) for port in ports))
        for index, ports in enumerate(ports_by_partition)
    ]


def names(dealt):
    return [one.name for one in dealt.left_out]


def test_dealing_is_fair():
    seen = Observed(Reserved(), range(100, 112))
    greedy = range(100, 112)
    assert deal(seen, of(greedy, (110,), (111,))).ports == {100, 101, 102, 103, 110, 111}
    assert deal(seen, of((), (110,), (111,), greedy)).ports == {100, 101, 102, 103, 110, 111}
    assert names(deal(seen, of((111,), range(100, 106)))) == ["p1/105"]


def test_what_costs_nothing():
    seen = Observed(Reserved(), range(100, 104))
    everywhere = (*range(1, 100), *range(104, 1000))
    dealt = deal(seen, of(everywhere, (100, 101, 102, 103)))
    assert dealt.ports == {*everywhere, 100, 101}
    assert names(dealt) == ["p1/102", "p1/103"]
    # the same port of two partitions costs once
    assert names(deal(seen, of((100, 101), (100, 101), (100,), (102,)))) == ["p0/101", "p1/101"]


def test_what_others_reserved_makes_the_room_smaller():
    others = frozenset((100, 101, 102, 9999))
    seen = Observed(Reserved(others=others), range(100, 108))
    dealt = deal(seen, of((102, 103), (104,), (105,)))
    assert dealt.ports == {102, 104, 105}
    assert names(dealt) == ["p0/103"]
    everything = Observed(Reserved(others=frozenset(range(100, 108))), range(100, 108))
    assert deal(everything, of((100, 107))).ports == {100, 107}


def test_one_line_however_many():
    assert open_cases(deal(Observed(Reserved(), range(100, 102)), of((100,)))) == []
    (line,) = open_cases(deal(Observed(Reserved(), range(100, 110)), of(range(100, 110))))
    assert "p0/105 (105)" in line
    (line,) = open_cases(deal(Observed(Reserved(), range(1000, 3000)), of(range(1000, 3000))))
    assert "and 995 other tunnels" in line
    assert len(line) < 400


def test_a_long_list_is_cut_in_the_plan():
    dealt = deal(Observed(Reserved(), range(10)), of(range(20, 4000, 2)))
    (one,) = port_reservation.plan(Observed(Reserved(), range(10)), dealt)
    assert one.after.endswith("… (1990 ports)")
    assert len(one.after) < 300
    assert one.wanted == dealt.ports
    assert port_reservation.plan(Observed(Reserved(ours=dealt.ports, others=NONE)), dealt) == ()
