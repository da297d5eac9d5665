"""Tables of the packet filter that nobody else can change or flush, while a process lives that holds them.

``nft flush ruleset`` stands at the head of most nftables.conf: a reload of the distribution's firewall would open
the node and end its meters.  A table with an owner, which is a netlink socket, is spared by it, and refused to
everybody else with ``EPERM`` (NFT_TABLE_F_OWNER, Linux 5.12).  With NFT_TABLE_F_PERSIST (Linux 6.9) it stays when
that socket is closed, is then anybody's, and can be taken over (net/netfilter/nf_tables_api.c,
nf_tables_updtable and nft_rcv_nl_event).  So the daemon holds; commands without one, and a daemon that starts,
find tables that they can change.

PERSIST is given when a table is made, or never.  Where the kernel or nft does not know it, nothing is held.
"""

import errno
import threading
import time
from collections.abc import Iterable, Sequence

from netplan import nfbatch, nftables
from netplan.netlink import NETLINK_NETFILTER, NetlinkSocket, Request
from netplan.nfnetlink import FAMILIES, generation, here, nft_socket, table

_DORMANT, _OWNER, _PERSIST = 1, 2, 4
_WAIT_SECONDS = 2.0


class _Holder:
    """Whether this process is to hold its tables, and the socket that does, in one network namespace."""

    def __init__(self) -> None:
        self.wanted = False
        # two threads on one socket would take each other's answers
        self.turn = threading.RLock()
        self.sock: NetlinkSocket | None = None
        self.place = (0, 0)


_holder = _Holder()


def begin() -> None:
    """From now on, hold what this process loads; :func:`netplan.filter_state.keep` also what is there."""
    _holder.wanted = True


def end() -> None:
    """Hold nothing any more."""
    _holder.wanted = False
    release()


def wanted() -> bool:
    """Whether this process is to hold the tables."""
    return _holder.wanted


def held() -> bool:
    """Whether this process holds the tables of the network namespace that it is in."""
    return _holder.sock is not None and _holder.place == here()


def spared() -> bool:
    """Whether the tables of this network namespace are somebody's, so that a flush by others passes over them."""
    with nft_socket() as sock:
        return bool(_flags(sock, "inet") & _OWNER)


def make_tables(sock: NetlinkSocket, families: Iterable[str], *, anew: Iterable[str] = ()) -> None:
    """Make tables of ours, such that can be held where the kernel knows that; those ``anew`` are removed before.

    Raises ``network.packet_filter``.
    """
    gone = list(nfbatch.no_tables(sorted(anew)))
    made = sorted(families)
    for flags in (_PERSIST, 0) if nftables.knows_persist() else (0,):
        try:
            nfbatch.commit(sock, generation(sock), [*gone, *nfbatch.tables(made, flags)])
        except nfbatch.RefusedError as error:
            if flags and error.errno == errno.EOPNOTSUPP:
                continue
            raise
        return


def wake_tables(sock: NetlinkSocket) -> None:
    """Wake those of our tables whose rules somebody put to sleep.  Raises ``network.packet_filter``."""
    for family in FAMILIES:
        flags = _flags(sock, family)
        if flags & _DORMANT:
            nfbatch.commit(sock, generation(sock), list(nfbatch.tables([family], flags & ~_DORMANT)))


def commit(sock: NetlinkSocket, number: int, requests: Sequence[Request]) -> bool:
    """Commit like :func:`netplan.nfbatch.commit`, as the one who holds; take hold with it if that is wanted."""
    with _holder.turn:
        return _commit(sock, number, requests)


def _commit(sock: NetlinkSocket, number: int, requests: Sequence[Request]) -> bool:
    if held() and _holder.sock is not None:
        return nfbatch.commit(_holder.sock, number, requests)
    free = _free(sock) if _holder.wanted else []
    if not free:
        return nfbatch.commit(sock, number, requests)
    release()
    own = NetlinkSocket(NETLINK_NETFILTER)
    taken = False
    try:
        taken = nfbatch.commit(own, number, [*nfbatch.tables(free, _OWNER | _PERSIST), *requests])
    finally:
        if taken:
            _holder.sock, _holder.place = own, here()
        else:
            own.close()
    return taken


def possible(sock: NetlinkSocket) -> bool:
    """Whether there is a table of ours that can be held and is not."""
    return bool(_free(sock))


def _free(sock: NetlinkSocket) -> list[str]:
    return [one for one in FAMILIES if _flags(sock, one) == _PERSIST]


def release() -> None:
    """Let go, for changes that somebody else makes for us; what is committed next takes hold again.

    A child that is just being started has the socket for a moment longer.
    """
    with _holder.turn:
        sock, _holder.sock = _holder.sock, None
        if sock is None:
            return
        sock.close()
    if _holder.place != here():
        return
    until = time.monotonic() + _WAIT_SECONDS
    with nft_socket() as other:
        while any(_flags(other, one) & _OWNER for one in FAMILIES) and time.monotonic() < until:
            time.sleep(0.001)


def _flags(sock: NetlinkSocket, family: str) -> int:
    found = table(sock, family)
    return found.flags if found else 0
