"""What a killed partitiond left in the file system goes with the next command, and nothing else does."""

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from partitiond import build_keeper, files, lock, procfs, recovery

LEFT = ".base-address.0123456789ab.partitiond"
TREE = ".removing-0123456789abcdef"
PLACES = (
    "instance",
    "instance/etc",
    "instance/etc/supervisord.conf.d",
    "instance/slappart0",
    "software",
    "software/0123",
    "state",
    "state/instances",
    "state/software",
    "state/builds",
    "state/tunnels/slappart0",
    "log",
    "run",
)
ROOTS = ("instance", "software", "state", "log", "run")


@pytest.fixture
def config(node_config):
    node = node_config(1)
    for place in PLACES:
        (node.root / place).mkdir(parents=True, exist_ok=True)
        (node.root / place / LEFT).write_text("half")
        (node.root / place / ".other").write_text("somebody's")
    for root in ROOTS:
        (node.root / root / TREE / "deep" / "deeper").mkdir(parents=True)
        (node.root / root / TREE / "deep" / "file").touch()
    return node.load()


def names(path):
    return [one.name for one in path.iterdir()]


def left(config):
    root = config.instance_root.parent
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.name in (LEFT, TREE)}


def test_after_a_kill_it_goes_from_everywhere(config):
    etc = Path("/etc", LEFT.replace("base-address", "passwd"))
    etc.touch()
    (config.instance_root / "slappart0" / ".link.0123456789ab.partitiond").symlink_to("/etc")
    Path(config.state_dir, "lock").write_text("partitiond apply (process 1)\n")
    with recovery.exclusive(config, "apply"):
        assert not left(config)
        assert not etc.exists()
        assert Path("/etc/passwd").exists()
        for place in PLACES:
            assert (config.instance_root.parent / place / ".other").exists()
    assert names(config.instance_root / "slappart0") == [".other"]


def test_after_a_good_end_nobody_looks(config):
    before = left(config)
    with lock.exclusive(config.state_dir, "apply"):
        pass
    with recovery.exclusive(config, "apply"):
        assert left(config) == before


def test_a_tree_in_a_tenants_directory_is_the_tenants_own(config):
    mine = config.instance_root / "slappart0" / TREE
    mine.mkdir()
    recovery.remove_leftovers(config)
    assert left(config) == {"instance/slappart0/" + TREE}


def test_a_partition_that_is_a_link_is_left_alone(config, tmp_path):
    (tmp_path / LEFT).touch()
    (config.instance_root / "slappart1").symlink_to(tmp_path)
    recovery.remove_leftovers(config)
    assert (tmp_path / LEFT).exists()


def test_what_cannot_be_removed_is_said_and_holds_up_nothing(config, caplog):
    (config.state_dir / "instances" / LEFT).unlink()
    (config.state_dir / "instances" / LEFT).mkdir()  # unlink(2) refuses a directory
    recovery.remove_leftovers(config)
    assert left(config) == {f"state/instances/{LEFT}"}
    assert "left over from a partitiond that was killed" in caplog.text


def test_a_link_is_replaced_in_one_step(tmp_path):
    with files.directory(tmp_path) as descriptor:
        files.link("a", Path("/one"), dir_fd=descriptor)
        files.link("a", Path("/two"), dir_fd=descriptor)
    assert (tmp_path / "a").readlink() == Path("/two")
    assert names(tmp_path) == ["a"]


def test_flushing_says_when_it_fails(tmp_path):
    with files.directory(tmp_path) as descriptor:
        files.flush(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.flush(-1)


def test_emptying_keeps_what_is_to_be_kept(tmp_path):
    for name in ("lock", "other"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "lock").touch()
    with files.directory(tmp_path) as descriptor:
        files.empty(descriptor, keep=frozenset(("lock",)))
    assert names(tmp_path) == ["lock"]


def test_a_build_that_outlived_its_daemon_is_left_alone(config):
    """It may stand between making a file and giving it its name; so may one that is just beginning."""
    places = build_keeper.Places.of(config)
    places.directory.mkdir()
    own = build_keeper.Runner("http://r/", os.getpid(), procfs.started(os.getpid()), procfs.boot())
    places.record.write_text(json.dumps(asdict(own)))
    with places.lock.open("w") as runner:
        fcntl.flock(runner, fcntl.LOCK_EX)
        recovery.remove_leftovers(config)
        of_builds = {f"{name}/{LEFT}" for name in ("software", "software/0123", "state/builds")}
        assert left(config) == of_builds | {f"software/{TREE}"}
        assert not build_keeper.end_cut_off(config)
        assert places.record.exists()
    recovery.remove_leftovers(config)
    assert not left(config)
    with build_keeper.idle(config) as nobody:
        assert nobody
        assert build_keeper.running(config) is None, "who looks is not taken for a runner"
        with places.lock.open("w") as runner, pytest.raises(BlockingIOError):
            fcntl.flock(runner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert build_keeper.end_cut_off(config)
    assert not places.record.exists()
