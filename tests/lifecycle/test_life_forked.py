"""Instances of real releases: forked from the server of builds or built by the release's own script, file by file the same."""

import subprocess
import time

import pytest
from life_node import ROOT

from partitiond import build_server, buildout, config, converge, instance_build
from partitiond.build_server import BuildServer
from partitiond.context import Context

pytestmark = pytest.mark.full

# title: profile below the repository, type, parameters
RELEASES = {
    "tests": ("tests/lifecycle/release/software.cfg", None, {"text": "served"}),
    # recipes of slapos.cookbook: slapconfiguration, publish, wrapper
    "demo": ("partitiond/demo/release/software.cfg", "server", {}),
}


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(software_interval=100_000, instances_interval=100_000)
    node.start()
    node.offer()
    return node


def tree(path):
    """{name: (mode, owner, group, content)} of all below."""
    found = {}
    for place in sorted(path.rglob("*")):
        status = place.lstat()
        link = str(place.readlink()) if place.is_symlink() else None
        content = link or (place.read_bytes() if place.is_file() else None)
        found[str(place.relative_to(path))] = (oct(status.st_mode), status.st_uid, status.st_gid, content)
    return found


def built(context, partition, entry):
    """The partition's files after a build from nothing."""
    for place in partition.path.iterdir():
        if place.name != ".slapos-resource":
            subprocess.run(["/bin/rm", "-rf", str(place)], check=True)
    instance_build.configure_instance(context, partition, entry)
    return tree(partition.path)


@pytest.mark.parametrize("title", RELEASES)
def test_the_same_files(node, title):
    profile, kind, parameters = RELEASES[title]
    url = str(ROOT / profile)
    if title == "tests":
        url = node.release()
    node.supply(url)
    node.cli("sync", "software", timeout=300)
    node.request(title, url, kind=kind, **parameters)
    node.cli("sync", "instances", timeout=120)
    name = node.holder(title)
    entry = node.wishes()[name]
    node.terminate()
    context = Context.of(config.load(node.configuration))
    server = BuildServer(patience=0)
    try:
        partition = next(item for item in converge.observe(context).node.partitions if item.id == name)
        assert build_server.fits(context.config, buildout.software_directory(context.config, url))
        context.builds = BuildServer(patience=10**6)
        executed = built(context, partition, entry)
        context.builds = server
        server.begin()
        end = time.monotonic() + 60
        while (channel := server._channel()) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        channel.close()
        forked = built(context, partition, entry)
        log = (context.config.log_dir / name / "buildout.log").read_text().rpartition("configuring")[2]
        assert "pkg_resources is deprecated" not in log, "it was executed: only then this warning is told"
        assert ".installed.cfg" in forked
        assert forked == executed
        again = built(context, partition, entry)
        assert again == executed
    finally:
        server.close()
        context.meters.close()
        node.start()
