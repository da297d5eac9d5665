"""Tunnels over the mesh: between nodes without any IPv6, and which address a client comes from."""

import os
from base64 import b64decode
from ipaddress import IPv4Address, IPv4Interface, IPv6Address

import pytest
from mesh_world import standing, until

from stunnel_mgr.declaration import parse_declaration
from stunnel_mgr.identity import make_identity
from stunnel_mgr.model import TunnelContext

SERVICE, LISTEN, ENTRY = 5000, 4000, 6000


def declare(node, partition, name, text):
    top = node.seen(node.path(partition))
    uid = top.stat().st_uid
    directory = top / "etc" / "tunnel"
    for one in (directory.parent, directory):
        one.mkdir(exist_ok=True)
        os.chown(one, uid, uid)
    path = directory / f"{name}.cfg"
    path.write_text(f"[tunnel]\n{text}")
    os.chown(path, uid, uid)


def certificate(node, partition):
    found = node.resource(partition)["certificate"]
    assert b64decode(found)
    return f"cert:{found}"


def test_a_tunnel_between_nodes_without_ipv6():
    with standing(names="AB") as world:
        a, b = world["A"], world["B"]
        world.apply().join()
        target = a.vpn("slappart0")
        # it stands in for the IPv6 that nobody has
        assert a.public("slappart0") == target
        server = (
            f"mode = server\nlisten = {LISTEN}\nconnect = {SERVICE}\nallow = {certificate(b, 'slappart0')}\n"
        )
        client = f"mode = client\nlisten = {ENTRY}\nconnect = {target}:{LISTEN}\npeer = {certificate(a, 'slappart0')}\n"
        declare(a, "slappart0", "in", server)
        declare(b, "slappart0", "out", client)
        a.verb("apply")
        b.verb("apply")
        (tunnel,) = a.verb("tunnel", "list")["tunnels"]
        assert (tunnel["state"], tunnel["listen"]) == ("up", f"{target}:{LISTEN}")
        until(lambda: b.reaches("A"), "A to be reached")
        before = b.usage()["slappart0"]["addresses"]
        with (
            a.agent("serve", f"{a.private('slappart0')}:{SERVICE}", partition="slappart0"),
            b.agent("ask", partition="slappart0") as client,
        ):
            (answer,) = client.ask([["", b.private("slappart0"), ENTRY]])
            assert "Error" not in answer, answer
            (checked,) = b.verb("tunnel", "check")["checks"]
            assert checked["outcome"] == "ok", checked

        def sent(found):
            return sum(
                one["bytes_out"]
                for one in found
                if (one["address"], one["scope"]) == (b.vpn("slappart0"), "remote")
            )

        assert sent(b.usage()["slappart0"]["addresses"]) > sent(before) + 2000


OWN = IPv4Interface("10.64.2.2/16")


@pytest.mark.parametrize(
    ("more", "connect", "source"),
    [
        ({"ipv6": IPv6Address("2001:db8::2")}, "10.64.9.2:4000", OWN.ip),
        ({"ipv6": IPv6Address("2001:db8::2")}, "[2001:db8::9]:4000", IPv6Address("2001:db8::2")),
        ({"ipv6": IPv6Address("2001:db8::2")}, "192.0.2.9:4000", None),
        ({"ipv4_public": OWN.ip}, "10.64.9.2:4000", OWN.ip),
        ({"ipv4_public": OWN.ip}, "192.0.2.9:4000", None),
        ({"ipv4_public": IPv4Address("203.0.113.5")}, "192.0.2.9:4000", IPv4Address("203.0.113.5")),
        ({"ipv4_public": IPv4Address("203.0.113.5")}, "10.64.9.2:4000", OWN.ip),
    ],
)
def test_what_is_in_the_mesh_is_reached_from_there(more, connect, source):
    context = TunnelContext(partition="slappart0", ipv4=IPv4Address("10.0.0.2"), vpn=OWN, **more)
    pem = make_identity("slappart9").certificate_pem.decode()
    peer = "".join(line for line in pem.splitlines() if "-----" not in line)
    text = f"[tunnel]\nmode = client\nlisten = 4000\nconnect = {connect}\npeer = cert:{peer}\n"
    tunnel = parse_declaration(text, name="out", file="out.cfg", context=context)
    assert tunnel.source_host == source
