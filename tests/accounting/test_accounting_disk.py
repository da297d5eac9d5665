"""Trees as tenants build them, measured against du(1), and while they are changed under the walk."""

import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from accounting import DiskMeter


def du(top):
    words = ["du", "-sx", "-B1", str(top)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[0])


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def measure(top, **bounds):
    with DiskMeter(**bounds) as meter:
        return meter.measure({"slappart0": top})["slappart0"]


@pytest.fixture
def top(tmp_path):
    directory = tmp_path / "slappart0"
    directory.mkdir()
    yield directory
    # Not left to pytest: shutil.rmtree recurses, and some of these trees are deep.
    subprocess.run(["rm", "-rf", str(directory)], check=True)


@pytest.fixture(autouse=True)
def no_descriptor_leaks():
    before = descriptors()
    yield
    assert descriptors() == before


def build(top):
    """Some of everything; gives how many names there are."""
    (top / "a/b/c").mkdir(parents=True)
    (top / "a/file").write_bytes(b"x" * 100_000)
    (top / "a/b/small").write_bytes(b"x")
    for index in range(5):
        os.link(top / "a/file", top / f"a/b/c/name{index}")
    with (top / "sparse").open("wb") as file:
        file.truncate(2**40)
        file.write(b"x" * 5000)
    (top / "a/b/c/loop").symlink_to(top)
    (top / "a/b/c/self").symlink_to("self")
    (top / "etc").symlink_to("/usr")
    (top / "long").symlink_to("x" * 3000)
    os.mkfifo(top / "fifo")
    (top / os.fsdecode(b"name \xff\n")).mkdir()
    return 17


def test_it_agrees_with_du(top):
    names = build(top)
    usage = measure(top)
    assert (usage.bytes, usage.entries, usage.finished, usage.complete) == (du(top), names, True, True)
    assert 100_000 < usage.bytes < 200_000


def test_an_empty_tree_and_one_that_is_not_there(top):
    assert measure(top).bytes == du(top)
    usage = measure(top / "nothing")
    assert (usage.bytes, usage.finished, usage.complete) == (0, True, True)


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/usr"), lambda p: p.write_text("x"), os.mkfifo])
def test_a_top_that_is_no_directory_is_not_measured(top, make):
    make(top / "top")
    usage = measure(top / "top")
    assert (usage.bytes, usage.entries, usage.finished, usage.complete) == (0, 0, True, False)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_a_bounded_walk_goes_on_where_it_was(top, steps):
    build(top)
    with DiskMeter(entries_per_pass=steps) as meter:
        calls = 0
        while not (usage := meter.measure({"slappart0": top})["slappart0"]).finished:
            assert not usage.complete
            calls += 1
        assert (usage.bytes, usage.complete) == (du(top), True)
        assert calls >= 20 // steps


def test_time_is_a_bound_too(top):
    for index in range(2000):
        (top / str(index)).touch()
    now = iter(range(10**6))
    with DiskMeter(seconds_per_pass=3, clock=lambda: next(now)) as meter:
        usage = meter.measure({"slappart0": top})["slappart0"]
        assert not usage.finished
        assert 0 < usage.entries < 2000
        while not usage.finished:
            usage = meter.measure({"slappart0": top})["slappart0"]
        assert usage.bytes == du(top)


def test_trees_have_their_turn_and_a_big_one_starves_nobody(top):
    trees = {}
    for name, size in (("a", 30), ("b", 500), ("c", 30), ("d", 30)):
        trees[name] = top / name
        trees[name].mkdir()
        for index in range(size):
            (trees[name] / str(index)).touch()
    finished = []
    with DiskMeter(entries_per_pass=100) as meter:
        for _ in range(30):
            finished += [name for name, usage in meter.measure(trees).items() if usage.finished]
    assert finished[:8] == ["a", "b", "c", "d"] * 2


def test_all_small_trees_are_measured_in_one_call(top):
    for index in range(20):
        (top / f"t{index}").mkdir()
    with DiskMeter() as meter:
        found = meter.measure({f"t{index}": top / f"t{index}" for index in range(20)})
    assert len(found) == 20
    assert all(usage.complete for usage in found.values())


def test_a_walk_is_let_go_of(top):
    build(top)
    other = top / "other"
    other.mkdir()
    before = descriptors()
    with DiskMeter(entries_per_pass=5) as meter:

        def begin():
            assert not meter.measure({"slappart0": top})["slappart0"].finished
            assert descriptors() > before

        begin()
        meter.forget("another")
        assert descriptors() > before
        meter.forget("slappart0")
        assert descriptors() == before
        begin()
        assert meter.measure({"slappart0": other})["slappart0"].bytes == du(other)  # its tree is another now
        begin()
        meter.measure({})  # no such partition any more
        assert descriptors() == before


def dig(top, depth):
    """A chain of directories far beyond PATH_MAX, with a file in every thousandth."""
    here = os.open(top, os.O_RDONLY)
    for level in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        if level % 1000 == 0:
            file = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here)
            os.write(file, b"x" * 5000)
            os.close(file)
            os.mkdir("z", dir_fd=here)
            os.mkdir("a", dir_fd=here)
    os.close(here)


def test_ten_thousand_levels_need_no_recursion_and_few_descriptors(top):
    import resource

    dig(top, 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        usage = measure(top)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert usage.complete
    assert usage.entries == 10_000 + 3 * 10
    assert usage.bytes == du(top)


def test_a_tree_without_end_is_given_up(top):
    build(top)
    usage = measure(top, entries_per_tree=10)
    assert (usage.finished, usage.complete) == (True, False)
    assert 0 < usage.bytes <= du(top)


def test_names_that_fill_our_memory_end_the_walk(top):
    for index in range(300):
        (top / f"{'x' * 200}{index}").mkdir()
    assert measure(top).complete
    usage = measure(top, memory_per_tree=20_000)
    assert (usage.finished, usage.complete) == (True, False)


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from accounting import DiskMeter
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
with DiskMeter() as meter:
    print(meter.measure({"p": Path(sys.argv[1])})["p"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_makes_it_a_lower_bound():
    """Root may read all on a local file system, not so on NFS; another user shows the same here."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        build(Path(directory))
        whole = du(directory)
        (Path(directory) / "a").chmod(0)
        child = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, directory],
            env={"PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        )
    found = re.fullmatch(
        r"DiskUsage\(bytes=(\d+), entries=6, finished=True, complete=False\)\n", child.stdout
    )
    assert found
    assert 8192 < int(found[1]) < whole


@pytest.mark.parametrize("fate", ["only itself", "with its parent", "with its parent, replaced"])
def test_a_directory_moved_out_while_we_are_in_it_leads_nowhere_else(top, tmp_path, fate):
    """After the move `..` is another directory, which has all that we look for and more: none of it counts."""
    siblings = [f"s{index}" for index in range(6)]
    outside = tmp_path / "outside"
    for name in siblings:
        (outside / name).mkdir(parents=True)
        (outside / name / "big").write_bytes(b"x" * 2**20)
        (top / "a/b" / name).mkdir(parents=True)
        (top / "a/b" / name / "file").write_bytes(b"x" * 5000)
    expected = du(top)
    with DiskMeter(entries_per_pass=1) as meter:
        while True:
            usage = meter.measure({"p": top})["p"]
            stack = meter._walk._stack
            if len(stack) == 4 and stack[3].scanned and stack[2].pending:
                break
        inside = top / "a/b" / stack[3].name
        (outside / inside.name).rename(outside / "made-way")
        inside.rename(outside / inside.name)
        if fate != "only itself":
            (top / "a/b").rename(outside / "b")
        if fate.endswith("replaced"):
            for name in siblings:
                (top / "a/b" / name).mkdir(parents=True)
                (top / "a/b" / name / "big").write_bytes(b"x" * 2**20)
        before = usage.bytes
        while not (usage := meter.measure({"p": top})["p"]).finished:
            pass
    if fate == "only itself":  # it was counted while it was there, and so is the rest, which still is
        assert expected - 8192 <= usage.bytes <= expected
        assert usage.complete
    else:
        assert before <= usage.bytes <= before + 8192
        assert not usage.complete


@pytest.mark.parametrize("seed", range(12))
def test_a_tenant_who_moves_everything_all_the_time(top, tmp_path, seed):
    dice = random.Random(seed)  # noqa: S311 (a test's dice must fall alike each time)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "big").write_bytes(b"x" * 2**22)
    names = [f"d{index}" for index in range(12)]

    def places():
        return [
            top,
            outside,
            *(p for p in (*top.rglob("*"), *outside.rglob("*")) if p.is_dir() and not p.is_symlink()),
        ]

    for name in names:
        (dice.choice(places()[:1] + places()[2:]) / name).mkdir()
    with DiskMeter(entries_per_pass=1) as meter:
        for _ in range(3000):
            if meter.measure({"p": top})["p"].finished:
                break
            source, target = dice.choice(places()), dice.choice(places())
            try:
                match dice.randrange(4):
                    case 0:
                        source.rename(target / source.name)
                    case 1:
                        (target / f"new{dice.randrange(10)}").mkdir()
                    case 2 if source not in (top, outside):
                        source.rmdir()
                        source.symlink_to("/usr")
                    case _:
                        (target / f"file{dice.randrange(10)}").write_bytes(b"x" * 100)
            except OSError:
                continue
        usage = meter.measure({"q": top})["q"]
    assert usage.bytes < 2**22


MOUNTED = """
import subprocess, sys
from pathlib import Path
from accounting import DiskMeter
top = Path(sys.argv[1])
run = lambda *words: subprocess.run(words, check=True)
run("mount", "-t", "tmpfs", "none", str(top / "other"))
(top / "other/big").write_bytes(b"x" * 2**22)
run("mount", "--bind", str(top), str(top / "loop"))
run("mount", "--bind", str(top / "other/big"), str(top / "empty"))
with DiskMeter() as meter:
    usage = meter.measure({"p": top})["p"]
print(usage.bytes, usage.complete)
"""


def test_no_other_file_system_is_entered_and_a_bind_mount_makes_no_circle(top):
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    build(top)
    expected = du(top)
    (top / "other").mkdir()
    (top / "loop").mkdir()
    (top / "empty").touch()
    child = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", MOUNTED, str(top)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    # The mount points themselves are hidden; two are of the other file system, one is the top again.
    assert child.stdout.split() == [str(expected), "True"]
