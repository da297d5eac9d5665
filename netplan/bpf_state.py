"""The cgroup programs in the kernel: what there is, loading, changing their maps, and taking them away.

Maps and links are pinned below ``/sys/fs/bpf/partitiond/<cookie of the network namespace>/<version>``, so that they
outlive this process, and several nodes of one machine do not meet.  The directory gets its name when all is in it
and attached; of two versions the new one is attached before the old one goes.  The map of refusals lies beside them
and is handed on.  What was received is not: for a moment two versions count, so each has a map of its own.

Maps are changed by differences.  A note in one of them says what they were filled with: to look costs a few calls
whatever the number of partitions.
"""

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from netplan import bpf_syscall, cgroup
from netplan.bpf_contents import Contents, Entries
from netplan.bpf_programs import COOKIE, MAPS, NOTE, RECEIVED, REFUSED, Refusal, programs, version
from netplan.errors import NetplanError
from netplan.model import HookState

_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, since Linux 5.14
_FIRST = bytes(4)  # the key of the one entry of an array
_UNKNOWN = bytes(16)
_RETRY_SECONDS = 600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RULES = {one.value: one.name.lower() for one in Refusal}
_LINKS = tuple(programs(ingress_everywhere=False))
_FILLED = tuple(name for name in MAPS if name not in (NOTE, REFUSED, RECEIVED))


class RefusedCalls(NamedTuple):
    """How often each user (by number) was refused by a rule (``bind``, ``receive``) in an ``epoch``, which is empty
    without programs.  Who never was refused is not there.
    """

    epoch: str
    counts: Mapping[tuple[int, str], int]


class Arrived(NamedTuple):
    """Bytes and packets that a user received at the node's own addresses of a family (``ipv4``, ``ipv6``)."""

    bytes: int
    packets: int


class ReceivedShared(NamedTuple):
    """What the programs counted in an ``epoch``, by user (number) and family; the epoch is empty where they do not count.
    Who received nothing is not there.
    """

    epoch: str
    counts: Mapping[tuple[int, str], Arrived]


class _Refused(NamedTuple):
    """Why it was not possible, and when it was tried."""

    reason: str
    at: float


class _Filled(NamedTuple):
    directory: Path
    contents: Contents


_refusals: dict[int, _Refused] = {}
_possible: set[int] = set()
_last: _Filled | None = None


def observe_hooks(*, wanted: bool) -> HookState:
    """Return what there is for the network namespace of this thread; ``wanted``: else only what is to be removed."""
    cookie = _cookie()
    if cookie is None:
        return HookState(refused="this kernel does not number its network namespaces (Linux 5.14 does)")
    place = _place(cookie)
    names = _names(place)
    if not wanted:
        return HookState(leftover=names or _left_empty(place))
    group = cgroup.root()
    if group is None:
        return HookState(leftover=names, refused="no cgroup2 file system is mounted")
    for everywhere in (False, True):
        name = version(ingress_everywhere=everywhere)
        if name in names and _stands(place / name, group.stat().st_ino):
            others = tuple(one for one in names if one not in (name, REFUSED))
            return HookState(name, _note(place / name).hex(), others, everywhere=everywhere)
    leftover = tuple(one for one in names if one != REFUSED)
    return HookState(leftover=leftover, refused=_why_not(cookie, group))


def load_hooks(wanted: Contents, state: HookState) -> None:
    """Put the programs in force, where they are not, and fill their maps.  Raises ``network.bpf``."""
    cookie = _known_cookie()
    place = _place(cookie)
    try:
        if state.version:
            kept = place / state.version
            _fill(kept, wanted)
        else:
            kept = _make(cookie, place, wanted)
        for name in state.leftover:
            if name not in (REFUSED, kept.name):
                _remove(place / name)
    except OSError as error:
        _refusals[cookie] = _Refused(_words(error), time.monotonic())
        raise _error("the programs at the cgroup could not be loaded", error) from error


def remove_hooks() -> None:
    """Take away everything that is ours for this network namespace.  Raises ``network.bpf``."""
    place = _place(_known_cookie())
    try:
        for name in _names(place):
            _remove(place / name)
        for directory in (place, place.parent):
            with suppress(FileNotFoundError):
                _remove_if_empty(directory)
        cgroup.unmount_bpffs()
    except OSError as error:
        raise _error("the programs at the cgroup could not be removed", error) from error


def read_refusals() -> RefusedCalls:
    """Return what the programs of this network namespace refused."""
    path = _place(_known_cookie()) / REFUSED
    if not path.exists():  # where we may not load any, bpf(2) would not even say that there is none
        return RefusedCalls("", {})
    try:
        with bpf_syscall.pinned(str(path)) as counts:
            number, found = bpf_syscall.map_id(counts), bpf_syscall.entries(counts, MAPS[REFUSED])
    except OSError as error:
        raise _error("the refusals cannot be read", error) from error
    order = sys.byteorder
    values = {
        (int.from_bytes(key[:4], order), _RULES[int.from_bytes(key[4:], order)]): int.from_bytes(value, order)
        for key, value in found.items()
    }
    return RefusedCalls(_epoch(number), values)


def read_received() -> ReceivedShared:
    """Return what users received from other hosts at the node's own addresses.

    Each time that the programs are put in force they count in a new map, so the epoch is another one.
    """
    directory = _place(_known_cookie()) / version(ingress_everywhere=False)
    nothing = ReceivedShared("", {})
    try:
        if not directory.exists():  # where we may not load any, bpf(2) would not even say that there is none
            return nothing
        with bpf_syscall.pinned(f"{directory}/ingress") as link:
            if not bpf_syscall.link_info(link).cgroup:  # somebody has detached it
                return nothing
        with bpf_syscall.pinned(f"{directory}/{RECEIVED}") as counts:
            number, found = bpf_syscall.map_id(counts), bpf_syscall.entries(counts, MAPS[RECEIVED])
    except FileNotFoundError:  # likewise
        return nothing
    except OSError as error:
        raise _error("what was received cannot be read", error) from error
    values = {}
    for key, value in found.items():
        uid, ip_version = struct.unpack("=II", key)
        values[uid, f"ipv{ip_version}"] = Arrived(*struct.unpack("=QQ", value))
    return ReceivedShared(_epoch(number), values)


def _epoch(number: int) -> str:
    return f"{_BOOT_ID.read_text(encoding='ascii').strip()}/{number}"


def _error(what: str, cause: OSError) -> NetplanError:
    hint = "the routing table before local stands in; partitiond status says what stays open"
    return NetplanError("network.bpf", f"{what}: {_words(cause)}", resource="bpf/cgroup", hint=hint)


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def _cookie() -> int | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        try:
            return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return None


def _known_cookie() -> int:
    cookie = _cookie()
    # nothing can have been loaded where there is none: -1 is nobody's
    return -1 if cookie is None else cookie


def _place(cookie: int) -> Path:
    return cgroup.BPFFS / "partitiond" / str(cookie)


def _names(place: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(place)))  # noqa: PTH208 - names suffice
    except FileNotFoundError:
        return ()


def _left_empty(place: Path) -> tuple[str, ...]:
    """Directories that somebody made who was killed before he put anything into them."""
    return tuple(one.name for one in (place, place.parent) if one.is_dir() and not os.listdir(one))  # noqa: PTH208 - as above


def _stands(directory: Path, group: int) -> bool:
    """Whether every link is there, and attached to that cgroup: anybody with the right can detach one."""
    try:
        for name in _LINKS:
            with bpf_syscall.pinned(f"{directory}/{name}") as link:
                if bpf_syscall.link_info(link).cgroup != group:
                    return False
    except (
        OSError
    ):  # what cannot be opened, or is something else, is made anew, and then told if it cannot be
        return False
    return all((directory / name).exists() for name in (*_FILLED, NOTE, RECEIVED))


def _note(directory: Path) -> bytes:
    with bpf_syscall.pinned(f"{directory}/{NOTE}") as note:
        return bpf_syscall.lookup(note, _FIRST, len(_UNKNOWN)) or _UNKNOWN


def _why_not(cookie: int, group: Path) -> str:
    """Return why the programs cannot be attached, "" when they can: tried with those that act in no namespace."""
    known = _refusals.get(cookie)
    if known is not None and time.monotonic() - known.at < _RETRY_SECONDS:
        return known.reason
    if cookie not in _possible:
        try:
            with _maps() as maps, _attached(0, group, maps):
                _possible.add(cookie)
        except OSError as error:
            _refusals[cookie] = _Refused(_words(error), time.monotonic())
            return _refusals[cookie].reason
    _refusals.pop(cookie, None)
    return ""


@contextmanager
def _maps() -> Iterator[dict[str, int]]:
    """Make the maps anew."""
    with ExitStack() as stack:
        maps = {}
        for name, kind in MAPS.items():
            maps[name] = bpf_syscall.create_map(name, kind)
            stack.callback(os.close, maps[name])
        yield maps


class _Attached(NamedTuple):
    """Links by the names of their programs, and the version that these are."""

    links: dict[str, int]
    version: str


@contextmanager
def _attached(cookie: int, group: Path, maps: Mapping[str, int]) -> Iterator[_Attached]:
    """Load and attach all programs; what is not pinned meanwhile is detached again at the end."""
    with ExitStack() as stack:
        loaded, everywhere = _load(stack, cookie, maps)
        directory = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        links = {}
        for name, (hook, program) in loaded.items():
            links[name] = bpf_syscall.attach(program, directory, hook)
            stack.callback(os.close, links[name])
        yield _Attached(links, version(ingress_everywhere=everywhere))


def _load(stack: ExitStack, cookie: int, maps: Mapping[str, int]) -> tuple[dict[str, tuple[int, int]], bool]:
    """Load the programs; return hook and descriptor of each, and whether what comes in is checked everywhere."""
    loaded: dict[str, tuple[int, int]] = {}
    for everywhere in (False, True):
        for name, one in programs(ingress_everywhere=everywhere).items():
            if name in loaded:
                continue
            code = one.code.linked(maps, {COOKIE: cookie})
            try:
                program = bpf_syscall.load_program(name, one.kind, one.hook, code)
            except OSError as error:
                if (
                    everywhere
                    or one.kind != bpf_syscall.CGROUP_SKB
                    or error.errno not in (errno.EINVAL, errno.EACCES)
                ):
                    raise
                break  # the last one: this kernel does not let it ask for its namespace
            stack.callback(os.close, program)
            loaded[name] = (one.hook, program)
        else:
            return loaded, everywhere
    raise AssertionError("the second round loads all or raises")


def _make(cookie: int, place: Path, wanted: Contents) -> Path:
    """Put all in force anew; return where it is pinned."""
    group = cgroup.root()
    if group is None:
        raise FileNotFoundError(errno.ENOENT, "no cgroup2 file system is mounted")
    if not cgroup.has_bpffs():
        cgroup.mount_bpffs()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _maps() as maps, ExitStack() as stack:
        _take_over_refusals(stack, place, maps)
        _write(maps, {name: {} for name in _FILLED}, wanted)
        with _attached(cookie, group, maps) as attached:
            making = place / f"making-{attached.version}"  # bpffs takes no name with a dot
            _remove(making)
            making.mkdir(mode=0o700)
            pins = {name: one for name, one in maps.items() if name != REFUSED} | attached.links
            for name, descriptor in pins.items():
                bpf_syscall.pin(descriptor, str(making / name))
            final = place / attached.version
            _remove(final)  # with a link that is gone, else it would be in force
            making.rename(final)
    _remember(final, wanted)
    return final


def _take_over_refusals(stack: ExitStack, place: Path, maps: dict[str, int]) -> None:
    """Go on counting in the map that is there, else pin the new one."""
    path = str(place / REFUSED)
    try:
        known = stack.enter_context(bpf_syscall.pinned(path))
    except FileNotFoundError:
        bpf_syscall.pin(maps[REFUSED], path)
    else:
        maps[REFUSED] = known


def _fill(directory: Path, wanted: Contents) -> None:
    """Change the maps that are in force from what they hold to what they shall."""
    with ExitStack() as stack:
        maps = {
            name: stack.enter_context(bpf_syscall.pinned(str(directory / name))) for name in (*_FILLED, NOTE)
        }
        noted = bpf_syscall.lookup(maps[NOTE], _FIRST, len(_UNKNOWN)) or _UNKNOWN
        last: Mapping[str, Entries]
        if _last and _last.directory == directory and _last.contents.fingerprint == noted.hex():
            last = _last.contents.maps
        else:
            last = {name: bpf_syscall.entries(maps[name], MAPS[name]) for name in _FILLED}
        _write(maps, last, wanted)
    _remember(directory, wanted)


def _write(maps: Mapping[str, int], last: Mapping[str, Entries], wanted: Contents) -> None:
    """What comes first, then what goes; a note of nothing meanwhile tells who comes after a crash."""
    bpf_syscall.update(maps[NOTE], _FIRST, _UNKNOWN)
    for name in _FILLED:
        new, old = wanted.maps[name], last[name]
        bpf_syscall.update_all(
            maps[name], {key: value for key, value in new.items() if old.get(key) != value}
        )
    for name in _FILLED:
        bpf_syscall.delete_all(maps[name], list(last[name].keys() - wanted.maps[name].keys()))
    bpf_syscall.update(maps[NOTE], _FIRST, bytes.fromhex(wanted.fingerprint))


def _remember(directory: Path, wanted: Contents) -> None:
    global _last  # noqa: PLW0603 - what the kernel has is one for the process, too
    _last = _Filled(directory, wanted)


def _remove(path: Path) -> None:
    """Take away a pin, or a directory of them, each link detached first: the kernel may come to that only later."""
    if path.is_dir():
        for name in os.listdir(path):  # noqa: PTH208 - names suffice
            if name in _LINKS:
                with bpf_syscall.pinned(f"{path}/{name}") as link:
                    bpf_syscall.detach(link)
            (path / name).unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
