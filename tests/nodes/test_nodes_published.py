"""A twin that has the same addresses shows by what its instances publish: certificates that this machine does not have.

One node and the stock slapproxy. What the twin's instance would publish is told to the master in its place; this machine's own
as well, in the place of a release that publishes its certificate.
"""

import base64
import json
import ssl
import time
from urllib.parse import urlencode

import nodes_life
import pytest
from life_eyes import events, fetch
from life_node import COMPUTER

from partitiond import published
from partitiond.published import Shown
from slap_client.documents import PartitionDocument
from slap_client.marshal import dumps
from stunnel_mgr.identity import make_identity

make_node, no_leaks = nodes_life.make_node, nodes_life.no_leaks


def certificate(partition="slappart0"):
    pem = make_identity(partition).certificate_pem.decode()
    return base64.b64encode(ssl.PEM_cert_to_DER_cert(pem)).decode()


MINE, NEXT, THEIRS = certificate(), certificate(), certificate()


@pytest.mark.parametrize(
    ("found", "own", "before", "configured", "strange"),
    [
        # nothing was shown before: what is there may be from the machine before this one
        ({"c": THEIRS}, {MINE}, None, 1.0, set()),
        ({"c": MINE}, {MINE}, Shown(1.0, {"c": MINE}), 1.0, set()),
        ({"c": THEIRS}, {MINE}, Shown(1.0, {"c": MINE}), 1.0, {THEIRS}),
        # configured meanwhile: it may have published anything
        ({"c": THEIRS}, {MINE}, Shown(1.0, {"c": MINE}), 2.0, set()),
        # rotated, or made anew: the one that was shown is still shown
        ({"c": MINE}, {NEXT}, Shown(1.0, {"c": MINE}), 1.0, set()),
        ({"c": NEXT}, {NEXT, MINE}, Shown(1.0, {"c": MINE}), 1.0, set()),
        # another key is another thing: it publishes whom it uses
        ({"c": MINE, "peer": THEIRS}, {MINE}, Shown(1.0, {"c": MINE}), 1.0, set()),
    ],
)
def test_judged(found, own, before, configured, strange):
    assert published.judge(found, frozenset(own), before, configured)[1] == strange


def test_what_is_taken_for_a_certificate():
    entry = PartitionDocument(
        "slappart0",
        "started",
        connection={
            "certificate": MINE,
            "other": certificate("slappart1"),
            "url": "http://[2001:db8::1]/",
            "damaged": f"MII{MINE[8:]}",
            "long": "MII" * 10_000,
            "_": json.dumps({"inner": THEIRS, "number": 7}),
        },
    )
    assert published.certificates(entry) == {"certificate": MINE, "inner": THEIRS}


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(partitions=2, software_interval=1, instances_interval=1, meter_interval=5)
    node.start()
    node.offer()
    node.url = node.release()
    node.supply(node.url)
    node.request("one", node.url, text="one")
    node.name = node.holder("one")
    node.wait_for_state(node.name, "started")
    return node


def publish(node, value):
    fields = {
        "computer_id": COMPUTER,
        "computer_partition_id": node.name,
        "connection_xml": dumps({"certificate": value}).decode(),
    }
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    path = "setComputerPartitionConnectionXml"
    assert node.front.ask("POST", path, urlencode(fields).encode(), form) == (200, b"done")


def passes(node, count=3):
    seen = len(node.front.seen)
    node.wait(lambda: node.front.count("getFullComputerInformation", seen) >= count, "the daemon to ask")


def test_a_certificate_of_somebody_else(node, capsys):
    resource = json.loads((node.base / "instance" / node.name / ".slapos-resource").read_text())
    older, twin = certificate(node.name), certificate(node.name)
    # of the machine before this one, say; then its own; and again the older, as an older database has it
    for value in (older, resource["certificate"], older, resource["certificate"]):
        publish(node, value)
        passes(node)
    assert not events(node, "node.twin")
    before = node.tenants()
    began = time.monotonic()
    publish(node, twin)
    node.wait(lambda: events(node, "node.twin"), "the twin to be found out")
    seconds = time.monotonic() - began
    passes(node)
    (event,) = events(node, "node.twin")
    assert "certificate" in event["message"]
    assert node.name in event["message"]
    posts = node.front.count("loadComputerConfigurationFromXML")
    said = node.cli("sync", "capacity", expect=3).value
    assert [one["code"] for one in said["failures"]] == ["node.twin"]
    # the addresses are the same, and a tenant may publish what it likes: nobody is kept from telling by that
    assert node.front.count("loadComputerConfigurationFromXML") == posts + 1
    # nor is it told of again and again
    publish(node, certificate(node.name))
    passes(node)
    assert len(events(node, "node.twin")) == 1
    assert node.tenants() == before
    cases = json.loads(fetch(node, "/1/status")[2])["node"]["open_cases"]
    assert any("another machine told the master" in case for case in cases)
    with capsys.disabled():
        print(f"\n  a twin with the same addresses: found out after {seconds:.1f} s: {event['message']}")


def test_the_operator_says_that_this_is_the_one(node):
    node.kill()
    node.start()
    assert node.cli("sync", "capacity", expect=3).value["failures"]
    assert node.cli("sync", "capacity", "--force").value["done"]
    passes(node)
    cases = json.loads(fetch(node, "/1/status")[2])["node"]["open_cases"]
    assert not any("another machine" in case for case in cases)
    assert len(events(node, "node.twin")) == 1
