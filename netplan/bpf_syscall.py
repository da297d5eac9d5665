"""bpf(2) through ctypes: maps, programs, links, and their pins.  Only what :mod:`netplan.bpf_state` calls.

Every function raises OSError with the kernel's errno.  Attributes are packed by hand after union bpf_attr
(include/uapi/linux/bpf.h); what is not named is 0.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

HASH, ARRAY, LPM_TRIE = 1, 2, 11
CGROUP_SKB, CGROUP_SOCK_ADDR = 8, 18

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD, _OBJ_PIN, _OBJ_GET = 0, 1, 2, 5, 6, 7
_OBJ_GET_INFO, _LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH, _LINK_CREATE, _LINK_DETACH = (
    15,
    24,
    26,
    27,
    28,
    34,
)
_NO_PREALLOC = 1
_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "ppc64le": 361, "s390x": 351}
_LICENSE = b"Apache-2.0\0"  # none of the functions that the programs call asks for GPL
_LOG_SIZE = 1 << 16
_ROOM = 4096
_NAME = 16  # BPF_OBJ_NAME_LEN, with the final NUL

_libc = ctypes.CDLL(None, use_errno=True)


class MapKind(NamedTuple):
    """What a map is: its type, the sizes of key and value, and how many entries it may have."""

    type: int
    key_size: int
    value_size: int
    entries: int


class LinkInfo(NamedTuple):
    """What the kernel says of a link: its program's number, and the cgroup that it is attached to (0: none)."""

    program: int
    cgroup: int


class _Answer(NamedTuple):
    """What the kernel said: a result, or -1 and an errno; and the attributes as it left them."""

    result: int
    code: int
    attributes: bytes


def _call(command: int, attributes: bytes) -> _Answer:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        return _Answer(-1, errno.ENOSYS, attributes)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(_libc.syscall(ctypes.c_long(number), command, buffer, len(attributes)))
    return _Answer(result, ctypes.get_errno() if result < 0 else 0, buffer.raw)


def _bpf(command: int, attributes: bytes) -> int:
    answer = _call(command, attributes)
    if answer.code:
        raise OSError(answer.code, os.strerror(answer.code))
    return answer.result


def _address(data: "ctypes.Array[ctypes.c_char]") -> int:
    return ctypes.addressof(data)


def _name(text: str) -> bytes:
    return text.encode("ascii")[: _NAME - 1].ljust(_NAME, b"\0")


def create_map(name: str, kind: MapKind) -> int:
    """Make a map; return its descriptor."""
    flags = 0 if kind.type == ARRAY else _NO_PREALLOC
    fixed = struct.pack("=IIIII", kind.type, kind.key_size, kind.value_size, kind.entries, flags)
    return _bpf(_MAP_CREATE, fixed + bytes(8) + _name(name))


def lookup(descriptor: int, key: bytes, value_size: int) -> bytes | None:
    """Return the value of a key, or None."""
    key_buffer, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value_size)
    try:
        _bpf(_MAP_LOOKUP, struct.pack("=IIQQQ", descriptor, 0, _address(key_buffer), _address(value), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def update(descriptor: int, key: bytes, value: bytes) -> None:
    """Set the value of a key."""
    key_buffer, buffer = (ctypes.create_string_buffer(one, len(one)) for one in (key, value))
    _bpf(_MAP_UPDATE, struct.pack("=IIQQQ", descriptor, 0, _address(key_buffer), _address(buffer), 0))


def update_all(descriptor: int, entries: Mapping[bytes, bytes]) -> None:
    """Set many values by one call."""
    if entries:
        keys, values = b"".join(entries), b"".join(entries.values())
        code, _ = _batch(_UPDATE_BATCH, descriptor, keys, values, len(entries))
        if code:
            raise OSError(code, os.strerror(code))


def delete_all(descriptor: int, keys: list[bytes]) -> None:
    """Remove many keys; those that are not there do not matter."""
    while keys:
        code, done = _batch(_DELETE_BATCH, descriptor, b"".join(keys), b"", len(keys))
        if code not in (0, errno.ENOENT):
            raise OSError(code, os.strerror(code))
        keys = keys[done + 1 :] if code else []


def _batch(command: int, descriptor: int, keys: bytes, values: bytes, count: int) -> tuple[int, int]:
    """Return the errno, and for how many entries it was done."""
    key_buffer, buffer = (ctypes.create_string_buffer(one, len(one)) for one in (keys, values))
    places = (0, 0, _address(key_buffer), _address(buffer))
    answer = _call(command, struct.pack("=QQQQIIQQ", *places, count, descriptor, 0, 0))
    return answer.code, _count(answer.attributes)


def _count(attributes: bytes) -> int:
    return int.from_bytes(attributes[32:36], sys.byteorder)


def entries(descriptor: int, kind: MapKind) -> dict[bytes, bytes]:
    """Return all that is in a map, by as few calls as it takes."""
    found: dict[bytes, bytes] = {}
    position, room, more = b"", _ROOM, True
    while more:
        keys, values = (ctypes.create_string_buffer(room * size) for size in (kind.key_size, kind.value_size))
        before = ctypes.create_string_buffer(position)
        after = ctypes.create_string_buffer(max(kind.key_size, 4))
        places = (_address(before) if position else 0, _address(after), _address(keys), _address(values))
        answer = _call(_LOOKUP_BATCH, struct.pack("=QQQQIIQQ", *places, room, descriptor, 0, 0))
        if answer.code == errno.ENOSPC:  # a bucket of the hash has more than fits
            room *= 2
            continue
        if answer.code not in (0, errno.ENOENT):
            raise OSError(answer.code, os.strerror(answer.code))
        more = not answer.code  # ENOENT: that was the end
        count, position = _count(answer.attributes), after.raw
        found |= zip(
            _cut(keys.raw, kind.key_size, count), _cut(values.raw, kind.value_size, count), strict=True
        )
    return found


def _cut(data: bytes, size: int, count: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, count * size, size)]


def load_program(name: str, kind: int, attach_type: int, code: bytes) -> int:
    """Load a program; return its descriptor.  The error of one that the kernel refuses ends with its words."""
    instructions = ctypes.create_string_buffer(code, len(code))
    words = ctypes.create_string_buffer(_LICENSE)

    def attributes(level: int, size: int, log: int) -> bytes:
        head = struct.pack(
            "=IIQQIIQII",
            kind,
            len(code) // 8,
            _address(instructions),
            _address(words),
            level,
            size,
            log,
            0,
            0,
        )
        return head + _name(name) + struct.pack("=II", 0, attach_type)

    try:
        return _bpf(_PROG_LOAD, attributes(0, 0, 0))
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return _bpf(_PROG_LOAD, attributes(1, _LOG_SIZE, _address(log)))
        except OSError:
            said = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
            # the last line tells statistics
            reason = next((line for line in reversed(said) if not line.startswith("processed")), "")
            raise OSError(error.errno, f"{error.strerror}{': ' if reason else ''}{reason}") from error


def attach(program: int, cgroup: int, attach_type: int) -> int:
    """Attach a program to a cgroup; return the descriptor of the link, with which it ends unless it is pinned."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", program, cgroup, attach_type, 0).ljust(64, b"\0"))


def detach(link: int) -> None:
    """Detach the program of a link now, not only when the kernel comes to it."""
    _bpf(_LINK_DETACH, struct.pack("=I", link))


def pin(descriptor: int, path: str) -> None:
    """Give it a name in a bpffs, by which it lives on."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, struct.pack("=QII", _address(name), descriptor, 0))


@contextmanager
def pinned(path: str) -> Iterator[int]:
    """Open what is pinned there."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    descriptor = _bpf(_OBJ_GET, struct.pack("=QII", _address(name), 0, 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def map_id(descriptor: int) -> int:
    """Return the number that no other map of this boot has at the same time."""
    # struct bpf_map_info: type, id
    info = ctypes.create_string_buffer(64)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", descriptor, len(info), _address(info)))
    return int(struct.unpack_from("=II", info.raw)[1])


def link_info(link: int) -> LinkInfo:
    """Return what the kernel says of a link."""
    # struct bpf_link_info: type, id, prog_id, then for a cgroup cgroup_id, attach_type
    info = ctypes.create_string_buffer(64)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", link, len(info), _address(info)))
    _, _, program, _, cgroup = struct.unpack_from("=IIIIQ", info.raw)
    return LinkInfo(program, cgroup)
