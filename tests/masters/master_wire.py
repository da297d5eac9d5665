"""The marshalled XML of the strict master, by itself: what it says, and a strict look at what it is told.

Nothing of the product's is used, so that a mistake in its marshalling is seen here. Strings are escaped
twice, other characters than ASCII come as references, ids count from i2, and a tuple has none.
"""

import re
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape, unescape


class UnreadableError(ValueError):
    """What was posted is no marshalled document as the stock client makes it."""


@dataclass(frozen=True)
class Thing:
    """An object of one of SLAP's classes."""

    kind: str
    init: tuple = ()
    state: dict = field(default_factory=dict)


def write(value):
    """Marshal a value."""
    parts = []
    _Writer(parts).write(value)
    return f"<marshal>{''.join(parts)}</marshal>".encode("ascii", "xmlcharrefreplace")


class _Writer:
    def __init__(self, parts):
        self._parts, self._next = parts, 2

    def _id(self):
        self._next += 1
        return f'id="i{self._next - 1}"'

    def write(self, value):
        put = self._parts.append
        match value:
            case None:
                put("<none/>")
            case bool():
                put(f"<bool>{int(value)}</bool>")
            case int():
                put(f"<int>{value}</int>")
            case float():
                put(f"<float>{value!r}</float>")
            case str():
                put(f"<string>{escape(escape(value))}</string>")
            case Thing():
                put(f'<object {self._id()} module="slapos.slap.slap" class="{value.kind}">')
                self.write(tuple(value.init))
                self.write(value.state)
                put("</object>")
            case dict():
                self._nest(f"dictionary {self._id()}", [item for pair in value.items() for item in pair])
            case list():
                self._nest(f"list {self._id()}", value)
            case tuple():
                self._nest("tuple", value)
            case _:
                raise TypeError(type(value))

    def _nest(self, opening, items):
        if not items:
            self._parts.append(f"<{opening}/>")
            return
        self._parts.append(f"<{opening}>")
        for item in items:
            self.write(item)
        self._parts.append(f"</{opening.partition(' ')[0]}>")


def read(text):
    """Read a marshalled value of plain types; raise UnreadableError for all that xml_marshaller would not write."""
    try:
        root = ET.fromstring(text)  # noqa: S314 - of the node under test
    except ET.ParseError as error:
        raise UnreadableError(str(error)) from error
    if root.tag != "marshal" or len(root) != 1:
        raise UnreadableError("no <marshal> with one value")
    return _value(root[0])


def _value(node):
    if node.tag in ("dictionary", "list", "tuple"):
        return _nested(node)
    text = node.text or ""
    if len(node):
        raise UnreadableError(f"values in <{node.tag}>")
    if node.tag == "string":
        if re.search("&(?!lt;|gt;|amp;)|[<>]", text):
            raise UnreadableError(f"a string that was escaped once only: {text[:80]!r}")
        return unescape(text)
    if node.tag == "none" and not text:
        return None
    pattern, kind = _SCALARS.get(node.tag, ("(?!)", str))
    if not re.fullmatch(pattern, text):
        raise UnreadableError(f"a <{node.tag}> of {text[:80]!r}")
    return kind(text)


def _nested(node):
    if (node.text or "").strip() or any((child.tail or "").strip() for child in node):
        raise UnreadableError("text between values")
    items = [_value(child) for child in node]
    if node.tag != "dictionary":
        return tuple(items) if node.tag == "tuple" else items
    keys = items[::2]
    if len(items) % 2 or len(set(keys)) != len(keys) or not all(isinstance(key, str) for key in keys):
        raise UnreadableError("a dictionary that is none")
    return dict(zip(keys, items[1::2], strict=True))


_SCALARS = {
    "bool": ("[01]", lambda text: text == "1"),
    "int": ("-?[0-9]+", int),
    "float": (r"-?[0-9]+\.[0-9]+", float),
}


def instance_xml(parameters):
    """Write the second format, in which masters keep parameters."""
    rows = "".join(
        f"<parameter id={_quoted(key)}>{escape(str(text))}</parameter>" for key, text in parameters.items()
    )
    return f"<?xml version='1.0' encoding='utf-8'?><instance>{rows}</instance>"


def _quoted(text):
    return '"' + escape(text, {'"': "&quot;"}) + '"'
