"""Changes of tunnels under live sessions: who is cut, who goes on, what a bad configuration, a lost port or a crash costs."""

import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from network_scene import ip_lines
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from test_node_tunnels import LISTENER, as_user, declare, ipv6, pin, resource, until

from partitiond import (
    converge,
    event_reader,
    identities,
    instance_cleanup,
    metrics,
    tunnel_declarations,
    tunnel_process,
    tunnel_sessions,
    tunnel_status,
    tunnel_trial,
    tunnels,
    verbs,
)
from partitiond.context import Context
from partitiond.state import InstanceState
from partitiond.tunnel_lane import TunnelLane
from stunnel_mgr.identity import make_identity

ECHO = """
import socket, sys, threading
def serve(connection):
    with connection:
        while piece := connection.recv(65536):
            connection.sendall(piece)
with socket.create_server((sys.argv[1], 5000)) as listener:
    print("listening", flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
TALKER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as connection:
    for line in sys.stdin:
        try:
            connection.sendall(line.encode())
            answer = connection.recv(1000)
        except OSError as error:
            answer = repr(error).encode()
        print("same" if answer == line.encode() else f"other: {answer!r}", flush=True)
"""


class Talk:
    """A live session of a partition's user through its client's tunnel."""

    def __init__(self, user, address, port):
        self.process = subprocess.Popen(
            as_user(user, TALKER, address, port),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lives(self):
        """Whether a word comes back."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("word\n")
            self.process.stdin.flush()
        return self.process.stdout.readline() == "same\n"


class Scene:
    """A node: partition 0 serves, the others have clients of it."""

    def __init__(self, node):
        self.node = node
        self.context = Context.of(node.load())
        self.started = []
        verbs.apply(self.context, [])

    def anew(self):
        """Go on as another process would."""
        self.context = Context.of(self.node.load())

    def apply(self):
        outcome = verbs.apply(self.context, [])
        return outcome["failures"], outcome["left"], [one["name"] for one in outcome["refused"]]

    def server(self, name, port, *partitions, extra=""):
        allow = "\n ".join(pin(self.node, f"slappart{one}", "cert", "") for one in partitions)
        text = f"mode = server\nlisten = {port}\nconnect = 5000\nallow = {allow}\n{extra}"
        return declare(self.node, "slappart0", name, text)

    def client(self, partition, port=6000, to=4000, *, form="cert", extra=""):
        peer = pin(self.node, "slappart0", form, f"slappart{partition}")
        target = f"[{ipv6(self.node, 'slappart0')}]:{to}"
        text = f"mode = client\nlisten = {port}\nconnect = {target}\npeer = {peer}\n{extra}"
        return declare(self.node, f"slappart{partition}", f"out{port}", text)

    def serve(self):
        process = subprocess.Popen(as_user("slapuser0", ECHO, "10.0.0.2"), stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        assert process.stdout.readline() == "listening\n"

    def begin(self, partition, port=6000, network="10.0.0"):
        found = Talk(f"slapuser{partition}", f"{network}.{partition + 2}", port)
        self.started.append(found.process)
        return found

    def talk(self, partition, port=6000):
        found = self.begin(partition, port)
        assert found.lives()
        return found

    def directory(self, partition):
        return identities.directory_of(self.context.config, f"slappart{partition}")

    def events(self, name):
        found = event_reader.last(self.context.config.log_dir, 1000)
        return [one for one in found if one["event"] == name]

    def listed(self):
        return {one["name"]: one for one in tunnel_status.listing(self.context)["tunnels"]}

    def stunnels(self):
        """Process ids of the stunnels."""
        found = self.context.supervisor.processes()
        return {one.group: one.pid for one in found if one.group.endswith("-tunnel")}

    def end(self):
        self.context.meters.close()
        for process in self.started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


@pytest.fixture
def scene(bridge, node_config):
    made = Scene(node_config(4))
    made.serve()
    yield made
    made.end()


def test_a_revoked_peer_is_cut_and_nobody_else(scene):
    scene.server("db", 4000, 1, 2)
    scene.server("other", 4001, 2)
    scene.client(1)
    scene.client(2)
    scene.client(2, 6001, 4001)
    assert scene.apply() == ([], [], [])
    revoked, kept, elsewhere = scene.talk(1), scene.talk(2), scene.talk(2, 6001)
    stunnels = scene.stunnels()
    scene.server("db", 4000, 2)
    scene.anew()  # what is known of sessions is on the disk
    assert scene.apply() == ([], [], [])
    assert [revoked.lives(), kept.lives(), elsewhere.lives()] == [False, True, True]
    (cut,) = scene.events("tunnel.cut")
    assert (cut["resource"], cut["count"]) == ("tunnel/slappart0/db", 1)
    assert "was taken back" in cut["reason"]
    # and once more: a tunnel that is gone leaves nobody connected
    scene.server("db", 4000, 2).unlink()
    assert scene.apply() == ([], [], [])
    assert [kept.lives(), elsewhere.lives()] == [False, True]
    assert scene.stunnels() == stunnels
    assert scene.apply() == ([], [], [])


def test_a_client_leaves_a_server_that_it_trusts_no_more(scene):
    scene.server("db", 4000, 1)
    scene.server("also", 4001, 1)
    scene.client(1)
    scene.client(1, 6001, 4001)
    assert scene.apply() == ([], [], [])
    left, kept = scene.talk(1), scene.talk(1, 6001)
    stranger = make_identity("slappart0").certificate_der_base64
    path = scene.client(1)
    published = resource(scene.node, "slappart0")["certificate"]
    path.write_text(path.read_text().replace(published, stranger))
    assert scene.apply() == ([], [], [])
    assert [left.lives(), kept.lives()] == [False, True]


@pytest.mark.parametrize("where", ["before the signal", "before the cut"])
def test_a_crash_loses_no_revocation(scene, monkeypatch, where):
    scene.server("db", 4000, 1, 2)
    scene.client(1)
    scene.client(2)
    assert scene.apply() == ([], [], [])
    revoked, kept = scene.talk(1), scene.talk(2)
    scene.server("db", 4000, 2)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if where == "before the cut":
            patch.setattr(tunnel_sessions, "cut", killed)
        else:
            patch.setattr(tunnel_process.Carrier, "_tell", killed)
        with pytest.raises(Killed):
            scene.apply()
    assert [revoked.lives(), kept.lives()] == [True, True]
    scene.anew()
    assert scene.apply() == ([], [], [])
    assert [revoked.lives(), kept.lives()] == [False, True]


def test_what_stunnel_would_not_take_touches_nothing(scene):
    scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    talk = scene.talk(1)
    stunnels = scene.stunnels()
    key = scene.directory(0) / identities.SLOTS[0][1]
    good, before = key.read_bytes(), (scene.directory(0) / "stunnel.conf").read_text()
    key.write_bytes(b"damaged\n")
    scene.server("more", 4001, 1)
    failures, left, refused = scene.apply()
    assert [one["code"] for one in failures] == ["tunnel.trial"]
    assert "PrivateKey" in failures[0]["message"]
    assert ([one["id"] for one in left], refused) == (["tunnels/slappart0"], [])
    assert (scene.directory(0) / "stunnel.conf").read_text() == before
    assert talk.lives()
    assert scene.talk(1).lives()
    key.write_bytes(good)
    assert scene.apply() == ([], [], [])
    assert talk.lives()
    assert scene.stunnels() == stunnels
    assert scene.listed()["slappart0/more"]["state"] == "up"


def test_one_that_is_stopped_keeps_nobody_waiting(scene):
    scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    pid = scene.stunnels()["slappart0-tunnel"]
    os.kill(pid, signal.SIGSTOP)
    try:
        scene.server("more", 4001, 1)
        failures, _, _ = scene.apply()
        assert [one["code"] for one in failures] == ["tunnel.reload"]
        assert "somebody has stopped it" in failures[0]["message"]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert scene.apply() == ([], [], [])
    assert scene.listed()["slappart0/more"]["state"] == "up"
    assert scene.stunnels()["slappart0-tunnel"] == pid


def free_until_it_is_tried(patch, port):
    """Let a taken port look free to the plan, until that was carried out."""
    looked, original = tunnel_declarations._port_is_free, tunnel_process.Carrier.run
    patch.setattr(tunnel_declarations, "_port_is_free", lambda one: one.listen_port == port or looked(one))

    def run(self, operations):
        original(self, operations)
        patch.setattr(tunnel_declarations, "_port_is_free", looked)

    patch.setattr(tunnel_process.Carrier, "run", run)


@pytest.mark.parametrize("runs", [True, False])
def test_a_port_that_is_taken_in_the_last_moment_costs_that_tunnel_alone(scene, monkeypatch, runs):
    scene.client(1)
    if runs:
        scene.server("db", 4000, 1)
        assert scene.apply() == ([], [], [])
        talk = scene.talk(1)
    squatter = subprocess.Popen(as_user("slapuser3", LISTENER, 4777), stdout=subprocess.PIPE, text=True)
    scene.started.append(squatter)
    assert squatter.stdout.readline() == "listening\n"
    scene.server("db", 4000, 1)
    scene.server("taken", 4777, 1)
    with monkeypatch.context() as patch:
        found = scene.context
        free_until_it_is_tried(patch, 4777)
        failures, left, refused = scene.apply()
    assert found is scene.context
    assert (failures, left, refused) == ([], [], ["slappart0/taken"])
    assert scene.talk(1).lives()
    if runs:
        assert talk.lives()
    squatter.kill()
    squatter.wait()
    assert scene.apply() == ([], [], [])
    assert scene.listed()["slappart0/taken"]["state"] == "up"


def test_what_stunnel_reads_by_itself_meanwhile_is_no_answer(scene, monkeypatch):
    """Where a port is taken it reads its file again after 10 ms, which may be once more the one from before."""
    scene.client(1)
    scene.server("db", 4000, 1)
    assert scene.apply() == ([], [], [])
    squatter = subprocess.Popen(as_user("slapuser3", LISTENER, 4777), stdout=subprocess.PIPE, text=True)
    scene.started.append(squatter)
    assert squatter.stdout.readline() == "listening\n"
    scene.server("taken", 4777, 1)
    log = tunnels.log_file(scene.context.config, converge.observe(scene.context).node.partitions[0])
    again = tunnel_process.Carrier._again
    later = []

    def late(self, change):
        known = log.read_text().count("Binding service [taken] failed")
        until(lambda: log.read_text().count("Binding service [taken] failed") > known)
        later.append(threading.Timer(0.3, again, (self, change)))
        later[0].start()

    with monkeypatch.context() as patch:
        free_until_it_is_tried(patch, 4777)
        patch.setattr(tunnel_process.Carrier, "_again", late)
        failures, left, refused = scene.apply()
    (timer,) = later
    timer.join()
    assert (failures, left, refused) == ([], [], ["slappart0/taken"])
    assert scene.talk(1).lives()


def short_lived(scene, partition, *, ends_in, lasts=timedelta(days=30)):
    """Let a partition have a certificate that ends soon, as after years."""
    now = datetime.now(UTC)
    identity = make_identity(f"slappart{partition}", now=now + ends_in - lasts, lifetime=lasts)
    directory, user = scene.directory(partition), pwd.getpwnam(f"slapuser{partition}")
    for name, content, mode, owner in zip(
        identities.SLOTS[0], (identity.certificate_pem, identity.key_pem), (0o444, 0o400), (0, user.pw_uid),
        strict=True,
    ):  # fmt: skip
        (directory / name).unlink()
        (directory / name).write_bytes(content)
        (directory / name).chmod(mode)
        os.chown(directory / name, owner, user.pw_gid)
    return identity


def test_an_identity_is_renewed_with_overlap(scene, monkeypatch):
    for partition in (0, 1):
        short_lived(scene, partition, ends_in=timedelta(days=5))
    assert scene.apply() == ([], [], [])
    old = resource(scene.node, "slappart0")
    assert old["certificate_next"]
    assert old["certificate_next_fingerprint"] != old["certificate_fingerprint"]
    allow = pin(scene.node, "slappart1", "sha256", "")
    declare(scene.node, "slappart0", "db", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {allow}\n")
    scene.client(1, form="sha256")
    # who does as told and takes both, on whatever node
    both = f"cert:{old['certificate']}\n cert:{old['certificate_next']}"
    path = scene.client(2)
    path.write_text(path.read_text().replace(f"cert:{old['certificate']}", both))
    allow += f"\n {pin(scene.node, 'slappart2', 'cert', '')}"
    declare(scene.node, "slappart0", "db", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {allow}\n")
    assert scene.apply() == ([], [], [])
    begun = [scene.talk(1), scene.talk(2)]
    stunnels = scene.stunnels()
    later = datetime.now(UTC) + timedelta(days=3)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return later.astimezone(tz)

    with monkeypatch.context() as patch:
        patch.setattr(identities, "datetime", Later)
        assert scene.apply() == ([], [], [])
        new = resource(scene.node, "slappart0")
        assert (new["certificate"], new["certificate_next"]) == (old["certificate_next"], "")
        assert scene.listed()["slappart0/db"]["certificate"]["fingerprint"] == new["certificate_fingerprint"]
        assert all(talk.lives() for talk in begun)
        # new ones: by the old name of the partition, and by both certificates
        assert scene.talk(1).lives()
        assert scene.talk(2).lives()
        assert all(talk.lives() for talk in begun)
        assert scene.stunnels() == stunnels
        assert scene.apply() == ([], [], [])
    assert scene.events("tunnel.cut") == []


@pytest.fixture
def with_pairs(bridge, node_config, tmp_path):
    node = node_config(3)
    repository = tmp_path / "pairs"
    repository.mkdir(mode=0o711)
    node.write(slapos={"certificate_repository_path": repository})
    made = Scene(node)
    made.repository = repository
    made.serve()
    yield made
    made.end()


def measured(scene, name, **labels):
    """One value of ``/metrics``."""
    text = metrics.everything(scene.context, metrics.Tally())
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name == f"partitiond_tunnel_{name}" and sample.labels.items() >= labels.items():
                return sample.value
    raise AssertionError(text.decode())


def give_pair(scene, partition, identity):
    user = pwd.getpwnam(f"slapuser{partition}")
    for name, content in (("key", identity.key_pem), ("crt", identity.certificate_pem)):
        path = scene.repository / f"slappart{partition}.{name}"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(0o400)
        os.chown(path, user.pw_uid, user.pw_gid)


def test_the_pair_of_the_master_and_its_renewal(with_pairs):
    scene = with_pairs
    scene.server("own", 4001, 1)
    scene.server("db", 4000, 1, extra="identity = master\n")
    assert scene.apply() == ([], [], ["slappart0/db"])
    listed = scene.listed()
    assert "gave no pair" in listed["slappart0/db"]["reason"]
    assert listed["slappart0/own"]["state"] == "up"
    given = make_identity("COMP-1-slappart0", lifetime=timedelta(days=20))
    give_pair(scene, 0, given)
    scene.client(1, 6001, 4001)
    path = scene.client(1)
    published = resource(scene.node, "slappart0")["certificate"]
    path.write_text(path.read_text().replace(published, given.certificate_der_base64))
    assert scene.apply() == ([], [], [])
    row = scene.listed()["slappart0/db"]
    assert (row["identity"], row["certificate"]["fingerprint"]) == ("master", given.fingerprint)
    assert any("its own certificate" in one and "ends on" in one for one in row["warnings"])
    lane = TunnelLane(lambda _pids: None)
    for _ in range(2):  # told once
        lane.run(scene.context)
    told = {one["resource"]: one["message"] for one in scene.events("tunnel.expiring")}
    assert len(scene.events("tunnel.expiring")) == 2
    assert f"its own certificate, {given.fingerprint}, ends on" in told["tunnel/slappart0/db"]
    assert f"a certificate that it allows, {given.fingerprint}, ends on" in told["tunnel/slappart1/out6000"]
    assert measured(scene, "up", tunnel="db", mode="server") == 1
    assert measured(scene, "up", tunnel="own") == 1
    ends = measured(scene, "certificate_not_after_timestamp_seconds", tunnel="db")
    assert ends == given.not_after.timestamp()
    (key,) = scene.directory(0).glob("master-*.key")
    assert (key.stat().st_uid, key.stat().st_mode & 0o777) == (5000, 0o400)
    talk, other = scene.talk(1), scene.talk(1, 6001)
    assert measured(scene, "sessions", partition="slappart0", tunnel="db") == 1
    # what cannot be used changes nothing
    (scene.repository / "slappart0.key").write_bytes(b"damaged")
    assert scene.apply() == ([], [], [])
    row = scene.listed()["slappart0/db"]
    assert (row["state"], row["certificate"]["fingerprint"]) == ("up", given.fingerprint)
    assert any("the key is damaged" in one for one in row["warnings"])
    assert [talk.lives(), other.lives(), scene.talk(1).lives()] == [True, True, True]
    renewed = make_identity("COMP-1-slappart0")
    give_pair(scene, 0, renewed)
    path.write_text(path.read_text().replace(given.certificate_der_base64, renewed.certificate_der_base64))
    assert scene.apply() == ([], [], [])
    assert scene.listed()["slappart0/db"]["certificate"]["fingerprint"] == renewed.fingerprint
    assert scene.talk(1).lives()
    assert other.lives()
    assert [one.name for one in scene.directory(0).glob("master-*.key")] != [key.name]
    assert len(list(scene.directory(0).glob("master-*"))) == 2
    talk.process.kill()


def test_sessions_are_told_with_who_it_was(scene):
    scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    talk = scene.talk(1)
    talk.process.stdin.close()
    assert talk.process.wait(10) == 0
    watched = {}
    lane = TunnelLane(watched.update)
    with socket.create_connection((ipv6(scene.node, "slappart0"), 4000), timeout=10) as plain:
        plain.sendall(b"no TLS at all\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            plain.recv(100)

    def told():
        lane.run(scene.context)
        return scene.events("tunnel.rejected") and len(scene.events("tunnel.session")) == 2

    until(told)
    served = next(one for one in scene.events("tunnel.session") if one["partition"] == "slappart0")
    assert (served["resource"], served["bytes_in"], served["bytes_out"]) == ("tunnel/slappart0/db", 5, 5)
    assert served["certificate"].startswith("CN=slappart1, serialNumber=")
    assert served["peer"].startswith(f"[{ipv6(scene.node, 'slappart1')}]:")
    (rejected,) = scene.events("tunnel.rejected")
    assert rejected["reason"] == "no_tls"
    assert set(watched) == {""}  # of the end of a stunnel supervisord tells itself
    assert json.loads((scene.directory(0) / tunnel_sessions.FILE).read_text())["reader"]["sessions"] == []


def test_tunnels_are_down_while_their_partition_is_stopped(scene):
    scene.server("db", 4000, 1)
    scene.server("other", 4001, 2)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    talk = scene.talk(1)
    scene.context.store.save_instance(InstanceState("slappart0", "stopped", wanted="stopped"))
    assert scene.apply() == ([], [], [])
    assert not talk.lives()
    found = scene.listed()
    assert (found["slappart0/db"]["state"], found["slappart0/db"]["reason"]) == (
        "down",
        "its partition is stopped",
    )
    assert found["slappart1/out6000"]["state"] == "up"
    assert set(scene.stunnels()) == {"slappart1-tunnel"}
    left = {path.name for path in scene.directory(0).iterdir()}
    assert left == {"certificate.pem", "key.pem"}
    before = resource(scene.node, "slappart0")["certificate"]
    scene.context.store.save_instance(InstanceState("slappart0", "started", wanted="started"))
    assert scene.apply() == ([], [], [])
    assert resource(scene.node, "slappart0")["certificate"] == before
    assert scene.talk(1).lives()


def test_a_destroyed_partition_is_somebody_else_afterwards(scene):
    scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    talk = scene.talk(1)
    before = resource(scene.node, "slappart0")["certificate"]
    scene.context.store.save_instance(InstanceState("slappart0", "destroying", wanted="destroyed"))
    instance_cleanup.clean(scene.context, scene.context.node, scene.context.node.partitions[0])
    scene.context.store.save_instance(InstanceState("slappart0", "free"))
    assert not talk.lives()
    assert list(scene.directory(0).iterdir()) == []
    assert scene.apply() == ([], [], [])
    assert resource(scene.node, "slappart0")["certificate"] != before
    assert "slappart0/db" not in scene.listed()
    # who trusted the one before does not trust the one that has its place
    scene.server("db", 4000, 1)
    scene.serve()
    assert scene.apply() == ([], [], [])
    assert not scene.begin(1).lives()


def test_tunnels_follow_the_addresses(scene):
    scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    before, stunnels = ipv6(scene.node, "slappart0"), scene.stunnels()
    ip_lines("address add 2001:db8:2::2/64 dev br0 nodad", "address delete 2001:db8:1::2/64 dev br0")
    scene.node.write(slapformat={"ipv4_local_network": "10.7.0.0/16"})
    scene.anew()
    assert scene.apply() == ([], [], [])
    assert ipv6(scene.node, "slappart0") != before
    scene.started.append(
        subprocess.Popen(as_user("slapuser0", ECHO, "10.7.0.2"), stdout=subprocess.PIPE, text=True)
    )
    assert scene.started[-1].stdout.readline() == "listening\n"
    scene.client(1)
    assert scene.apply() == ([], [], [])
    assert scene.stunnels() == stunnels
    found = scene.listed()
    assert found["slappart0/db"]["listen"] == f"[{ipv6(scene.node, 'slappart0')}]:4000"
    assert found["slappart1/out6000"]["listen"] == "10.7.0.3:6000"
    assert {one["state"] for one in found.values()} == {"up"}
    assert scene.begin(1, network="10.7.0").lives()


def test_who_began_before_the_tunnel_moved_is_cut_all_the_same(scene):
    scene.server("db", 4000, 1, 2)
    scene.client(1)
    scene.client(2)
    assert scene.apply() == ([], [], [])
    revoked, kept = scene.talk(1), scene.talk(2)
    scene.server("db", 4001, 1, 2)
    # who has its place now is not charged with what it left
    scene.server("after", 4000, 1, 2)
    assert scene.apply() == ([], [], [])
    assert [revoked.lives(), kept.lives()] == [True, True]
    newer = scene.talk(1)  # through "after"
    scene.server("db", 4001, 2)
    assert scene.apply() == ([], [], [])
    assert [revoked.lives(), kept.lives(), newer.lives()] == [False, True, True]
    scene.server("db", 4001, 2).unlink()
    assert scene.apply() == ([], [], [])
    assert [kept.lives(), newer.lives()] == [False, True]


def test_of_a_blocked_tunnel_sessions_are_cut_too(scene):
    scene.server("db", 4000, 1, 2)
    scene.server("other", 4002, 1)
    scene.client(1)
    scene.client(2)
    assert scene.apply() == ([], [], [])
    revoked, kept = scene.talk(1), scene.talk(2)
    squatter = subprocess.Popen(as_user("slapuser3", LISTENER, 4777), stdout=subprocess.PIPE, text=True)
    scene.started.append(squatter)
    assert squatter.stdout.readline() == "listening\n"
    scene.server("db", 4777, 1, 2)
    assert scene.apply() == ([], [], ["slappart0/db"])
    assert [revoked.lives(), kept.lives()] == [True, True]
    scene.server("db", 4777, 2)
    assert scene.apply() == ([], [], ["slappart0/db"])
    assert [revoked.lives(), kept.lives()] == [False, True]
    assert verbs.plan(scene.context)["operations"] == []
    scene.server("db", 4777, 2).unlink()
    assert scene.apply() == ([], [], [])
    assert not kept.lives()


def test_a_peer_that_is_gone_costs_nobody_else(scene):
    names = "\n ".join(pin(scene.node, f"slappart{one}", "sha256", "") for one in (1, 2))
    declare(scene.node, "slappart0", "db", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {names}\n")
    scene.client(1)
    assert scene.apply() == ([], [], [])
    talk, old = scene.talk(1), resource(scene.node, "slappart2")["certificate_fingerprint"]
    # its user may change the mode of its key, which is set back
    (scene.directory(2) / identities.SLOTS[0][1]).chmod(0o600)
    assert scene.apply() == ([], [], [])
    assert resource(scene.node, "slappart2")["certificate_fingerprint"] == old
    assert (scene.directory(2) / identities.SLOTS[0][1]).stat().st_mode & 0o777 == 0o400
    for name in identities.SLOTS[0]:
        (scene.directory(2) / name).unlink()
    assert scene.apply() == ([], [], [])
    row = scene.listed()["slappart0/db"]
    assert row["state"] == "up"
    assert any(old in one and "no partition of this node" in one for one in row["warnings"])
    assert [talk.lives(), scene.talk(1).lives()] == [True, True]


def test_a_declaration_that_is_being_written_takes_nothing_down(scene):
    path = scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    talk = scene.talk(1)
    good = path.read_text()
    path.write_text("")
    assert scene.apply() == ([], [], ["slappart0/db"])
    assert [talk.lives(), scene.talk(1).lives()] == [True, True]
    path.write_text(good)
    assert scene.apply() == ([], [], [])
    # what stays so is refused, and nobody may come any more; who is there is let be while another tunnel keeps stunnel
    scene.server("other", 4001, 1)
    assert scene.apply() == ([], [], [])
    path.write_text("")
    os.utime(path, (0, 0))
    assert scene.apply() == ([], [], ["slappart0/db"])
    assert [talk.lives(), scene.begin(1).lives()] == [True, False]
    scene.server("db", 4000, 2)
    assert scene.apply() == ([], [], [])
    assert not talk.lives()


def test_a_trial_leads_nowhere(scene, monkeypatch):
    """It can be reached by everybody on 127.0.0.1 while it lasts."""
    scene.server("db", 4000, 1)
    scene.client(1)
    assert scene.apply() == ([], [], [])
    heard = []
    original = tunnel_trial._reason

    def reason(trial, process, deadline):
        found = original(trial, process, deadline)
        if trial.partition.id == "slappart1":
            text = (scene.directory(1) / "trial.conf").read_text()
            assert "accept = 127.0.0.1:0\nconnect = 127.0.0.1:1\n" in text
            assert "local =" not in text
            for place in places(process.pid):
                try:
                    with socket.create_connection(place, timeout=5) as there:
                        there.sendall(b"word")
                        heard.append(there.recv(10))
                except ConnectionError:
                    heard.append(b"")
        return found

    monkeypatch.setattr(tunnel_trial, "_reason", reason)
    scene.client(1, 6001)
    assert scene.apply() == ([], [], [])
    assert heard
    assert set(heard) <= {b""}


def places(pid):
    """Where a process listens."""
    inodes = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        ("127.0.0.1", int(row[1].partition(":")[2], 16))
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in inodes
    ]
