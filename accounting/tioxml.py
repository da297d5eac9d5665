"""TioXML, the usage documents of SLAP, as data: written and read; and the usage files of tenants, read.

``write`` makes what computer_consumption.xsd of slapos.core accepts, of one transaction, in ASCII (what is
beyond it are character references), so that no master can decode it wrongly. ``read`` takes that and
nothing else. ``read_consumption`` takes a tenant's file by partition_consumption.xsd: it is hostile until
shown otherwise, so all that grows is bounded, and any other input ends as ``accounting.report``.

The rules that masters have beyond the schema are in ``accounting.rules``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET  # written with, never parsed with

from accounting.elements import Node, parse, refusal, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOST_BYTES = 256 * 1024
"""Of a tenant's file; whoever reads it need read no more than one byte beyond."""
MOST_MOVEMENTS = 1000
MOST_TEXT = 200
LARGEST = Decimal(10) ** 15
SMALLEST = Decimal("1e-9")
"""Of a tenant's quantity, and its resolution: more digits behind the point are rounded."""

_DOCUMENT_BYTES = 64 * 1024 * 1024
_DOCUMENT_ELEMENTS = 1_000_000
_WIDEST = 40  # digits before and behind the point of a number that is written
_DECLARATION = '<?xml version="1.0" encoding="utf-8"?>'
_TYPE = "Sale Packing List"
_ARROW = "Destination"
_DATE = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}) UTC")
_PLAIN = re.compile(rf"-?[0-9]{{1,{_WIDEST + 1}}}(\.[0-9]{{1,{_WIDEST}}})?")
# the lexical form of xs:float (XML Schema part 2, 3.2.4), its digits bounded
_FLOAT = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")
_EXACT = Context(prec=128)  # a thread's own context may round or trap differently
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Movement:
    """So much of a resource for what ``reference`` names: the guid of an instance, or the computer's."""

    resource: str
    reference: str
    quantity: Decimal
    title: str = ""
    price: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Document:
    """One usage report; ``start`` and ``stop`` are Unix seconds, written to the whole second (downwards)."""

    reference: str
    title: str
    start: float
    stop: float
    movements: tuple[Movement, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a tenant's file says of one movement; ``rules.accept`` judges it. The price is the operator's."""

    resource: str
    title: str
    reference: str
    quantity: Decimal


# --- writing


def clean(text: str) -> str:
    """Give text as a document can carry it: on one line, and what XML 1.0 has no place for is U+FFFD."""
    return text if text.isprintable() else "".join(map(_carried, text))


def _carried(char: str) -> str:
    if char in "\t\n\r\u2028\u2029":
        return " "
    code = ord(char)
    # control characters, halves of pairs, what Unicode calls no characters, what turns the direction of text
    if (
        code < 0x20
        or 0x7F <= code <= 0x9F
        or 0xD800 <= code <= 0xDFFF
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
    ):
        return "\ufffd"
    return char


def write(document: Document) -> str:
    """Give the document as text; raises AccountingError for a number or date that has no plain form."""
    journal = ET.Element("journal")
    transaction = ET.SubElement(journal, "transaction", {"type": _TYPE})
    for tag, text in (
        ("title", document.title),
        ("start_date", _date(document.start)),
        ("stop_date", _date(document.stop)),
        ("reference", document.reference),
        ("currency", ""),
        ("payment_mode", ""),
        ("category", ""),
    ):
        ET.SubElement(transaction, tag).text = clean(text)
    ET.SubElement(transaction, "arrow", {"type": _ARROW})
    for movement in document.movements:
        transaction.append(_element(movement))
    encoded: bytes = ET.tostring(journal, encoding="us-ascii")
    return f"{_DECLARATION}\n{encoded.decode('ascii')}"


def size(movement: Movement) -> int:
    """Give the bytes that a movement has in a document; raises as :func:`write`."""
    return len(ET.tostring(_element(movement), encoding="us-ascii"))


def _element(movement: Movement) -> ET.Element:
    element = ET.Element("movement")
    for tag, text in (
        ("resource", movement.resource),
        ("title", movement.title),
        ("reference", movement.reference),
        ("quantity", _plain(movement.quantity)),
        ("price", _plain(movement.price)),
        ("VAT", ""),
        ("category", ""),
    ):
        ET.SubElement(element, tag).text = clean(text)
    return element


def _date(at: float) -> str:
    try:
        moment = datetime.fromtimestamp(at // 1, UTC)
    except (ValueError, OverflowError, OSError) as error:  # not finite, or no year of four digits
        raise refusal(f"{at} is no time that can be written") from error
    return f"{moment.replace(tzinfo=None).isoformat(sep=' ')} UTC"


def _plain(number: Decimal) -> str:
    if number.is_zero():
        return "0"
    # bounded before it is written: Decimal("1e999999") would be a million digits
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -_WIDEST or number.adjusted() > _WIDEST:
        raise refusal(f"{number} is no number that can be written")
    whole, point, rest = format(number, "f").partition(".")
    rest = rest.rstrip("0")
    return f"{whole}{point}{rest}" if rest else whole


# --- reading what was written


def read(text: str) -> Document:
    """Read what ``write`` wrote, for ``report list`` and tests; raises AccountingError."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise refusal("not text that can be encoded") from error
    root = parse(content, most_bytes=_DOCUMENT_BYTES, most_elements=_DOCUMENT_ELEMENTS, depth=4)
    (transaction,) = _fields(root, "journal", ("transaction",))
    if transaction.attributes != {"type": _TYPE}:
        raise refusal(f"<transaction> is not of type {_TYPE!r}", transaction.line)
    names = ("title", "start_date", "stop_date", "reference", "currency", "payment_mode", "category", "arrow")
    head = _fields(transaction, "transaction", names, more="movement")
    title, start, stop, reference, *empty, arrow = head[: len(names)]
    _want_leaf(title, start, stop, reference)
    _want_empty(*empty, arrow)
    if arrow.attributes != {"type": _ARROW}:
        raise refusal(f"<arrow> is not of type {_ARROW!r}", arrow.line)
    return Document(
        reference=reference.text,
        title=title.text,
        start=_moment(start),
        stop=_moment(stop),
        movements=tuple(map(_movement, head[len(names) :])),
    )


def _movement(node: Node) -> Movement:
    names = ("resource", "title", "reference", "quantity", "price", "VAT", "category")
    resource, title, reference, quantity, price, *empty = _fields(node, "movement", names)
    _want_plain(node)
    _want_leaf(resource, title, reference, quantity, price)
    _want_empty(*empty)
    _want_plain(*empty)
    return Movement(resource.text, reference.text, _number(quantity), title.text, _number(price))


def _fields(node: Node, tag: str, names: Sequence[str], more: str | None = None) -> list[Node]:
    """Give the children of an element that has these and no others, then any number of ``more``."""
    if node.tag != tag:
        raise refusal(f"<{tag}> expected, not {shown(node.tag)}", node.line)
    tags = [child.tag for child in node.children]
    if tags[: len(names)] != list(names) or any(name != more for name in tags[len(names) :]):
        raise refusal(f"<{tag}> has other elements than {', '.join(names)}", node.line)
    return node.children


def _want_leaf(*nodes: Node) -> None:
    for node in nodes:
        if node.children or node.attributes:
            raise refusal(f"<{node.tag}> has more than text", node.line)


def _want_plain(*nodes: Node) -> None:
    for node in nodes:
        if node.attributes:
            raise refusal(f"<{node.tag}> has attributes", node.line)


def _want_empty(*nodes: Node) -> None:
    for node in nodes:
        if node.children or node.text:
            raise refusal(f"<{node.tag}> is not empty", node.line)


def _moment(node: Node) -> float:
    found = _DATE.fullmatch(node.text)
    try:
        if found is not None:
            return datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise refusal(f"{node.text!r} is no date", node.line) from error
    raise refusal(f"{shown(node.text)} is no date as YYYY-MM-DD HH:MM:SS UTC", node.line)


def _number(node: Node) -> Decimal:
    if _PLAIN.fullmatch(node.text) is None:
        raise refusal(f"{shown(node.text)} is no plain number", node.line)
    return Decimal(node.text)


# --- reading what a tenant wrote


def read_consumption(content: bytes) -> tuple[Claim, ...]:
    """Read a tenant's usage file; movements of quantity 0 are left out; raises AccountingError alone."""
    # an element <category> may come any number of times; as many as a file holds is the bound
    root = parse(content, most_bytes=MOST_BYTES, most_elements=MOST_BYTES // 4, depth=3)
    if root.tag != "consumption":
        raise refusal(f"<consumption> expected, not {shown(root.tag)}", root.line)
    _want_plain(root)
    if not 0 < len(root.children) <= MOST_MOVEMENTS:
        raise refusal(f"it has {len(root.children)} movements; from 1 to {MOST_MOVEMENTS} are read")
    if root.text.strip(_SPACE):
        raise refusal("text in <consumption>", root.line)
    return tuple(claim for claim in map(_claim, root.children) if claim.quantity)


def _claim(node: Node) -> Claim:
    if node.tag != "movement":
        raise refusal(f"<movement> expected, not {shown(node.tag)}", node.line)
    _want_plain(node)
    fields = dict(_in_order(node))
    if not _FLOAT.fullmatch(_collapsed(fields["price"])) and _collapsed(fields["price"]) not in _NO_NUMBERS:
        raise refusal(f"price {shown(fields['price'].text)} is no number", fields["price"].line)
    texts = {name: _short(fields[name]) if name in fields else "" for name in _TEXTS}
    return Claim(quantity=_quantity(fields["quantity"]), **texts)


_TEXTS = ("resource", "title", "reference")
_OPTIONAL = frozenset({"title", "reference"})
_NO_NUMBERS = frozenset({"INF", "-INF", "NaN"})  # values of xs:float all the same


def _in_order(node: Node) -> Iterator[tuple[str, Node]]:
    """Give the named children of a movement in the order of the schema, each once."""
    children = iter(node.children)
    child = next(children, None)
    for name in ("resource", "title", "reference", "quantity", "price", "VAT"):
        if child is not None and child.tag == name:
            _want_leaf(child)
            yield name, child
            child = next(children, None)
        elif name not in _OPTIONAL:
            found = "its end" if child is None else shown(child.tag)
            raise refusal(f"<{name}> expected in <movement>, not {found}", (child or node).line)
    while child is not None:
        if child.tag != "category":
            raise refusal(f"{shown(child.tag)} is out of place in <movement>", child.line)
        _want_leaf(child)
        child = next(children, None)


def _collapsed(node: Node) -> str:
    """White space around a number is no part of it (XML Schema part 2, whiteSpace collapse)."""
    return node.text.strip(_SPACE)


def _short(node: Node) -> str:
    text = node.text.strip(_SPACE)
    if len(text) > MOST_TEXT:
        raise refusal(f"<{node.tag}> has {len(text)} characters; at most {MOST_TEXT} are read", node.line)
    return text


def _quantity(node: Node) -> Decimal:
    text = _collapsed(node)
    if _FLOAT.fullmatch(text) is None:
        raise refusal(f"quantity {shown(text)} is no number that is read", node.line)
    number = Decimal(text)
    if number.is_zero():
        return Decimal(0)
    if number < SMALLEST or number > LARGEST:
        raise refusal(f"quantity {shown(text)} is not between {SMALLEST} and {LARGEST:f}", node.line)
    exponent = number.as_tuple().exponent
    rounded = isinstance(exponent, int) and exponent < SMALLEST.adjusted()
    return number.quantize(SMALLEST, context=_EXACT) if rounded else number
