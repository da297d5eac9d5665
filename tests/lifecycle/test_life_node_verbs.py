"""``partitiond node``: what scripts and crontabs made for ``slapos node`` say, without and with a daemon; and its socket."""

import http.client
import json
import subprocess

import pytest
from life_front import WISHES, always
from life_node import COMPUTER, ENVIRONMENT, ROOT, valid

from partitiond import execute, lock
from partitiond.unix_http import UnixConnection
from slap_client.marshal import dumps, loads

MEMBERS = 4998
OTHER = 4997


@pytest.fixture(scope="module")
def node(make_node):
    return make_node(partitions=2)


@pytest.fixture(scope="module")
def url(node):
    return node.release()


def said(node, *words, expect=0, environment=None, timeout=60):
    """What a verb says as text, both channels; ``-c`` stands where slapos has it."""
    line = node.line("node", words[0], "--cfg", node.configuration, *words[1:])
    line[4:6] = []  # not before the verb
    done = subprocess.run(
        list(map(str, line)),
        cwd="/",
        env={**node.environment, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    text = done.stdout + done.stderr
    assert done.returncode == expect, text
    assert "Traceback" not in text
    return text


def test_without_a_daemon(node, url):
    """The way of an instance by these verbs alone, as the packaged crontab has them."""
    assert "nothing to do" not in said(node, "format", "--dry-run")
    assert not node.wishes(), "nothing was posted"
    assert "capacity of 2 partitions posted" in said(node, "format", "--now", "--verbose")
    assert len(node.wishes()) == 2
    node.supply(url)
    text = said(node, "software", "--verbose", f"--logfile={node.base}/software.log")
    assert "Processing software releases" in text
    assert f"building {url}" in text, "what the build says is shown"
    assert "Processing software releases" in (node.base / "software.log").read_text()
    node.request("one", url, text="one")
    name = node.holder("one")
    text = said(node, "instance", "--verbose", "--promise-timeout", "20", "--pidfile", "/run/pid")
    assert "Processing computer partitions" in text
    assert f"{name}: started" in text
    status = said(node, "status", f"{name}:*")
    assert f"{name}:" in status
    assert "RUNNING" in status
    assert "no such process" in said(node, "status", "nobody", expect=4)
    before = node.buildouts(name)
    said(node, "instance", "--only-cp", name)
    assert node.buildouts(name) == before, "it is not due"
    said(node, "instance", "--all")
    assert node.buildouts(name) == before + 1
    _kept_without_a_daemon(node, name)
    before = node.buildouts(name) - 1
    text = said(node, "instance", "--force", "--only-cp", f"{name},slappart77", expect=1)
    assert "[sync.unknown_partition] slappart77" in text
    assert node.buildouts(name) == before + 1


def _kept_without_a_daemon(node, name):
    """What a daemon does in between each run does: it asks promises, and looks after programs that ended."""
    promise = node.base / "instance" / name / "etc" / "promise" / "kept"
    promise.write_text("#!/bin/sh\necho >> asked; echo on purpose; exit 1\n")
    promise.chmod(0o755)
    said(node, "supervisorctl", "signal", "KILL", f"{name}:http-on-watch")
    node.wait(lambda: "EXITED" in ask_status(node, name), "the program to end")
    text = said(node, "instance")
    assert f"{name}: http-on-watch ended; the master is told" in text
    assert node.front.count("softwareInstanceBang") == 1
    assert len((promise.parents[2] / "asked").read_text()) == 1
    # as the master was told, it has it configured anew
    assert "on purpose" in said(node, "instance", expect=2)
    promise.unlink()
    said(node, "instance")
    assert "RUNNING" in ask_status(node, name)
    assert node.front.count("softwareInstanceBang") == 1


def ask_status(node, name):
    done = subprocess.run(
        list(map(str, node.line("node", "status", f"{name}:http-on-watch"))),
        cwd="/",
        env=node.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.full
def test_releases(node, url):
    built = node.base / "log" / "software"
    text = "".join(path.read_text() for path in built.iterdir())
    typo = said(node, "software", "--only-sr", "0123456789abcdef0123456789abcdef", expect=1)
    assert "0123456789abcdef0123456789abcdef: [sync.unknown_release]" in typo
    said(node, "software")
    assert "".join(path.read_text() for path in built.iterdir()) == text
    said(node, "software", "--only-sr", node.software(url).name)
    assert "".join(path.read_text() for path in built.iterdir()) != text, "one that is named is built again"
    spare = node.release("spare")
    node.supply(spare)
    said(node, "software")
    document = loads(node.front.wishes(COMPUTER))
    rows = document.attributes["_software_release_list"]
    document.attributes["_software_release_list"] = [
        one for one in rows if one.attributes["_software_release"] == url
    ]
    node.front.answers[WISHES] = always(dumps(document))
    said(node, "software")
    assert node.software(spare).exists(), "what is not listed any more stays"
    said(node, "software", "--garbage-collect")
    node.front.answers.clear()
    assert not node.software(spare).exists()
    assert node.software(url).exists()


def test_exit_codes(node, url):
    node.front.answers["*"] = always(b"", 503)
    # a report with nothing to tell asks nobody
    for verb, status in (("instance", 3), ("software", 1), ("report", 0), ("format", 2)):
        words = ("--now",) if verb == "format" else ()
        said(node, verb, *words, expect=status)
    value = node.cli("node", "format", "--now", expect=2).value
    assert [one["code"] for one in value["failures"]] == ["slap.unavailable"]
    node.front.answers.clear()
    node.request("bad", url, text="bad", fail="on purpose")
    said(node, "instance", expect=1)
    assert "on purpose" in said(node, "instance", expect=1), (
        "what fails is tried at each run, as slapgrid does"
    )
    node.request("bad", url, state="destroyed", text="bad")
    with lock.exclusive(node.base / "state", "a test"):
        assert "[node.busy]" in said(node, "report", expect=10)


def test_who_may(node):
    line = [execute.SETPRIV, "--reuid", str(OTHER), "--regid", str(OTHER), "--clear-groups", "--"]
    line += [*node.line()[:4], "node", "instance"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "SLAPOS_CONFIGURATION": str(node.configuration)}
    done = subprocess.run(line, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "[cli.root]" in done.stderr
    # and for root the environment names the configuration, too
    done = subprocess.run(line[7:], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_with_a_daemon(node, url):
    """It is the daemon that does it."""
    node.start()
    node.offer()
    (name,) = [key for key, state in node.states().items() if state == "started"]
    before = node.buildouts(name)
    text = said(node, "instance", "--force", "--only", name, "--maximum-periodicity", "1")
    assert "not acted on: maximum_periodicity" in text
    assert f"configuring {name}" in text, "what the daemon's buildout says is shown, too"
    assert node.buildouts(name) == before + 1
    text = said(node, "instance", "--only-cp", "slappart77", expect=1)
    assert "[sync.unknown_partition] slappart77" in text
    node.request("one", url, state="destroyed", text="one")
    said(node, "instance")
    assert "Aggregating and sending usage reports" in said(node, "report")
    assert node.states()[name] == "free"
    node.request("two", url, text="two")
    said(node, "instance")


def ask(node, target, body=None, *, uid=0, groups=""):
    """What a user is answered at the socket: (status, object)."""
    if uid == 0:
        return exchange(node.socket, target, None if body is None else json.dumps(body))
    program = (
        "import sys, json; sys.path[:0] = [sys.argv[4], sys.argv[4] + '/..'];"
        "from test_life_node_verbs import exchange;"
        "print(json.dumps(exchange(sys.argv[1], sys.argv[2], sys.argv[3] or None)))"
    )
    switch = [
        "--reuid",
        str(uid),
        "--regid",
        str(uid),
        *(("--groups", groups) if groups else ("--clear-groups",)),
    ]
    text = "" if body is None else json.dumps(body)
    done = subprocess.run(
        [
            execute.SETPRIV,
            *switch,
            "--",
            *node.line()[:2],
            "-c",
            program,
            node.socket,
            target,
            text,
            ROOT / "tests" / "lifecycle",
        ],
        cwd="/",
        env=node.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def exchange(path, target, body):
    connection = UnixConnection(str(path), 60)
    try:
        connection.request("GET" if body is None else "POST", target, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except http.client.HTTPException as error:
        return 0, {"code": repr(error)}
    finally:
        connection.close()


def test_status_and_events_of_the_daemon(node):
    (name,) = [key for key, state in node.states().items() if state == "started"]
    status, value = ask(node, "/1/status")
    assert status == 200
    valid({"schema": "partitiond/status/1", **value})
    assert value["node"]["master"]["reachable"] is True
    (item,) = [one for one in value["partitions"] if one["id"] == name]
    assert (item["state"], item["software_release"]) == ("started", node.partition(name)["software_release"])
    uid = item["user"]["uid"]
    status, own = ask(node, "/1/status", uid=uid)
    assert (status, [one["id"] for one in own["partitions"]]) == (200, [name])
    assert set(own["node"]) == {"computer_id"}, "of the node it is told no more"
    assert ask(node, "/1/status", uid=OTHER)[0] == 403
    status, value = ask(node, "/1/events?limit=1000")
    assert status == 200
    names = [event["event"] for event in value["events"]]
    assert {"instance.started", "instance.destroyed", "node.started"} <= set(names)
    for event in value["events"]:
        valid({"schema": "partitiond/event/1", **event})
    status, value = ask(node, "/1/events", uid=uid)
    assert status == 200
    assert {event["partition"] for event in value["events"]} == {name}
    assert ask(node, "/1/events", uid=OTHER)[0] == 403


def test_apply_of_the_daemon(node):
    subprocess.run(["/usr/sbin/groupadd", "--gid", str(MEMBERS), "partitiond"], check=True)
    try:
        for who in ({}, {"uid": OTHER, "groups": str(MEMBERS)}):
            status, value = ask(node, "/1/apply", {}, **who)
            assert (status, value["failures"], value["left"]) == (200, [], [])
            valid({"schema": "partitiond/apply/1", **value})
        status, value = ask(node, "/1/apply", {"partitions": ["slappart0"], "force": False})
        assert (status, value["done"]) == (200, 0)
        for verb in ("/1/sync", "/1/teardown", "/1/try"):
            assert ask(node, verb, {}, uid=OTHER, groups=str(MEMBERS))[0] == 403
    finally:
        subprocess.run(["/usr/sbin/groupdel", "partitiond"], check=True)
    uid = next(iter(node.partitions().values()))["user"]["uid"]
    for who in (uid, OTHER):
        assert ask(node, "/1/apply", {}, uid=who)[0] == 403


_BAD = [
    ("/1/apply", {"partition": ["slappart0"]}),
    ("/1/apply", {"partitions": "slappart0"}),
    ("/1/apply", {"partitions": [0]}),
    ("/1/apply", {"partitions": None}),
    ("/1/apply", {"force": "false"}),
    ("/1/sync", {"lane": "instances", "only": "slappart0"}),
    ("/1/sync", {"lane": 5}),
    ("/1/sync", {"lane": "instances", "force": 1}),
    ("/1/try", {"timeout": 5, "forced": True}),
    ("/1/teardown", {"purge": "false"}),
    ("/1/teardown", {"keep": True}),
]


def test_bad_bodies_do_nothing(node):
    before = node.states()
    for target, body in _BAD:
        status, value = ask(node, target, body)
        assert (status, value["code"]) == (400, "control.body"), (target, body)
        assert value["hint"].startswith("allowed: ")
    for raw in ("[]", "{", "nonsense", '"text"'):
        assert exchange(node.socket, "/1/apply", raw)[0] == 400, raw
    assert node.states() == before


def test_unknown_partitions_and_lanes(node):
    status, value = ask(node, "/1/apply", {"partitions": ["slappart77"]})
    assert (status, value["code"]) == (409, "apply.unknown_partition")
    assert ask(node, "/1/sync", {"lane": "nonsense"})[0] == 404
