"""Who is in the spoof matrix, and what a kind of frame is.

Each kind is made for a destination, with a token in it by which it is known again wherever it comes out.
"""

from dataclasses import dataclass
from typing import NamedTuple

STRICT, LAN = "strict", "lan"
BOTH, NEITHER, ONLY_LAN = frozenset((STRICT, LAN)), frozenset(), frozenset((LAN,))
ZERO_MAC = "00:00:00:00:00:00"


class End(NamedTuple):
    """Somebody on the link."""

    mac: str
    four: str
    six: str
    local: str = "fe80::1"


@dataclass(frozen=True)
class Cast:
    """Who is there.  ``me`` is the guest at its tap; ``other`` the one at the other tap."""

    me: End
    other: End
    host: End
    router: End
    free: End
    partition: End
    proposed: str
    second: str
    resolver: str
    vpn: str
    private: str


class Kind(NamedTuple):
    """``passes`` has the modes in which it is legitimate; ``make(cast, target, token)`` returns the frame.

    ``unforwarded``: a bridge lets nobody send it on, guarded or not.
    """

    name: str
    passes: frozenset
    make: object
    unforwarded: str = ""


def told(value, cast):
    """What is given as it is, or told by the cast."""
    return value(cast) if callable(value) else value


def my_mac(cast):
    return cast.me.mac


MINE4, MINE6, LOCAL6 = (lambda c: c.me.four), (lambda c: c.me.six), (lambda c: c.me.local)
UNSPECIFIED = "::"


def routers(cast):
    return cast.router.six
