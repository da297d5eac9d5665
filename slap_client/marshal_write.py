"""Writing the XML form of values in classic SLAP, in the shape that xml_marshaller 1.0.3 gives it.

Whatever XML or the format can not carry is refused here, before a master sees it.
"""

import math
import re
from collections.abc import Sequence

from slap_client.errors import SlapError
from slap_client.values import CLASSES, MAX_DEPTH, MODULE, Instance, Value

# What XML 1.0 can not carry in any form, section 2.2.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LONG = 10**24  # from here on xml_marshaller writes <long>
_TWICE = {"&": "&amp;amp;", "<": "&amp;lt;", ">": "&amp;gt;", "\r": "&#13;"}
_TO_ESCAPE = re.compile("[&<>\r]")


def dumps(value: Value, *, max_depth: int = MAX_DEPTH) -> bytes:
    """Write ``value`` as a marshalled document in ASCII; shared values are written as often as they are used.

    Raises SlapError ``slap.value`` for what XML or the format can not carry: control characters, lone
    surrogates, keys that are no strings, infinite numbers, foreign types, more than ``max_depth`` levels
    (so cycles, too).
    """
    writer = _Writer(max_depth)
    writer.write(value, 1)
    return f"<marshal>{''.join(writer.parts)}</marshal>".encode("ascii", "xmlcharrefreplace")


class _Writer:
    """Writes one document; it numbers the ids as xml_marshaller does, outer before inner, from i2.

    The description of 300 partitions is 20 000 values, so the frequent kinds come first.
    """

    def __init__(self, max_depth: int) -> None:
        self.parts: list[str] = []
        self._max_depth = max_depth
        self._next_id = 2

    def write(self, value: Value, depth: int) -> None:
        if depth > self._max_depth:
            raise _unwritable(f"a value with more than {self._max_depth} levels, or one that contains itself")
        if isinstance(value, str):
            self.parts.append(_string(value))
        elif isinstance(value, (dict, list, tuple, Instance)):
            self._write_container(value, depth)
        else:
            self.parts.append(_scalar(value))

    def _write_container(
        self, value: Instance | dict[str, Value] | list[Value] | tuple[Value, ...], depth: int
    ) -> None:
        tag, attributes, children = self._container(value)
        if not children:
            self.parts.append(f"<{tag}{attributes}/>")
            return
        self.parts.append(f"<{tag}{attributes}>")
        for child in children:
            self.write(child, depth + 1)
        self.parts.append(f"</{tag}>")

    def _container(
        self, value: Instance | dict[str, Value] | list[Value] | tuple[Value, ...]
    ) -> tuple[str, str, Sequence[Value]]:
        """Return tag, attributes and children."""
        match value:
            case dict():
                if not all(isinstance(key, str) for key in value):
                    raise _unwritable("a dictionary with a key that is no string")
                return "dictionary", self._id(), [item for pair in value.items() for item in pair]
            case list():
                return "list", self._id(), value
            case tuple():
                return "tuple", "", value
            case Instance():
                if value.class_name not in CLASSES:
                    raise _unwritable("an object of a class that is not part of SLAP")
                names = f' module="{MODULE}" class="{value.class_name}"'
                return "object", self._id() + names, [tuple(value.init), dict(value.attributes)]

    def _id(self) -> str:
        number, self._next_id = self._next_id, self._next_id + 1
        return f' id="i{number}"'


def _string(value: str) -> str:
    if _NOT_XML.search(value):
        raise _unwritable("a str that SLAP's XML can not carry")
    if _TO_ESCAPE.search(value):
        value = _TO_ESCAPE.sub(lambda match: _TWICE[match[0]], value)
    return f"<string>{value}</string>"


def _scalar(value: bool | int | float | None) -> str:
    match value:
        case None:
            return "<none/>"
        case bool():  # before int, of which it is a kind
            return f"<bool>{int(value)}</bool>"
        case int() if abs(value) < _LONG:
            return f"<int>{int(value)}</int>"
        case int() if abs(value) < 10**1000:
            return f"<long>{int(value)}</long>"
        case float() if math.isfinite(value):
            return f"<float>{float(value)!r}</float>"
        case _:
            raise _unwritable(f"a {type(value).__name__} that SLAP's XML can not carry")


def _unwritable(message: str) -> SlapError:
    return SlapError("slap.value", message, hint="correct the value that is to be sent to the master")
