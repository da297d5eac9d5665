"""A release of slapos.cookbook's recipes, unchanged, by slapos.core's node commands and by ours: same files, same words.

One after the other with the same paths and addresses, each with a master of its own: what differs then is the node's doing.
"""

import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from life_node import ENVIRONMENT, ROOT, SLAPOS

# what slapos.cookbook's recipes make here is in tests/nodes, too
pytestmark = pytest.mark.full

RELEASE = ROOT / "tests" / "lifecycle" / "cookbook"
PASSES = (
    6  # until the request of an instance for another one is answered, and what that publishes has come back
)

# what belongs to the node programs themselves: logs, marks of their own, records of what was asked
OWN = re.compile(r"\.slapos-.*|\.slapgrid.*|\.timestamp|\..*\.log|software_release|\.installed\.cfg")


@pytest.fixture(scope="module")
def node(make_node):
    return make_node(partitions=3)


@pytest.fixture(scope="module")
def url(node):
    target = node.base / "cookbook"
    target.mkdir()
    words = {
        "@DEMO@": str(ROOT / "partitiond" / "demo" / "release"),
        "@WHEELS@": f"{sys.prefix}/share/wheels",
    }
    for path in RELEASE.iterdir():
        text = path.read_text()
        for word, value in words.items():
            text = text.replace(word, value)
        (target / path.name.replace("software.cfg.in", "software.cfg")).write_text(text)
    return str(target / "software.cfg")


def partitions(node):
    return sorted(path for path in (node.base / "instance").iterdir() if path.name.startswith("slappart"))


def tree(node):
    """{path: (kind, mode, owner, content)} of all that the instances made."""
    found = {}
    for partition in partitions(node):
        for path in sorted(partition.rglob("*")):
            name = path.relative_to(partition)
            if any(OWN.fullmatch(part) for part in name.parts):
                continue
            status = path.lstat()
            content = (
                str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else ""
            )
            found[f"{partition.name}/{name}"] = (
                oct(status.st_mode),
                status.st_uid,
                plain(content, path.name),
            )
    return found


def plain(text, name):
    """Without what must differ: whose interpreter and buildout it is, and the order of options that nobody reads by order."""
    text = text.replace(f"{sys.prefix}/master/", f"{sys.prefix}/")
    if name == "buildout.cfg":
        # comments and the order of options mean nothing to buildout; "index" is what a published one needs beside "offline"
        return sorted(
            filter(
                None, (line.strip() for line in text.splitlines() if not line.startswith(("#", "index =")))
            )
        )
    # slapos.cookbook:wrapper folds its lines by the length of the interpreter's path
    return re.sub(r"\s*\\\n\s*", " ", re.sub(r"python3(\.\d+)?", "python3", text))


def published(node):
    return {title: node.tree(title)["connection_parameters"] for title in ("root",)} | {
        "the-child": connection_of(node, "the-child")
    }


def connection_of(node, title):
    """What an instance publishes, as the master's own listing has it."""
    done = subprocess.run(
        [SLAPOS, "proxy", "show", "--params", "--cfg", node.base / "proxy.cfg"],
        env={**ENVIRONMENT, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    block = re.search(rf": {title}\b.*?\n(.*?)(?=\n\S|\Z)", done.stdout, re.DOTALL)
    assert block, done.stdout
    return sorted(line.strip() for line in block[1].splitlines() if " = " in line)


def state(node, names):
    return {"files": tree(node), "published": published(node), "running": names}


@pytest.fixture(scope="module")
def ours(node, url):
    node.cli("apply")
    node.cli("sync", "capacity")
    node.supply(url)
    node.cli("sync", "software", timeout=300)
    node.request("root", url, text="hello & <welcome>")
    for _ in range(PASSES):
        said = node.cli("sync", "instances", "--force", expect=None, timeout=120)
        if said.status == 0:
            return state(node, running(node))
    pytest.fail(said.text)


def running(node):
    """The programs that supervisord runs, by its own word."""
    done = subprocess.run(
        [f"{sys.prefix}/bin/supervisorctl", "-c", node.base / "instance/etc/supervisord.conf", "status"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    return sorted(
        name for name, what in map(tuple, rows) if what == "RUNNING" and name.startswith("slappart")
    )


@pytest.fixture(scope="module")
def theirs(node, url, ours):
    node.cli("teardown", "--purge", timeout=120)
    node.renew_master()
    # users, addresses and directories are the same: those that slapos format would have left, too
    node.cli("apply")
    node.cli("sync", "capacity")
    supervisorctl(node, "shutdown")
    shutil.rmtree(node.base / "instance" / "etc")
    node.supply(url)
    slapos(node, "software", 0)
    node.request("root", url, text="hello & <welcome>")
    for _ in range(PASSES):
        if slapos(node, "instance", None, "--force") == 0:
            break
    value = state(node, running(node))
    yield value
    supervisorctl(node, "shutdown")


def supervisorctl(node, *words):
    configuration = node.base / "instance/etc/supervisord.conf"
    pid = int((node.base / "instance/var/run/supervisord.pid").read_text())
    subprocess.run(
        [f"{sys.prefix}/bin/supervisorctl", "-c", configuration, *words],
        env=ENVIRONMENT,
        capture_output=True,
        check=True,
        timeout=60,
    )
    node.wait(lambda: not Path(f"/proc/{pid}").exists(), "supervisord to end")


def slapos(node, verb, expect, *words):
    done = subprocess.run(
        [SLAPOS, "node", verb, "--cfg", node.configuration, "--pidfile", node.base / "slapgrid.pid", *words],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT / "tests" / "peer")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert expect is None or done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode


def _lines(found):
    kind, owner, content = found
    return [kind, str(owner), *(content if isinstance(content, list) else content.splitlines())]


def test_ours_did_what_the_release_says(node, ours):
    assert ours["running"] == ["slappart0:pages-on-watch", "slappart1:sleeper"]
    root = ours["published"]["root"]
    assert root["child-url"].startswith("child://[2001:db8:")
    assert root["child-url"].endswith("/hello & <welcome>")


def test_theirs_and_ours_make_the_same_files(ours, theirs):
    mine, others = ours["files"], theirs["files"]
    assert mine.keys() == others.keys(), sorted(mine.keys() ^ others.keys())
    differing = "\n".join(
        line
        for name in mine
        for line in difflib.unified_diff(
            *(_lines(one[name]) for one in (mine, others)), name, name, "", "", 0, ""
        )
    )
    assert not differing, differing
    assert len(mine) >= 20


def test_theirs_and_ours_publish_the_same(ours, theirs):
    assert ours["published"] == theirs["published"]


def test_theirs_and_ours_run_the_same(ours, theirs):
    assert ours["running"] == theirs["running"]
