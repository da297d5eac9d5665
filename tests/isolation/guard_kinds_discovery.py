"""Kinds of neighbour discovery, and what it can be hidden behind."""

from guard_cast import BOTH, LOCAL6, MINE6, NEITHER, ONLY_LAN, UNSPECIFIED, Kind, my_mac, routers, told
from guard_frames import (
    ALL_NODES,
    ALL_ROUTERS,
    FRAGMENT,
    HOP_BY_HOP,
    ICMP6,
    IP6,
    NONCE,
    OPTIONS,
    PREFIX,
    ROUTING,
    SOURCE_LINK,
    TARGET_LINK,
    ether,
    group_mac,
    icmp6,
    ip6,
    mac,
    option,
    six,
    solicited,
)
from guard_packets import piece, routing, wrapped


def _nd(kind, source, body, *, to=None, hops=255, code=0, headers=(), length=None, cut=None):
    """A message of discovery; ``body`` is what stands behind the first four bytes."""

    def make(cast, end, token):
        address = told(source, cast)
        target = told(to, cast) if to else ALL_NODES
        packet = icmp6(address, target, kind, told(body, cast), code=code)
        following = ICMP6
        for number, wrap in headers:
            packet, following = wrap(following, packet), number
        whole = ip6(address, target, following, packet, hops=hops, length=length)
        destination = group_mac(target) if target.startswith("ff") else end.mac
        return ether(destination, cast.me.mac, IP6, whole[:cut] if cut else whole + token)

    return make


def _target(address, *options, flags=0):
    def body(cast):
        return (
            flags.to_bytes(4, "big") + six(told(address, cast)) + b"".join(told(one, cast) for one in options)
        )

    return body


def _link(kind, of=my_mac):
    return lambda cast: option(kind, mac(told(of, cast)))


_NONCE = option(NONCE, b"\1\2\3\4\5\6")


def _routers_mac(cast):
    return cast.router.mac


OVERRIDE = 0x20000000


def _advertised(cast):
    return (
        bytes.fromhex("40000708" + "00000000" * 2)
        + option(SOURCE_LINK, mac(cast.me.mac))
        + option(PREFIX, bytes.fromhex("40c0" + "00015180" * 2 + "00000000") + six("2001:db8:bad::"))
    )


def _redirected(cast):
    return bytes(4) + six(cast.me.local) + six("2001:4860::1")


_DISGUISES = {
    "a hop-by-hop header": [(HOP_BY_HOP, wrapped())],
    "a destination header": [(OPTIONS, wrapped())],
    "two destination headers": [(OPTIONS, wrapped()), (OPTIONS, wrapped())],
    "an atomic fragment": [(FRAGMENT, piece())],
    "a first fragment": [(FRAGMENT, piece(more=1))],
    "a fragment behind hop-by-hop": [(FRAGMENT, piece()), (HOP_BY_HOP, wrapped())],
    "a destination header in a fragment": [(OPTIONS, wrapped()), (FRAGMENT, piece(more=1))],
    "a routing header": [(ROUTING, routing(2))],
    "two fragment headers": [(FRAGMENT, piece()), (FRAGMENT, piece(more=1))],
}


def _solicit(source=MINE6, target=routers, *options, to=None, **more):
    return _nd(
        135, source, _target(target, *options), to=to or (lambda c: solicited(told(target, c))), **more
    )


def _advertise(source=MINE6, target=MINE6, *options, flags=OVERRIDE, **more):
    return _nd(136, source, _target(target, *options, flags=flags), **more)


NEIGHBOURS = [
    Kind("NS with its MAC", BOTH, _solicit(MINE6, routers, _link(SOURCE_LINK))),
    Kind("NS from link-local", BOTH, _solicit(LOCAL6, routers, _link(SOURCE_LINK))),
    Kind("NS without options", BOTH, _solicit()),
    Kind("DAD for its own", BOTH, _solicit(UNSPECIFIED, MINE6)),
    Kind("DAD with nonce for its own", BOTH, _solicit(UNSPECIFIED, MINE6, _NONCE)),
    Kind("DAD for link-local", BOTH, _solicit(UNSPECIFIED, LOCAL6, _NONCE)),
    Kind("DAD for a free address", ONLY_LAN, _solicit(UNSPECIFIED, lambda c: c.free.six, _NONCE)),
    Kind("NA of its own", BOTH, _advertise(MINE6, MINE6, _link(TARGET_LINK))),
    Kind("NA of its own from link-local", BOTH, _advertise(LOCAL6, MINE6, _link(TARGET_LINK))),
    Kind("NA of link-local", BOTH, _advertise(LOCAL6, LOCAL6, _link(TARGET_LINK))),
    Kind("NA without options", BOTH, _advertise()),
    Kind(
        "RS from link-local",
        BOTH,
        _nd(133, LOCAL6, lambda c: bytes(4) + _link(SOURCE_LINK)(c), to=ALL_ROUTERS),
    ),
    Kind("RS from nobody", BOTH, _nd(133, UNSPECIFIED, bytes(4), to=ALL_ROUTERS)),
    *(
        Kind(f"NA of {whom}", NEITHER, _advertise(MINE6, address, _link(TARGET_LINK)))
        for whom, address in {
            "the router": routers,
            "the router's link-local": lambda c: c.router.local,
            "the host": lambda c: c.host.six,
            "the other tap": lambda c: c.other.six,
            "the other tap's link-local": lambda c: c.other.local,
            "a partition": lambda c: c.partition.six,
            "a group": "ff02::1",
            "nothing": UNSPECIFIED,
        }.items()
    ),
    Kind("NA of its own from the router", NEITHER, _advertise(routers, MINE6, _link(TARGET_LINK))),
    Kind("NA of its own from nobody", NEITHER, _advertise(UNSPECIFIED, MINE6, _link(TARGET_LINK))),
    Kind("NA with the router's MAC", NEITHER, _advertise(MINE6, MINE6, _link(TARGET_LINK, _routers_mac))),
    Kind(
        "NA with two options",
        NEITHER,
        _advertise(MINE6, MINE6, _link(TARGET_LINK), _link(TARGET_LINK, _routers_mac)),
    ),
    Kind(
        "NA with an option before",
        NEITHER,
        _advertise(MINE6, MINE6, _NONCE, _link(TARGET_LINK, _routers_mac)),
    ),
    Kind(
        "NA with the router's MAC as source option",
        NEITHER,
        _advertise(MINE6, MINE6, _link(SOURCE_LINK, _routers_mac)),
    ),
    Kind(
        "NA with a long option",
        NEITHER,
        _advertise(MINE6, MINE6, lambda c: option(TARGET_LINK, mac(c.me.mac) + bytes(8))),
    ),
    Kind("NA with few hops", NEITHER, _advertise(MINE6, MINE6, _link(TARGET_LINK), hops=64)),
    Kind("NA with a code", NEITHER, _advertise(MINE6, MINE6, _link(TARGET_LINK), code=1)),
    Kind("NS from the router", NEITHER, _solicit(routers, MINE6, _link(SOURCE_LINK))),
    Kind("NS from the other tap", NEITHER, _solicit(lambda c: c.other.six, routers, _link(SOURCE_LINK))),
    Kind("NS with the router's MAC", NEITHER, _solicit(MINE6, routers, _link(SOURCE_LINK, _routers_mac))),
    Kind(
        "NS with the router's MAC behind a nonce",
        NEITHER,
        _solicit(MINE6, routers, _NONCE, _link(SOURCE_LINK, _routers_mac)),
    ),
    Kind(
        "NS with the router's MAC behind its own",
        NEITHER,
        _solicit(MINE6, routers, _link(SOURCE_LINK), _link(SOURCE_LINK, _routers_mac)),
    ),
    Kind(
        "NS with an option of no length", NEITHER, _solicit(MINE6, routers, lambda c: b"\1\0" + mac(c.me.mac))
    ),
    Kind("DAD for the router's", NEITHER, _solicit(UNSPECIFIED, routers, _NONCE)),
    Kind("DAD for the other tap's", NEITHER, _solicit(UNSPECIFIED, lambda c: c.other.six, _NONCE)),
    Kind(
        "DAD for the other tap's link-local", NEITHER, _solicit(UNSPECIFIED, lambda c: c.other.local, _NONCE)
    ),
    Kind("DAD with a MAC", NEITHER, _solicit(UNSPECIFIED, MINE6, _link(SOURCE_LINK))),
    Kind(
        "RS with the router's MAC",
        NEITHER,
        _nd(133, LOCAL6, lambda c: bytes(4) + _link(SOURCE_LINK, _routers_mac)(c), to=ALL_ROUTERS),
    ),
    Kind(
        "RS from nobody with a MAC",
        NEITHER,
        _nd(133, UNSPECIFIED, lambda c: bytes(4) + _link(SOURCE_LINK)(c), to=ALL_ROUTERS),
    ),
    Kind("NA cut in the target", NEITHER, _advertise(MINE6, MINE6, cut=40 + 12)),
    Kind("NA cut in the option", NEITHER, _advertise(MINE6, MINE6, _link(TARGET_LINK), cut=40 + 28)),
    Kind(
        "NA longer than it says",
        NEITHER,
        _advertise(MINE6, MINE6, _link(TARGET_LINK, _routers_mac), length=28),
    ),
    Kind("inverse NS", NEITHER, _nd(141, LOCAL6, _target(MINE6))),
    Kind("RA", NEITHER, _nd(134, LOCAL6, _advertised)),
    Kind("RA with few hops", NEITHER, _nd(134, LOCAL6, _advertised, hops=64)),
    Kind("RA from its own", NEITHER, _nd(134, MINE6, _advertised)),
    Kind("RA as the router", NEITHER, _nd(134, lambda c: c.router.local, _advertised)),
    Kind("router renumbering", NEITHER, _nd(138, MINE6, _advertised)),
    Kind("redirect", NEITHER, _nd(137, LOCAL6, _redirected)),
    Kind("redirect as the router", NEITHER, _nd(137, lambda c: c.router.local, _redirected)),
    *(
        Kind(f"RA behind {how}", NEITHER, _nd(134, LOCAL6, _advertised, headers=headers))
        for how, headers in _DISGUISES.items()
    ),
    *(
        Kind(
            f"NA of the router behind {how}",
            NEITHER,
            _advertise(MINE6, routers, _link(TARGET_LINK), headers=headers),
        )
        for how, headers in _DISGUISES.items()
    ),
    *(
        Kind(f"redirect behind {how}", NEITHER, _nd(137, LOCAL6, _redirected, headers=headers))
        for how, headers in list(_DISGUISES.items())[:4]
    ),
]
