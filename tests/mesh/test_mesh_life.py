"""A node's life with a mesh: into it and out of it, its directory gone or full, its verbs used wrongly."""

import json

import pytest
from mesh_world import STATE, TINC, standing, until

from netplan import tinc_keys


@pytest.fixture(scope="module")
def world():
    with standing(names="AB") as made:
        made.apply().join()
        until(made.whole, "everybody to reach everybody")
        yield made


def test_a_directory_that_is_full_or_read_only_takes_nothing_in(world):
    a = world["A"]
    hosts = a.seen(TINC / "hosts")
    pid, before = a.tincd(), (hosts / "B").read_text()
    key = tinc_keys.public_of(tinc_keys.make(2048))
    # a node of tinc 1.0 by hand is as good as any
    blocks = "".join(
        f"Name = N{number}\nSubnet = 10.64.{number}.0/24\n{tinc_keys.public_of(tinc_keys.make(2048))}"
        for number in range(100, 112)
    )
    a.run("mount", "-t", "tmpfs", "-o", "size=24k,mode=0700", "tmpfs", str(TINC / "hosts"))
    try:
        error = a.refuses("mesh", "import", "-", said=world["B"].export() + blocks)
        assert (error["code"], "No space left" in error["message"]) == ("mesh.unwritable", True), error
        assert a.run("ls", "-A", str(TINC / "hosts")).stdout == ""
    finally:
        a.run("umount", str(TINC / "hosts"))
    a.run("mount", "--bind", str(TINC), str(TINC))
    a.run("mount", "-o", "remount,bind,ro", str(TINC))
    try:
        text = f"Name = N\nSubnet = 10.64.100.0/24\n{key}"
        error = a.refuses("mesh", "import", "-", said=text)
        assert (error["code"], "Read-only" in error["message"]) == ("mesh.unwritable", True), error
        error = a.refuses("mesh", "remove", "B")
        assert (error["code"], "Read-only" in error["message"]) == ("mesh.unwritable", True), error
        assert a.verb("plan")["operations"] == []
    finally:
        a.run("umount", str(TINC))
    assert (hosts / "B").read_text() == before
    a.verb("apply")
    assert a.tincd() == pid
    until(lambda: a.reaches("B"), "B to be reached")


def test_a_directory_that_is_gone_takes_nothing_away(world):
    """As where the disk that it lies on is not mounted: no new key, and what runs keeps its peers."""
    a = world["A"]
    pid = a.tincd()
    away = a.seen(TINC).with_name("tinc-away")
    a.seen(TINC).rename(away)
    try:
        for _ in range(2):
            value = a.verb("apply", expect=(3,))
            assert [one["code"] for one in value["refused"]] == ["mesh.no_directory"], value
            assert not a.seen(TINC).exists()
        assert a.refuses("mesh", "import", "-", said=world["B"].export())["code"] == "mesh.no_directory"
        assert a.verb("plan")["operations"] == []
        assert a.tincd() == pid
        assert (a.seen(STATE) / "hosts" / "B").exists()
    finally:
        away.rename(a.seen(TINC))
    a.verb("apply")
    assert a.verb("plan")["operations"] == []
    assert a.reaches("B")


def test_hosts_that_are_no_plain_files_cost_themselves(world):
    a = world["A"]
    hosts = a.seen(TINC / "hosts")
    a.run("mkfifo", str(TINC / "hosts" / "F"))
    (hosts / "H").write_bytes(b"#" * (1 << 20))
    (hosts / "D").mkdir()
    try:
        value = a.verb("apply", expect=(3,))
        found = {one["name"]: one["code"] for one in value["refused"]}
        assert found == {f"mesh: peer {name}": "files.refused" for name in "DFH"}
        assert a.verb("plan")["operations"] == []
        assert a.reaches("B")
        assert set(a.verb("mesh", "remove", "F", "H", expect=(0, 3))["removed"]) == {"F", "H"}
        error = a.refuses("mesh", "remove", "D")
        assert error["code"] == "mesh.unwritable"
    finally:
        (hosts / "D").rmdir()
    a.verb("apply")


def test_many_blocks_at_once(world):
    a = world["A"]
    keys = [tinc_keys.public_of(tinc_keys.make(2048)) for _ in range(200)]
    blocks = "".join(
        f"Name = N{number}\nAddress = 203.0.113.{number}\nSubnet = 10.64.{number + 20}.0/24\n{key}"
        for number, key in enumerate(keys)
    )
    pid = a.tincd()
    assert len(a.take_in(blocks)["added"]) == 200
    assert a.tincd() == pid
    assert a.verb("plan")["operations"] == []
    assert len(a.peers()) == 201
    assert a.take_in(blocks)["applied"]["done"] == 0
    a.verb("mesh", "remove", *(f"N{number}" for number in range(200)))
    assert a.reaches("B")


def test_verbs_that_are_used_wrongly(world):
    a = world["A"]
    for words, code in (
        (("mesh",), 64),
        (("mesh", "exprot"), 64),
        (("mesh", "remove"), 64),
        (("mesh", "export", "x"), 64),
        (("mesh", "import", "--replce"), 64),
    ):
        done = a.run(*a.line("--json", *words), check=False)
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (code, "cli.usage"), done
    for words in (
        ("mesh", "-h"),
        *(("mesh", verb, "-h") for verb in ("export", "import", "remove", "status")),
    ):
        assert "usage:" in a.say(*words)
    for words in (("export",), ("status",), ("import", "/dev/null"), ("remove", "B")):
        line = ("setpriv", "--reuid", "65534", "--clear-groups", "--", *a.line("--json", "mesh", *words))
        done = a.run(*line, check=False)
        assert done.returncode == 1, done
        error = json.loads(done.stdout)["error"]
        assert "Traceback" not in done.stderr
        print(words, error)


def test_a_node_into_a_mesh_and_out_of_it(world):
    """A daemon that is reloaded, and a try that nobody confirms."""
    a, b = world["A"], world["B"]
    keys = dict(a.sections["tinc"])
    gone = dict.fromkeys(keys)
    a.start()
    try:
        a.configure({"tinc": gone})
        a.verb("apply")
        assert not a.tincd()
        assert not a.seen(STATE).exists()
        assert a.refuses("mesh", "import", "-", said=b.export())["code"] == "mesh.off"
        a.configure({"tinc": keys})
        a.verb("apply")
        until(lambda: a.reaches("B"), "A to be back by its key and its peers")
        pid = a.tincd()
        a.configure({"tinc": gone})
        a.verb("try", "--timeout", "3")
        assert not a.tincd()
        until(a.tincd, "the try to be taken back")
        until(lambda: a.reaches("B"), "A to be back in the mesh")
        a.configure({"tinc": keys})
        a.verb("apply")
        assert a.tincd() != pid
        assert a.verb("plan")["operations"] == []
    finally:
        a.stop()


def test_a_range_and_a_name_that_change(world):
    a, b = world["A"], world["B"]
    before = b.export()
    index = b.sections["tinc"]["index"]
    b.configure({"tinc": {"index": 9}})
    b.verb("apply")
    assert b.vpn("slappart0") == "10.64.18.2"
    assert b.verb("plan")["operations"] == []
    assert a.refuses("mesh", "import", "-", said=b.export())["code"] == "mesh.known"
    assert a.take_in(b.export(), words=("--replace",))["changed"] == ["B"]
    until(lambda: a.reaches("B") and b.reaches("A"), "B to be reached by its new range")
    # by another name with the same key it is nobody new
    b.configure({"tinc": {"name": "BB"}})
    b.verb("apply")
    assert a.refuses("mesh", "import", "-", said=b.export())["code"] == "mesh.clash"
    a.verb("mesh", "remove", "B")
    assert a.take_in(b.export())["added"] == ["BB"]
    until(lambda: a.reaches("BB") and b.reaches("A"), "B to be reached by its new name")
    b.configure({"tinc": {"name": "B", "index": index}})
    b.verb("apply")
    assert b.verb("plan")["operations"] == []
    a.verb("mesh", "remove", "BB")
    assert a.take_in(before)["added"] == ["B"]
    until(lambda: a.reaches("B") and b.reaches("A"), "B to be as before")
