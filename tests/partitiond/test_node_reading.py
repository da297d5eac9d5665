"""The control socket as each kind of user sees it: real users, real credentials, hostile ones too."""

import contextlib
import grp
import json
import os
import pwd
import select
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from accounting.ledger import Ledger
from accounting.model import Pass, TrafficReading
from partitiond import api, bounded_http, control, converge, execute, metrics, peers, privacy
from partitiond.context import Context
from partitiond.metering import ledger_path
from partitiond.state import InstanceState

OTHER = 4999
MEMBERS = 4998

# sends each request on a connection of its own, and says how each was answered
ASK = """
import contextlib, json, socket, sys
path, *targets = sys.argv[1:]
said = []
for target in targets:
    method, _, target = target.rpartition(" ")
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(30)
        channel.connect(path)
        with contextlib.suppress(BrokenPipeError):  # who is turned away may hear it before it speaks
            channel.sendall(f"{method or 'GET'} {target} HTTP/1.0\\r\\n\\r\\n".encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := channel.recv(65536):
                answer += piece
    head, _, body = answer.partition(b"\\r\\n\\r\\n")
    said.append((int(head.split()[1]) if head else 0, body.decode()))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def scene(module_node_config):
    node = module_node_config
    context = Context.of(node.load())
    outcome = converge.apply(context)
    assert not outcome.failures
    own, other = context.node.partitions[:2]
    context.store.save_instance(InstanceState(own.id, "started", "started", instance_guid="SOFTINST-1"))
    privacy.ensure(context, own)
    _meter(context, [(own, "SOFTINST-0"), (other, None)], 0)
    _meter(context, [(own, "SOFTINST-0"), (other, None)], 1000)  # of who was there before
    _meter(context, [(own, "SOFTINST-1"), (other, None)], 1300)
    for partition, event in (
        (own.id, "instance.failed"),
        (own.id, "instance.destroyed"),
        (own.id, "instance.started"),
        (other.id, "instance.started"),
        (None, "node.started"),
    ):
        context.events.record(event, f"{event} of {partition}", partition=partition)
    context.events.record("drift.found", "both", partitions=[own.id, other.id])
    context.meters._passes += 1
    verbs = {"/1/apply": lambda _: {"done": 0}, "/1/teardown": lambda _: {"done": 1}}
    made = api.Api(context, metrics.Tally(), verbs)
    path = node.root / "run" / "control.sock"
    with _serving(path, made.answer, peers.Judge(lambda: context.node)):
        yield SimpleNamespace(node=node, context=context, own=own, other=other, path=path, api=made)
    context.meters.close()


@contextlib.contextmanager
def _serving(path, answer, judge):
    server = control.serve(path, answer, judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        path.unlink()


def _meter(context, owned, octets):
    traffic = [
        TrafficReading(item.id, str(item.ipv6), "ipv6", "remote", "boot/1", octets, octets, octets, octets)
        for item, _ in owned
    ]
    with Ledger(ledger_path(context.config.state_dir)) as ledger:
        ledger.record(Pass(time.time(), {item.id: guid for item, guid in owned}, tuple(traffic)))


@pytest.fixture(autouse=True)
def full_purses(scene):
    scene.api._paces._purses.clear()


def ask(scene, uid, *targets, groups=""):
    """What a user is answered, as (status, JSON or text)."""
    switch = ["--reuid", str(uid), "--regid", str(uid)]
    switch += ["--groups", groups] if groups else ["--clear-groups"]
    line = ["/usr/bin/setpriv", *switch, sys.executable, "-I", "-c", ASK, str(scene.path), *targets]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [
        (status, json.loads(body) if body.startswith(("{", "[")) else body)
        for status, body in json.loads(done.stdout)
    ]


def samples(text):
    return [one for family in text_string_to_metric_families(text) for one in family.samples]


def test_a_partitions_user_sees_its_own(scene):
    own = scene.own
    asked = ask(scene, own.uid, f"/1/partitions/{own.id}", "/1/status", "/1/events", "/1/node")
    (_, item), (_, status), (_, events), (_, node) = asked
    assert [code for code, _ in asked] == [200] * 4
    assert (item["id"], item["instance_guid"], item["ipv6"]) == (own.id, "SOFTINST-1", str(own.ipv6))
    assert status == {"node": {"computer_id": "COMP-1"}, "partitions": [item]}
    assert [event["event"] for event in events["events"]] == ["instance.started"], (
        "of its own time, and no others"
    )
    assert node["memory_total_bytes"] > 0


def test_its_usage_is_that_of_its_instance(scene):
    own = scene.own
    answers = ask(
        scene,
        own.uid,
        "/1/usage",
        "/1/usage?period=month&last=1",
        f"/1/usage?partition={own.id}&from=yesterday",
        f"/1/usage?partition={scene.other.id}",
    )
    assert [code for code, _ in answers] == [200, 200, 200, 403]
    for value in (answers[0][1], answers[1][1]["periods"][0], answers[2][1]):
        (item,) = value["partitions"]
        assert (item["id"], item["instance_guid"]) == (own.id, "SOFTINST-1")
        assert [one["bytes_in"] for one in item["addresses"]] == [300]


def test_nothing_is_said_of_others(scene):
    others = (
        f"/1/partitions/{scene.other.id}",
        "/1/partitions/nothing",
        "/1/partitions/",
        "/1/partitions/..%2f",
    )
    answers = ask(scene, scene.own.uid, *others, f"/1/events?partition={scene.other.id}")
    assert {code for code, _ in answers} == {403}
    assert len({body["message"] for _, body in answers}) == 1, "whether there is one makes no difference"
    everybody = ask(
        scene, OTHER, f"/1/partitions/{scene.own.id}", "/1/status", "/1/events", "/1/usage", "/1/node"
    )
    assert [code for code, _ in everybody] == [403, 403, 403, 403, 200]


def test_only_root_changes_the_node_and_members_apply(scene):
    verbs = ("POST /1/apply", "POST /1/teardown", "POST /1/sync", "POST /1/nothing")
    for uid in (scene.own.uid, OTHER):
        assert [code for code, _ in ask(scene, uid, *verbs)] == [403] * 4
    assert [code for code, _ in ask(scene, 0, *verbs)] == [200, 200, 404, 404]


def test_members_of_the_group(scene):
    """By a supplementary group, by the primary one, and by one among more than Python's own getsockopt can tell."""
    subprocess.run(["/usr/sbin/groupadd", "--gid", str(MEMBERS), peers.GROUP], check=True)
    try:
        many = ",".join(map(str, (*range(30000, 30600), MEMBERS)))
        for uid, groups in ((OTHER, str(MEMBERS)), (MEMBERS, ""), (OTHER, many)):
            verbs = ("/1/status", f"/1/partitions/{scene.other.id}", "POST /1/apply", "POST /1/teardown")
            assert [code for code, _ in ask(scene, uid, *verbs, groups=groups)] == [200, 200, 200, 403]
        assert ask(scene, OTHER, "/1/status", groups="4997")[0][0] == 403
    finally:
        subprocess.run(["/usr/sbin/groupdel", peers.GROUP], check=True)
    with pytest.raises(KeyError):
        grp.getgrnam(peers.GROUP)


def test_metrics_by_who_asks(scene):
    ((code, own),) = ask(scene, scene.own.uid, "/metrics")
    assert code == 200
    named = {one.labels.get("partition") for one in samples(own)}
    assert named == {scene.own.id, None}
    assert {one.name for one in samples(own) if "partition" not in one.labels} == {
        one.name for one in samples(own) if one.name.startswith("partitiond_node_")
    }
    ((_, node),) = ask(scene, OTHER, "/metrics")
    assert node.startswith("# HELP partitiond_node_")
    assert {one.name.startswith("partitiond_node_") for one in samples(node)} == {True}
    ((_, everything),) = ask(scene, 0, "/metrics")
    name = "partitiond_partition_network_receive_bytes_total"
    labels = {"partition": scene.own.id, "address": str(scene.own.ipv6), "family": "ipv6", "scope": "remote"}
    found = [one for one in samples(everything) if one.name == name]
    assert {one.labels["partition"] for one in found} == {scene.own.id, scene.other.id}
    (one,) = [one for one in found if one.labels == labels]
    assert one.value == 1300, "of a partition, whoever had it: totals never fall"


def test_wrong_words(scene):
    targets = (
        "/1/usage?period=year",
        "/1/usage?last=3",
        "/1/usage?until=now",
        "/1/events?limit=0",
        "/1/events?limit=²",
        "/1/events?limit=99999999999999999999",
        "/1/nothing",
        "DELETE /1/status",
    )
    assert [code for code, _ in ask(scene, 0, *targets)] == [400] * 6 + [404, 501]
    own = ask(scene, scene.own.uid, "/1/usage?period=day&last=101", "/1/events?limit=1001")
    assert [code for code, _ in own] == [400, 400]
    assert "100 at most" in own[0][1]["hint"]


def test_who_asks_for_much_at_once_waits_for_itself_and_nobody_else_does(monkeypatch):
    """Reads of the ledger and logs go one at a time: of a tenant with many of them one at most comes before another's."""
    lane, order, pauses = api._SlowLane(), [], []
    monkeypatch.setattr(api.time, "sleep", pauses.append)
    begun, go = threading.Event(), threading.Event()

    def read(name):
        with lane.turn(name):
            order.append(name)
            begun.set()
            assert go.wait(20)

    def start(*names):
        made = [threading.Thread(target=read, args=(name,)) for name in names]
        for one in made:
            one.start()
        return made

    threads = start("greedy")
    assert begun.wait(20)
    threads += start(*["greedy"] * 4)
    threads += start("other", "third")
    end = time.monotonic() + 20
    while lane._waiting != {"other", "third"}:
        assert time.monotonic() < end
    go.set()
    for one in threads:
        one.join(20)
    assert order == ["greedy", "other", "third", *["greedy"] * 4]
    assert len(pauses) == 7


def test_who_asks_too_often_waits_and_nobody_else(scene):
    codes = [code for code, _ in ask(scene, scene.own.uid, *(["/1/node"] * 60))]
    assert codes[:30] == [200] * 30
    assert 429 in codes
    assert ask(scene, scene.other.uid, "/1/node")[0][0] == 200
    assert {code for code, _ in ask(scene, 0, *(["/1/node"] * 60))} == {200}


def test_looks_at_the_whole_node_are_shared(scene, monkeypatch):
    looks = []
    look = converge.observe

    def counted(*arguments, **options):
        looks.append(arguments)
        return look(*arguments, **options)

    monkeypatch.setattr(scene.api, "_looks", api._SharedLook(scene.context))
    monkeypatch.setattr(converge, "observe", counted)
    for item in (scene.own, scene.other):
        ask(scene, item.uid, *([f"/1/partitions/{item.id}", "/1/status"] * 5))
    assert len(looks) == 1


@contextlib.contextmanager
def connections(path, uid, count):
    """Connections of a user, who says nothing."""
    reader, writer = os.pipe()
    found = []
    for _ in range(count):
        channel = socket.socket(socket.AF_UNIX)
        found.append(channel)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(uid)
            os.setuid(uid)
            for channel in found:
                channel.connect(str(path))
            os.write(writer, b"x")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert os.waitpid(pid, 0)[1] == 0
        assert os.read(reader, 1) == b"x"
        yield found  # credentials are those of who connected
    finally:
        os.close(reader)
        for channel in found:
            channel.close()


def test_the_silent_hold_up_nobody(scene):
    """A tenant and others with no account fill what they may have; root, and another tenant, are answered at once."""
    before = threading.active_count()
    with (
        connections(scene.path, scene.own.uid, 100) as tenants,
        connections(scene.path, OTHER, 100) as others,
    ):
        time.sleep(0.2)
        assert threading.active_count() - before <= 4 + 16
        began = time.monotonic()
        assert ask(scene, 0, "/1/node")[0][0] == 200
        assert ask(scene, scene.other.uid, "/1/node")[0][0] == 200
        assert time.monotonic() - began < 4, "shorter than the silent may be"
        assert ask(scene, scene.own.uid, "/1/node")[0][0] == 503
        turned_away = [one.recv(100).split()[1] for one in (tenants[50], others[50])]
        assert turned_away == [b"503"] * 2


def test_the_slow_are_cut_off(scene):
    """A byte now and then does not make the time longer."""
    short = bounded_http.Pool("slow", 4, "slow", 4, 0.5)
    path = scene.path.with_name("slow.sock")
    with (
        _serving(path, lambda *_: {"said": "x" * 10_000_000}, lambda _: (None, short)),
        socket.socket(socket.AF_UNIX) as slow,
        socket.socket(socket.AF_UNIX) as deaf,
    ):
        slow.connect(str(path))
        deaf.connect(str(path))
        deaf.sendall(b"GET / HTTP/1.0\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 20:
                slow.send(b"G")
                time.sleep(0.05)
        assert 0.4 < time.monotonic() - began < 10
        # it is over before anything is read: what was written by then lies in the socket
        ended = select.poll()
        ended.register(deaf, select.POLLHUP)
        assert ended.poll(20_000)
        received = 0
        with contextlib.suppress(OSError):
            while piece := deaf.recv(1 << 20):
                received += len(piece)
        assert received < 10_000_000


def test_what_is_said_is_bounded(scene):
    before = threading.active_count()
    for said in (
        b"GET /1/node HTTP/1.0\r\n" + b"X: y\r\n" * 1_000_000,
        b"G" * 10_000_000,
        b"POST /1/apply HTTP/1.0\r\nContent-Length: -1\r\n\r\n",
        b"POST /1/apply HTTP/1.0\r\nContent-Length: 1e3\r\n\r\n",
        b"POST /1/apply HTTP/1.0\r\nContent-Length: 99999999999\r\n\r\n",
        b"\0\xff\r\n\r\n",
    ):
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(20)
            channel.connect(str(scene.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                channel.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                answer = channel.recv(1000)
                assert not answer or answer.split()[1][:1] == b"4" or b"Error code: 4" in answer, answer
    assert ask(scene, 0, "/1/node")[0][0] == 200
    time.sleep(0.1)
    assert threading.active_count() == before


def test_from_private_namespaces(scene):
    line = privacy.launcher(scene.context.config, scene.own)
    asked = (str(scene.path), f"/1/partitions/{scene.own.id}", f"/1/partitions/{scene.other.id}", "/metrics")
    done = subprocess.run(
        [*line, "/usr/bin/python3", "-I", "-c", ASK, *asked],
        env={"PATH": execute.PATH},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [code for code, _ in json.loads(done.stdout)] == [200, 403, 200]


def test_of_the_software_user_nobody_knows(scene):
    uid = pwd.getpwnam(scene.context.config.software_user).pw_uid
    assert [code for code, _ in ask(scene, uid, "/1/node", "/1/status")] == [200, 403]
