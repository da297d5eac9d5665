"""TioXML as data: what is written is read again, and what a tenant wrote is read with suspicion."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting.elements import parse
from accounting.errors import AccountingError
from accounting.tioxml import (
    MOST_BYTES,
    MOST_MOVEMENTS,
    MOST_TEXT,
    Claim,
    Document,
    Movement,
    clean,
    read,
    read_consumption,
    write,
)

DAY = 1795219200.0  # 2026-11-21 00:00:00 UTC
DOCUMENT = Document(
    "2026-11-21-network",
    "Network usage of COMP-1",
    DAY,
    DAY + 86399,
    (Movement("network_out", "SOFTINST-12", Decimal("42.5"), "Bytes sent 2001:db8:1::2"),),
)
# as slapos.toolbox's slapreport writes it: an empty reference, prose as resource
SLAPREPORT = (
    b"<?xml version='1.0' encoding='utf-8'?><consumption><movement><resource>CPU Consumption</resource>"
    b"<title>CPU consumption of the partition on 2026-11-21 at 23:59:58</title><reference></reference>"
    b"<quantity>12.5</quantity><price>0.00</price><VAT></VAT><category></category></movement>"
    b"<movement><resource>Memory consumption</resource><title>Memory</title><reference></reference>"
    b"<quantity>1.5e+06</quantity><price>0.00</price><VAT></VAT><category></category></movement></consumption>"
)


def movement(resource="cpu", quantity="1", price="0", vat="<VAT/>", **more):
    middle = "".join(f"<{name}>{text}</{name}>" for name, text in more.items())
    return (
        f"<movement><resource>{resource}</resource>{middle}<quantity>{quantity}</quantity>"
        f"<price>{price}</price>{vat}</movement>"
    )


def consumption(*movements):
    return f"<consumption>{''.join(movements)}</consumption>".encode()


def refused(content):
    with pytest.raises(AccountingError) as caught:
        read_consumption(content)
    assert caught.value.code == "accounting.report"
    assert caught.value.hint
    assert not caught.value.retryable
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400
    return caught.value.message


# --- documents


def test_a_document_is_written_as_masters_take_it():
    assert write(DOCUMENT) == (
        '<?xml version="1.0" encoding="utf-8"?>\n<journal><transaction type="Sale Packing List">'
        "<title>Network usage of COMP-1</title><start_date>2026-11-21 00:00:00 UTC</start_date>"
        "<stop_date>2026-11-21 23:59:59 UTC</stop_date><reference>2026-11-21-network</reference>"
        '<currency /><payment_mode /><category /><arrow type="Destination" /><movement>'
        "<resource>network_out</resource><title>Bytes sent 2001:db8:1::2</title>"
        "<reference>SOFTINST-12</reference><quantity>42.5</quantity><price>0</price><VAT /><category />"
        "</movement></transaction></journal>"
    )


texts = st.text(max_size=60).map(clean)
numbers = st.decimals(
    allow_nan=False, allow_infinity=False, min_value=Decimal(-(10**30)), max_value=Decimal(10**30), places=12
)
moments = st.integers(-62135596800, 253402300799).map(float)
documents = st.builds(
    Document,
    reference=texts,
    title=texts,
    start=moments,
    stop=moments,
    movements=st.lists(
        st.builds(Movement, resource=texts, reference=texts, quantity=numbers, title=texts, price=numbers),
        max_size=5,
    ).map(tuple),
)


@settings(deadline=None)
@given(documents)
def test_what_is_written_is_read_again(document):
    text = write(document)
    assert text.isascii()
    assert read(text) == document


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_text_can_be_carried(title):
    document = Document("r", title, DAY, DAY, ())
    assert read(write(document)).title == clean(title)
    assert clean(clean(title)) == clean(title)


def test_what_xml_can_not_carry_is_replaced():
    assert clean("a\0b\x1bc\ud800d\ufffee\x85f\u202eg") == "a�b�c�d�e�f�g"
    assert clean("two\r\nlines\u2028") == "two  lines "


@pytest.mark.parametrize(
    ("number", "text"),
    [("1E+3", "1000"), ("1e-9", "0.000000001"), ("0E-50", "0"), ("-0", "0"), ("1.500", "1.5"), ("-7", "-7")],
)
def test_numbers_are_written_plainly(number, text):
    document = Document("r", "", DAY, DAY, (Movement("a", "b", Decimal(number)),))
    assert f"<quantity>{text}</quantity>" in write(document)


@pytest.mark.parametrize("number", ["NaN", "sNaN", "Infinity", "-Infinity", "1e999999", "1e-999999", "1e41"])
@pytest.mark.parametrize("name", ["quantity", "price"])
def test_numbers_without_a_plain_form_are_not_written(number, name):
    values = {"quantity": Decimal(1), "price": Decimal(1), name: Decimal(number)}
    with pytest.raises(AccountingError, match="no number that can be written"):
        write(Document("r", "", DAY, DAY, (Movement("a", "b", **values),)))


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -1e12, 1e300])
def test_times_without_a_date_are_not_written(at):
    with pytest.raises(AccountingError, match="no time"):
        write(Document("r", "", DAY, at, ()))


def test_a_fraction_of_a_second_is_dropped():
    assert read(write(Document("r", "", DAY + 0.9, DAY + 1.999, ()))).stop == DAY + 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2026-11-21 23:59:59 UTC", "2026-11-22 at 15:53:05"),
        ("2026-11-21 23:59:59 UTC", "2026-11-31 23:59:59 UTC"),
        ("2026-11-21 23:59:59 UTC", "2026-11-21 23:59:59"),
        ("<start_date>2026-11-21 00:00:00 UTC</start_date>", ""),
        ('type="Destination"', 'type="Administration"'),
        ('type="Sale Packing List"', ""),
        ("<currency />", "<currency>EUR</currency>"),
        ("<currency />", ""),
        ("<VAT />", ""),
        ("<VAT />", "<VAT>None</VAT>"),
        ("<quantity>42.5", "<quantity>4.25e1"),
        ("<quantity>42.5", "<quantity>NaN"),
        ("<quantity>42.5", "<quantity>4_2"),
        ("<quantity>42.5", "<quantity>٤"),
        ("<movement>", "<movement><extra/>"),
        ("<movement>", '<movement a="b">'),
        ("<title>N", "<title>N<b/>"),
        ("</journal>", "<transaction/></journal>"),
        ("<journal>", "<!DOCTYPE journal><journal>"),
        ("journal", "diary"),
        ("</journal>", ""),
        ("</journal>", "\udc80</journal>"),
    ],
)
def test_reading_a_document_is_strict(old, new):
    text = write(DOCUMENT)
    assert old in text
    with pytest.raises(AccountingError) as caught:
        read(text.replace(old, new))
    assert caught.value.code == "accounting.report"


# --- what tenants write


def test_a_tenants_file():
    content = consumption(
        movement("cpu", " 1e3\n", title="CPU &amp; <![CDATA[<time>]]>", reference="SOFTINST-1"),
        movement("disk", ".5", price="-INF", vat="<VAT>7</VAT><category>a</category><category/>"),
    )
    assert read_consumption(content) == (
        Claim("cpu", "CPU & <time>", "SOFTINST-1", Decimal(1000)),
        Claim("disk", "", "", Decimal("0.5")),
    )


def test_what_slapreport_writes():
    assert [(claim.resource, claim.reference, claim.quantity) for claim in read_consumption(SLAPREPORT)] == [
        ("CPU Consumption", "", Decimal("12.5")),
        ("Memory consumption", "", Decimal(1500000)),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "windows-1252"])
def test_encodings_in_use(encoding):
    declared = encoding.removesuffix("-sig")
    text = f'<?xml version="1.0" encoding="{declared}"?>' + consumption(movement("café")).decode()
    assert read_consumption(text.encode(encoding))[0].resource == "café"


@pytest.mark.parametrize("zero", ["0", "-0", "+0.000", "0e5", ".0E-999"])
def test_zero_means_nothing(zero):
    assert read_consumption(consumption(movement("cpu", zero))) == ()
    assert len(read_consumption(consumption(movement("cpu", zero), movement("disk", "2")))) == 1


def test_quantities_have_nine_digits_behind_the_point():
    numbers = ["0.30000000000000004", "0.1234567894999", "1.0000000005000001", "1e-9", "1e15"]
    claims = read_consumption(consumption(*(movement("cpu", number) for number in numbers)))
    expected = ["0.3", "0.123456789", "1.000000001", "0.000000001", "1000000000000000"]
    assert [claim.quantity for claim in claims] == list(map(Decimal, expected))


REFUSED = (
    "-1 -1e-99 NaN INF -INF Infinity 1e308 1e16 1e-10 1e-999999999 1e99999999999999999999 1e1000 0x10 1_000 1,5"
    " \u0661 \uff11 1e . +-1 --1 1.2.3 \xbd 1e1.5 1e\u0661"
).split()


@pytest.mark.parametrize("quantity", [*REFUSED, "", " ", "1 2", "1\xa0", "1" * 41, "1." + "0" * 41])
def test_quantities_that_are_refused(quantity):
    assert "quantity" in refused(consumption(movement("cpu", quantity)))


@pytest.mark.parametrize("price", ["", "free", "0x1", "1_0", "nan", "+INF"])
def test_the_price_is_a_number_though_it_is_not_used(price):
    assert "price" in refused(consumption(movement("cpu", "1", price)))


def test_errors_name_the_line():
    content = consumption(movement(), "\n\n", movement("cpu", "-1"))
    assert refused(content).startswith("line 3: quantity '-1'")


@pytest.mark.parametrize("name", ["resource", "title", "reference"])
def test_texts_are_bounded(name):
    values = {"resource": "cpu", "title": "", "reference": ""}
    (claim,) = read_consumption(consumption(movement(**values | {name: "x" * MOST_TEXT})))
    assert getattr(claim, name) == "x" * MOST_TEXT
    assert f"<{name}>" in refused(consumption(movement(**values | {name: "x" * (MOST_TEXT + 1)})))


def test_movements_are_bounded():
    assert len(read_consumption(consumption(*[movement()] * MOST_MOVEMENTS))) == MOST_MOVEMENTS
    assert "movements" in refused(consumption(*[movement()] * (MOST_MOVEMENTS + 1)))
    assert "movements" in refused(consumption())


def test_depth_is_bounded_before_memory_is_spent():
    content = consumption(movement(title="<b>" * 60_000))
    assert "nested deeper than 3" in refused(content)


def test_elements_are_bounded():
    assert parse(b"<a><b/><b/></a>", most_bytes=99, most_elements=3, depth=2).tag == "a"
    with pytest.raises(AccountingError, match="line 1: more elements"):
        parse(b"<a><b/><b/><b/>", most_bytes=99, most_elements=3, depth=2)


def test_bytes_are_bounded():
    content = consumption(movement())
    assert read_consumption(content + b" " * (MOST_BYTES - len(content)))
    assert "bytes" in refused(content + b" " * (MOST_BYTES - len(content) + 1))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content):
    refused(content)  # so short that they are no usage file by chance
