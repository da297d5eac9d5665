import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slap_samples import PRODUCTION_COMPUTER, PROXY_CERTIFICATE, PROXY_COMPUTER

from slap_client.documents import (
    CertificatePair,
    ComputerDocument,
    PartitionDocument,
    Rejected,
    SoftwareDocument,
    parse_certificate,
    parse_computer,
    parse_partition,
    parse_software,
)
from slap_client.errors import SlapError
from slap_client.marshal import Instance, loads

URL = "https://lab.example/software.cfg"


def release(url=URL, **more):
    return Instance("SoftwareRelease", (url, "COMP-7"), {"_software_release": url, **more})


def partition(name="slappart0", state="started", url=URL, parameters=None, **more):
    attributes = {
        "_computer_id": "COMP-7",
        "_partition_id": name,
        "_requested_state": state,
        "_software_release_document": None if url is None else release(url),
        **({} if parameters is None else {"_parameter_dict": parameters}),
        **more,
    }
    return Instance("ComputerPartition", ("COMP-7", name, None), attributes)


def computer(*partitions, software=(), **more):
    attributes = {
        "_computer_id": "COMP-7",
        "_computer_partition_list": list(partitions),
        "_software_release_list": list(software),
        **more,
    }
    return Instance("Computer", ("COMP-7",), attributes)


def test_the_answer_of_slapproxy():
    document = parse_computer(loads(PROXY_COMPUTER))
    assert document.computer_id == "COMP-7"
    assert document.software == (SoftwareDocument("/srv/hello/software.cfg", "available"),)
    assert document.rejected == document.rejected_software == ()
    busy, free = document.partitions
    assert busy == PartitionDocument(
        partition_id="slappart0",
        requested_state="started",
        software_release="/srv/hello/software.cfg",
        instance_guid="COMP-7-slappart0",
        timestamp="1795362430.933656",
        parameters={"greeting": "a<b> & é"},
        software_type="default",
        ip_list=(("slaptap0", "10.0.3.4"), ("slaptap0", "2001:db8:7::2")),
        slave_instance_list=(
            {"slave_title": "_one", "slave_reference": "_one", "slap_software_type": "default", "k": "v"},
        ),
        instance_title="hello",
        root_instance_title="hello",
    )
    assert not busy.free
    assert not busy.destroy_requested
    assert free == PartitionDocument("slappart1", "destroyed")
    assert free.free
    assert not free.destroy_requested


def test_the_answer_of_the_production_master():
    document = parse_computer(loads(PRODUCTION_COMPUTER))
    url = "https://lab.example/software.cfg?a=1&b=2"
    assert document.software == (SoftwareDocument(url, "available"),)
    free, leaving = document.partitions
    assert free == PartitionDocument("slappart2", "destroyed")
    assert leaving == PartitionDocument(
        partition_id="slappart1",
        requested_state="destroyed",
        software_release=url,
        instance_guid="SOFTINST-42",
        timestamp="1785000000123456",
        parameters={"_": '{"port": 80, "name": "café"}'},
        filter={"retention_delay": "7"},
        access_status="#error while instanciating: no <disk>",
        software_type="RootSoftwareInstance",
        ip_list=(("slaptap1", "2001:db8:1::3"),),
        full_ip_list=(("route_slaptap1", "198.51.100.9", "198.51.100.1", "255.255.255.0", "198.51.100.0"),),
        slave_instance_list=(
            {
                "slave_title": "Client",
                "slave_reference": "SOFTINST-99",
                "slap_software_type": "default",
                "timestamp": 1785000000000001,
            },
        ),
        instance_title="Ma base de données",
        root_instance_title="Racine",
    )
    assert leaving.destroy_requested
    assert not leaving.free


def test_documents_can_not_be_changed():
    document = parse_partition(partition(parameters={"a": {"b": [1, {"c": 2}]}}))
    with pytest.raises(AttributeError):
        document.requested_state = "destroyed"
    for mapping in (document.parameters, document.parameters["a"], document.filter):
        with pytest.raises(TypeError):
            mapping["x"] = 1
    assert document.parameters["a"]["b"][0] == 1
    with pytest.raises(TypeError):
        document.parameters["a"]["b"][1]["c"] = 3


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-rf",
        "a/b",
        "../x",
        "a b",
        "a\n",
        "a\x00",
        "é",
        "a;b",
        "x" * 65,
        None,
        7,
        ("a",),
    ],
)
def test_names_that_are_no_partition_names_are_rejected(name):
    document = parse_computer(computer(partition(name), partition("slappart1")))
    assert [entry.partition_id for entry in document.partitions] == ["slappart1"]
    assert [entry.partition_id for entry in document.rejected] == ["?"]
    reason = document.rejected[0].reason
    assert reason.isprintable()
    assert len(reason) < 200


@pytest.mark.parametrize("name", ["slappart0", "a", "A.b_c-d", "x" * 64, "_"])
def test_names_that_are_partition_names_are_taken(name):
    assert parse_partition(partition(name)).partition_id == name


BAD_URLS = [
    "",
    "a b",
    "a\tb",
    "a\nextends = /tmp/evil.cfg",
    "a\r",
    "a\x00",
    "a\x7f",
    "a\x85b",
    "a\u2028b",
    "a\u202eb",
    "a\u00a0b",
    "x" * 4097,
    3,
    None,
    ["a"],
]

REJECTED = [
    *({"url": url} for url in BAD_URLS if url is not None),
    {"state": "frobbed"},
    {"state": "Started"},
    {"state": None},
    {"state": 1},
    {"state": ["started"]},
    {"url": None},  # started, but what?
    {"url": None, "state": "stopped"},
    {"_software_release_document": "text"},
    {"_software_release_document": Instance("Computer", (), {"_software_release": URL})},
    {"_software_release_document": Instance("SoftwareRelease", (), {})},
    {"_computer_id": "COMP-8"},
    {"_computer_id": ["COMP-7"]},
    {"_instance_guid": "SOFTINST-1\n"},
    {"_instance_guid": 5},
    {"_access_status": 5},
    {"_filter_dict": "text"},
    {"_filter_dict": {"a": release()}},
    {"parameters": "text"},
    {"parameters": {"a": release()}},
    {"parameters": {"slap_software_type": "a\nb"}},
    {"parameters": {"slap_software_type": "a\x1b[2J"}},
    {"parameters": {"slap_software_type": "x" * 1025}},
    {"parameters": {"slap_software_type": ["a"]}},
    {"parameters": {"timestamp": True}},
    {"parameters": {"timestamp": 1.5}},
    {"parameters": {"timestamp": "1\n2"}},
    {"parameters": {"timestamp": ["1"]}},
    {"parameters": {"ip_list": "10.0.0.1"}},
    {"parameters": {"ip_list": ["10.0.0.1"]}},
    {"parameters": {"ip_list": [("tap", 1)]}},
    {"parameters": {"full_ip_list": [("tap", "a\nb")]}},
    {"parameters": {"slave_instance_list": {"a": 1}}},
    {"parameters": {"slave_instance_list": ["a"]}},
    {"parameters": {"instance_title": 1}},
]


@pytest.mark.parametrize("bad", REJECTED, ids=lambda bad: repr(bad)[:60])
def test_a_bad_entry_does_not_spoil_the_others(bad):
    document = parse_computer(
        computer(partition("slappart0"), partition("slappart1", **bad), partition("slappart2"))
    )
    assert [entry.partition_id for entry in document.partitions] == ["slappart0", "slappart2"]
    assert [entry.partition_id for entry in document.rejected] == ["slappart1"]
    assert document.rejected[0].reason.isprintable()


@pytest.mark.parametrize("entry", [None, "text", 1, [], release(), Instance("ComputerPartition", (), {})])
def test_an_entry_that_is_no_partition_is_rejected_without_a_name(entry):
    document = parse_computer(computer(entry, partition()))
    assert len(document.partitions) == 1
    assert [rejected.partition_id for rejected in document.rejected] == ["?"]


def test_two_entries_of_one_name_are_both_rejected_even_if_one_is_bad():
    document = parse_computer(
        computer(
            partition("a"),
            partition("b"),
            partition("a", url="x y"),
            partition("c"),
            partition("c", "destroyed"),
        )
    )
    assert [entry.partition_id for entry in document.partitions] == ["b"]
    reason = "2 entries have this name"
    assert document.rejected == tuple(Rejected(name, reason) for name in "aacc")


@pytest.mark.parametrize(
    ("state", "url", "free", "destroy_requested"),
    [
        ("started", URL, False, False),
        ("stopped", URL, False, False),
        ("destroyed", URL, False, True),
        ("destroyed", None, True, False),
    ],
)
def test_free_and_destroy_requested(state, url, free, destroy_requested):
    document = parse_partition(partition(state=state, url=url))
    assert (document.free, document.destroy_requested) == (free, destroy_requested)


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        (1785000000123456, "1785000000123456"),
        ("1795362430.933656", "1795362430.933656"),
        ("", ""),
        (None, ""),
    ],
)
def test_timestamps_are_opaque_text(stamp, text):
    assert parse_partition(partition(parameters={"timestamp": stamp})).timestamp == text


def test_reserved_keys_are_no_parameters():
    mixed = {
        "ip_list": [],
        "full_ip_list": [],
        "full_address_list": [],
        "slave_instance_list": [],
        "timestamp": "1",
        "instance_title": "a",
        "root_instance_title": "b",
        "root_instance_short_title": "c",
        "slap_computer_id": "COMP-7",
        "slap_computer_partition_id": "slappart0",
        "slap_software_release_url": URL,
        "slap_software_type": "default",
        "mine": "1",
    }
    assert parse_partition(partition(parameters=mixed)).parameters == {"mine": "1"}


def test_text_for_people_is_kept_and_disarmed():
    document = parse_partition(
        partition(
            parameters={"instance_title": "a\x1b[2Jb", "root_instance_title": None},
            _access_status="#error: two\nlines " + "x" * 5000,
        )
    )
    assert document.instance_title == "a\ufffd[2Jb"
    assert document.root_instance_title == ""
    assert document.access_status.startswith("#error: two\ufffdlines")
    assert len(document.access_status) == 4096


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ({}, "available"),
        ({"_requested_state": None}, "available"),
        ({"_requested_state": "available"}, "available"),
        ({"_requested_state": "destroyed"}, "destroyed"),
    ],
)
def test_software_states(more, state):
    assert parse_software(release(**more)) == SoftwareDocument(URL, state)


@pytest.mark.parametrize(
    "entry",
    [
        *(release(url) for url in BAD_URLS),
        release(_requested_state="started"),
        release(_requested_state=1),
        None,
        "text",
        partition(),
    ],
)
def test_a_bad_software_does_not_spoil_the_others(entry):
    document = parse_computer(computer(software=(release("/a"), entry, release("/b"))))
    assert [software.url for software in document.software] == ["/a", "/b"]
    (reason,) = document.rejected_software
    assert reason.startswith("software 2: ")
    assert reason.isprintable()


def test_software_that_is_listed_twice():
    twice = (release("/a"), release("/b"), release("/a"), release("/b", _requested_state="destroyed"))
    document = parse_computer(computer(software=twice))
    assert document.software == (SoftwareDocument("/a", "available"),)
    assert document.rejected_software == ("/b: wanted available and destroyed",)


def test_the_software_list_may_be_missing_but_not_the_partitions():
    assert parse_computer(computer(_software_release_list=None)) == ComputerDocument("COMP-7")
    with pytest.raises(SlapError, match="without a list of partitions"):
        parse_computer(computer(_computer_partition_list=None))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        [],
        {},
        partition(),
        computer(_computer_id=None),
        computer(_computer_id=""),
        computer(_computer_id=7),
        computer(_computer_id="a\nb"),
        computer(_computer_partition_list="text"),
        computer(_computer_partition_list={}),
        computer(_software_release_list={"a": 1}),
        Instance("Computer", ("COMP-7",), {}),
    ],
)
def test_what_is_no_computer_is_garbage(value):
    with pytest.raises(SlapError) as caught:
        parse_computer(value)
    assert caught.value.code == "slap.garbage"


def test_certificates():
    assert parse_certificate(loads(PROXY_CERTIFICATE)) == CertificatePair("", "")
    pair = parse_certificate({"certificate": "CERT", "key": "SECRET", "more": 1})
    assert pair == CertificatePair("CERT", "SECRET")
    assert "SECRET" not in repr(pair)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        {},
        {"certificate": "a"},
        {"certificate": "a", "key": None},
        {"certificate": "a", "key": ""},
        {"certificate": "", "key": "b"},
        {"certificate": 1, "key": 2},
    ],
)
def test_bad_certificates_are_garbage(value):
    with pytest.raises(SlapError) as caught:
        parse_certificate(value)
    assert caught.value.code == "slap.garbage"


PLACES = st.sampled_from(
    "_computer_id _partition_id _requested_state _software_release_document _parameter_dict "
    "_instance_guid _filter_dict _access_status".split()
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(
            st.sampled_from(["timestamp", "ip_list", "slave_instance_list", "a"]), inner, max_size=3
        )
        | st.builds(Instance, st.just("SoftwareRelease"), st.just(()), st.just({"_software_release": "x"}))
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(PLACES, ANYTHING, max_size=4))
def test_whatever_stands_in_a_partition_no_other_is_touched(odd):
    document = parse_computer(computer(partition("slappart0"), partition("slappart1", **odd)))
    assert "slappart0" in {entry.partition_id for entry in document.partitions + document.rejected}
    assert len(document.partitions) + len(document.rejected) == 2
