"""``tunnel check`` on a node: real stunnels and services of the partitions' users, each outcome from its real cause."""

import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from json_schemas import parsed

from partitiond import identities, tunnel_check
from partitiond.context import Context
from stunnel_mgr.identity import make_identity

PATIENCE = 20.0

SERVICE = """
import selectors, socket, sys
address, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.create_server((address, port), family=family) as listener, selectors.DefaultSelector() as selector:
    selector.register(listener, selectors.EVENT_READ)
    print("listening", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            elif not (seen := key.fileobj.recv(65536)):
                selector.unregister(key.fileobj)
                key.fileobj.close()
            else:
                print("got", len(seen), flush=True)
"""


class Scene:
    """A node with its tenants, as their recipes and an operator deal with it."""

    def __init__(self, node, command):
        self.node, self.command, self.services = node, command, {}

    @staticmethod
    def user(partition):
        return pwd.getpwnam(f"slapuser{partition}")

    def published(self, partition):
        return json.loads((self.node.instance / f"slappart{partition}" / ".slapos-resource").read_bytes())

    def ipv6(self, partition):
        return next(one["addr"] for one in self.published(partition)["address_list"] if ":" in one["addr"])

    def certificate(self, partition):
        return f"cert:{self.published(partition)['certificate']}"

    def fingerprint(self, partition):
        return self.published(partition)["certificate_fingerprint"]

    def declare(self, partition, name, **keys):
        user = self.user(partition)
        directory = self.node.instance / f"slappart{partition}" / "etc" / "tunnel"
        for path in (directory.parent, directory):
            path.mkdir(exist_ok=True)
            os.chown(path, user.pw_uid, user.pw_gid)
        file = directory / f"{name}.cfg"
        file.write_text("[tunnel]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))
        os.chown(file, user.pw_uid, user.pw_gid)

    def server(self, partition, name, listen, *allowed, connect=5000):
        self.declare(
            partition, name, mode="server", listen=listen, connect=connect, allow="\n  ".join(("", *allowed))
        )

    def client(self, partition, name, listen, target, peer):
        self.declare(partition, name, mode="client", listen=listen, connect=target, peer=peer)

    def apply(self, status=0):
        done = self.command("apply", "-c", self.node.path)
        assert done.returncode == status, done.stdout + done.stderr

    def check(self, *arguments, status=None):
        done = self.command("tunnel", "check", "--json", "-c", self.node.path, *arguments)
        value = parsed(done)
        found = {one["name"]: one for one in value["checks"]}
        assert len(found) == len(value["checks"])
        expected = 0 if tunnel_check.healthy(value) else 3
        assert done.returncode == (expected if status is None else status), done.stderr
        return found

    def outcomes(self, *arguments, status=None):
        return {name: one["outcome"] for name, one in self.check(*arguments, status=status).items()}

    def serve(self, partition, address, port=5000):
        numbers = self.user(partition)
        switch = ["--reuid", str(numbers.pw_uid), "--regid", str(numbers.pw_gid), "--clear-groups"]
        words = ["/usr/bin/setpriv", *switch, sys.executable, "-I", "-c", SERVICE, address, str(port)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.services[partition] = process
        assert process.stdout.readline() == "listening\n"

    def end_service(self, partition):
        process = self.services.pop(partition)
        process.kill()
        said, _ = process.communicate()
        return said

    def stunnel(self, partition):
        """The process of a partition's stunnel."""
        name = f"slappart{partition}-tunnel"
        processes = Context.of(self.node.load()).supervisor.processes()
        return next(one.pid for one in processes if one.group == name)

    def stop_stunnel(self, partition):
        Context.of(self.node.load()).supervisor.stop_group(f"slappart{partition}-tunnel")

    @contextlib.contextmanager
    def frozen(self, partition):
        pid = self.stunnel(partition)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def be(self, partition, identity):
        """Give a partition another identity."""
        directory = self.node.state / "tunnels" / f"slappart{partition}"
        certificate, key = identities.SLOTS[0]
        user = self.user(partition)
        for name, content, mode in (
            (key, identity.key_pem, 0o400),
            (certificate, identity.certificate_pem, 0o444),
        ):
            (directory / name).unlink()
            (directory / name).write_bytes(content)
            (directory / name).chmod(mode)
            os.chown(directory / name, user.pw_uid if mode == 0o400 else 0, user.pw_gid)


@pytest.fixture
def scene(bridge, node_config, command):
    """Two partitions with a tunnel between them and a service, one that nobody knows, and one without a tunnel."""
    made = Scene(node_config(4), command)
    made.apply()
    made.server(0, "in", 4000, made.certificate(1))
    made.client(1, "out", 6000, f"[{made.ipv6(0)}]:4000", made.certificate(0))
    try:
        made.serve(0, "10.0.0.2")
        yield made
    finally:
        for partition in list(made.services):
            made.end_service(partition)


def test_all_is_well_and_nothing_is_said_to_the_service(scene):
    scene.apply()
    found = scene.check(status=0)
    assert {name: (one["outcome"], one["mode"], one["peer"]) for name, one in found.items()} == {
        "slappart0/in": ("ok", "server", scene.fingerprint(0)),
        "slappart1/out": ("ok", "client", scene.fingerprint(0)),
    }
    # the way in was gone by one who is allowed, and by way of the stunnel
    assert found["slappart0/in"]["message"] == "slappart1 is let through to the service"
    assert scene.end_service(0) == ""


def test_what_is_asked_for(scene):
    scene.apply()
    assert set(scene.check("slappart1/out", status=0)) == {"slappart1/out"}
    assert set(scene.check("slappart0", status=0)) == {"slappart0/in"}
    assert scene.check("slappart3", status=0) == {}
    for name in ("slappart9", "slappart0/no", "in", ""):
        done = scene.command("tunnel", "check", name, "--json", "-c", scene.node.path)
        error = parsed(done)["error"]
        assert (done.returncode, error["code"], error["resource"]) == (1, "tunnel.unknown", name)
        assert "tunnel list" in error["hint"]
    # options on either side, people's words, and nothing at all
    done = scene.command("-c", scene.node.path, "tunnel", "check")
    assert done.stdout.splitlines()[-1] == "2 of 2 tunnels work"
    assert "slappart1/out: ok: " in done.stdout
    assert (
        scene.command("tunnel", "check", "slappart3", "-c", scene.node.path).stdout
        == "no tunnel is declared\n"
    )
    assert scene.command("tunnel", "check", "-q", "-c", scene.node.path).stdout == ""


def test_what_the_other_side_may_be(scene):
    scene.client(1, "wrong", 6001, f"[{scene.ipv6(0)}]:4000", scene.certificate(2))
    scene.client(1, "nobody", 6002, f"[{scene.ipv6(0)}]:4999", scene.certificate(0))
    scene.client(1, "plain", 6003, f"[{scene.ipv6(2)}]:7000", scene.certificate(2))
    scene.client(2, "stranger", 6000, f"[{scene.ipv6(0)}]:4000", scene.certificate(0))
    # root gets there, the partition's user does not: private IPv4 is its owner's
    socket.create_connection(("10.0.0.2", 5000), timeout=PATIENCE).close()
    scene.client(2, "private", 6001, "10.0.0.2:5000", scene.certificate(0))
    scene.declare(0, "idle", mode="server", listen=4001, connect=5000, allow="")
    scene.declare(0, "bad", mode="server", listen=99999)
    scene.serve(2, scene.ipv6(2), 7000)
    scene.apply(3)
    found = scene.check(status=3)
    assert {name: one["outcome"] for name, one in found.items()} == {
        "slappart0/in": "ok",
        "slappart0/idle": "idle",
        "slappart0/bad": "refused_declaration",
        "slappart1/out": "ok",
        "slappart1/wrong": "wrong_server",
        "slappart1/nobody": "unreachable",
        "slappart1/plain": "no_tls",
        "slappart2/stranger": "refused_by_pin",
        "slappart2/private": "unreachable",
    }
    assert "etc/tunnel/bad.cfg:3: " in found["slappart0/bad"]["message"]
    assert found["slappart1/wrong"]["peer"] == scene.fingerprint(0)
    # names and reasons are tenants' words
    scene.declare(0, "\x1b[31mred\u202e", mode="\x1b[2J")
    shown = scene.command("tunnel", "check", "slappart0", "-c", scene.node.path).stdout
    assert "red" in shown
    assert all(one.isprintable() or one == "\n" for one in shown)
    assert all(one["hint"] for one in found.values() if one["outcome"] != "ok")
    # an idle tunnel is as it was declared
    assert scene.outcomes("slappart0/idle", status=0) == {"slappart0/idle": "idle"}
    text = scene.command("tunnel", "check", "slappart2/stranger", "-c", scene.node.path)
    first, second, last = text.stdout.splitlines()
    assert first.startswith("slappart2/stranger: refused by pin: ")
    assert "the other side says: " in first
    assert second.startswith("    next: the far end must allow")
    assert (last, text.returncode) == ("0 of 1 tunnels work", 3)


@pytest.mark.full
def test_what_may_be_down(scene):
    scene.apply()
    said = scene.end_service(0)
    assert said == ""
    assert scene.outcomes() == {"slappart0/in": "service_down", "slappart1/out": "service_down"}
    scene.serve(0, "10.0.0.2")
    with scene.frozen(0):
        assert scene.outcomes() == {"slappart0/in": "stunnel_fails", "slappart1/out": "no_tls"}
    with scene.frozen(1):
        assert scene.outcomes() == {"slappart0/in": "ok", "slappart1/out": "stunnel_fails"}
    scene.stop_stunnel(0)
    assert scene.outcomes() == {"slappart0/in": "listener_down", "slappart1/out": "unreachable"}
    scene.stop_stunnel(1)
    assert scene.outcomes()["slappart1/out"] == "listener_down"
    # in its place something of the partition's own that says nothing
    scene.end_service(0)
    scene.serve(0, scene.ipv6(0), 4000)
    assert scene.outcomes()["slappart0/in"] == "stunnel_fails"


@pytest.mark.full
def test_pins_that_come_and_go(scene):
    scene.apply()
    # declared, and not loaded yet
    scene.server(0, "in", 4000, scene.certificate(2))
    found = scene.check()
    assert found["slappart0/in"]["outcome"] == "stunnel_fails"
    assert "slappart2" in found["slappart0/in"]["message"]
    scene.apply()
    assert scene.outcomes() == {"slappart0/in": "ok", "slappart1/out": "refused_by_pin"}
    # nobody of this node is allowed: the server's own side says what it can
    stranger = make_identity("elsewhere")
    scene.server(0, "in", 4000, f"cert:{stranger.certificate_der_base64}")
    scene.apply()
    found = scene.check("slappart0")
    assert found["slappart0/in"]["outcome"] == "ok"
    assert "so does the service behind it" in found["slappart0/in"]["message"]


def test_certificates_that_are_others_or_ran_out(scene):
    scene.apply()
    old = make_identity("slappart0", now=datetime.now(UTC) - timedelta(days=9), lifetime=timedelta(days=1))
    scene.be(0, old)
    found = scene.check("slappart0")
    # stunnel still shows what it has loaded
    assert found["slappart0/in"]["outcome"] == "wrong_certificate"
    assert found["slappart0/in"]["peer"] != old.fingerprint
    scene.client(1, "out", 6000, f"[{scene.ipv6(0)}]:4000", f"cert:{old.certificate_der_base64}")
    scene.stop_stunnel(0)
    scene.apply()
    # what had run out has a successor, which the client does not know
    assert scene.outcomes() == {"slappart0/in": "ok", "slappart1/out": "wrong_server"}
    # beside one that is good an old one is nobody's trouble, and not the one to try it with
    scene.server(0, "in", 4000, f"cert:{old.certificate_der_base64}", scene.certificate(2))
    scene.apply()
    found = scene.check("slappart0", status=0)
    assert found["slappart0/in"]["message"] == "slappart2 is let through to the service"


@pytest.mark.full
def test_a_port_that_another_tenant_has(scene):
    scene.serve(2, "::", 4000)
    scene.apply(3)
    found = scene.check("slappart0")
    assert found["slappart0/in"]["outcome"] == "foreign_listener"
    assert "port 4000 is taken" in found["slappart0/in"]["message"]


@pytest.mark.full
def test_a_key_that_is_damaged_or_gone(scene):
    scene.apply()
    directory = scene.node.state / "tunnels" / "slappart1"
    key = directory / identities.SLOTS[0][1]
    key.write_text("damaged")
    found = scene.check("slappart1")
    assert found["slappart1/out"]["outcome"] == "undecided"
    assert "cannot be used" in found["slappart1/out"]["message"]
    key.unlink()
    assert scene.outcomes("slappart1") == {"slappart1/out": "undecided"}


def test_the_owner_alone_checks(scene):
    """Root opens no connection, and none to the far end is made by another user than the tunnel's."""
    scene.apply()
    process = scene.command.start("tunnel", "check", "slappart1/out", "--json", "-c", scene.node.path)
    seen = set()
    while process.poll() is None:
        for children in Path("/proc").glob(f"{process.pid}/task/*/children"):
            with contextlib.suppress(OSError):
                for child in children.read_text().split():
                    text = Path("/proc", child, "status").read_text()
                    seen.add(tuple(text.partition("\nUid:")[2].split()[:4]))
        time.sleep(0.005)
    said, _ = process.communicate()
    assert json.loads(said)["checks"][0]["outcome"] == "ok"
    uid = str(scene.user(1).pw_uid)
    assert (uid,) * 4 in seen
    assert seen <= {(uid,) * 4, ("0",) * 4}


def test_who_ends_the_check_ends_its_children(scene):
    scene.apply()
    with scene.frozen(0):
        process = scene.command.start("tunnel", "check", "-c", scene.node.path)
        try:
            uid = scene.user(1).pw_uid
            end = time.monotonic() + PATIENCE
            while not (children := _children(process.pid, uid)) and time.monotonic() < end:
                time.sleep(0.01)
            assert children
            process.kill()
        finally:
            process.kill()
            process.communicate()
        while any(Path("/proc", child).exists() for child in children):
            assert time.monotonic() < end, "they live on"
            time.sleep(0.01)


def _children(pid, uid):
    found = []
    for task in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            found += [
                child
                for child in task.read_text().split()
                if f"\nUid:\t{uid}\t" in Path("/proc", child, "status").read_text()
            ]
    return found


def test_on_a_node_with_ipv4_alone(bridge, node_config, command):
    subprocess.run(["/usr/sbin/ip", "address", "add", "192.0.2.2/24", "dev", bridge.name], check=True)
    subprocess.run(
        ["/usr/sbin/ip", "-6", "address", "flush", "dev", bridge.name, "scope", "global"], check=True
    )
    made = Scene(node_config(3, partitiond={"ipv4_partition_network": "10.64.0.0/16"}), command)
    made.apply()
    public = next(
        one["addr"] for one in made.published(0)["address_list"] if one["addr"].startswith("10.64.")
    )
    made.server(0, "in", 4000, made.certificate(1))
    made.client(1, "out", 6000, f"{public}:4000", made.certificate(0))
    made.client(2, "stranger", 6000, f"{public}:4000", made.certificate(0))
    made.apply()
    assert made.outcomes() == {
        "slappart0/in": "service_down",
        "slappart1/out": "service_down",
        "slappart2/stranger": "refused_by_pin",
    }
    made.serve(0, "10.0.0.2")
    try:
        found = made.check("slappart0", status=0) | made.check("slappart1", status=0)
    finally:
        made.end_service(0)
    assert found["slappart0/in"]["message"] == "slappart1 is let through to the service"
    assert found["slappart1/out"]["message"] == f"{public}:4000 lets us through"
