"""After a teardown the system is as it was before: every kind of node, on an uplink that the operator has set up."""

import pwd
from pathlib import Path

import pytest
from trial_scene import (
    NODE4,
    NODE6,
    OPERATOR4,
    RIGHT,
    assert_as_before,
    instance_runs,
    ip,
    machine,
    processes,
    reached_again,
)

RESERVED_PORTS = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
# that nobody may use yet
TUNNEL = {"partition": "slappart0", "mode": "server", "listen": 40000, "connect": 5000, "allow": ""}
ROUTABLE = {"slappart1": f"203.0.113.7/32 via {OPERATOR4}"}
NODES = {
    "in a bridge of ours": {
        "slapformat": {"create_tun": "true"},
        "partitiond": RIGHT,
        "routable_ipv4": ROUTABLE,
    },
    "in the operator's bridge": {
        "slapformat": {"create_tun": "true"},
        "partitiond": {"bridge": "br0", "bridge_ports": "eth0"},
        "routable_ipv4": ROUTABLE,
    },
    "routed": {
        "slapformat": {"create_tun": "true", "tap_gateway_interface": "guests0"},
        "routable_ipv4": ROUTABLE,
    },
    "without IPv6": {
        "partitiond": {**RIGHT, "ipv4_partition_network": "198.51.100.0/24"},
    },
}


@pytest.fixture(autouse=True)
def others():
    """What is not ours beside what will be: users at the end of the files, a group with members of both kinds."""
    kept = {name: Path("/etc", name).read_bytes() for name in ("passwd", "group", "shadow", "gshadow")}
    for name, line in (
        ("passwd", "someone:x:4999:4999:Someone,,,:/home/someone:/bin/bash\n"),
        ("group", "someone:x:4999:\nkvm0:x:4998:someone\n"),
        ("shadow", "someone:!:19000:0:99999:7:::\n"),
        ("gshadow", "someone:!::\nkvm0:!::someone\n"),
    ):
        with Path("/etc", name).open("a") as file:
            file.write(line)
    yield
    for name, content in kept.items():
        Path("/etc", name).write_bytes(content)


@pytest.mark.parametrize(
    ("settings", "purge"),
    [*((one, ()) for one in NODES.values()), (NODES["in a bridge of ours"], ("--purge",))],
    ids=[*NODES, "with its data"],
)
def test_nothing_is_left(uplink, node_config, command, settings, purge):
    ip(
        "route add 198.51.100.128/25 via 192.0.2.1 src 192.0.2.9 table 77",
        "rule add pref 500 from 192.0.2.9 table 77",
        "link add guests0 type bridge",
        "address add 172.31.0.1/24 dev guests0",
    )
    RESERVED_PORTS.write_text("8080,9000-9003\n")
    try:
        before, ran = machine(), processes()
        node = node_config(3, interface="eth0", **{"tunnel db": TUNNEL}, **settings)
        node.write(slapos={"certificate_repository_path": node.root / "pki"})
        (node.root / "pki").mkdir(mode=0o711)
        (key := node.root / "pki" / "slappart1.key").write_text("of its instance")
        done = command("apply", "-c", node.path)
        assert done.returncode == 0, done.stdout + done.stderr
        instance_runs(node, 1)
        assert command("plan", "-c", node.path).returncode == 0
        assert pwd.getpwnam("slapuser2")
        assert RESERVED_PORTS.read_text() == "8080,9000-9003,40000\n"
        if settings.get("partitiond", {}).get("bridge") != "br0":  # which lets nothing through
            reached_again(uplink, NODE4)
        done = command("teardown", "-c", node.path, *purge)
        assert done.returncode == 0, done.stdout + done.stderr
        assert_as_before(before)
        assert processes() == ran
        reached_again(uplink, NODE4)
        reached_again(uplink, NODE6)
        assert (node.instance / "slappart1" / "etc" / "service" / "sleeper").exists() != bool(purge)
        assert key.exists() != bool(purge), "the next user of the number has the key"
    finally:
        RESERVED_PORTS.write_text("\n")
        ip("rule delete pref 500", "route flush table 77", "link delete guests0")
