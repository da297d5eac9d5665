"""Races: a user exchanges what root is about to open, 10 000 rounds of each thing that root does; and the controls.

The controls do the same as a naive program would: they must be caught by the same canaries, else the tests could not fail.
"""

import contextlib
import os
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hostile_node
import hostile_scene
import pytest
from hostile_node import URL
from hostile_scene import Canary, Hostile, HungError, swapping, within

from accounting.disk import DiskMeter
from partitiond import (
    directories,
    files,
    programs,
    resource_file,
    software_build,
    tunnel_declarations,
)
from partitiond.directories import DirectorySpec
from partitiond.errors import FAMILY

ROUNDS = 10_000  # of each race; by default, of all of them together
_SHORT = 1_500
_TIME = 120.0  # for all rounds of one race, on a machine that has other work, too


@pytest.fixture(scope="module")
def scene(module_node_config):
    yield from hostile_node.standing(module_node_config)


@pytest.fixture(scope="session")
def table(request):
    return hostile_node.table(request.config)


def rounds(call, count):
    """Do it so often; how often it went well, and how often which error was raised."""

    def run():
        seen = Counter()
        for _ in range(count):
            try:
                call()
            except (*FAMILY, OSError) as error:
                seen[getattr(error, "code", type(error).__name__)] += 1
            else:
                seen["well"] += 1
        return seen

    seen, error, _ = within(_TIME, run)
    if error is not None:
        raise error
    assert seen.total() == count
    return seen


class Race:
    """Two names that are exchanged, and what root does meanwhile; ``both``: root must have met the one and the other."""

    def __init__(self, one, other, uid, call, *, both=True):
        self.one, self.other, self.uid, self.call, self.both = one, other, uid, call, both


def _declarations(scene):
    path = scene.tenant_directory("etc", "tunnel") / "x.cfg"
    path.write_text("[tunnel]\nmode = server\nlisten = 4000\nconnect = 4000\n")
    os.chown(path, scene.partition.uid, scene.partition.gid)

    def read():
        found = tunnel_declarations.declared(scene.context.node, scene.partition, {})
        if found.refused:
            assert not scene.canary.leaks(repr(found))
            raise PermissionError("refused")

    return read


def race_directory_of_declarations(scene):
    read = _declarations(scene)
    link = scene.path / "link"
    link.symlink_to(scene.canary.directory)
    return Race(scene.path / "etc" / "tunnel", link, scene.partition.uid, read)


def race_declaration(scene):
    read = _declarations(scene)
    link = scene.path / "link"
    link.symlink_to(scene.canary.file)
    return Race(scene.path / "etc" / "tunnel" / "x.cfg", link, scene.partition.uid, read)


def race_declaration_and_hard_link(scene):
    read = _declarations(scene)
    link = scene.path / "link"
    os.link(scene.canary.file, link)
    return Race(scene.path / "etc" / "tunnel" / "x.cfg", link, scene.partition.uid, read)


def race_resource_file(scene):
    link = scene.path / "link"
    link.symlink_to(scene.canary.file)
    holdings = resource_file.Holdings()
    resource_file.write(scene.context.node, scene.partition, holdings)

    def look_and_write():
        resource_file.write(scene.context.node, scene.partition, holdings)
        resource_file._compare(scene.context.node, scene.partition, None, holdings)

    return Race(scene.path / ".slapos-resource", link, scene.partition.uid, look_and_write, both=False)


def race_removal(scene):
    top = scene.tenant_directory("top", "sub").parent
    link = scene.path / "top" / "link"
    link.symlink_to(scene.canary.directory)

    def make_and_remove():
        with contextlib.suppress(FileExistsError):
            link.symlink_to(scene.canary.directory)
        inner = scene.path / "top" / "sub"
        with contextlib.suppress(FileExistsError):
            inner.mkdir()
        with files.directory(top) as descriptor:
            files.empty(descriptor)

    return Race(top / "sub", link, scene.partition.uid, make_and_remove, both=False)


def race_directory_of_programs(scene):
    path = scene.tenant_directory("etc", "run") / "prog"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    link = scene.path / "link"
    link.symlink_to(scene.canary.directory)
    return Race(
        scene.path / "etc" / "run",
        link,
        scene.partition.uid,
        lambda: programs.group(scene.context, scene.partition),
    )


def race_meter(scene):
    inner = scene.tenant_directory("top", "sub")
    (inner / "file").write_bytes(bytes(4096))
    link = scene.path / "top" / "link"
    link.symlink_to(scene.canary.directory)

    def measure():
        with DiskMeter() as meter:
            found = meter.measure({"slappart0": scene.path / "top"})
        assert found["slappart0"].finished

    return Race(inner, link, scene.partition.uid, measure, both=False)


def race_leftovers(scene):
    name = ".x.0123456789ab.partitiond"
    (scene.path / name).mkdir()
    link = scene.path / "link"
    link.symlink_to(scene.canary.directory)

    def clean():
        with contextlib.suppress(FileExistsError):
            link.symlink_to(scene.canary.directory)
        with files.directory(scene.path) as descriptor:
            files.remove_leftovers(descriptor)

    return Race(scene.path / name, link, scene.partition.uid, clean, both=False)


def race_directory_of_a_release(scene):
    """What build steps run owns ``software_root`` itself."""
    link = scene.config.software_root / "link"
    link.symlink_to(scene.canary.directory)
    own = scene.soft.pw_uid, scene.soft.pw_gid
    return Race(
        scene.software, link, scene.soft.pw_uid, lambda: software_build._prepare(scene.config, URL, own)
    )


def race_owner_of_a_directory(scene):
    """As if somebody else than root could write where a partition's directory lies."""
    open_to_all = scene.tenant_directory("open")
    path, link = open_to_all / "mine", open_to_all / "link"
    path.mkdir()
    link.symlink_to(scene.canary.directory)
    user = scene.partition.user
    numbers = {user: (scene.partition.uid, scene.partition.gid)}
    spec = DirectorySpec(path, user, user, 0o751, "slappart0")

    def own():
        directories.apply((directories._operation(spec, "", "missing"),), numbers)

    return Race(path, link, scene.partition.uid, own)


RACES = {
    name.removeprefix("race_"): make for name, make in list(globals().items()) if name.startswith("race_")
}


@pytest.fixture
def tidy(scene):
    yield
    hostile_scene.remove(scene.config.software_root / "link")
    for name in os.listdir(scene.path):  # noqa: PTH208 - names suffice
        hostile_scene.remove(scene.path / name)
    hostile_scene.remove(scene.software)
    scene.make_software()


assert _SHORT * len(RACES) > ROUNDS
COUNTS = pytest.mark.parametrize("count", [_SHORT, pytest.param(ROUNDS, marks=pytest.mark.full)])


@COUNTS
@pytest.mark.parametrize("name", RACES)
def test_race(scene, tidy, table, name, count):
    race = RACES[name](scene)
    scene.canary.set()
    with swapping(race.one, race.other, race.uid):
        seen = rounds(race.call, count)
    table.races[name] += count
    assert scene.canary.changes() == []
    if race.both:
        assert seen["well"], seen
        assert seen.total() > seen["well"], "root never met the link: that was no race"


@COUNTS
def test_temporary_names_are_of_no_use(scene, tidy, table, count):
    """A user sees the temporary file beside the one that is replaced, and puts a link in its place at once."""
    link = scene.path / "link"
    link.symlink_to(scene.canary.file)
    holdings = resource_file.Holdings()
    scene.canary.set()
    with hostile_scene.hunting(scene.path, scene.canary.file, scene.partition.uid) as hunter:
        seen = rounds(lambda: resource_file.write(scene.context.node, scene.partition, holdings), count)
        won = hunter()
    table.races["temporary names"] += count
    assert won, "no temporary name was ever caught: that was no race"
    assert seen["well"]
    assert scene.canary.changes() == []


# --- controls: what a naive program does is seen ---------------------------------------------------------------------------


@pytest.fixture
def field():
    """A place where every user may do as it likes, and canaries beside it."""
    base = Path("/srv", f"field-{secrets.token_hex(3)}")
    (base / "open").mkdir(parents=True)
    (base / "open").chmod(0o777)
    yield base / "open", Canary(base)
    hostile_scene.remove(base)


def naive_read(path):
    return path.read_bytes()


def naive_write(path):
    path.write_bytes(b"{}")


def naive_chown(path):
    os.chown(path, 4242, 4242)


def naive_chmod(path):
    path.chmod(0o755)


def naive_removal(path):
    for name in os.listdir(path):  # noqa: PTH208 - this is the naive way
        if (path / name).is_dir():
            naive_removal(path / name)
        else:
            (path / name).unlink()


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("link_to_file", naive_read),
        ("hard_link", naive_read),
        ("link_to_file", naive_write),
        ("hard_link", naive_write),
        ("hard_link", naive_chown),
        ("link_to_directory", naive_chown),
        ("hard_link", naive_chmod),
        ("link_to_directory", naive_removal),
        ("bind", naive_removal),
    ],
)
def test_the_canary_sees(field, kind, act):
    where, canary = field
    hostile = Hostile(kind, where / "thing", 4242, canary)
    try:
        canary.set()
        read = act(where / "thing")
        assert canary.changes()
        assert not read or canary.leaks(read)
    finally:
        hostile.close()


_READ = "import pathlib, sys; pathlib.Path(sys.argv[1]).read_bytes()"


@pytest.mark.parametrize("kind", ["fifo", "leased"])
def test_what_waits_is_seen(field, kind):
    where, canary = field
    hostile = Hostile(kind, where / "thing", 4242, canary)
    reader = subprocess.Popen([sys.executable, "-I", "-c", _READ, str(where / "thing")])
    try:
        with pytest.raises(HungError):
            within(1.0, reader.wait)
    finally:
        reader.kill()
        reader.wait()
        hostile.close()


def test_a_deep_tree_is_too_much_for_recursion(field):
    where, canary = field
    hostile = Hostile("deep", where / "thing", 4242, canary)
    try:
        with pytest.raises((RecursionError, OSError)):
            naive_removal(where)
    finally:
        hostile.close()


def checked_chown(path):
    if not path.is_symlink():
        os.chown(path, 4242, 4242)


def checked_write(path):
    if not path.is_symlink():
        (path / "buildout.cfg").write_bytes(b"{}")


def checked_removal(path):
    if not path.is_symlink():
        naive_removal(path)


@pytest.mark.parametrize("act", [checked_chown, checked_write, checked_removal])
def test_a_race_is_won_against_who_looks_before(field, act):
    where, canary = field
    (where / "one").mkdir(mode=0o777)
    (where / "other").symlink_to(canary.directory)
    canary.set()

    def until_seen():
        for number in range(100 * ROUNDS):
            with contextlib.suppress(OSError):
                act(where / "one")
            if number % 100 == 0 and canary.changes():
                return True
        return False

    with swapping(where / "one", where / "other", 4242):
        won, error, _ = within(_TIME, until_seen)
    assert error is None
    assert won
