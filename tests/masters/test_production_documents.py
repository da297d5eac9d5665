"""Every field in which production differs from slapproxy, from the strict master's own writer to the product's documents."""

import production_master
import pytest

from slap_client.client import SlapClient
from slap_client.errors import SlapError

RELEASE = "https://lab.example/software.cfg?a=1&b=<2>"
NASTY = "é <b>&amp;</b> \u4e2d \U0001f40d & &lt; ]]>"


@pytest.fixture(scope="module")
def master():
    with production_master.running() as made:
        made.offer(*(f"slappart{number}" for number in range(12)))
        made.supply(RELEASE)
        made.supply("https://lab.example/old.cfg", "destroyed")
        sla = {
            "retention_delay": "7",
            "fw_restricted_access": "on",
            "fw_authorized_sources": "198.51.100.1 2001:db8::7",
        }
        made.want("slappart3", RELEASE, title=NASTY, parameters={"_": '{"a": "é"}', NASTY: NASTY}, filter=sla)
        made.share("slappart3", "shared é", key=NASTY)
        made.route("slappart3", "198.51.100.9", "198.51.100.1", "255.255.255.0", "198.51.100.0")
        made.want("slappart7", RELEASE, "stopped", access_status=f"#error while instanciating: {NASTY}\x85")
        made.want("slappart8", RELEASE, "destroyed")
        yield made


@pytest.fixture
def client(master):
    pair = {"cert_file": master.cert_file, "key_file": master.key_file}
    with SlapClient(master.url, master.computer, ca_file=master.ca_file, **pair) as slap:
        yield slap


@pytest.fixture
def found(client):
    document = client.computer()
    assert not document.rejected
    return {one.partition_id: one for one in document.partitions}


def test_all_partitions_in_any_order(found):
    assert sorted(found, key=lambda name: int(name[8:])) == [f"slappart{number}" for number in range(12)]
    assert list(found) != sorted(found)
    free = [one for one in found.values() if one.free]
    assert len(free) == 9
    assert {(one.instance_guid, one.timestamp, one.access_status) for one in free} == {("", "", "")}
    assert found["slappart8"].destroy_requested


def test_timestamps_are_opaque_text(found, master):
    stamp = master.books.in_partition("slappart3").timestamp
    assert found["slappart3"].timestamp == str(stamp)
    assert len(found["slappart3"].timestamp) == 16


def test_what_users_wrote(found):
    one = found["slappart3"]
    assert one.software_release == RELEASE
    assert one.instance_title == one.root_instance_title == NASTY
    assert dict(one.parameters) == {"_": '{"a": "é"}', NASTY: NASTY}
    assert one.instance_guid.startswith("SOFTINST-")


def test_the_sla(found):
    assert dict(found["slappart3"].filter) == {
        "retention_delay": "7",
        "fw_restricted_access": "on",
        "fw_authorized_sources": "198.51.100.1 2001:db8::7",
    }
    assert dict(found["slappart7"].filter) == {}


def test_addresses(found):
    one = found["slappart3"]
    assert one.ip_list == (("slaptap3", "10.0.0.5"), ("slaptap3", "2001:db8:1::5"))
    row = ("route_slaptap3", "198.51.100.9", "198.51.100.1", "255.255.255.0", "198.51.100.0")
    assert one.full_ip_list == (row,)


def test_shared_instances(found, master):
    (shared,) = found["slappart3"].slave_instance_list
    made = master.books.in_partition("slappart3").slaves[0]
    assert dict(shared) == {
        "slave_title": "shared é",
        "slave_reference": made.guid,
        "slap_software_type": "RootSoftwareInstance",
        "timestamp": made.timestamp,
        "key": NASTY,
    }


def test_the_access_status_is_shown_harmless(found):
    assert found["slappart7"].access_status == f"#error while instanciating: {NASTY}\ufffd"
    assert found["slappart3"].access_status == ""


def test_software(client):
    states = {one.url: one.requested_state for one in client.computer().software}
    assert states == {RELEASE: "available", "https://lab.example/old.cfg": "destroyed"}


def test_certificates_of_instances(client, master):
    pair = client.partition_certificate("slappart3")
    assert pair.certificate == master.calls.pairs[master.books.in_partition("slappart3").guid].certificate
    with pytest.raises(SlapError) as caught:
        client.partition_certificate("slappart0")
    assert caught.value.code == "slap.not_found"


def test_reports(client, master):
    client.instance_error("slappart3", "x" * 200)
    assert {one.partition_id: one for one in client.computer().partitions}[
        "slappart3"
    ].access_status.startswith("#error")
    client.instance_started("slappart3")
    client.software_building(RELEASE)
    client.software_error(RELEASE, "log")
    client.software_available(RELEASE)
    client.software_destroyed("https://lab.example/old.cfg")
    client.instance_stopped("slappart8")
    client.instance_destroyed("slappart8")
    client.bang("slappart3", "why")
    client.computer_bang("Reboot")
    assert master.words("slappart3") == ["error", "started", "bang"]
    assert master.words(RELEASE) == ["building", "error", "available"]
    assert master.words("slappart8") == ["stopped", "destroyed"]
    assert master.words("COMP-123") == ["bang"]
    for refused in (lambda: client.software_destroyed(RELEASE), lambda: client.instance_started("slappart8")):
        with pytest.raises(SlapError) as caught:
            refused()
        assert caught.value.code == "slap.not_found"
    assert master.violations == [f"{RELEASE} is told destroyed, which nobody asked for"]
