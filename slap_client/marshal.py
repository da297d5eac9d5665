"""Reading the XML form of values in classic SLAP ("xml_marshaller"), strictly; ``dumps`` is at home here too.

A master is on the other side of a network and we are root, so reading promises: nothing but the value types
comes out, nothing is ever instantiated by name, every bad input ends as ``SlapError("slap.garbage", …)``, and
the result *with its back references written out* stays within the limits, so that callers may walk it freely.

Protocol facts: SLAP classic as slapos.core 1.26 and xml_marshaller 1.0.3 speak it. One ``<marshal>`` with one
value; dictionaries are key, value, key, value; strings are escaped TWICE; ids (i2, i3, …) only serve
``<reference>``.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from xml.etree.ElementTree import ParseError  # the exception alone; parsing is defusedxml's

from defusedxml.ElementTree import DefusedXMLParser

from slap_client.errors import SlapError
from slap_client.marshal_write import dumps
from slap_client.values import CLASSES, MAX_DEPTH, MODULE, Instance, Value

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "Instance", "Value", "dumps", "loads"]

# 500 partitions take 1.5 MB and 50 000 values, 5 000 shared instances among them some 10 MB; who sends more would hold the
# other threads up for tens of seconds and cost hundreds of megabytes.
MAX_BYTES = 32 * 1024 * 1024
MAX_NODES = 1_000_000

_SPACE = " \t\r\n"


def loads(
    data: bytes | str, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, max_nodes: int = MAX_NODES
) -> Value:
    """Read one marshalled document.

    ``max_bytes`` bounds the document and the text it expands to, ``max_depth`` the nesting of values,
    ``max_nodes`` the number of values; the last two count what a reference stands for each time it is used.
    Values that are referred to twice are shared in the result; a reference to an enclosing value is refused.
    Raises SlapError ``slap.garbage``, and nothing else.
    """
    try:
        raw = data.encode("utf-8") if isinstance(data, str) else data
        if len(raw) > max_bytes:
            raise _garbage(f"the document has {len(raw)} bytes, more than the {max_bytes} that are read")
        # Text was decoded by somebody already: an encoding in its XML declaration no longer holds.
        encoding = "utf-8" if isinstance(data, str) else None
        builder = _Builder(max_nodes=max_nodes, max_depth=max_depth, max_chars=max_bytes)
        parser = DefusedXMLParser(target=builder, encoding=encoding, forbid_dtd=True)
        parser.feed(raw)
        parser.close()
    # ValueError: defusedxml's refusals, undecodable text; LookupError: an encoding that Python does not know.
    except (ParseError, ValueError, LookupError) as error:
        raise _garbage(f"not a marshalled document: {str(error) or type(error).__name__}") from error
    return builder.result


def _garbage(message: str) -> SlapError:
    return SlapError("slap.garbage", message, hint="ask the operator of the master; nothing was changed here")


@dataclass(slots=True)
class _Size:
    """How large a value is with its references written out: values, characters, levels."""

    nodes: int = 1
    chars: int = 0
    height: int = 1

    def add(self, child: "_Size") -> None:
        self.nodes += child.nodes
        self.chars += child.chars
        self.height = max(self.height, child.height + 1)


@dataclass(slots=True)
class _Frame:
    """An element that is open."""

    tag: str
    attributes: Mapping[str, str]
    children: list[Value] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    size: _Size = field(default_factory=_Size)


class _Builder:
    """Takes the parser's events and enforces the limits while they come, before memory is spent.

    An id is known from the end of its element only; so a reference can not point into an enclosing value, and
    values can not contain themselves.
    """

    def __init__(self, *, max_nodes: int, max_depth: int, max_chars: int) -> None:
        self.result: Value = None
        self._max = _Size(max_nodes, max_chars, max_depth)
        self._open: list[_Frame] = []
        self._known: dict[str, tuple[Value, _Size]] = {}
        self._elements = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if (tag == "marshal") == bool(self._open):
            raise _garbage(
                "a document is one <marshal> element" if not self._open else "<marshal> inside a value"
            )
        if self._open and self._open[-1].tag not in _CONTAINERS:
            raise _garbage(f"an element inside <{self._open[-1].tag}>")
        if tag not in _CONTAINERS and tag not in _SCALARS and tag != "reference":
            raise _garbage(f"unknown element <{tag[:80]}>")
        if not attributes.keys() <= _ATTRIBUTES.get(tag, frozenset()):
            raise _garbage(f"unknown attribute of <{tag}>")
        self._elements += 1
        if self._elements > self._max.nodes + 1 or len(self._open) > self._max.height:
            raise _garbage(f"more than {self._max.nodes} values or {self._max.height} levels")
        self._open.append(_Frame(tag, attributes))

    def data(self, text: str) -> None:
        frame = self._open[-1]
        if frame.tag in _SCALARS:
            frame.text.append(text)
        elif text.strip(_SPACE):
            raise _garbage(f"text inside <{frame.tag}>")

    def end(self, tag: str) -> None:
        frame = self._open.pop()
        if tag == "reference":
            value, size = self._refer(frame)
        else:
            value, size = _value(frame), frame.size
            self._remember(frame, value)
        if not self._open:
            self.result = value
            return
        parent = self._open[-1]
        parent.children.append(value)
        parent.size.add(size)
        # The parent of all values is <marshal>, which is no value itself: hence one more.
        if parent.size.nodes > self._max.nodes + 1 or parent.size.chars > self._max.chars:
            raise _garbage(f"more than {self._max.nodes} values or {self._max.chars} characters")

    def close(self) -> Value:
        return self.result

    def _refer(self, frame: _Frame) -> tuple[Value, _Size]:
        found = self._known.get(frame.attributes.get("id", ""))
        if found is None:
            raise _garbage("a reference to an unknown or enclosing value")
        if len(self._open) + found[1].height - 1 > self._max.height:
            raise _garbage(f"more than {self._max.height} levels by references")
        return found

    def _remember(self, frame: _Frame, value: Value) -> None:
        ident = frame.attributes.get("id")
        if ident is None:
            return
        if ident in self._known:
            raise _garbage("two values with one id")
        self._known[ident] = (value, frame.size)


def _value(frame: _Frame) -> Value:
    """The value of a complete element."""
    if frame.tag in _CONTAINERS:
        return _CONTAINERS[frame.tag](frame)
    text = "".join(frame.text)
    frame.size.chars = len(text)
    return _SCALARS[frame.tag](text)


def _root(frame: _Frame) -> Value:
    if len(frame.children) != 1:
        raise _garbage(f"<marshal> holds {len(frame.children)} values in place of one")
    return frame.children[0]


def _dictionary(frame: _Frame) -> dict[str, Value]:
    if len(frame.children) % 2:
        raise _garbage("a dictionary with a key that has no value")
    result: dict[str, Value] = {}
    for key, value in zip(frame.children[::2], frame.children[1::2], strict=True):
        if not isinstance(key, str):
            raise _garbage("a dictionary with a key that is no string")
        if key in result:
            raise _garbage(f"a dictionary with two keys {key[:80]!r}")
        result[key] = value
    return result


def _object(frame: _Frame) -> Instance:
    name = frame.attributes.get("class", "")
    if frame.attributes.get("module") != MODULE or name not in CLASSES:
        raise _garbage("an object of a class that is not part of SLAP")
    match frame.children:
        case [tuple(init), dict(attributes)]:
            return Instance(name, init, attributes)
    raise _garbage("an object that is not one tuple and one dictionary")


def _none(text: str) -> None:
    if text.strip(_SPACE):
        raise _garbage("text inside <none>")


def _bool(text: str) -> bool:
    stripped = text.strip(_SPACE)
    if stripped not in {"0", "1"}:
        raise _garbage("a bool that is neither 0 nor 1")
    return stripped == "1"


def _int(text: str) -> int:
    stripped = text.strip(_SPACE)
    # 1000 digits: far beyond any use and below Python's own limit, whose breach would be a ValueError.
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}", stripped):
        raise _garbage("an int that is not decimal digits")
    return int(stripped)


def _float(text: str) -> float:
    stripped = text.strip(_SPACE)
    pattern = r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,5})?"
    number = float(stripped) if re.fullmatch(pattern, stripped) else math.nan
    # "nan" is unequal to itself: a document with it would look changed at each poll.
    if not math.isfinite(number):
        raise _garbage("a float that is not a finite decimal number")
    return number


def _string(text: str) -> str:
    """Undo the second escaping; what was escaped once only comes out right, too."""
    return re.sub("&(lt|gt|amp);", lambda match: _UNESCAPED[match[1]], text) if "&" in text else text


_UNESCAPED = {"lt": "<", "gt": ">", "amp": "&"}

_CONTAINERS: Mapping[str, Callable[[_Frame], Value]] = {
    "marshal": _root,
    "list": lambda frame: frame.children,
    "tuple": lambda frame: tuple(frame.children),
    "dictionary": _dictionary,
    "object": _object,
}
_SCALARS: Mapping[str, Callable[[str], Value]] = {
    "none": _none,
    "bool": _bool,
    "int": _int,
    "long": _int,
    "float": _float,
    "string": _string,
    "unicode": _string,
}
_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "object": frozenset({"id", "module", "class"}),
    **dict.fromkeys(("list", "tuple", "dictionary", "reference"), frozenset({"id"})),
}
