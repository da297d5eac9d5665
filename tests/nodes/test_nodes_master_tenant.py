"""The master as a tenant: slapproxy in a partition of node A serves B and C, which reach it by stunnel over IPv6 alone."""

import os
import signal
import socket
import time

import pytest
import tenant_master
from nodes_world import until
from tenant_master import KEEPER, NEAR, URL, Tenancy, answers, running

from partitiond.demo import scene

pytestmark = pytest.mark.full
# the pauses between questions to a master that is away grow to 300 s
LONGEST_PAUSE = 400.0
METERS = {"cpu": "resource/cpu per s", "memory": "resource/memory per MB"}
MEMCACHED = "/srv/releases/release/software.cfg"
_SQUAT = """
import http.server, sys
http.server.HTTPServer.allow_reuse_address = True
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="0.0.0.0")
"""
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"


@pytest.fixture(scope="module")
def tenancy(module_world):
    made = Tenancy(module_world(3, settings={"accounting": METERS}))
    made.bootstrap()
    made.allow()
    return made


@pytest.fixture(scope="module")
def nodes(tenancy):
    """B asks before anybody lets it in, C is let in before it is there: both come up by themselves."""
    b, c = tenancy.world["B"], tenancy.world["C"]
    certificates = [tenancy.keeper(node) for node in (b, c)]
    given = tenancy.published()
    place = {"peer": given["certificate"], "host": given["host"], "port": given["port"]}
    assert given["url"] == f"http+tls://[{given['host']}]:{given['port']}/"
    assert given["host"] == tenancy.a.public(tenancy.partition)
    tenancy.lead(b, **place)
    b.start()
    until(lambda: b.verb("status")["node"]["master"]["reachable"] is False, "B to ask in vain", b)
    (case,) = cases(b)
    assert case.endswith(
        f"whose near end is up: partitiond tunnel check {KEEPER}/master says what its far end does"
    )
    check = b.verb("tunnel", "check", expect=(3,))
    print(f"B before it is let in: {case}\n{check}")
    assert not answers(b)
    tenancy.allow(*certificates)
    began = time.monotonic()
    until(lambda: answers(b), "B's tunnel to work", tenancy.a)
    through = time.monotonic() - began
    until(b.offered, "B to be served", b, seconds=LONGEST_PAUSE)
    print(
        f"B's tunnel works after {through:.1f} s, its daemon is served {time.monotonic() - began - through:.1f} s later"
    )
    assert not cases(b)
    b.verb("tunnel", "check")
    # by the private address of the partition, as root may: C's instances would not reach their master
    private = c.private(KEEPER)
    tenancy.lead(c, **place, listen=str(NEAR), url=f"http://{private}:{NEAR}/")
    c.start()
    until(c.offered, "C to be served", c)
    assert answers(c, f"http://{private}:{NEAR}/")
    assert refused(c, "slappart0", private)
    tenancy.lead(c, **place)
    c.verb("apply")
    until(lambda: answers(c), "C's tunnel to be on the loopback", c)
    assert not refused(c, "slappart0", "127.0.0.1")
    return {"B": b, "C": c, "place": place, "certificates": certificates}


def cases(node):
    """What status says of the way to the master."""
    return [one for one in node.verb("status")["node"]["open_cases"] if "the master is reached by" in one]


def refused(node, partition, host):
    """Whether a partition's user is kept from the near end of the tunnel."""
    command = node.as_user(partition, "/usr/bin/python3", "-I", "-c", _CONNECT, host, str(NEAR))
    return node.run(*command, check=False).returncode != 0


def test_capacity_is_in_its_database(tenancy, nodes):
    offered = {(row["computer_reference"], row["reference"]) for row in tenancy.rows("partition")}
    # the partition that keeps the tunnel is nobody's to stop
    assert offered == {(f"COMP-{name}", f"slappart{index}") for name in "BC" for index in (0, 1)}
    item = tenancy.a.partitions()[tenancy.partition]
    (service,) = [one for one in item["processes"] if one["name"].startswith("slapproxy")]
    assert service["state"] == "RUNNING"
    (pid,) = running(
        tenancy.a, f"{scene.master_program()} proxy start --cfg {tenancy.a.path(tenancy.partition)}"
    )
    assert tenancy.a.processes()[pid][0] == item["user"]["uid"]
    assert "POST /loadComputerConfigurationFromXML" in tenancy.log()


def test_an_instance_of_b(tenancy, nodes):
    b = nodes["B"]
    tenant_master.shutil.copytree(tenant_master.RELEASES / "release", b.seen(MEMCACHED).parent)
    with tenancy.world.internet.captured(tenancy.world.directory / "tenant.pcap") as capture:
        tenancy.slapos(b, "supply", MEMCACHED, "COMP-B")
        request = ("request", "cache", MEMCACHED, "--type", "server", "--node", "computer_guid=COMP-B")
        tenancy.slapos(b, *request)
        given = until(lambda: tenancy.ask(b, URL, "cache").get("host"), "the instance to publish", b)
        until(lambda: "POST /startedComputerPartition" in tenancy.log(), "it to be reported started", b)
    item = next(one for one in b.partitions().values() if one["instance_guid"])
    assert (item["state"], item["ipv6"]) == ("started", given)
    assert {one["state"] for one in item["processes"]} == {"RUNNING"}
    row = next(row for row in tenancy.rows("partition") if row["partition_reference"] == "cache")
    assert (row["computer_reference"], row["slap_state"]) == ("COMP-B", "busy")
    carried = sum(map(len, capture.packets()))
    assert carried > 20_000
    for words in (b"HTTP/1.", b"COMP-", b"slappart", b"marshal", b"memcached", b"slap"):
        assert not capture.count(words), words
    print(f"{carried} bytes between the nodes, of SLAP in plain text none")


def test_who_is_not_allowed(tenancy, nodes):
    c, place = nodes["C"], nodes["place"]
    stranger = {
        "partition": "slappart1",
        "mode": "client",
        "listen": "127.0.0.1:5001",
        "connect": f"[{place['host']}]:{place['port']}",
        "peer": f"cert:{place['peer']}",
    }
    c.configure({"tunnel stranger": stranger})
    c.verb("apply")
    try:
        assert not answers(c, "http://127.0.0.1:5001/")
        (found,) = c.verb("tunnel", "check", "slappart1/stranger", expect=(3,))["checks"]
        assert found["outcome"] == "refused_by_pin"
        print(f"with a certificate that nobody allowed: {found}")
        assert answers(c)
    finally:
        del c.sections["tunnel stranger"]
        c.configure({})
        c.verb("apply")

    def plainly():
        with socket.create_connection((place["host"], int(place["port"])), 20) as channel:
            channel.sendall(b"GET /getRunId HTTP/1.0\r\n\r\n")
            try:
                return channel.recv(1000)
            except ConnectionResetError:
                return b""

    assert b"HTTP" not in c.within(plainly)


def test_nobody_takes_the_place_of_the_master(tenancy, nodes):
    """Another tenant that has the near end's port while the tunnel is away answers nobody."""
    c = nodes["C"]
    peer = c.sections["tunnel master"].pop("peer")
    c.configure({})
    c.verb("apply", expect=(3,))
    until(lambda: not listened(c), "the near end to be gone", c)
    squatter = c.launch(*c.as_user("slappart0", "/usr/bin/python3", "-I", "-c", _SQUAT, str(NEAR)))
    try:
        until(lambda: listened(c), "the squatter to listen", c)
        assert not answers(c, patience=2)
        assert refused(c, "slappart1", "127.0.0.1")
    finally:
        c.end(squatter, signal.SIGKILL)
        c.configure({"tunnel master": {"peer": peer}})
        c.verb("apply")
    assert answers(c)


def listened(node):
    """Whether anybody listens at the near end's port."""
    return f":{NEAR} " in node.run("/usr/bin/ss", "-Hltn").stdout


def _kill(number):
    os.kill(number, signal.SIGKILL)


def _proxy(tenancy, nodes):
    (pid,) = running(tenancy.a, f"slapos proxy start --cfg {tenancy.a.path(tenancy.partition)}")
    _kill(pid)


def _far_stunnel(tenancy, nodes):
    (pid,) = running(tenancy.a, "/usr/bin/stunnel")
    _kill(pid)


def _near_stunnel(tenancy, nodes):
    (pid,) = [
        pid for pid in running(nodes["B"], "/usr/bin/stunnel") if KEEPER in nodes["B"].processes()[pid][1]
    ]
    _kill(pid)


def _daemon_of_a(tenancy, nodes):
    tenancy.a.kill()
    tenancy.slapos(nodes["B"], "request", "cache", MEMCACHED, "--type", "server")
    tenancy.a.start()


@pytest.mark.parametrize("kill", [_proxy, _far_stunnel, _near_stunnel, _daemon_of_a])
def test_it_comes_back(tenancy, nodes, kill):
    b = nodes["B"]
    kill(tenancy, nodes)
    began = time.monotonic()
    until(lambda: answers(b), "the master to answer", tenancy.a)
    print(f"it answers again after {time.monotonic() - began:.1f} s")
    b.verb("sync", "instances")
    until(b.offered, "the daemon to know", b)
    assert {one["state"] for one in b.partitions().values()} == {"free", "started"}


def test_what_status_says_of_a_tunnel_that_is_refused(tenancy, nodes):
    c = nodes["C"]
    peer = c.sections["tunnel master"]["peer"]
    c.configure({"tunnel master": {"peer": "cert:AAAA"}})
    c.verb("apply", expect=(3,))
    (case,) = cases(c)
    print(case)
    assert f"the tunnel {KEEPER}/master, which is not up: refused: peer: " in case
    c.configure({"tunnel master": {"peer": peer}})
    c.verb("apply")
    assert answers(c)
    assert not [one for one in cases(c) if "not up" in one]


def test_usage_of_an_instance_that_ends_is_reported(tenancy, nodes):
    b = nodes["B"]
    request = ("request", "cache", MEMCACHED, "--type", "server", "--state", "destroyed")
    tenancy.slapos(b, *request)
    until(lambda: 'POST /destroyedComputerPartition HTTP/1.1" 200' in tenancy.log(), "its end to be told", b)
    assert 'POST /useComputer HTTP/1.1" 200' in tenancy.log(), b.say("report", "list")
    assert tenancy.ask(b, URL, "cache") == {}
