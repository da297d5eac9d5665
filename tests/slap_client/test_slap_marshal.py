import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slap_samples import PRODUCTION_COMPUTER, PROXY_CERTIFICATE, PROXY_COMPUTER

from slap_client.errors import SlapError
from slap_client.marshal import Instance, dumps, loads

SLAP = 'module="slapos.slap.slap"'


def marshal(inner: str) -> str:
    return f"<marshal>{inner}</marshal>"


READ = [
    ("<none/>", None),
    ("<none></none>", None),
    ("<bool>1</bool>", True),
    ("<bool>0</bool>", False),
    ("<int>1</int>", 1),
    ("<int> -12 </int>", -12),
    ("<int>1785000000123456</int>", 1785000000123456),
    ("<long>1000000000000000000000000</long>", 10**24),
    ("<float>1.5</float>", 1.5),
    ("<float>-1e-07</float>", -1e-07),
    ("<float>3</float>", 3.0),
    ("<string></string>", ""),
    ("<string/>", ""),
    ("<string> two  words\n</string>", " two  words\n"),
    ("<unicode>caf&#233;</unicode>", "café"),
    ("<string>a<!-- remark -->b</string>", "ab"),
    ('<list id="i2"/>', []),
    ("<list><int>1</int>\n  <none/></list>", [1, None]),
    ("<tuple/>", ()),
    ("<tuple><string>a</string><tuple/></tuple>", ("a", ())),
    ('<dictionary id="i2"/>', {}),
    (
        "<dictionary>\n<string>k</string>\n<int>1</int><string>l</string><list/></dictionary>",
        {"k": 1, "l": []},
    ),
    (
        f'<object {SLAP} class="SoftwareInstance"><tuple/><dictionary/></object>',
        Instance("SoftwareInstance", (), {}),
    ),
    (
        (
            f'<object id="i2" {SLAP} class="Computer"><tuple><string>C</string></tuple>'
            '<dictionary id="i3"><string>_computer_id</string><string>C</string></dictionary></object>'
        ),
        Instance("Computer", ("C",), {"_computer_id": "C"}),
    ),
    ('<list id="i2"><list id="i3"><int>1</int></list><reference id="i3"/></list>', [[1], [1]]),
]


@pytest.mark.parametrize(("inner", "value"), READ)
def test_each_type_is_read(inner, value):
    result = loads(marshal(inner))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a&amp;lt;b&amp;gt;&amp;amp;c", "a<b>&c"),
        ("a&lt;b", "a<b"),  # escaped once only
        ("&amp;amp;lt;", "&lt;"),
        ("&amp;amp;amp;lt;", "&amp;lt;"),
        ("&amp;quot; &amp;nbsp; &amp;", "&quot; &nbsp; &"),
        ("?a=1&amp;amp;b=2", "?a=1&b=2"),
        ("x&#13;\ny", "x\r\ny"),
    ],
)
def test_strings_are_unescaped_twice(text, value):
    assert loads(marshal(f"<string>{text}</string>")) == value


@pytest.mark.parametrize(
    ("value", "inner"),
    [
        (None, "<none/>"),
        (True, "<bool>1</bool>"),
        (5, "<int>5</int>"),
        (10**24, "<long>1000000000000000000000000</long>"),
        (1.5, "<float>1.5</float>"),
        ("", "<string></string>"),
        ("a<b>&c", "<string>a&amp;lt;b&amp;gt;&amp;amp;c</string>"),
        ("&lt;", "<string>&amp;amp;lt;</string>"),
        ("é\r\n\U0001f600", "<string>&#233;&#13;\n&#128512;</string>"),
        ([], '<list id="i2"/>'),
        ((), "<tuple/>"),
        ({"k": [{}, (1,)]}, None),
    ],
)
def test_values_are_written_as_xml_marshaller_does(value, inner):
    if inner is None:
        inner = (
            '<dictionary id="i2"><string>k</string><list id="i3"><dictionary id="i4"/>'
            "<tuple><int>1</int></tuple></list></dictionary>"
        )
    assert dumps(value).decode("ascii") == marshal(inner)


@pytest.mark.parametrize("document", [PROXY_COMPUTER, PROXY_CERTIFICATE])
def test_what_slapproxy_sends_is_written_back_to_the_byte(document):
    assert dumps(loads(document)).decode("ascii") == document


def test_a_reference_shares_its_value():
    first, second = loads(marshal('<list><dictionary id="i3"/><reference id="i3"/></list>'))
    assert first is second


GARBAGE = [
    "",
    " ",
    "OK",
    "<html><body>503</body></html>",
    "<marshal/>",
    "<marshal>1</marshal>",
    "<marshal><int>1</int>",
    "<marshal><int>1</int></marshal><marshal/>",
    marshal("<int>1</int><int>2</int>"),
    marshal("<marshal><int>1</int></marshal>"),
    "<int>1</int>",
    marshal("<none>x</none>"),
    marshal("<bool>2</bool>"),
    marshal("<bool/>"),
    marshal("<bool>True</bool>"),
    marshal("<int/>"),
    marshal("<int>1_0</int>"),
    marshal("<int>٣</int>"),
    marshal("<int>1.0</int>"),
    marshal(f"<int>{'9' * 5000}</int>"),
    marshal("<float>nan</float>"),
    marshal("<float>inf</float>"),
    marshal("<float>1e999</float>"),
    marshal("<float>1_0.5</float>"),
    marshal("<string>a<none/></string>"),
    marshal("<string>\x00</string>"),
    marshal("<string>\x1b[2J</string>"),
    marshal("<string>&#8;</string>"),
    marshal("<string>&undefined;</string>"),
    marshal("<list>text</list>"),
    marshal('<list id="i2"><reference id="i3"/></list>'),
    marshal('<list id="i2"><reference id="i2"/></list>'),
    marshal("<list><reference/></list>"),
    marshal('<list><list id="i3"/><list id="i3"/></list>'),
    marshal('<list><list id="i3"/><reference id="i3"><none/></reference></list>'),
    marshal("<dictionary><string>k</string></dictionary>"),
    marshal("<dictionary><int>1</int><int>1</int></dictionary>"),
    marshal("<dictionary><list/><int>1</int></dictionary>"),
    marshal("<dictionary><string>k</string><none/><string>k</string><none/></dictionary>"),
    marshal("<dictionary><string>k</string><none/><unicode>k</unicode><none/></dictionary>"),
    marshal("<set/>"),
    marshal("<global module='os' class='system'/>"),
    marshal('<string xml:lang="en">a</string>'),
    marshal('<list size="1"/>'),
    '<marshal id="i1"><none/></marshal>',
    '<marshal xmlns="http://example.org"><none/></marshal>',
    marshal('<object id="i2" module="os" class="system"><tuple/><dictionary/></object>'),
    marshal(f'<object id="i2" {SLAP} class="Supply"><tuple/><dictionary/></object>'),
    marshal('<object module="slapos.slap" class="Computer"><tuple/><dictionary/></object>'),
    marshal(f"<object {SLAP}><tuple/><dictionary/></object>"),
    marshal(f'<object {SLAP} class="Computer"><tuple/></object>'),
    marshal(f'<object {SLAP} class="Computer"><dictionary/><tuple/></object>'),
    marshal(f'<object {SLAP} class="Computer"><list/><dictionary/></object>'),
    "<!DOCTYPE marshal><marshal><none/></marshal>",
    '<!DOCTYPE marshal SYSTEM "http://127.0.0.1:1/evil.dtd"><marshal><none/></marshal>',
    '<!DOCTYPE m [<!ENTITY a "b">]><marshal><string>&a;</string></marshal>',
    '<!DOCTYPE m [<!ENTITY a SYSTEM "file:///etc/passwd">]><marshal><string>&a;</string></marshal>',
    "<marshal>\ud800</marshal>",
]


@pytest.mark.parametrize("document", GARBAGE)
def test_bad_documents_are_garbage(document):
    with pytest.raises(SlapError) as caught:
        loads(document)
    assert caught.value.code == "slap.garbage"
    assert not caught.value.retryable
    assert caught.value.hint


@pytest.mark.parametrize(
    "document",
    [
        b"\xff\xfe\x00",
        b"<marshal><string>\xe9</string></marshal>",
        b"<?xml version='1.0' encoding='klingon'?><marshal><none/></marshal>",
        b"<?xml version='1.0' encoding='utf-7'?><marshal><string>+ADw-</string></marshal>",
        b"<?xml version='1.0' encoding='shift_jis'?><marshal><string>\x83</string></marshal>",
        b"<?xml version='1.0' encoding='hex'?><marshal><none/></marshal>",
        b"<?xml version='1.0' encoding='utf-16'?><marshal><none/></marshal>",
    ],
)
def test_bytes_in_bad_encodings_are_garbage(document):
    with pytest.raises(SlapError) as caught:
        loads(document)
    assert caught.value.code == "slap.garbage"


def test_other_encodings_that_xml_declares_are_read():
    document = "<?xml version='1.0' encoding='{}'?><marshal><string>é</string></marshal>"
    assert loads(document.format("iso-8859-1").encode("iso-8859-1")) == "é"
    assert loads(document.format("utf-16").encode("utf-16")) == "é"
    # Text was decoded before: its declaration no longer counts.
    assert loads(document.format("iso-8859-1")) == "é"


def nested(levels: int) -> str:
    return "<list>" * levels + "</list>" * levels


def doubling(levels: int) -> str:
    """A list of lists of which each holds the one before twice: small to write, 2**levels values to walk."""
    inner = '<list id="a0"/>'
    for level in range(1, levels):
        inner += f'<list id="a{level}"><reference id="a{level - 1}"/><reference id="a{level - 1}"/></list>'
    return marshal(f"<list>{inner}</list>")


def chain(levels: int) -> str:
    """Lists of which each refers to the one before: flat to write, deep to walk."""
    inner = '<list id="a0"/>'
    for level in range(1, levels):
        inner += f'<list id="a{level}"><reference id="a{level - 1}"/></list>'
    return marshal(f"<list>{inner}</list>")


AGAIN = '<reference id="a"/>'


@pytest.mark.parametrize(
    ("document", "limits"),
    [
        (marshal("<string>12345678</string>"), {"max_bytes": 20}),
        (marshal(nested(4)), {"max_depth": 3}),
        (marshal(nested(100_000)), {}),
        (marshal(f"<list>{'<none/>' * 9}</list>"), {"max_nodes": 9}),
        (marshal("<list>" + "<none/>" * 5000 + "broken"), {"max_nodes": 100}),
        (doubling(60), {}),
        (doubling(5), {"max_nodes": 57}),
        (chain(100), {}),
        (chain(4), {"max_depth": 4}),
        (
            marshal(f'<list><list id="a"><string>{"x" * 300}</string></list>{AGAIN * 9}</list>'),
            {"max_bytes": 900},
        ),
    ],
)
def test_limits_hold_with_references_written_out(document, limits):
    with pytest.raises(SlapError) as caught:
        loads(document, **limits)
    assert caught.value.code == "slap.garbage"


@pytest.mark.parametrize(
    ("document", "limits"),
    [
        (marshal(nested(4)), {"max_depth": 4}),
        (marshal(f"<list>{'<none/>' * 9}</list>"), {"max_nodes": 10}),
        (chain(4), {"max_depth": 5}),
        (doubling(5), {"max_nodes": 1 + 1 + 3 + 7 + 15 + 31}),
    ],
)
def test_what_is_just_within_the_limits_is_read(document, limits):
    assert isinstance(loads(document, **limits), list)


def cyclic() -> list:
    value: list = []
    value.append({"self": value})
    return value


@pytest.mark.parametrize(
    "value",
    [
        "\x00",
        "\x1b",
        "\ud800",
        "\ufffe",
        {"k\x01": 1},
        {1: 1},
        math.nan,
        math.inf,
        10**1000,
        {1, 2},
        b"bytes",
        object(),
        cyclic(),
        Instance("system", (), {}),
        Instance("Computer", (), {1: 2}),
    ],
)
def test_what_can_not_be_written_is_refused(value):
    with pytest.raises(SlapError) as caught:
        dumps(value)
    assert caught.value.code == "slap.value"
    assert not caught.value.retryable


TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\ufffe\uffff", exclude_categories=("Cs", "Cc"))
    | st.sampled_from("\t\n\r&<>;"),
    max_size=30,
) | st.sampled_from(["&lt;", "&amp;lt;", "&amp;amp;", "<![CDATA[", "]]>", "&#13;"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)


def containers(children):
    attributes = st.dictionaries(TEXT, children, max_size=4)
    return (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | attributes
        | st.builds(
            Instance,
            st.sampled_from(["Computer", "ComputerPartition", "SoftwareRelease", "SoftwareInstance"]),
            st.lists(children, max_size=3).map(tuple),
            attributes,
        )
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(SCALARS, containers, max_leaves=20))
def test_what_is_written_is_read_back(value):
    written = dumps(value)
    assert loads(written) == value
    assert loads(written.decode("ascii")) == value
    assert dumps(loads(written)) == written


def outcome(data) -> str:
    try:
        loads(data)
    except SlapError as error:
        return error.code
    return "read"


SPLICES = st.sampled_from(
    [
        b"",
        b"<",
        b">",
        b"&",
        b"&#0;",
        b"\x00",
        b"\xff",
        b"<none/>",
        b"</dictionary>",
        b'<list id="i3">',
        b'<reference id="i3"/>',
        b"<!DOCTYPE x>",
        b"<!--",
        b"<?xml version='1.0' encoding='utf-16'?>",
    ]
) | st.binary(max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([PROXY_COMPUTER.encode(), PRODUCTION_COMPUTER.encode()]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), SPLICES), min_size=1, max_size=4),
)
def test_damaged_documents_raise_garbage_and_nothing_else(document, damages):
    for place, removed, inserted in damages:
        start = int(place * len(document))
        document = document[:start] + inserted + document[start + removed :]
    assert outcome(document) in {"read", "slap.garbage"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60) | TEXT.map(marshal))
def test_any_input_at_all_raises_garbage_and_nothing_else(data):
    assert outcome(data) in {"read", "slap.garbage"}
