"""A thousand usage files of a tenant that means no good, always the same ones, and good files to go with them.

A file whose name begins with ``refuse-`` must be refused as a whole. What begins with ``any-`` may be taken or
refused, but what is taken of it must be about the tenant alone, of the resources it may report, and finite.
"""

import gzip
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import permutations

COUNT = 1000
FIELDS = ("resource", "title", "reference", "quantity", "price", "VAT", "category")
_DECLARATION = '<?xml version="1.0" encoding="utf-8"?>'


@dataclass(frozen=True)
class Tenant:
    guid: str = "SOFTINST-7"
    partition: str = "slappart7"
    foreign: str = "SOFTINST-8"
    computer: str = "COMP-1"
    resources: tuple[str, ...] = ("cpu", "disk", "requests")


TENANT = Tenant()


def movement(**values):
    """One movement as text; the values go in as they are, and None leaves a field out."""
    fields = {"resource": "cpu", "title": "t", "reference": "", "quantity": "2.5", "price": "0", "VAT": ""}
    fields = fields | {"category": ""} | values
    parts = (f"<{name}>{text}</{name}>" for name, text in fields.items() if text is not None)
    return f"<movement>{''.join(parts)}</movement>"


def usage(*movements, head=_DECLARATION):
    return f"{head}<consumption>{''.join(movements)}</consumption>"


def good_files(tenant=TENANT) -> Iterator[tuple[str, bytes, dict[tuple[str, str], Decimal]]]:
    """Files that must be taken: name, content, and the quantities by resource and title."""
    cpu, disk, *_ = tenant.resources
    for number, reference in enumerate(("", tenant.guid, tenant.partition, f"\n  {tenant.guid}\n ")):
        text = usage(movement(resource=cpu, reference=reference, quantity="1.5"))
        yield f"good-reference-{number}", text.encode(), {(cpu, "t"): Decimal("1.5")}
    for number, quantity in enumerate(("1", "+1", "1.", "1e0", "10E-1", " 1\n", "0.1e1", "1.0000000001")):
        text = usage(movement(resource=cpu, quantity=quantity))
        yield f"good-quantity-{number}", text.encode(), {(cpu, "t"): Decimal(1)}
    for encoding in ("utf-8", "utf-16", "iso-8859-1"):
        text = usage(movement(resource=cpu, title="é"), head=f'<?xml version="1.0" encoding="{encoding}"?>')
        yield f"good-encoding-{encoding}", text.encode(encoding), {(cpu, "é"): Decimal("2.5")}
    both = usage(movement(resource=cpu), movement(resource=disk), movement(resource=cpu), head="")
    yield "good-added-up", both.encode(), {(cpu, "t"): Decimal(5), (disk, "t"): Decimal("2.5")}
    zero = usage(movement(resource=cpu, quantity="0"), movement(resource=disk))
    yield "good-zero-left-out", zero.encode(), {(disk, "t"): Decimal("2.5")}
    short = usage(movement(resource=cpu, title=None, reference=None, category=None))
    yield "good-shortest", short.encode(), {(cpu, ""): Decimal("2.5")}
    many = usage(*(movement(resource=cpu, title=str(number)) for number in range(1000)))
    yield "good-a-thousand", many.encode(), {(cpu, str(number)): Decimal("2.5") for number in range(1000)}


def hostile_files(tenant=TENANT) -> Iterator[tuple[str, bytes, str]]:
    """Give ``COUNT`` files: name (fit for a file), content, and what is tried with it."""
    made = 0
    families = (_injected, _quantities, _references, _doctypes, _structures, _encoded, _giants, _spoiled)
    for family in (*families, _no_xml, _truncated, _flipped):
        for number, (must, content, why) in enumerate(family(tenant)):
            if made == COUNT:
                return
            made += 1
            kind = "refuse" if must else "any"
            data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            yield f"{kind}-{family.__name__.strip('_')}-{number:03d}", data, why


# --- the families: whether it must be refused, content, why


def _injected(tenant):
    stranger = movement(reference=tenant.foreign)
    for field in FIELDS:
        closing = f"</{field}></movement>{stranger}<movement><resource>cpu</resource><{field}>"
        broken = (
            (closing, "ends its own movement and begins one about another"),
            (f"</{field}><reference>{tenant.foreign}</reference><{field}>", "a second reference"),
            ("<b>1</b>", "an element in it"),
            (f"</{field}></movement></consumption><!--", "ends the document"),
            ("]]>", "the end of a section that was not begun"),
            ("<![CDATA[", "a section without an end"),
            ("<!-- a -- b -->", "a comment that is none"),
            ("<?xml version='1.0'?>", "a second declaration"),
            ("&unknown;", "an entity nobody knows"),
            ("&#0;", "a reference to NUL"),
            ("&#27;[2J", "a reference to a control character"),
            ("&#xD800;", "a reference to half a pair"),
            ("&#xFFFF;", "a reference to no character"),
            ("&#x110000;", "a reference beyond Unicode"),
            ("&#99999999999999999999;", "a reference that overflows"),
            ("&", "a bare ampersand"),
            ("<", "a bare bracket"),
            ("a\0b", "NUL"),
            ("\x1b]0;x\x07", "a control sequence of terminals"),
            ("\ud800", "half a pair"),
            ("\uffff", "no character"),
        )
        for text, why in broken:
            yield True, usage(movement(**{field: text})), f"{field}: {why}"
        # words of these fields are judged; of the others they are text like any other
        judged = field in ("resource", "reference", "quantity", "price")
        texts = (
            ("<![CDATA[</reference>]]>", "XML in a section"),
            (f"<![CDATA[<reference>{tenant.foreign}</reference>]]>", "another's reference in a section"),
            ("&lt;/movement&gt;&lt;movement&gt;", "XML, escaped once"),
            ("&amp;lt;reference&amp;gt;", "XML, escaped twice"),
            ("'; DROP TABLE document; --", "SQL"),
            ("{0.__class__} %s %n ${x} $(reboot) `reboot`", "formats and shells"),
            ("../../../etc/shadow", "a path"),
            ("\x85\x9b2J\x7f", "control characters that XML allows"),
            ("\u202egnihton\u2066", "text that turns round"),
            ("=cmd|' /C calc'!A0", "a formula of spreadsheets"),
            ("\r\n200 OK\r\n\r\n", "lines of a protocol"),
            ("\U0001f4a9\u0301\u200b", "symbols and marks"),
        )
        for text, why in texts:
            yield judged, usage(movement(**{field: text})), f"{field}: {why}"
        split = {"resource": "c<!-- x -->pu", "quantity": "1<!-- x -->0", "price": "<?x y?>0"}
        yield False, usage(movement(**{field: split.get(field, "<!-- x -->")})), f"{field}: a comment in it"


def _quantities(tenant):
    bad = """-1 -0.000001 -1e-300 NaN nan -NaN INF -INF +INF inf Infinity -Infinity 1e16 1e308 1e309 1.8e308 -1e308
        1e-10 1e-308 5e-324 1e-999999999 1e999999999 1e99999999999999999999999999 1e-99999999999999999999999999
        0x10 0xFF 0b1 0o7 1_000 1,000 1.000,5 1/2 1e5.5 1e 1e+ .e1 . + - +-1 --1 1- 1+1 2**64 ²  ½ Ⅷ ٣ ３ 一 १ 1٫5
        1f 1d 1L 1j true null None [1] {1} "1" '1' $1 1€ 50% 1e١ 0x1p3 1e15.0 1000000000000000.1 01:00 1..2""".split()
    for text in bad:
        yield True, usage(movement(quantity=text.replace('"', "&quot;"))), f"quantity {text}"
    for text in (
        "",
        " ",
        "\xa01",
        "1 2",
        "1\u2003",
        "9" * 41,
        "9" * 5000,
        "0." + "1" * 5000,
        "0" * 100_000 + "1",
    ):
        yield True, usage(movement(quantity=text)), f"quantity of {len(text)} characters"
    for text in (
        "0",
        "-0",
        "+0",
        "-0.0e10",
        "0e999",
        ".0",
        "0000000000001",
        "1e-9",
        "1e15",
        "1E+15",
        "999e-9",
    ):
        yield False, usage(movement(quantity=text)), f"quantity {text}, which has a value"
    for text in ("NaN", "INF", "-INF", "-5", "1e308"):
        yield False, usage(movement(price=text)), f"price {text}"


def _references(tenant):
    guid, foreign = tenant.guid, tenant.foreign
    names = (
        foreign,
        tenant.computer,
        guid.lower(),
        f"{guid}0",
        guid[:-1],
        f"{guid}\u200b",
        f"{guid}.",
        "*",
        "%",
    )
    for name in (
        *names,
        f"{guid},{foreign}",
        f"{guid} {foreign}",
        f"{guid}/../{foreign}",
        f"{guid}\xa0",
        guid.replace("S", "\u0405", 1),
        guid.replace("-", "\u2010"),
        guid.replace("7", "\uff17"),
        "slappart8",
        "slappart",
        tenant.partition.upper(),
        f"/srv/slapgrid/{tenant.partition}",
        "root",
        "0",
        "None",
        "..",
        f"TIOCONS-{tenant.computer}",
        "x" * 201,
        "x" * 100_000,
    ):
        text = usage(movement(reference=name))
        yield True, text, f"reference {name[:40]!a}"
        text = usage(movement(), movement(reference=name))
        yield True, text, f"reference {name[:40]!a} in the second movement"
    for name in (
        "",
        "CPU",
        "cpu2",
        "cp",
        "c pu",
        "service_module/cpu",
        "\u0441pu",
        "x" * 201,
        "cpu\u200b",
        "*",
        "/",
    ):
        yield True, usage(movement(resource=name)), f"resource {name[:40]!a}"


def _doctypes(tenant):
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    inside = (
        (f'<!ENTITY l0 "ha">{laughs}', "&l9;", "a billion laughs"),
        (f'<!ENTITY a "{"x" * 50_000}">', "&a;" * 5_000, "quadratic blow-up"),
        ('<!ENTITY a "&b;"><!ENTITY b "&a;">', "&a;", "entities in a circle"),
        ('<!ENTITY a SYSTEM "file:///etc/shadow">', "&a;", "a file"),
        ('<!ENTITY a SYSTEM "file:///dev/zero">', "&a;", "a file without an end"),
        ('<!ENTITY a SYSTEM "http://127.0.0.1:1/">', "&a;", "an address"),
        ('<!ENTITY a PUBLIC "x" "http://127.0.0.1:1/">', "&a;", "a public identifier"),
        ('<!ENTITY % p SYSTEM "file:///etc/shadow"> %p;', "t", "a parameter entity of a file"),
        ("<!ENTITY % p \"<!ENTITY a 'x'>\"> %p;", "&a;", "a parameter entity"),
        ('<!ENTITY a "plain">', "&a;", "an entity"),
        (f'<!ENTITY a "{tenant.foreign}">', "t", "an entity that is not used"),
        ('<!ENTITY lt "&#38;#60;">', "&lt;", "an entity that is known, declared again"),
        ('<!NOTATION n SYSTEM "x"><!ENTITY a SYSTEM "x" NDATA n>', "t", "an entity that is not parsed"),
        ("<!ELEMENT consumption ANY>", "t", "an element declared"),
        (f'<!ATTLIST movement reference CDATA "{tenant.foreign}">', "t", "an attribute by default"),
        ("", "t", "nothing declared"),
    )
    for declared, text, why in inside:
        for field in ("title", "reference"):
            head = f"{_DECLARATION}<!DOCTYPE consumption [{declared}]>"
            yield True, usage(movement(**{field: text}), head=head), f"DTD, {field}: {why}"
    for doctype in (
        "<!DOCTYPE consumption>",
        '<!DOCTYPE consumption SYSTEM "file:///etc/shadow">',
        '<!DOCTYPE consumption SYSTEM "http://127.0.0.1:1/x.dtd">',
        '<!DOCTYPE consumption PUBLIC "-//W3C//DTD XHTML 1.0//EN" "http://127.0.0.1:1/x.dtd">',
        "<!DOCTYPE html>",
        "<!DOCTYPE consumption [",
        "<!ENTITY a 'b'>",
    ):
        yield True, usage(movement(), head=_DECLARATION + doctype), f"{doctype}"
    including = (
        '<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/shadow" parse="text"/>'
    )
    for field in ("resource", "title", "reference", "quantity"):
        yield True, usage(movement(**{field: including})), f"XInclude in {field}"
    for instruction in ("<?xml-stylesheet href='file:///etc/shadow'?>", "<?php system('reboot') ?>", "<?x?>"):
        yield False, usage(movement(), head=_DECLARATION + instruction), f"instruction {instruction}"


def _structures(tenant):
    parts = {
        name: f"<{name}>{text}</{name}>"
        for name, text in zip(FIELDS, ("cpu", "t", "", "1", "0", "", ""), strict=True)
    }
    orders = [order for order in permutations(FIELDS) if order != FIELDS]
    for order in orders[:: len(orders) // 40]:
        text = f"<movement>{''.join(parts[name] for name in order)}</movement>"
        yield True, usage(text), f"in the order {' '.join(order)}"
    for name in FIELDS:
        optional = name in ("title", "reference", "category")
        yield not optional, usage(movement(**{name: None})), f"without {name}"
        doubled = movement().replace(parts_of(name), parts_of(name) * 2)
        yield name != "category", usage(doubled), f"{name} twice"
        yield True, usage(movement().replace(f"<{name}>", f"<{name} a='b'>")), f"an attribute of {name}"
        yield (
            True,
            usage(movement().replace(f"<{name}>", f"<x/><{name}>")),
            f"a strange element before {name}",
        )
        yield True, usage(movement().replace(f"<{name}>", f"<{name}><x/>")), f"a strange element in {name}"
        yield True, usage(movement().replace(f"<{name}>", f"x<{name}>")), f"text before {name}"
        upper = movement().replace(f"{name}>", f"{name.upper() if name != 'VAT' else 'vat'}>")
        yield True, usage(upper), f"{name} in other letters"
        spaced = movement().replace(f"<{name}>", f'<{name} xmlns="urn:x">')
        yield True, usage(spaced), f"{name} of another namespace"
    one = movement()
    for text, why in (
        (_DECLARATION, "no element"),
        (usage(), "no movement"),
        (one, "a movement alone"),
        (usage(one) + usage(one, head=""), "two documents"),
        (usage(one) + "x", "text behind it"),
        ("x" + usage(one), "text before it"),
        (" " + usage(one), "a blank before the declaration"),
        (usage(f"<movement>{one}</movement>"), "a movement in a movement"),
        (usage(f"<consumption>{one}</consumption>"), "a consumption in a consumption"),
        (usage(one, "text"), "text beside movements"),
        (usage(one, "<extra/>"), "an element beside movements"),
        (usage(one).replace("consumption", "journal"), "the other schema's root"),
        (usage(one).replace("consumption", "Consumption"), "a capital"),
        (usage(one).replace("<consumption>", '<consumption a="b">'), "an attribute of the root"),
        (usage(one).replace("<consumption>", '<consumption xmlns="urn:x">'), "a namespace"),
        (usage(one).replace("consumption>", "x:consumption>"), "a prefix that is not bound"),
        (usage(one).replace("<consumption>", '<consumption a="1" a="2">'), "an attribute twice"),
        (usage(one).replace("<movement>", "<movement reference='SOFTINST-8'>"), "a reference as attribute"),
        (usage(one).replace("</movement>", "</consumption>", 1), "ends that do not match"),
        (usage(one).replace("<movement>", "<movement/>"), "an empty movement"),
        (usage("<movement/>"), "nothing in a movement"),
        (
            f'{_DECLARATION}<journal><transaction type="Sale Packing List">{one}</transaction></journal>',
            "a document for the master",
        ),
    ):
        yield True, text, why
    harmless = usage(one).replace("<consumption>", '<consumption xmlns:x="urn:x">')
    yield False, harmless, "a namespace that is not used"
    for depth in (4, 100, 10_000, 25_000):
        yield True, "<a>" * depth + "</a>" * depth, f"{depth} elements deep"
        yield True, usage("<movement>" * depth), f"{depth} movements deep, without an end"
        yield True, usage(movement(title="<b>" * depth + "</b>" * depth)), f"{depth} deep in a title"


def parts_of(name):
    """The part of ``movement()`` that has this field."""
    start = movement().index(f"<{name}>")
    return movement()[start : movement().index(f"</{name}>") + len(f"</{name}>")]


def _encoded(tenant):
    text = usage(movement(title="caf\xe9"), head="")
    for name in (
        "utf-7",
        "utf-32",
        "utf-32-le",
        "cp037",
        "cp500",
        "big5",
        "shift_jis",
        "euc-jp",
        "gb18030",
        "hz",
    ):
        head = f'<?xml version="1.0" encoding="{name}"?>'
        yield True, (head + text.replace("\xe9", "e")).encode(name), f"written in {name}"
        yield True, (head + text).encode(), f"declared as {name}"
    for name in (
        "rot13",
        "zlib",
        "base64",
        "hex",
        "idna",
        "punycode",
        "unicode_escape",
        "undefined",
        "mbcs",
        "x",
    ):
        yield True, (f'<?xml version="1.0" encoding="{name}"?>' + text).encode(), f"declared as {name}"
    for name in ("", " ", "utf 8", "../utf-8", "x" * 10_000, "utf-8\0", "\xe9"):
        yield True, (f'<?xml version="1.0" encoding="{name}"?>' + text).encode(), "declared as no name at all"
    for name in ("utf-16-le", "utf-16-be"):
        yield True, (_DECLARATION + text).encode(name), f"in {name} without a mark, declared as UTF-8"
        yield True, text.encode(name), f"in {name} without a mark"
        yield True, (_DECLARATION + text).encode(name)[:-1], f"in {name}, an odd number of bytes"
    utf16 = ('<?xml version="1.0" encoding="utf-16"?>' + text).encode("utf-16")
    yield True, utf16[:-1], "half a character at the end"
    yield True, utf16.replace("caf".encode("utf-16-le"), b"\x00\xd8a\x00f\x00"), "half a pair in UTF-16"
    yield True, b"\xff\xfe" + text.encode(), "a mark of UTF-16 before UTF-8"
    yield False, b"\xef\xbb\xbf" + (_DECLARATION + text).encode(), "a mark before UTF-8"
    yield True, b"\xef\xbb\xbf" * 2 + (_DECLARATION + text).encode(), "two marks"
    for bad in (
        b"\xe9",
        b"\xff",
        b"\xc0\x80",
        b"\xc0\xbc",
        b"\xe0\x80\xbc",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
    ):
        for field in ("resource", "title", "reference", "quantity"):
            content = usage(movement(**{field: "@"})).encode().replace(b"@", b"a" + bad + b"b")
            yield True, content, f"{field}: bytes {bad.hex()}, which are no UTF-8"
    yield False, usage(movement(title="caf\xe9"), head="").encode("utf-8"), "no declaration"
    yield True, usage(movement(title="caf\xe9"), head="").encode("latin-1"), "Latin without a declaration"
    for version in ("1.1", "2.0", "", "x"):
        head = f'<?xml version="{version}" encoding="utf-8"?>'
        yield True, usage(movement(), head=head), f"XML version {version}"


def _giants(tenant):
    good = usage(movement())
    yield True, good + " " * 300_000, "300 kB of blanks behind it"
    yield True, usage(movement(title="x" * 300_000)), "a title of 300 kB"
    yield True, usage(movement(title="x" * 200_000)), "a title of 200 kB"
    yield True, usage(movement(resource="x" * 200_000)), "a resource of 200 kB"
    yield True, usage(*[movement()] * 1001), "1001 movements"
    yield True, usage(*["<movement/>"] * 20_000), "20000 empty movements"
    yield True, usage(*[movement()] * 50_000), "50000 movements"
    yield True, usage(f"<{'x' * 200_000}/>"), "a name of 200 kB"
    yield True, usage(f"<movement a='{'x' * 200_000}'/>"), "an attribute of 200 kB"
    attributes = " ".join(f"a{n}=''" for n in range(20_000))
    yield True, usage(f"<movement {attributes}/>"), "20000 attributes"
    yield True, usage(movement(), f"<!-- {'x' * 300_000} -->"), "a comment of 300 kB"
    yield False, usage(movement(), f"<!-- {'x' * 200_000} -->"), "a comment of 200 kB"
    yield False, usage(movement(), *["<!---->"] * 30_000), "30000 comments"
    yield False, usage(movement(category="x</category><category>" * 10_000)), "10000 categories"
    yield False, usage(movement(VAT="x" * 200_000)), "a VAT of 200 kB"
    yield True, usage(movement(quantity="&#49;" * 40_000)), "a number of 40000 references"
    yield False, usage(movement(title="&#97;" * 200)), "a title of 200 references"
    yield True, usage(movement(title="&#97;" * 40_000)), "a title of 40000 references"
    yield True, usage(*[movement(quantity="1e15")] * 1000), "a thousand of the largest quantities"
    yield True, usage(*[movement(quantity="1e15")] * 2), "two of the largest quantities"
    yield False, usage(*[movement(quantity="1e-9")] * 1000), "a thousand of the smallest quantities"


def _spoiled(tenant):
    """A good movement and one that is not: none of the file may be taken."""
    bad = (
        {"reference": tenant.foreign},
        {"resource": "gold"},
        {"quantity": "-2.5"},
        {"quantity": "NaN"},
        {"quantity": "1e308"},
        {"price": "free"},
        {"VAT": None},
        {"title": "x" * 201},
    )
    for values in bad:
        for order in (1, -1):
            text = usage(*[movement(), movement(**values)][::order])
            yield True, text, f"a good movement beside one with {ascii(values)[:60]}"


def _no_xml(tenant):
    good = usage(movement()).encode()
    for content, why in (
        (b"", "empty"),
        (b"\n", "a line"),
        (b"\0", "NUL"),
        (b"\0" * 100_000, "nothing but NUL"),
        (b"\n" * 100_000, "nothing but lines"),
        (gzip.compress(good, mtime=0), "compressed"),
        (gzip.compress(b"\0" * 10_000_000, mtime=0), "compressed, and a bomb"),
        (pickle.dumps({"resource": "cpu"}), "a pickle"),
        (b"\x7fELF\2\1\1" + bytes(64), "a program"),
        (b"#!/bin/sh\nreboot\n", "a script"),
        (b"\x89PNG\r\n\x1a\n" + bytes(32), "a picture"),
        (b'{"resource": "cpu", "quantity": 1}', "JSON"),
        (b"resource,quantity\ncpu,1\n", "CSV"),
        (b"<html><body>502 Bad Gateway</body></html>", "a page"),
        (b"SQLite format 3\0" + bytes(84), "a database"),
        (good.replace(b"<", b"\xef\xbc\x9c"), "brackets of full width"),
        (good + b"\0", "NUL behind it"),
        (b"\0" + good, "NUL before it"),
        (good.replace(b" ", b"\0", 1), "NUL in it"),
        (good[::-1], "from end to start"),
    ):
        yield True, content, why


def _truncated(tenant):
    good = usage(movement(title="caf\xe9", reference=tenant.guid)).encode()
    for length in range(1, len(good)):
        yield True, good[:length], f"cut after {length} of {len(good)} bytes"


def _flipped(tenant):
    good = usage(movement(title="caf\xe9", reference=tenant.guid), movement(resource="disk")).encode()
    chance = random.Random(20261121)  # noqa: S311 - the same files each time
    for _ in range(COUNT):
        content = bytearray(good)
        places = [chance.randrange(len(good) * 8) for _ in range(chance.choice((1, 1, 2, 5)))]
        for place in places:
            content[place // 8] ^= 1 << place % 8
        yield False, bytes(content), f"bits {places} turned"
