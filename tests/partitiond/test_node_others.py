"""What stands beside a node: another configuration, a bridge that is none, the guest behind a tap."""

import subprocess
import sys

from json_schemas import parsed


def test_a_second_configuration_takes_nothing_of_the_first(bridge, node_config, command):
    first, second = node_config(2), node_config(2)
    assert command("apply", "-q", "-c", first.path).returncode == 0
    for verb in (("plan",), ("apply",), ("teardown",), ("teardown", "--purge")):
        done = command(*verb, "--json", "-c", second.path)
        assert (done.returncode, parsed(done)["error"]["code"]) == (1, "node.other")
    assert parsed(command("plan", "--json", "-c", first.path))["operations"] == []
    assert command("teardown", "-q", "-c", first.path).returncode == 0
    assert command("apply", "-q", "-c", second.path).returncode == 0
    assert command("teardown", "-q", "-c", second.path).returncode == 0


def test_a_bridge_that_is_none_changes_nothing(bridge, node_config, command):
    node = node_config(1)
    assert command("apply", "-q", "-c", node.path).returncode == 0
    node.write(partitiond={"bridge": "lo"})
    done = command("apply", "--json", "-c", node.path)
    assert (done.returncode, parsed(done)["error"]["code"]) == (1, "network.no_bridge")


def test_the_owner_of_a_tap_can_open_it(bridge, node_config, command):
    """As qemu does; another user cannot, and nobody could before: without udev the device is root's alone."""
    node = node_config(2)
    assert command("apply", "-q", "-c", node.path).returncode == 0
    script = """
import fcntl, struct, sys
with open("/dev/net/tun", "r+b", buffering=0) as tun:
    # TUNSETIFF; IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x0002 | 0x1000 | 0x4000))
"""
    for user, works in (("slapuser0", True), ("slapuser1", False), ("nobody", False)):
        switch = ["/usr/bin/setpriv", "--reuid", user, "--clear-groups", "--"]
        done = subprocess.run(
            [*switch, sys.executable, "-I", "-c", script, "slaptap0"], capture_output=True, check=False
        )
        assert (done.returncode == 0) == works, done.stderr
