"""Tunnels that tenants declare: two partitions, real stunnels, real processes of their users, a megabyte."""

import hashlib
import json
import os
import pwd
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path

import pytest
from json_schemas import parsed

from partitiond import tunnel_declarations, tunnels, verbs
from partitiond.context import Context

PATIENCE = 20.0
SIZE = 1 << 20


def declare(node, partition, name, text):
    """What the buildout of an instance does: a file below etc/tunnel, of the partition's user."""
    user = pwd.getpwnam(partition.replace("slappart", "slapuser"))
    directory = node.instance / partition / "etc" / "tunnel"
    for path in (directory.parent, directory):
        path.mkdir(exist_ok=True)
        os.chown(path, user.pw_uid, user.pw_gid)
    (directory / f"{name}.cfg").write_text(f"[tunnel]\n{text}")
    os.chown(directory / f"{name}.cfg", user.pw_uid, user.pw_gid)
    return directory / f"{name}.cfg"


def resource(node, partition):
    return json.loads((node.instance / partition / ".slapos-resource").read_bytes())


def ipv6(node, partition):
    return next(one["addr"] for one in resource(node, partition)["address_list"] if ":" in one["addr"])


def pem(base64):
    lines = "\n".join(base64[start : start + 64] for start in range(0, len(base64), 64))
    return f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"


def pin(node, partition, form, reader):
    """A way to name a partition's certificate, as recipes publish it; ``reader`` is whose file it may lie in."""
    published = resource(node, partition)
    if form == "cert":
        return f"cert:{published['certificate']}"
    if form == "sha256":
        return published["certificate_fingerprint"]
    (node.instance / reader / "pin.pem").write_text(pem(published["certificate"]))
    os.chown(node.instance / reader / "pin.pem", pwd.getpwnam(reader.replace("part", "user")).pw_uid, 0)
    return "file:pin.pem"


SERVER = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 5000)) as listener:
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            seen = hashlib.sha256()
            while piece := connection.recv(65536):
                seen.update(piece)
            connection.sendall(seen.hexdigest().encode())
"""
CLIENT = """
import hashlib, os, socket, sys
content = os.urandom(int(sys.argv[3]))
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    connection.sendall(content)
    connection.shutdown(socket.SHUT_WR)
    answer = b""
    while piece := connection.recv(1000):
        answer += piece
print("same" if answer.decode() == hashlib.sha256(content).hexdigest() else f"other: {answer!r}")
"""


def as_user(user, script, *arguments):
    numbers = pwd.getpwnam(user)
    switch = ["--reuid", str(numbers.pw_uid), "--regid", str(numbers.pw_gid), "--clear-groups"]
    return ["/usr/bin/setpriv", *switch, sys.executable, "-I", "-c", script, *map(str, arguments)]


@pytest.fixture
def server():
    """Start the server of a partition; it ends with the test."""
    started = []

    def start(user, address):
        process = subprocess.Popen(as_user(user, SERVER, address), stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "listening\n"

    yield start
    for process in started:
        process.kill()
        process.communicate()


FORMS = ("cert", "sha256", "file")


def test_a_megabyte_goes_through_and_a_bad_declaration_harms_nobody(bridge, node_config, command, server):
    node = node_config(3)
    assert command("apply", "-q", "-c", node.path).returncode == 0
    published = resource(node, "slappart0")
    digest = hashlib.sha256(b64decode(published["certificate"])).hexdigest()
    assert published["certificate_fingerprint"] == f"sha256:{digest}"

    for number, form in enumerate(FORMS):
        allow = pin(node, "slappart1", form, "slappart0")
        declare(
            node,
            "slappart0",
            f"in-{form}",
            f"mode = server\nlisten = {4000 + number}\nconnect = 5000\nallow = {allow}\n",
        )
        peer = pin(node, "slappart0", form, "slappart1")
        target = f"[{ipv6(node, 'slappart0')}]:{4000 + number}"
        declare(
            node,
            "slappart1",
            f"out-{form}",
            f"mode = client\nlisten = {6000 + number}\nconnect = {target}\npeer = {peer}\n",
        )
    # a third partition whom nobody allowed
    peer = pin(node, "slappart0", "cert", "slappart2")
    target = f"[{ipv6(node, 'slappart0')}]:4000"
    declare(node, "slappart2", "out", f"mode = client\nlisten = 6000\nconnect = {target}\npeer = {peer}\n")
    bad = declare(node, "slappart1", "bad", "mode = client\nlisten = 99999\n")

    applied = command("apply", "--json", "-c", node.path)
    value = parsed(applied)
    assert (applied.returncode, value["failures"], value["left"]) == (3, [], [])
    (refused,) = value["refused"]
    assert (refused["name"], refused["partition"]) == ("slappart1/bad", "slappart1")
    assert (refused["file"], refused["line"]) == (str(bad), 3)
    planned = command("plan", "--json", "-c", node.path)
    assert (planned.returncode, parsed(planned)["operations"]) == (0, [])
    assert len(parsed(planned)["refused"]) == 1

    listed = {
        one["name"]: one for one in parsed(command("tunnel", "list", "--json", "-c", node.path))["tunnels"]
    }
    assert {name: one["state"] for name, one in listed.items()} == {
        **{f"slappart0/in-{form}": "up" for form in FORMS},
        **{f"slappart1/out-{form}": "up" for form in FORMS},
        "slappart2/out": "up",
        "slappart1/bad": "refused",
    }
    assert f"{bad}:3: " in listed["slappart1/bad"]["reason"]
    assert listed["slappart0/in-file"]["allowed"] == [resource(node, "slappart1")["certificate_fingerprint"]]
    assert listed["slappart0/in-cert"]["listen"] == f"[{ipv6(node, 'slappart0')}]:4000"
    assert listed["slappart1/out-cert"]["listen"] == "10.0.0.3:6000"

    server("slapuser0", "10.0.0.2")
    for number in range(len(FORMS)):
        done = subprocess.run(
            as_user("slapuser1", CLIENT, "10.0.0.3", 6000 + number, SIZE),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.stdout == "same\n", done.stderr
    stranger = subprocess.run(
        as_user("slapuser2", CLIENT, "10.0.0.4", 6000, SIZE),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "same" not in stranger.stdout

    bad.unlink()
    mended = command("apply", "--json", "-c", node.path)
    assert (mended.returncode, parsed(mended)["refused"]) == (0, [])

    for path in (node.instance / "slappart1" / "etc" / "tunnel").iterdir():
        path.unlink()
    assert command("apply", "-q", "-c", node.path).returncode == 0
    names = {one["name"] for one in parsed(command("tunnel", "list", "--json", "-c", node.path))["tunnels"]}
    assert not any(name.startswith("slappart1/") for name in names)
    assert "slappart1-tunnel" not in {one.group for one in Context.of(node.load()).supervisor.processes()}


def owned(uids):
    """Processes of some users."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - names suffice
        try:
            text = Path("/proc", name, "status").read_text()
        except OSError:
            continue
        if int(text.partition("\nUid:")[2].split()[0]) in uids and "\nState:\tZ" not in text:
            found.append(Path("/proc", name, "cmdline").read_bytes())
    return found


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_smaller_node_runs_nothing_of_those_that_went(bridge, node_config):
    node = node_config(4)
    context = Context.of(node.load())
    verbs.apply(context, [])
    for index in (2, 3):
        own = pin(node, f"slappart{index}", "cert", "")
        declare(
            node, f"slappart{index}", "in", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {own}\n"
        )
    outcome = verbs.apply(context, [])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    # something that a tenant left behind, out of supervisord's sight
    numbers = pwd.getpwnam("slapuser3").pw_uid
    stray = subprocess.Popen(
        ["/usr/bin/setpriv", "--reuid", str(numbers), "--clear-groups", "/bin/sleep", "1000"]
    )
    try:
        until(lambda: len(owned({5002, 5003})) == 3)
        node.write(slapformat={"partition_amount": 2})
        with node.context() as smaller:
            outcome = verbs.apply(smaller, [])
            assert (outcome["failures"], outcome["left"]) == ([], [])
            assert verbs.plan(smaller)["operations"] == []
        assert owned({5002, 5003}) == []
    finally:
        stray.kill()
        stray.wait()


def test_a_killed_supervisord_leaves_no_second_stunnel(bridge, node_config):
    node = node_config(1)
    context = Context.of(node.load())
    verbs.apply(context, [])
    own = pin(node, "slappart0", "cert", "")
    declare(node, "slappart0", "in", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {own}\n")
    verbs.apply(context, [])
    assert len(owned({5000})) == 1
    os.kill(int((node.instance / "var" / "run" / "supervisord.pid").read_text()), 9)
    until(lambda: not context.supervisor.running())
    outcome = verbs.apply(context, [])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    assert len(owned({5000})) == 1
    assert verbs.plan(context)["operations"] == []


LISTENER = """
import socket, sys, time
with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6):
    print("listening", flush=True)
    time.sleep(1000)
"""


def states(command, node):
    found = parsed(command("tunnel", "list", "--json", "-c", node.path))["tunnels"]
    return {one["name"]: (one["state"], one["reason"]) for one in found}


def test_a_port_that_another_tenant_takes_costs_that_tunnel_alone(bridge, node_config, command):
    node = node_config(2)
    assert command("apply", "-q", "-c", node.path).returncode == 0
    own = pin(node, "slappart0", "cert", "")
    text = "mode = server\nlisten = {}\nconnect = 5000\nallow = " + own + "\n"
    declare(node, "slappart1", "good", text.format(4555))
    assert command("apply", "-q", "-c", node.path).returncode == 0
    before = owned({5001})
    squatter = subprocess.Popen(as_user("slapuser0", LISTENER, 4777), stdout=subprocess.PIPE, text=True)
    try:
        assert squatter.stdout.readline() == "listening\n"
        declare(node, "slappart1", "third", text.format(4777))
        assert command("apply", "-q", "-c", node.path).returncode == 3
        found = states(command, node)
        assert found["slappart1/good"] == ("up", None)
        assert found["slappart1/third"][0] == "down"
        assert "port 4777 is taken" in found["slappart1/third"][1]
        assert owned({5001}) == before  # the same stunnel, never ended
        assert verbs.plan(Context.of(node.load()))["operations"] == []
        # also when stunnel is started anew
        Context.of(node.load()).supervisor.stop_group("slappart1-tunnel")
        assert command("apply", "-q", "-c", node.path).returncode == 3
        assert states(command, node)["slappart1/good"] == ("up", None)
    finally:
        squatter.kill()
        squatter.communicate()
    # the port is free again: the next pass sees it
    assert len(verbs.plan(Context.of(node.load()))["operations"]) == 1
    assert command("apply", "-q", "-c", node.path).returncode == 0
    assert states(command, node)["slappart1/third"] == ("up", None)


def test_what_a_tenant_makes_us_read_is_bounded(bridge, node_config, monkeypatch):
    """A declaration may name a file of many certificates again and again; each costs half a millisecond to read."""
    node = node_config(2)
    context = Context.of(node.load())
    verbs.apply(context, [])
    user = pwd.getpwnam("slapuser0").pw_uid
    certificate = pem(resource(node, "slappart0")["certificate"])
    (node.instance / "slappart0" / "many.pem").write_text(certificate * 80)
    os.chown(node.instance / "slappart0" / "many.pem", user, 0)
    again = "\n".join(" file:many.pem" for _ in range(4000))
    for index in range(110):
        declare(
            node,
            "slappart0",
            f"t{index}",
            f"mode = server\nlisten = {4000 + index}\nconnect = 1\nallow =\n{again}\n",
        )
    read = []
    original = tunnel_declarations._read_below
    monkeypatch.setattr(tunnel_declarations, "_read_below", lambda *words: read.append(1) or original(*words))
    outcome = verbs.apply(context, ["slappart1"])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    refused = verbs.plan(context)["refused"]
    assert len(refused) == 110
    assert {one["reason"].partition("allow: ")[2] or one["reason"] for one in refused} >= {
        "more than 256 certificates; allowed: at most that many",
        "the partition's tunnels and the files that they name have more than 524288 bytes",
        "more than 100 tunnels",
    }
    # one reading in each of 100 declarations finds the allowance used up, and some before; in each of the looks
    assert len(read) <= 2 * 100 * 5


def test_without_stunnel_the_rest_is_repaired(bridge, node_config, monkeypatch):
    node = node_config(1)
    context = Context.of(node.load())
    verbs.apply(context, [])
    own = pin(node, "slappart0", "cert", "")
    declare(node, "slappart0", "in", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {own}\n")
    subprocess.run(["/usr/sbin/ip", "link", "delete", "slaptap0"], check=True)
    monkeypatch.setattr(tunnels, "stunnel_program", lambda: None)
    outcome = verbs.apply(context, [])
    assert [one["code"] for one in outcome["failures"]] == ["tunnel.no_stunnel"]
    assert Path("/sys/class/net/slaptap0").exists()


def test_an_operators_tunnel_for_nobody_is_listed(bridge, node_config, command):
    node = node_config(
        1, **{"tunnel op": {"partition": "nope", "mode": "server", "listen": 4000, "connect": 1}}
    )
    assert command("apply", "-q", "-c", node.path).returncode == 3
    state, reason = states(command, node)["nope/op"]
    assert state == "refused"
    assert "is no partition of this node" in reason
