"""TCP sockets as the kernel has them: who listens at an endpoint, the sessions there, and cutting single ones of them.

The kernel is asked for just the wanted endpoints by a filter that it runs itself, instead of all sockets of the
network namespace as text (/proc/net/tcp).  A session is cut by its addresses and its cookie, a number that no other
socket of this boot has: never by a filter, and never another one that came in its place.

A listing is no snapshot: who comes while it is made may be in it or not (net/ipv4/inet_diag.c,
inet_diag_dump_icsk, lets go of a bucket of sockets wherever a message is full).  Who must have cut *all* of a kind
first keeps new ones out, and then lists and cuts until nothing is found.

Layouts: include/uapi/linux/inet_diag.h, sock_diag.h; sock_diag(7).
"""

import errno
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6, IPPROTO_TCP
from typing import NamedTuple

from netplan.errors import NetplanError
from netplan.netlink import NETLINK_SOCK_DIAG, NetlinkSocket, Refusal, Request, attribute

IPAddress = IPv4Address | IPv6Address
Endpoint = tuple[IPAddress, int]

_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21
_INET_DIAG_REQ_BYTECODE = 1

# include/net/tcp_states.h, as bits
_LISTEN = 1 << 10
# established, and those that one side has closed: data may still flow
_SESSION = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11
# what is left of an ended session says its state of before by this "timer" (inet_twsk_diag_fill); it is TIME_WAIT
_TIMER_TIME_WAIT = 3

# family, protocol, extensions, states; and the socket: ports (big endian), addresses, link, cookie
_REQUEST = struct.Struct("=BBBxI")
_SOCKET = struct.Struct("=2s2s16s16sI2I")
_ANY_SOCKET = bytes(_SOCKET.size)
# family, (state,) timer, (retransmissions); the socket; (expires, queues,) uid, inode
_ANSWER = struct.Struct("=BxBx2s2s16s16sI2I12xII")

# struct inet_diag_bc_op: code, how far to go when it holds, and when not (or, behind a comparison, the port);
# struct inet_diag_hostcond: family, prefix length, port
_STEP = struct.Struct("=BBH")
_CONDITION = struct.Struct("=BBxxi")
_JUMP, _PORT_AT_MOST, _SOURCE_IS = 1, 3, 7
# an attribute has 64 KiB at most; what does not fit is asked for by another request
_MOST_CONDITIONS = 1000

_MAPPED = bytes(10) + b"\xff\xff"
_GONE = frozenset((errno.ENOENT, errno.ESTALE))  # ESTALE: there is another one of these addresses


@dataclass(frozen=True, slots=True)
class Session:
    """A TCP socket with a peer, named by its cookie.

    ``uid`` is the user who made the socket, or the listener that it came from.  ``inode`` is 0 when no process has
    it: it was not accepted yet, or is closed and still delivers.  ``link`` is the index of the link that it is
    bound to, or 0.  An IPv4 session of a socket of IPv6 has IPv4 addresses here.
    """

    local: Endpoint
    remote: Endpoint
    uid: int
    inode: int
    link: int
    cookie: tuple[int, int]


def sessions(listens: Collection[Endpoint]) -> Mapping[Endpoint, tuple[Session, ...]]:
    """Return the sessions by their local address and port; of a port without any an empty tuple.

    Sessions that are being opened or have ended (SYN_RECV, TIME_WAIT) are none.  Raises NetplanError.
    """
    found: dict[Endpoint, dict[tuple[int, int], Session]] = {endpoint: {} for endpoint in listens}
    for endpoint, row in _list(listens, _SESSION):
        remote = (_address(row.family, row.destination), int.from_bytes(row.destination_port, "big"))
        cookie = (row.cookie, row.cookie_high)
        found[endpoint][cookie] = Session(endpoint, remote, row.uid, row.inode, row.link, cookie)
    return {endpoint: tuple(there.values()) for endpoint, there in found.items()}


def count_sessions(listens: Collection[Endpoint]) -> Mapping[Endpoint, int]:
    """Return how many :func:`sessions` there are at each endpoint, for less work.  Raises NetplanError."""
    found: dict[Endpoint, set[tuple[int, int]]] = {endpoint: set() for endpoint in listens}
    for endpoint, row in _list(listens, _SESSION):
        found[endpoint].add((row.cookie, row.cookie_high))
    return {endpoint: len(there) for endpoint, there in found.items()}


def listeners(endpoints: Collection[Endpoint]) -> Mapping[Endpoint, frozenset[int]]:
    """Return the users (uid) that listen at just these endpoints; where nobody does, there is none.

    Who listens on all addresses listens at another endpoint.  Raises NetplanError.
    """
    found: dict[Endpoint, frozenset[int]] = {}
    for endpoint, row in _list(endpoints, _LISTEN):
        found[endpoint] = found.get(endpoint, frozenset()) | {row.uid}
    return found


def destroy(session: Session) -> bool:
    """End a session at once, for both sides; return False when it has ended already.

    Its process gets ECONNABORTED, its peer a reset.  Raises NetplanError ``sockets.destroy_unsupported``,
    ``sockets.not_permitted``, ``sockets.destroy``.
    """
    return destroy_all((session,)) == 1


def destroy_all(found: Sequence[Session]) -> int:
    """End sessions as :func:`destroy` does; return how many had not ended already.

    All are tried, whatever the kernel says to one of them; then it raises for the first that was refused.
    """
    if not found:
        return 0
    with NetlinkSocket(NETLINK_SOCK_DIAG) as sock:
        refused = sock.batch([_destroy(one) for one in found])
    for place, refusal in refused.items():
        if refusal.errno not in _GONE:
            raise _error(found[place], refusal)
    return len(found) - len(refused)


def _destroy(session: Session) -> Request:
    # the kernel looks for mapped addresses in the same table, whatever the family of the socket (inet_lookup)
    family = AF_INET if session.local[0].version == 4 else AF_INET6
    (local, local_port), (remote, remote_port) = session.local, session.remote
    which = _SOCKET.pack(
        local_port.to_bytes(2, "big"),
        remote_port.to_bytes(2, "big"),
        local.packed,  # padded with zeros
        remote.packed,
        session.link,
        *session.cookie,
    )
    return Request(_SOCK_DESTROY, 0, _REQUEST.pack(family, IPPROTO_TCP, 0, _SESSION) + which)


def _error(session: Session, refusal: Refusal) -> NetplanError:
    (host, port), (peer, peer_port) = session.local, session.remote
    about = f"tcp/{host}/{port}/{peer}/{peer_port}"
    if refusal.errno == errno.EOPNOTSUPP:
        return NetplanError(
            "sockets.destroy_unsupported",
            "this kernel cannot end a session of somebody else (CONFIG_INET_DIAG_DESTROY)",
            resource=about,
            hint="end the process that has it",
        )
    if refusal.errno == errno.EPERM:
        return NetplanError(
            "sockets.not_permitted",
            "ending a session of somebody else takes CAP_NET_ADMIN",
            resource=about,
            hint="run it as root",
        )
    return NetplanError(
        "sockets.destroy",
        f"the kernel does not end the session: {refusal.text()}",
        resource=about,
        retryable=True,
    )


class _Row(NamedTuple):
    """What an answer says, in its order; addresses of IPv4 are padded with zeros."""

    family: int
    timer: int
    source_port: bytes
    destination_port: bytes
    source: bytes
    destination: bytes
    link: int
    cookie: int
    cookie_high: int
    uid: int
    inode: int


def _list(endpoints: Collection[Endpoint], states: int) -> Iterator[tuple[Endpoint, _Row]]:
    """Yield the sockets at the endpoints; one may come twice."""
    if not endpoints:
        return
    old = [one for one in endpoints if one[0].version == 4]
    with NetlinkSocket(NETLINK_SOCK_DIAG) as sock:
        # a socket of IPv6 may have a mapped address of IPv4
        for family, wanted in ((AF_INET, old), (AF_INET6, list(endpoints))):
            for first in range(0, len(wanted), _MOST_CONDITIONS):
                yield from _dump(sock, family, wanted[first : first + _MOST_CONDITIONS], states)


def _dump(
    sock: NetlinkSocket, family: int, wanted: Sequence[Endpoint], states: int
) -> Iterator[tuple[Endpoint, _Row]]:
    places = {_place(family, host) + port.to_bytes(2, "big"): (host, port) for host, port in wanted}
    request = _REQUEST.pack(family, IPPROTO_TCP, 0, states) + _ANY_SOCKET
    unpack = _ANSWER.unpack_from
    for _, data, start, _ in sock.dump(
        _SOCK_DIAG_BY_FAMILY, request + attribute(_INET_DIAG_REQ_BYTECODE, _filter(wanted))
    ):
        row = _Row._make(unpack(data, start))
        if row.timer != _TIMER_TIME_WAIT:
            yield places[row.source + row.source_port], row


def _place(family: int, host: IPAddress) -> bytes:
    """Write an address as an answer has it."""
    if host.version == 6:
        return host.packed
    return host.packed + bytes(12) if family == AF_INET else _MAPPED + host.packed


def _filter(wanted: Iterable[Endpoint]) -> bytes:
    """Write a program that takes the sockets whose own address and port is one of these (inet_diag_bc_run).

    The port is searched for by halves, so that the many sockets of other ports cost the kernel little.
    """
    ports: dict[int, list[IPAddress]] = {}
    for host, port in wanted:
        ports.setdefault(port, []).append(host)
    return _search(sorted(ports.items()), 0)


def _search(ports: Sequence[tuple[int, list[IPAddress]]], behind: int) -> bytes:
    """Write the part for some ports in their order; ``behind`` are so many bytes of the program."""
    if len(ports) == 1:
        return _compare(*ports[0], behind)
    middle = len(ports) // 2
    above = _search(ports[middle:], behind)
    below = _search(ports[:middle], behind + len(above))
    size = 2 * _STEP.size
    return (
        _STEP.pack(_PORT_AT_MOST, size, size + len(below))
        + _STEP.pack(0, 0, ports[middle - 1][0])
        + below
        + above
    )


def _compare(port: int, hosts: Sequence[IPAddress], behind: int) -> bytes:
    """Write the part for one port: jump to the end, which takes the socket, or behind the end, which refuses it.

    A condition of IPv4 holds for mapped addresses, too.
    """
    part = _STEP.pack(_JUMP, _STEP.size, behind + 2 * _STEP.size)  # none of them
    for host in reversed(hosts):
        family, size = (AF_INET, 32) if host.version == 4 else (AF_INET6, 128)
        condition = _CONDITION.pack(family, size, port) + host.packed
        length = _STEP.size + len(condition)
        take = _STEP.pack(_JUMP, _STEP.size, _STEP.size + len(part) + behind)
        part = _STEP.pack(_SOURCE_IS, length, length + len(take)) + condition + take + part
    return part


@lru_cache(maxsize=4096)  # a peer has many sessions
def _address(family: int, packed: bytes) -> IPAddress:
    if family == AF_INET:
        return IPv4Address(packed[:4])
    if packed.startswith(_MAPPED):
        return IPv4Address(packed[len(_MAPPED) :])
    return IPv6Address(packed)
