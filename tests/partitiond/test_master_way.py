"""Which partition keeps the way to the master, what the master is offered, and what status says."""

import dataclasses
import ssl
from base64 import b64encode

import pytest

from partitiond import converge, lanes, master_way, status, tunnel_declarations
from partitiond.context import Context
from partitiond.errors import PartitiondError
from partitiond.state import InstanceState
from stunnel_mgr.identity import make_identity

PEER = "sha256:" + "00" * 32
LOOPBACK = "127.0.0.1:5000"


@pytest.fixture
def looked_at(bridge, node_config):
    """Make a node's context, of a master's URL and the settings of its ``[tunnel master]``; nothing is applied."""

    def make(url, partitions=3, also=None, **keys):
        tunnel = {"partition": "slappart2", "mode": "client", "connect": "[2001:db8::12]:5000", "peer": PEER}
        sections = {"tunnel master": {**tunnel, **keys}}
        if also is not None:
            sections["tunnel also"] = {**tunnel, **keys, **also}
        files = node_config(partitions, slapos={"master_url": url}, **sections)
        context = Context.of(files.load())
        return context, converge.observe(context).node

    return make


@pytest.mark.parametrize(
    ("url", "listen"),
    [
        ("http://127.0.0.1:5000/", LOOPBACK),
        ("http://localhost:5000", LOOPBACK),
        ("https://127.0.0.1:5000/", LOOPBACK),
        ("http://10.0.0.4:5000/", "5000"),
    ],
)
def test_the_keeper_is_not_offered(looked_at, url, listen):
    context, node = looked_at(url, listen=listen)
    assert str(node.partitions[2].ipv4) == "10.0.0.4"
    assert master_way.find(node) == ("slappart2/master", node.partitions[2])
    assert [one.id for one in master_way.offered(node)] == ["slappart0", "slappart1"]
    (port,) = node.network().held or (None,)
    assert (port is not None) == (listen == LOOPBACK)
    if port:
        assert (port.port, port.uid) == (5000, node.partitions[2].uid)
    context.meters.close()


@pytest.mark.parametrize(
    ("url", "keys"),
    [
        ("http://127.0.0.1:5001/", {"listen": LOOPBACK}),
        ("http://[2001:db8::12]:5000/", {"listen": LOOPBACK}),
        ("http://127.0.0.1:5000/", {"listen": "5000"}),
        ("http://127.0.0.1:5000/", {"listen": LOOPBACK, "mode": "server"}),
        ("http://127.0.0.1:5000/", {"listen": LOOPBACK, "partition": "slappart9"}),
    ],
)
def test_other_tunnels_keep_nothing(looked_at, url, keys):
    context, node = looked_at(url, **keys)
    assert master_way.find(node) is None
    assert master_way.offered(node) == node.partitions
    context.meters.close()


@pytest.mark.parametrize("keys", [{"mode": "Client"}, {"partition": "slappart9"}, {"peer": "nobody"}])
def test_the_port_of_a_bad_tunnel_is_nobody_elses(looked_at, keys):
    context, node = looked_at("http://127.0.0.1:5000/", listen=LOOPBACK, **keys)
    (port,) = node.network().held
    assert (port.port, port.uid) == (5000, 0 if "partition" in keys else node.partitions[2].uid)
    context.meters.close()


@pytest.mark.parametrize("partition", ["slappart1", "slappart2"])
def test_one_port_is_one_tunnels(looked_at, partition):
    der = ssl.PEM_cert_to_DER_cert(make_identity("peer").certificate_pem.decode())
    peer = {"peer": f"cert:{b64encode(der).decode()}"}
    context, node = looked_at(
        "http://127.0.0.1:5000/", listen=LOOPBACK, also={"partition": partition, **peer}, **peer
    )
    declared = {one.id: tunnel_declarations.declared(node, one, {}) for one in node.partitions}
    assert [one.name for item in declared.values() for one in item.tunnels] == ["slappart2/master"]
    (refused,) = declared[partition].refused
    assert (refused.name, refused.reason) == (
        f"{partition}/also",
        "listen: 127.0.0.1:5000 is that of [tunnel master]",
    )
    (port,) = node.network().held
    assert port.uid == node.partitions[2].uid
    context.meters.close()


def test_the_only_partition(looked_at):
    context, _ = looked_at("http://127.0.0.1:5000/", 1, listen=LOOPBACK, partition="slappart0")
    with pytest.raises(PartitiondError, match="the only one keeps the tunnel to the master") as caught:
        lanes.capacity(context)
    assert caught.value.code == "capacity.nothing"
    context.meters.close()


def test_what_status_says(looked_at):
    context, _ = looked_at("http://127.0.0.1:5000/", listen=LOOPBACK)
    (case,) = cases(context)
    assert case.startswith(
        "the master is reached by the tunnel slappart2/master, which is not up: refused: peer: "
    )
    context.config.state_dir.mkdir(mode=0o700)
    held = InstanceState("slappart2", "started", instance_guid="SOFTINST-1")
    context.store.save_instance(held)
    assert "slappart2 keeps the tunnel to the master and holds an instance" in cases(context)[0]
    context.store.save_instance(dataclasses.replace(held, life="stopped"))
    assert "not up: " in cases(context)[1]
    assert "stopped" in cases(context)[1]
    context.meters.close()


def cases(context):
    return [
        one
        for one in status.node(context)["node"]["open_cases"]
        if "the tunnel" in one and "the master" in one
    ]
