"""``instance_storage_home``: directories of partitions on other disks."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from json_schemas import parsed, validate

from partitiond import buildout, config, converge, instance_build, instance_cleanup, lanes, storage, verbs
from partitiond.context import Context
from partitiond.errors import PartitiondError

USER0, USER1 = 5000, 5001


@pytest.fixture(scope="module")
def standing(module_node_config):
    node = module_node_config
    node.home = node.root / "home"
    node.home.mkdir()
    node.write(slapformat={"instance_storage_home": node.home})
    assert apply(node)["failures"] == []
    return node


@pytest.fixture
def node(standing):
    """The standing node with an empty home."""
    yield standing
    for path in standing.home.iterdir():
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    done = apply(standing)
    assert (done["failures"], done["left"], done["refused"]) == ([], [], [])


def apply(node):
    with node.context() as context:
        return validate({"schema": "partitiond/apply/1", **verbs.apply(context, [])})


def plan(node):
    with node.context() as context:
        return validate({"schema": "partitiond/plan/1", **verbs.plan(context)})


def refused(value):
    return {one["name"]: one["code"] for one in value["refused"]}


def data(node, *names):
    for name in names:
        (node.home / name).mkdir()


def resource(node, partition):
    return json.loads((node.instance / partition / ".slapos-resource").read_text())


def access(path):
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def test_each_partition_gets_a_directory_on_each_disk(node):
    data(node, "data10", "data2", "data", "datax", "data1x", "other")
    (node.home / "data2" / "slappart7").mkdir()  # of a former partition
    assert apply(node)["left"] == []
    assert plan(node)["operations"] == []
    for index in range(3):
        expected = [node.home / name / f"slappart{index}" for name in ("data2", "data10")]
        assert resource(node, f"slappart{index}")["external_storage_list"] == list(map(str, expected))
        assert {access(path) for path in expected} == {(5000 + index, 5000 + index, 0o750)}
    assert access(node.home / "data2" / "slappart7") == (0, 0, 0o755)
    assert access(node.home / "data2") == (0, 0, 0o755)
    assert not list((node.home / "datax").iterdir())
    (node.home / "data2" / "slappart1").chmod(0o777)
    (operation,) = plan(node)["operations"]
    assert (operation["partition"], operation["reason"]) == ("slappart1", "is uid 5001, gid 5001, mode 0777")
    assert apply(node)["left"] == []


def test_a_partition_keeps_the_others_out(node):
    data(node, "data1")
    apply(node)
    code = "import os, sys\ntry: os.listdir(sys.argv[1])\nexcept OSError as error: sys.exit(error.errno)"
    path = str(node.home / "data1" / "slappart0")
    for uid, answer in ((USER0, 0), (USER1, errno.EACCES)):
        line = [sys.executable, "-I", "-S", "-c", code, path]
        done = subprocess.run(line, user=uid, group=uid, extra_groups=[], check=False)
        assert done.returncode == answer


@pytest.mark.parametrize(("uid", "mode"), [(USER0, 0o755), (1000, 0o755), (0, 0o777), (0, 0o1777)])
def test_a_data_directory_that_others_can_change_is_refused(node, uid, mode, command):
    data(node, "data1", "data2")
    os.chown(node.home / "data1", uid, 0)
    (node.home / "data1").chmod(mode)
    done = command("apply", "--json", "-c", node.path)
    assert (done.returncode, refused(parsed(done))) == (3, {str(node.home / "data1"): "path.untrusted"})
    assert not list((node.home / "data1").iterdir())
    assert resource(node, "slappart0")["external_storage_list"] == [str(node.home / "data2" / "slappart0")]


def test_links_of_root_are_followed_but_not_through_others_directories(node):
    disk, others = node.root / "disk", node.root / "others"
    for path in (disk, others):
        path.mkdir()
    (others / "link").symlink_to(disk)
    os.chown(others, 1000, 1000)
    (node.home / "data1").symlink_to(disk)
    (node.home / "data2").symlink_to(others / "link")
    (node.home / "data3").symlink_to("/nothing")
    (node.home / "data4").write_text("no directory")
    done = apply(node)
    assert refused(done) == {
        str(node.home / "data2"): "path.untrusted",
        str(node.home / "data3"): "storage.unusable",
        str(node.home / "data4"): "storage.unusable",
    }
    assert done["failures"] == []
    assert access(disk / "slappart0") == (USER0, USER0, 0o750)
    assert resource(node, "slappart0")["external_storage_list"] == [str(node.home / "data1" / "slappart0")]


def test_something_in_the_way_on_one_disk_holds_up_no_other(node):
    data(node, "data1", "data2")
    (node.home / "data1" / "slappart1").symlink_to("/etc")
    done = apply(node)
    assert refused(done) == {str(node.home / "data1" / "slappart1"): "directory.in_the_way"}
    assert access(Path("/etc"))[0] == 0
    assert access(node.home / "data2" / "slappart1")[0] == USER1


def test_a_disk_that_cannot_be_written_fails_alone(node):
    data(node, "data1", "data2")
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,mode=0755", "none", str(node.home / "data1")], check=True
    )
    try:
        done = apply(node)
        assert {failure["resource"] for failure in done["failures"]} == {
            f"directory{node.home}/data1/slappart{index}" for index in range(3)
        }
        assert access(node.home / "data2" / "slappart0")[0] == USER0
    finally:
        subprocess.run(["umount", str(node.home / "data1")], check=True)


def test_a_home_that_is_not_there_is_said(node):
    node.home.rename(node.root / "away")
    try:
        assert refused(apply(node)) == {str(node.home): "storage.unusable"}
    finally:
        (node.root / "away").rename(node.home)


def test_software_and_master_are_told(node):
    data(node, "data1")
    context = Context.of(node.load())
    target = converge.observe(context).node
    release = node.root / "software" / buildout.software_name("http://r")
    release.mkdir()
    (release / "instance.cfg").write_text("[buildout]\n")
    entry = SimpleNamespace(software_release="http://r", requested_state="started")
    profile = instance_build.instance_profile(context, target.partitions[0], entry).decode()
    assert f"[storage-configuration]\nstorage-home = {node.home}\n" in profile
    said = lanes.description(target, storage.observe(target.config), ("debian", "12", "Debian"))
    assert said["instance_storage_home"] == str(node.home)
    assert said["partition_list"][1]["external_storage_list"] == [str(node.home / "data1" / "slappart1")]


def test_what_lies_there_is_metered_and_goes_with_the_instance(node):
    data(node, "data1")
    apply(node)
    mine, other = (node.home / "data1" / f"slappart{index}" for index in range(2))
    (mine / "deep" / "er").mkdir(parents=True)
    (mine / "deep" / "file").write_bytes(os.urandom(2**20))
    (mine / "link").symlink_to(other)
    (other / "file").write_bytes(b"x")
    context = Context.of(node.load())
    try:
        lanes.usage(context)
        target = context.node
        used = {one.id: disk_bytes(context, one.id) for one in target.partitions}
        assert 2**20 < used["slappart0"] < 2**21
        assert 0 < used["slappart1"] < 2**17
        instance_cleanup.clean(context, target, target.partitions[0])
        lanes.usage(context)
        assert disk_bytes(context, "slappart0") < 2**17
    finally:
        context.meters.close()
    # a directory that the last tenant has held open is not the next one's
    assert not mine.exists()
    apply(node)
    assert list(mine.iterdir()) == []
    assert access(mine) == (USER0, USER0, 0o750)
    assert (other / "file").read_bytes() == b"x"


def disk_bytes(context, partition):
    report = context.meters._ledger.usage(None, None, partition)
    (found,) = report.partitions
    return found.disk_bytes


GOOD = """\
[slapos]
computer_id = COMP-1
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance
{slapos}
[slapformat]
interface_name = br0
partition_amount = 3
{slapformat}
"""


def load(directory, slapos="", slapformat=""):
    path = directory / "slapos.cfg"
    path.write_text(GOOD.format(slapos=slapos, slapformat=slapformat))
    return config.load(path)


def test_both_sections_may_name_it_and_slapos_wins(tmp_path):
    """As in slapos.core, where slapformat reads both and slapgrid [slapos] alone."""
    line = "instance_storage_home = /srv/"
    assert load(tmp_path).instance_storage_home is None
    assert load(tmp_path, slapformat=line + "a").instance_storage_home == Path("/srv/a")
    assert load(tmp_path, slapos=line + "b").instance_storage_home == Path("/srv/b")
    both = load(tmp_path, line + "b", line + "a")
    assert (both.instance_storage_home, both.warnings) == (Path("/srv/b"), ())


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("data", "absolute path"),
        ("/srv/a b", "absolute path"),
        ("/srv/t/instance/slappart0/home", "outside of the partitions"),
        ("/srv/t/software", "outside of software_root"),
    ],
)
def test_a_bad_home_is_named_with_its_place(tmp_path, value, allowed):
    with pytest.raises(PartitiondError) as caught:
        load(tmp_path, slapformat=f"instance_storage_home = {value}")
    assert "slapos.cfg:10: instance_storage_home = " in str(caught.value)
    assert allowed in str(caught.value)


def test_no_home_no_directories():
    assert storage.observe(SimpleNamespace(instance_storage_home=None)) == storage.Observed()
