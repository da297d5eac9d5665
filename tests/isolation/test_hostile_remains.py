"""What one tenant leaves behind is nothing that reaches the next one, and removing it ends whatever the tenant does."""

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import hostile_node
import hostile_scene
import pytest
from hostile_scene import PATIENCE, within

from partitiond import buildout, converge, files, instance_cleanup, programs, software_build, status, verbs
from partitiond.errors import PartitiondError
from partitiond.incidents import WATCHED

FRIEND = 61999  # another user, who is in league with the tenant


def acl(*entries):
    """An access control list, acl(5); the entries are (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
LIST = acl((1, 7, NOBODY), (2, 7, FRIEND), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))


@pytest.fixture(scope="module")
def scene(module_node_config):
    yield from hostile_node.standing(module_node_config)


def as_user(uid, code, *arguments):
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        user=uid,
        group=uid,
        extra_groups=[],
        check=False,
        capture_output=True,
        text=True,
    )


def give_away(path, uid):
    """The tenant opens its directory to its friend by a list, as setfacl(1) does; the mode can hide it."""
    code = (
        "import os, sys\nfor name in ('access', 'default'):\n"
        " os.setxattr(sys.argv[1], 'system.posix_acl_' + name, bytes.fromhex(sys.argv[2]))\n"
        "os.setxattr(sys.argv[1], 'user.note', b'for my friend')\nos.chmod(sys.argv[1], 0o750)"
    )
    done = as_user(uid, code, path, LIST.hex())
    assert done.returncode == 0, done.stderr


LOOK = "import os, sys; print(os.listdir(sys.argv[1]))"


@pytest.mark.parametrize("which", ["partition", "storage"])
def test_a_list_on_the_directory_is_drift(scene, which):
    path = scene.path if which == "partition" else scene.home / "data1" / "slappart0"
    give_away(path, scene.partition.uid)
    assert as_user(FRIEND, LOOK, path).returncode == 0
    found = [one for one in converge.plan(scene.context, converge.observe(scene.context)) if one.partition]
    assert [one.resource for one in found] == ["directory"]
    assert "access control list" in found[0].reason
    assert verbs.apply(scene.context, [])["left"] == []
    assert as_user(FRIEND, LOOK, path).returncode != 0
    assert not [name for name in os.listxattr(path) if name.startswith("system.posix_acl")]


@pytest.mark.parametrize("which", ["partition", "storage"])
def test_who_had_it_open_does_not_see_the_next_tenant(scene, which):
    path = scene.path if which == "partition" else scene.home / "data1" / "slappart0"
    path.chmod(0o777)
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        give_away(path, scene.partition.uid)
        instance_cleanup.clean(scene.context, scene.context.node, scene.partition)
        assert verbs.apply(scene.context, [])["left"] == []
        (path / "of-the-next-tenant").write_bytes(b"")
        assert os.listdir(held) == []  # noqa: PTH208 - of a descriptor
        assert (os.fstat(held).st_uid, stat.S_IMODE(os.fstat(held).st_mode)) == (0, 0o700)
        assert not [name for name in os.listxattr(path) if name.startswith(("system.posix_acl", "user."))]
    finally:
        os.close(held)
        hostile_scene.remove(path / "of-the-next-tenant")


def test_a_directory_that_is_a_mount_is_kept_and_stripped(scene):
    """As an operator's quota of its own would have it: it cannot be made anew."""
    hostile_scene.remove(scene.path)
    scene.path.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "none", str(scene.path)], check=True)
    try:
        assert verbs.apply(scene.context, [])["left"] == []
        (scene.path / "data").write_bytes(b"x")
        give_away(scene.path, scene.partition.uid)
        instance_cleanup.clean(scene.context, scene.context.node, scene.partition)
        assert verbs.apply(scene.context, [])["left"] == []
        assert [one.name for one in scene.path.iterdir()] == [".slapos-resource"]
        assert os.listxattr(scene.path) == []
    finally:
        subprocess.run(["/usr/bin/umount", str(scene.path)], check=True)
    verbs.apply(scene.context, [])


def test_a_mount_with_more_attributes_than_can_be_listed_is_no_obstacle(scene, caplog):
    """They cannot be taken off, as no call names them; the lists beside them can, and the end of the instance comes."""
    hostile_scene.remove(scene.path)
    scene.path.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "none", str(scene.path)], check=True)
    try:
        assert verbs.apply(scene.context, [])["left"] == []
        give_away(scene.path, scene.partition.uid)
        hostile_scene.burden(scene.path, scene.partition.uid)
        (scene.path / "data").write_bytes(b"x")
        assert verbs.plan(scene.context)["operations"][0]["resource"] == "directory"
        instance_cleanup.clean(scene.context, scene.context.node, scene.partition)
        assert [one for one in caplog.messages if str(scene.path) in one and "too many" in one]
        assert verbs.apply(scene.context, [])["left"] == []
        assert [one.name for one in scene.path.iterdir()] == [".slapos-resource"]
        for name in ("access", "default"):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what matters
                os.getxattr(scene.path, f"system.posix_acl_{name}")
            assert caught.value.errno == errno.ENODATA
    finally:
        subprocess.run(["/usr/bin/umount", str(scene.path)], check=True)
    verbs.apply(scene.context, [])


_FILL = """
import os, sys
os.chdir(sys.argv[1])
print("filling", flush=True)
number = 0
while True:
    number += 1
    for make in (os.mkdir, lambda name: os.close(os.open(name, os.O_CREAT | os.O_WRONLY))):
        try:
            make(f"{make is os.mkdir}{number}")
        except OSError as error:
            if error.errno in (13, 2):
                print(error.errno, flush=True)
                sys.stdin.read()
                raise SystemExit
"""


def test_who_fills_a_directory_while_it_is_emptied_is_kept_out(scene):
    """Somebody who is no user of the partition, so that ending its processes does not help."""
    inner = scene.tenant_directory("open", "to", "all")
    inner.chmod(0o777)
    # so much that the friend is sure to try while it is removed
    for number in range(20_000):
        os.mknod(inner / f"file{number}")
    friend = subprocess.Popen(
        [sys.executable, "-I", "-c", f"import os; os.setuid({FRIEND})\n{_FILL}", "."],
        cwd=inner,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert friend.stdout.readline() == b"filling\n"
        _, error, _ = within(
            PATIENCE, lambda: instance_cleanup.clean(scene.context, scene.context.node, scene.partition)
        )
        assert error is None, error
        assert not scene.path.exists()
        assert int(friend.stdout.readline()) == errno.EACCES
    finally:
        friend.kill()
        friend.communicate()
        verbs.apply(scene.context, [])


def test_a_removal_needs_no_memory_for_names(scene):
    """Two hundred thousand names of 200 bytes in one directory: as a list they would be fifty megabytes and more."""
    tree = scene.tenant_directory("many")
    code = (
        "import os, resource, sys\nfrom partitiond import files\n"
        "with files.directory(sys.argv[1]) as top:\n"
        " before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        " files.empty(top)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    descriptor = os.open(tree, os.O_RDONLY)
    try:
        for number in range(200_000):
            os.mknod(f"{number:0>200}", dir_fd=descriptor)
    finally:
        os.close(descriptor)
    root = Path(files.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(scene.path)],
        env={"PYTHONPATH": str(root)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 8192, "KiB"
    assert list(scene.path.iterdir()) == []
    verbs.apply(scene.context, [])


def test_root_does_not_say_where_links_lead(scene):
    """A program that is a link to another tenant's is none: the tenant would learn from its log that there is such a file."""
    theirs = scene.other.path / "etc" / "secret-program"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("#!/bin/sh\n")
    theirs.chmod(0o755)
    run = scene.tenant_directory("etc", "run")
    for name, target in (
        ("theirs", theirs),
        ("ours", scene.software / "bin" / "buildout"),
        ("nowhere", "/nonexistent"),
        ("directory", "/"),
        ("text", "/etc/passwd"),
        ("round", "round"),
    ):
        (run / name).symlink_to(target)
    (run / "plain").write_text("#!/bin/sh\n")
    (run / "plain").chmod(0o755)
    assert (run / "theirs").is_file()  # root would follow it
    group = programs.group(scene.context, scene.partition)
    assert [program.name for program in group.programs] == ["ours", "plain"]
    hostile_scene.remove(run.parent)


def test_too_many_links_are_not_looked_at(scene):
    run = scene.tenant_directory("etc", "run")
    for number in range(101):
        (run / f"p{number}").symlink_to("/bin/sh")
    with pytest.raises(PartitiondError) as caught:
        programs.group(scene.context, scene.partition)
    assert caught.value.code == "instance.too_many_programs"
    hostile_scene.remove(run.parent)


def test_two_programs_that_supervisord_could_not_tell_apart(scene, caplog):
    for kind, name in (
        ("run", "x-on-watch"),
        ("run", "x-on-watch-run"),
        ("service", "x"),
        ("service", "y" * 95),
    ):
        path = scene.tenant_directory("etc", kind) / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    group = programs.group(scene.context, scene.partition)
    assert [program.process_name for program in group.programs] == ["x-on-watch-run", "x-on-watch"]
    # what of etc/run has the name of a watched one is none
    assert [
        (program.process_name.endswith(WATCHED), program.command.split("/")[-2:])
        for program in group.programs
    ] == [
        (False, ["run", "x-on-watch"]),
        (True, ["service", "x"]),
    ]
    assert group.render()
    assert len(caplog.messages) == 2
    hostile_scene.remove(scene.path / "etc")


def test_a_log_that_grows_while_it_is_read(scene, tmp_path):
    """The descriptor of a build's log is the tenant's to write to, also after the build."""
    log = tmp_path / "build.log"
    with log.open("wb") as file:
        file.truncate(hostile_scene.GIANT)
    text, error, _ = within(PATIENCE, lambda: buildout.tail(log))
    assert error is None
    assert len(text) == 4000


@pytest.mark.parametrize("name", ["café", "=?utf-8?q?x?=\n y", "../../x", "a\0b", "x/y", "a\nb", ""])
def test_an_egg_with_an_odd_name(scene, name):
    path = scene.software / "eggs" / "b.egg" / "b.dist-info" / "METADATA"
    path.write_text(f"Name: {name}\n")
    links = scene.software / "develop-eggs"
    for link in links.iterdir():
        link.unlink()
    software_build._link_eggs(
        scene.config.software_root, scene.software, scene.soft.pw_uid, scene.soft.pw_gid
    )
    for link in links.iterdir():
        assert link.name == "b.egg-link"
        assert link.read_text() == f"{scene.software}/eggs/b.egg\n.\n"
    scene.make_software()


def test_a_partition_that_cannot_be_looked_at_is_named(scene):
    hostile = None
    hostile_scene.remove(scene.path)
    try:
        hostile = hostile_scene.Hostile("fuse", scene.path, scene.partition.uid, scene.canary)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what matters
            list(scene.path.iterdir())
        assert caught.value.errno == errno.EACCES
        refused = verbs.plan(scene.context)["refused"]
        assert [(one["resource"], one["partition"], one["code"]) for one in refused] == [
            ("directory", "slappart0", "directory.unreachable")
        ]
        cases = status.node(scene.context)["node"]["open_cases"]
        assert any("slappart0 of slappart0 is refused" in one for one in cases)
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(verbs.apply, scene.context, [])
            if hostile:
                hostile.close()


def test_a_directory_that_fails_after_the_look_fails_alone(scene):
    """A file system of the tenant's own, mounted between plan and apply, keeps root out; the others' round goes on."""
    hostile_scene.remove(scene.path)
    scene.path.mkdir()
    files_of_all = [one.path / ".slapos-resource" for one in (scene.partition, scene.other)]
    (scene.other.path).chmod(0o777)
    files_of_all[1].unlink()
    with scene.context.applying:
        first = converge.look(scene.context)
    assert {one.partition for one in first[1].directories} == {"slappart0", "slappart1"}
    assert {one.partition for one in first[1].resources} == {"slappart0", "slappart1"}
    scene.path.rmdir()
    hostile = None
    try:
        hostile = hostile_scene.Hostile("fuse", scene.path, scene.partition.uid, scene.canary)
        outcome = converge.apply(scene.context, first=first)
        assert [name for name, _ in outcome.failures] == [f"directory{scene.path}"]
        assert [error.errno for _, error in outcome.failures] == [errno.EACCES]
        # the resource file of the hostile one was not tried
        assert outcome.done == len(first[1]) - 2
        assert files_of_all[1].is_file()
        assert stat.S_IMODE(scene.other.path.lstat().st_mode) == 0o750
        assert outcome.stands
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(verbs.apply, scene.context, [])
            if hostile:
                hostile.close()


def test_a_tenant_that_is_always_drift_does_not_shake_the_node(scene):
    """What its directory is like says nothing of a configuration that is on trial."""
    scene.path.chmod(0o777)
    try:
        found = converge.plan(scene.context, converge.observe(scene.context))
        assert [one.id for one in found.directories] == [f"directory{scene.path}"]
        assert found.stands
    finally:
        verbs.apply(scene.context, [])


def test_what_it_takes_to_bound_the_pins_of_refused_tunnels(scene):
    """Declarations that are refused for their last line cost as much to read as good ones."""
    from partitiond import tunnel_declarations
    from stunnel_mgr import pins
    from stunnel_mgr.identity import make_identity

    own = scene.tenant_directory("etc", "tunnel")
    certificates = [make_identity(f"p{number}").certificate_der_base64 for number in range(60)]
    for number in range(100):
        lines = [f" cert:{one}" for one in certificates]
        path = own / f"t{number}.cfg"
        path.write_text(
            f"[tunnel]\nmode = server\nlisten = {4000 + number}\nconnect = 1\nallow =\n"
            + "\n".join(lines)
            + "\n bad\n"
        )
        os.chown(path, scene.partition.uid, scene.partition.gid)
    pins.pin_from_der.cache_clear()
    found, error, _ = within(
        PATIENCE, lambda: tunnel_declarations.declared(scene.context.node, scene.partition, {})
    )
    assert error is None
    assert len(found.refused) == 100
    used = pins.pin_from_der.cache_info()
    assert used.hits + used.misses <= 524288 // 500
    hostile_scene.remove(own.parent)
