"""Writing the XML form of values in classic SLAP, in the shape that xml_marshaller 1.0.3 gives it.

Whatever XML or the format can not carry is refused here, before a master sees it.
"""

import math
import re
from collections.abc import Iterator

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
    parts = _Writer(max_depth).parts(value, 1)
    return f"<marshal>{''.join(parts)}</marshal>".encode("ascii", "xmlcharrefreplace")


class _Writer:
    """Writes one document; it numbers the ids as xml_marshaller does, outer before inner, from i2."""

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._next_id = 2

    def parts(self, value: Value, depth: int) -> Iterator[str]:
        if depth > self._max_depth:
            raise _unwritable(f"a value with more than {self._max_depth} levels, or one that contains itself")
        match value:
            case Instance():
                if value.class_name not in CLASSES:
                    raise _unwritable("an object of a class that is not part of SLAP")
                names = f'module="{MODULE}" class="{value.class_name}"'
                children: list[Value] = [tuple(value.init), dict(value.attributes)]
                yield from self._container("object", f" {self._id()} {names}", children, depth)
            case dict():
                if not all(isinstance(key, str) for key in value):
                    raise _unwritable("a dictionary with a key that is no string")
                pairs: list[Value] = [item for pair in value.items() for item in pair]
                yield from self._container("dictionary", f" {self._id()}", pairs, depth)
            case list():
                yield from self._container("list", f" {self._id()}", value, depth)
            case tuple():
                yield from self._container("tuple", "", list(value), depth)
            case _:
                yield _scalar(value)

    def _container(self, tag: str, attributes: str, children: list[Value], depth: int) -> Iterator[str]:
        if not children:
            yield f"<{tag}{attributes}/>"
            return
        yield f"<{tag}{attributes}>"
        for child in children:
            yield from self.parts(child, depth + 1)
        yield f"</{tag}>"

    def _id(self) -> str:
        number, self._next_id = self._next_id, self._next_id + 1
        return f'id="i{number}"'


def _scalar(value: bool | int | float | str | None) -> str:
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
        case str() if not _NOT_XML.search(value):
            return f"<string>{re.sub(_TO_ESCAPE, lambda match: _TWICE[match[0]], value)}</string>"
        case _:
            raise _unwritable(f"a {type(value).__name__} that SLAP's XML can not carry")


def _unwritable(message: str) -> SlapError:
    return SlapError("slap.value", message, hint="correct the value that is to be sent to the master")
