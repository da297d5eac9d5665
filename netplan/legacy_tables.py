"""The tables of legacy iptables: read from the kernel, changed through python-iptables.

Reading is one snapshot with all counters by getsockopt(2), which needs no library and makes no table where there is
none.  Writing is libiptc's work, which carries counters over: python-iptables is imported by the first change and by
nothing else, since it starts ``ldconfig`` and ``modprobe`` when it is imported.

A table is read, changed and written back as a whole.  :func:`locked` keeps out whoever else does so by the
rules of iptables(8); those who do not are told from their traces: the kernel refuses what is of another size.
"""

import ctypes
import fcntl
import os
import struct
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_RAW, SOCK_RAW, AddressFamily, socket
from types import ModuleType
from typing import Any, Literal, NamedTuple

from netplan.errors import NetplanError
from netplan.xtables import Counted, Entry, packed, parse

_TABLE = b"filter"
_RESOURCE = "filter/partitiond"
_NAMES = {AF_INET: Path("/proc/net/ip_tables_names"), AF_INET6: Path("/proc/net/ip6_tables_names")}
_TOOLS = {AF_INET: "iptables", AF_INET6: "ip6tables"}
_LEVELS = {AF_INET: IPPROTO_IP, AF_INET6: IPPROTO_IPV6}
_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES; of both families
_INFO = struct.Struct("=32sI5I5III")  # name, valid hooks, where each begins, and ends, rules, bytes
_REQUEST = struct.Struct("=32sI4x")
_TRIES = 5
_LOCK = Path("/run/xtables.lock")  # XTABLES_LOCKFILE of iptables(8)
_PATIENCE = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class Edit(NamedTuple):
    """A step in the change of a table: a chain is made, or emptied and removed; a rule is put before the one at
    ``place`` (-1: at the end), or the one at ``place`` is deleted.
    """

    kind: Literal["create", "flush", "remove", "insert", "delete"]
    chain: str
    place: int = 0
    entry: Entry = Entry(b"", "")


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of iptables(8).  Raises ``network.packet_filter`` when somebody keeps it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(_LOCK, flags, 0o600)
    except OSError as error:
        raise _failed(f"cannot open {_LOCK}: {error.strerror}") from error
    try:
        end = time.monotonic() + _PATIENCE
        while not _taken(descriptor):
            if time.monotonic() > end:
                raise _failed(f"somebody keeps {_LOCK} locked", hint=f"see who: fuser {_LOCK}")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def families() -> tuple[AddressFamily, ...]:
    """Return the families that this kernel has."""
    return (AF_INET6, AF_INET) if Path("/proc/sys/net/ipv6").exists() else (AF_INET,)


def is_there(family: AddressFamily) -> bool:
    """Whether the table exists in the network namespace of this thread; to look into it would make it."""
    try:
        return _TABLE in Path("/proc/thread-self", *_NAMES[family].parts[2:]).read_bytes().split()
    except FileNotFoundError:
        return False


class Size(NamedTuple):
    """How many rules a table has, and how large they are."""

    rules: int
    bytes: int


def size(family: AddressFamily) -> Size:
    """Return the size of the table, which is made where it is missing."""
    with _asking(family) as sock:
        return _info(sock, family)[1]


def read(family: AddressFamily) -> dict[str, tuple[Counted, ...]]:
    """Return every chain of the table, which is made where it is missing."""
    with _asking(family) as sock:
        for _ in range(_TRIES):
            hooks, (_, length) = _info(sock, family)
            try:
                blob = _ask(sock, family, _GET_ENTRIES, _REQUEST.pack(_TABLE, length) + bytes(length))
            except BlockingIOError:  # EAGAIN: it has become another size
                continue
            return parse(blob[_REQUEST.size :], hooks, family)
    raise _failed(f"the rules of {_TOOLS[family]} change each time that they are read")


@contextmanager
def _asking(family: AddressFamily) -> Iterator[socket]:
    try:
        with socket(family, SOCK_RAW, IPPROTO_RAW) as sock:
            yield sock
    except OSError as error:
        hint = "the kernel needs legacy iptables (CONFIG_IP_NF_IPTABLES_LEGACY, CONFIG_IP_NF_FILTER), or set"
        message = f"the kernel does not answer about {_TOOLS[family]}: {error.strerror}"
        raise _failed(message, hint=f"{hint} packet_filter = nftables", retryable=False) from error


def _info(sock: socket, family: AddressFamily) -> tuple[dict[int, int], Size]:
    """Return where each built-in chain begins, by hook, and the size."""
    _, valid, *numbers = _INFO.unpack(_ask(sock, family, _GET_INFO, _TABLE.ljust(_INFO.size, b"\0")))
    return {hook: numbers[hook] for hook in range(5) if valid & 1 << hook}, Size(*numbers[-2:])


def _ask(sock: socket, family: AddressFamily, option: int, request: bytes) -> bytes:
    """Call getsockopt(2) with something to say: Python's own passes nothing in."""
    buffer = ctypes.create_string_buffer(request, len(request))
    length = ctypes.c_uint32(len(request))
    if _libc.getsockopt(sock.fileno(), _LEVELS[family], option, buffer, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw


def write(family: AddressFamily, edits: Iterable[Edit]) -> None:
    """Change the table in one commit.  Raises ``network.packet_filter``; then nothing was changed."""
    iptc = _library()
    kind = iptc.Table if family == AF_INET else iptc.Table6
    try:
        # one object for each name and process: open only here, in the namespace of this thread
        table = kind(kind.FILTER, autocommit=False)
        try:
            table.refresh()
            for one in edits:
                _edit(iptc, table, family, one)
            table.commit()
        finally:
            table.close()
    except iptc.IPTCError as error:
        hint = "the rules that were loaded before are still in force"
        raise _failed(f"{_TOOLS[family]} refused the change: {error}", hint=hint) from error


def _edit(iptc: ModuleType, table: Any, family: AddressFamily, one: Edit) -> None:
    if one.kind == "create":
        table.create_chain(one.chain)
    elif one.kind == "flush":
        table.flush_entries(one.chain)
    elif one.kind == "remove":
        table.delete_chain(one.chain)
    elif one.kind == "delete":
        # python-iptables deletes by content only, and has no method for libiptc's deletion by number
        functions, handle = table._iptc, table._handle  # noqa: SLF001 - see above
        if functions.iptc_delete_num_entry(one.chain.encode(), one.place, handle) != 1:
            raise iptc.IPTCError(f"can't delete rule {one.place} of {one.chain}: {table.strerror()}")
    else:
        buffer = ctypes.create_string_buffer(packed(one.entry, family))
        if one.place < 0:
            table.append_entry(one.chain, buffer)
        else:
            table.insert_entry(one.chain, buffer, one.place)


def _library() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # of its own making: escapes that Python complains about, distutils, a pipe left open
            warnings.simplefilter("ignore")
            import iptc  # noqa: PLC0415 - an optional package, for legacy hosts only
    except (ImportError, AttributeError, OSError) as error:  # AttributeError: it found no libip4tc
        raise NetplanError(
            "network.no_library",
            f"packet_filter = iptables needs python-iptables, which cannot be loaded: {error}",
            resource=_RESOURCE,
            hint="apt install iptables, and install partitiond with its extra 'iptables' (pip install"
            " python-iptables); or set packet_filter = nftables",
        ) from error
    return iptc  # type: ignore[no-any-return]


def _failed(message: str, *, hint: str = "", retryable: bool = True) -> NetplanError:
    return NetplanError("network.packet_filter", message, resource=_RESOURCE, hint=hint, retryable=retryable)
