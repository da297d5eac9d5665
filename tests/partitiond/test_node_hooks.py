"""The programs at the cgroup as part of a node: applied, told by ``status``, and what stands in for them."""

import json
import os
import pwd
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)


@pytest.fixture
def said(command):
    """Run a verb to its end and return its object."""

    def run(verb, node, code=0, before=""):
        line = command.line(verb, "--json", "-c", node.path)
        if before:
            line = ["/usr/bin/unshare", "--mount", "sh", "-c", f'{before} && exec "$@"', "sh", *line]
        done = subprocess.run(
            line, env=command.environment, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


WITHOUT_CGROUPS = "umount /sys/fs/cgroup"


def open_cases(status):
    return [case for case in status["node"]["open_cases"] if "no programs at the cgroup" in case]


def source_of(user, address):
    """The source that a client of the user has, who bound nothing."""
    uid = pwd.getpwnam(user).pw_uid
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(uid)
            os.setuid(uid)
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
                one.connect((address, 9))
                os.write(writer, one.getsockname()[0].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    os.waitpid(child, 0)
    return text


def test_status_says_what_gives_sources(bridge, node_config, said):
    node = node_config(2, interface=bridge.name)
    planned = {one["id"] for one in said("plan", node, code=2)["operations"]}
    assert "bpf/cgroup" in planned
    said("apply", node)
    value = said("status", node)
    assert (value["node"]["source_selection"], open_cases(value), value["node"]["drift"]) == (
        "cgroup-bpf",
        [],
        [],
    )
    one, other = (item["ipv6"] for item in value["partitions"])
    assert source_of("slapuser0", other) == one

    # where there is no cgroup2, they have to go; the node works all the same
    blind = said("status", node, before=WITHOUT_CGROUPS)
    assert blind["node"]["source_selection"] == "routing-table"
    assert any("no cgroup2 file system is mounted" in case for case in open_cases(blind))
    said("apply", node, before=WITHOUT_CGROUPS)
    assert said("plan", node, before=WITHOUT_CGROUPS)["operations"] == []
    assert source_of("slapuser0", other) not in (one, other)

    assert [row["id"] for row in said("plan", node, code=2)["operations"]] == ["bpf/cgroup"]
    said("apply", node)
    assert source_of("slapuser0", other) == one

    node.write(partitiond={"address_ownership": "off"})
    said("apply", node)
    value = said("status", node)
    assert (value["node"]["source_selection"], open_cases(value)) == ("kernel", [])
    assert source_of("slapuser0", other) == other


def test_a_bpffs_is_mounted_where_there_is_none(bridge, node_config, command):
    """And taken away by teardown; in a mount namespace that ends with the commands."""
    node = node_config(1, interface=bridge.name)
    verbs = " && ".join(
        f'"$0" -P -m partitiond {verb} -q -c {node.path} > /dev/null && {check}'
        for verb, check in (
            ("apply", "grep -q '/sys/fs/bpf .* - bpf partitiond ' /proc/self/mountinfo"),
            ("plan", "true"),
            ("teardown", "! grep -q ' - bpf partitiond ' /proc/self/mountinfo"),
        )
    )
    line = ["/usr/bin/unshare", "--mount", "sh", "-c", f"umount /sys/fs/bpf && {verbs}", sys.executable]
    done = subprocess.run(line, env=command.environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
