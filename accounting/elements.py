"""Reads XML of strangers into plain nodes: no DTD, no entities, nothing external, and bounds on all that grows.

Files of tenants are read by root. So whatever the bytes are, the result is either a tree of elements with
text that is no deeper and no larger than asked for, or an AccountingError ``accounting.report``; the limits
are enforced while the parser's events come, before memory is spent. An element has text or children, never
both, and what is between children is white space: TioXML needs no more.
"""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError  # the exception alone; parsing is defusedxml's

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from accounting.errors import AccountingError

if TYPE_CHECKING:
    from collections.abc import Set

_SPACE = " \t\r\n"
# Of what expat knows and of Python's 8 bit codecs those that are in use; pyexpat would try any other codec.
_ENCODINGS = frozenset({"utf-8", "us-ascii", "ascii", "iso-8859-1", "iso-8859-15", "windows-1252"})
_SHOWN = 60  # characters of what a stranger wrote that go into a message


@dataclass(slots=True)
class Node:
    """An element: its name, the line it starts in, its attributes, and either its text or its children."""

    tag: str
    line: int
    attributes: dict[str, str]
    children: list[Node] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The characters in it, as they are; nothing of its children."""
        return "".join(self.pieces)


def shown(text: str) -> str:
    """Give a stranger's text as it may stand in a message: short, printable, quoted."""
    return ascii(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def refusal(message: str, line: int | None = None) -> AccountingError:
    """Make the one error for what can not be reported."""
    return AccountingError(
        "accounting.report",
        message if line is None else f"line {line}: {message}",
        hint="it is not reported; write it as partition_consumption.xsd of slapos.core says",
    )


def parse(content: bytes, *, most_bytes: int, most_elements: int, depth: int) -> Node:
    """Give the root element of a document; raises AccountingError ``accounting.report``, and nothing else."""
    if len(content) > most_bytes:
        raise refusal(f"it has {len(content)} bytes, and at most {most_bytes} are read")
    wide = content.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
    if b"\0" in content and not wide:
        # expat guesses UTF-16 without a mark, which XML (4.3.3) and the masters' parser do not know
        raise refusal("it has bytes of zero, and no mark of UTF-16 at its begin")
    tree = _Tree(most_elements, depth)
    try:
        # expat makes a character of half a pair and what follows it, so UTF-16 is decoded here
        data, encoding = (content.decode("utf-16").encode(), "utf-8") if wide else (content, None)
        parser = DefusedXMLParser(
            target=tree, encoding=encoding, forbid_dtd=True, forbid_entities=True, forbid_external=True
        )
        parser.parser.XmlDeclHandler = partial(_declared, {"utf-16"} if wide else _ENCODINGS)
        tree.parser = parser.parser
        parser.feed(data)
        parser.close()
    except DefusedXmlException as error:
        raise refusal(f"a DTD or an entity, which is not read ({type(error).__name__})") from error
    # ValueError: undecodable text; LookupError: an encoding that Python does not know
    except (ParseError, ValueError, LookupError) as error:
        raise refusal(f"not well-formed XML: {str(error) or type(error).__name__}") from error
    if tree.root is None:  # the parser would have said so already
        raise refusal("no element")
    return tree.root


def _declared(read: Set[str], version: str, encoding: str | None, _standalone: int) -> None:
    if version != "1.0":  # expat takes any word for a version
        raise refusal(f"version {shown(version)} of XML is not read")
    # expat tells the declaration before it looks for the encoding
    if encoding is not None and encoding.lower() not in read:
        raise refusal(f"encoding {shown(encoding)} is not read here; use UTF-8")


class _Tree:
    """Takes the parser's events."""

    def __init__(self, most_elements: int, depth: int) -> None:
        self.root: Node | None = None
        self.parser: object = None  # expat's, for its line number
        self._left = most_elements
        self._depth = depth
        self._open: list[Node] = []

    def _line(self) -> int:
        return int(getattr(self.parser, "CurrentLineNumber", 0))

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        node = Node(tag, self._line(), attributes)
        self._left -= 1
        if self._left < 0:
            raise refusal("more elements than are read", node.line)
        if len(self._open) >= self._depth:
            raise refusal(f"elements nested deeper than {self._depth}", node.line)
        if not self._open:
            self.root = node
        else:
            parent = self._open[-1]
            if any(piece.strip(_SPACE) for piece in parent.pieces):
                raise refusal(f"text beside elements in <{_name(parent)}>", node.line)
            parent.pieces.clear()
            parent.children.append(node)
        self._open.append(node)

    def data(self, text: str) -> None:
        node = self._open[-1]
        if not node.children:
            node.pieces.append(text)
        elif text.strip(_SPACE):
            raise refusal(f"text beside elements in <{_name(node)}>", self._line())

    def end(self, _tag: str) -> None:
        self._open.pop()

    def close(self) -> None:
        """End of the document; what is in it was kept by then."""


def _name(node: Node) -> str:
    return shown(node.tag)[1:-1]
