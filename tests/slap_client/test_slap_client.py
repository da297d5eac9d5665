import subprocess
import sys
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
from slap_samples import PROXY_CERTIFICATE, PROXY_COMPUTER
from slap_server import reply

from slap_client.capacity import capacity_document
from slap_client.client import LOG_TAIL, SlapClient
from slap_client.documents import CertificatePair
from slap_client.errors import SlapError
from slap_client.marshal import dumps, loads

URL = "http://lab.example/é?a=1&b=2"
PARTITION = {"computer_id": "COMP-7", "computer_partition_id": "slappart0"}
SOFTWARE = {"url": URL, "computer_id": "COMP-7"}
PARTITION_IDENTITY = "X-SlapPartition computer_id=COMP-7, computer_partition_id=slappart0"

REPORTS = [
    ("instance_started", ("slappart0",), "/startedComputerPartition", PARTITION),
    ("instance_stopped", ("slappart0",), "/stoppedComputerPartition", PARTITION),
    (
        "instance_error",
        ("slappart0", "boom & é"),
        "/softwareInstanceError",
        {**PARTITION, "error_log": "boom & é"},
    ),
    ("bang", ("slappart0", "why"), "/softwareInstanceBang", {**PARTITION, "message": "why"}),
    ("software_building", (URL,), "/buildingSoftwareRelease", SOFTWARE),
    ("software_available", (URL,), "/availableSoftwareRelease", SOFTWARE),
    ("software_error", (URL, ""), "/softwareReleaseError", {**SOFTWARE, "error_log": ""}),
    (
        "use_computer",
        ("<journal/>",),
        "/useComputer",
        {"computer_id": "COMP-7", "use_string": "<journal/>"},
    ),
]


@pytest.mark.parametrize(("method", "arguments", "path", "fields"), REPORTS)
@pytest.mark.parametrize("body", ["Ignored", "OK", "None", "", "<marshal><none/></marshal>"])
def test_reports_are_forms_and_any_success_will_do(client, master, method, arguments, path, fields, body):
    master.answer = reply(body)
    assert getattr(client, method)(*arguments) is None
    (seen,) = master.seen
    assert (seen.method, seen.path, seen.fields) == ("POST", path, fields)
    assert seen.headers["content-type"] == "application/x-www-form-urlencoded"
    assert seen.headers.get("authorization") == (PARTITION_IDENTITY if arguments[0] == "slappart0" else None)


def test_the_computer(client, master):
    master.answer = reply(PROXY_COMPUTER, **{"Content-Type": "text/html; charset=utf-8"})
    document = client.computer()
    assert [partition.partition_id for partition in document.partitions] == ["slappart0", "slappart1"]
    (seen,) = master.seen
    assert (seen.method, seen.path) == ("GET", "/getFullComputerInformation")
    assert seen.fields == {"computer_id": "COMP-7"}
    assert seen.headers["user-agent"].startswith("partitiond/")
    assert seen.headers["accept"] == "*/*"
    assert "authorization" not in seen.headers


def test_the_answer_for_another_computer_is_garbage(client, master):
    master.answer = reply(PROXY_COMPUTER.replace("COMP-7", "COMP-8"))
    with pytest.raises(SlapError) as caught:
        client.computer()
    assert caught.value.code == "slap.garbage"
    assert caught.value.resource == f"{master.url}getFullComputerInformation"


def test_the_capacity_is_posted_marshalled(client, master):
    master.answer = reply("done")
    description = {"reference": "COMP-7", "partition_list": [{"reference": "slappart0", "path": "/a&b"}]}
    client.post_capacity(capacity_document(description))
    (seen,) = master.seen
    assert (seen.method, seen.path, list(seen.fields)) == (
        "POST",
        "/loadComputerConfigurationFromXML",
        ["xml"],
    )
    assert loads(seen.fields["xml"]) == description


def test_a_capacity_that_can_not_be_written_is_refused_before_it_is_sent():
    with pytest.raises(SlapError) as caught:
        capacity_document({"reference": "\x00"})
    assert caught.value.code == "slap.value"


@pytest.mark.parametrize(
    "text", ["", "a b+c&d=e%f/g?h#i", "é\u20ac\U0001f600\x00\n\r\t", "%41", "".join(map(chr, range(1, 300)))]
)
def test_a_form_is_encoded_as_urllib_does_it(client, master, text):
    master.answer = reply("done")
    client.use_computer(text)
    (seen,) = master.seen
    fields = {"computer_id": client.computer_id, "use_string": text}
    assert seen.text == urllib.parse.urlencode(fields)
    assert seen.headers["content-type"] == "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("body", "pair"),
    [
        (PROXY_CERTIFICATE, CertificatePair("", "")),
        (dumps({"certificate": "-----BEGIN", "key": "-----KEY"}), CertificatePair("-----BEGIN", "-----KEY")),
    ],
)
def test_the_certificate_of_a_partition(client, master, body, pair):
    master.answer = reply(body)
    assert client.partition_certificate("slappart0") == pair
    (seen,) = master.seen
    assert (seen.method, seen.path) == ("GET", "/getComputerPartitionCertificate")
    assert seen.fields == PARTITION
    assert "authorization" not in seen.headers


@pytest.mark.parametrize(
    "body",
    [
        "OK",
        "None",
        "<marshal><none/></marshal>",
        "<?xml version='1.0'?>\n<marshal>\n<none/></marshal>",
        "<marshal><string>None</string></marshal>",
    ],
)
def test_destroyed_is_confirmed_by_both_kinds_of_master(client, master, body):
    master.answer = reply(body)
    client.instance_destroyed("slappart0")
    client.software_destroyed(URL)
    instance, software = master.seen
    assert (instance.path, instance.fields) == ("/destroyedComputerPartition", PARTITION)
    assert (software.path, software.fields) == ("/destroyedSoftwareRelease", SOFTWARE)


REFUSAL = "Not destroying yet because this partition has child partitions: ['slappart3']"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (REFUSAL, REFUSAL),
        ("Unknown partition 'slappart0' on 'COMP-7'", "Unknown partition 'slappart0' on 'COMP-7'"),
        ("OK\n", "OK"),
        ("ok", "ok"),
        ("Ignored", "Ignored"),
        ("", "the master gave an empty answer in place of a confirmation"),
        ("<html><body><h1>Log in,</h1>please</body></html>", "Log in, please"),
        (
            '<marshal><list id="i2"/></marshal>',
            "the master gave an empty answer in place of a confirmation",
        ),
        ("a\x1b[2J\nb" + "x" * 300, "a [2J b" + "x" * 190 + "..."),
    ],
)
def test_every_other_answer_refuses_the_destruction(client, master, body, message):
    master.answer = reply(body)
    for destroy in (lambda: client.instance_destroyed("slappart0"), lambda: client.software_destroyed(URL)):
        with pytest.raises(SlapError) as caught:
            destroy()
        assert caught.value.code == "slap.destroy_refused"
        assert caught.value.message == message
        assert caught.value.retryable
        assert caught.value.resource.startswith(f"{master.url}destroyed")


def test_of_a_log_the_end_is_sent(client, master):
    log = "begin" + "x" * 10_000 + "end"
    client.instance_error("slappart0", log)
    client.software_error(URL, log)
    for seen in master.seen:
        assert seen.fields["error_log"] == log[-LOG_TAIL:]
    assert len(master.seen) == 2


def test_a_log_with_undecodable_bytes_is_sent(client, master):
    client.instance_error("slappart0", b"caf\xe9 \x00".decode("utf-8", "surrogateescape"))
    assert master.seen[0].fields["error_log"] == "caf? \x00"


@pytest.mark.parametrize("name", ["", "..", "a/b", "slappart0\r\nX-Evil: 1", "a, computer_id=COMP-8"])
def test_names_that_are_none_are_not_sent(client, master, name):
    for call in (client.instance_started, client.instance_destroyed, client.partition_certificate):
        with pytest.raises(SlapError) as caught:
            call(name)
        assert caught.value.code == "slap.value"
    assert master.seen == []


@pytest.mark.parametrize("computer_id", ["", "COMP 7", "COMP-7,x", "COMP-7\n", "é", "x" * 256])
def test_computer_ids_that_are_none_are_refused(computer_id):
    with pytest.raises(SlapError) as caught:
        SlapClient("http://127.0.0.1/", computer_id)
    assert caught.value.code == "slap.value"


@pytest.mark.parametrize("files", [{"cert_file": "/a"}, {"key_file": "/b"}])
def test_half_a_pair_is_refused(files):
    with pytest.raises(SlapError) as caught:
        SlapClient("https://127.0.0.1/", "COMP-7", **files)
    assert caught.value.code == "slap.value"


def test_the_connection_is_kept_also_after_a_refusal(client, master):
    client.instance_started("slappart0")
    master.answer = reply("no such thing", 404)
    with pytest.raises(SlapError):
        client.instance_started("slappart0")
    master.answer = reply("OK")
    client.instance_started("slappart0")
    assert len({seen.peer for seen in master.seen}) == 1


def test_threads_may_share_a_client(client, master):
    master.answer = reply(PROXY_COMPUTER)
    with ThreadPoolExecutor(8) as pool:
        documents = list(pool.map(lambda _number: client.computer(), range(40)))
    assert all(document == documents[0] for document in documents)
    assert len(master.seen) == 40


def test_a_path_in_the_url_is_kept(master):
    with SlapClient(f"{master.url}erp5/slap", "COMP-7") as client:
        assert client.master_url == f"{master.url}erp5/slap/"
        client.instance_started("slappart0")
    assert master.seen[0].path == "/erp5/slap/startedComputerPartition"


def test_cookies_are_not_kept(client, master):
    master.answer = reply("OK", **{"Set-Cookie": "session=1"})
    client.instance_started("slappart0")
    client.instance_started("slappart0")
    assert "cookie" not in master.seen[1].headers


def test_the_package_alone_is_cheap_to_import():
    program = "import slap_client, slap_client.errors, sys; sys.exit('requests' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
