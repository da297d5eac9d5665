"""What a user tries with addresses: sockets bound to them, sources in control messages, options, frames of tap and tun."""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from pathlib import Path

IPPROTO_MPTCP, IPPROTO_UDPLITE, IPPROTO_SCTP = 262, 136, 132
AF_SMC = 43
# include/uapi/linux/in.h, in6.h, tcp.h
IP_OPTIONS, IP_PKTINFO, IP_FREEBIND, IP_TRANSPARENT, IP_MULTICAST_IF = 4, 8, 15, 19, 32
IPV6_2292PKTINFO, IPV6_FLOWINFO_SEND, IPV6_PKTINFO, IPV6_TRANSPARENT, IPV6_FREEBIND = 2, 33, 50, 75, 78
SO_BINDTODEVICE, MSG_FASTOPEN = 25, 0x20000000


def is_six(address):
    return ":" in address


def _level(six):
    return socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP


def mapped(address):
    return f"::ffff:{address}"


def made(six, kind, protocol=0):
    return socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind, protocol)


def opened(protocol, six):
    """A socket of a protocol by name; SMC is TCP by a socket of the kernel's own (net/smc/af_smc.c)."""
    if protocol == "smc":
        return socket.socket(AF_SMC, socket.SOCK_STREAM, int(six))
    kinds = {
        "tcp": (socket.SOCK_STREAM, 0),
        "mptcp": (socket.SOCK_STREAM, IPPROTO_MPTCP),
        "sctp": (socket.SOCK_STREAM, IPPROTO_SCTP),
        "udp": (socket.SOCK_DGRAM, 0),
        "udplite": (socket.SOCK_DGRAM, IPPROTO_UDPLITE),
    }
    return made(six, *kinds[protocol])


def _free(sock, six):
    sock.setsockopt(_level(six), IPV6_FREEBIND if six else IP_FREEBIND, 1)


def _transparent(sock, six):
    sock.setsockopt(_level(six), IPV6_TRANSPARENT if six else IP_TRANSPARENT, 1)


def _share(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.suppress(OSError):  # SO_REUSEPORT is not for every kind
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _leave_group(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def listener(variant, address, port):
    """A bound socket and how it is read.  ``variant`` is the protocol and then words for options."""
    protocol, *words = variant.split()
    six = is_six(address) or "mapped" in words
    sock = opened(protocol, six)
    try:
        if six and "mapped" not in words:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int("dual" not in words))
        if "free" in words:
            _free(sock, six)
        if "transparent" in words:
            _transparent(sock, six)
        if "shared" in words or "address" in words:
            _share(sock)
        if "address" in words:  # SO_REUSEADDR alone: other users' sockets are no hindrance to UDP then
            _leave_group(sock)
        for word in words:
            if word.startswith("device="):
                sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, word.removeprefix("device=").encode())
        sock.bind((mapped(address) if "mapped" in words else address, port))
        if protocol not in ("udp", "udplite"):
            sock.listen(64)
            return sock, "listen"
    except OSError:
        sock.close()
        raise
    return sock, "datagrams"


def bind_alone(variant, address, port):
    """Bind, and let go at once."""
    listener(variant, address, port)[0].close()


# --- datagrams from a source --------------------------------------------------------------------------------------------------


def _control(six, source, *, old=False):
    if six:
        kind = IPV6_2292PKTINFO if old else IPV6_PKTINFO
        return [(socket.IPPROTO_IPV6, kind, socket.inet_pton(socket.AF_INET6, source) + bytes(4))]
    return [(socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + socket.inet_aton(source) + bytes(4))]


def _prepare(sock, words, six, source):
    """What comes before binding."""
    if "free" in words:
        _free(sock, six)
    if "transparent" in words:
        _transparent(sock, six)
    if "shared" in words:
        _share(sock)
    if "multicast" in words:
        sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_IF, socket.inet_aton(source))
    if "options" in words:  # a longer header: whatever looks for something at a fixed place misses it
        sock.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, b"\x07\x07\x04" + bytes(5))


_UNBOUND = {"control", "old", "multicast", "unbound"}


def send(variant, source, target, port, token, own=""):
    """Send a datagram with a token; ``own`` is an address that some variants begin with."""
    protocol, *words = variant.split()
    six = is_six(target) or "mapped" in words
    with made(six, socket.SOCK_DGRAM, IPPROTO_UDPLITE if protocol == "udplite" else 0) as sock:
        _prepare(sock, words, six, source)
        if "after" in words:
            sock.bind((own, 0))
        elif not _UNBOUND & set(words):
            sock.bind((mapped(source) if "mapped" in words else source, 0))
        if "mapped" in words:
            target = mapped(target)
        body = token.encode()
        if {"control", "old"} & set(words):
            text = mapped(source) if "mapped" in words else source
            sock.sendmsg([body], _control(six, text, old="old" in words), 0, (target, port))
        elif "connected" in words:
            sock.connect((target, port))
            sock.send(body)
        elif "flow" in words:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FLOWINFO_SEND, 1)
            sock.sendto(body, (target, port, 0x12345, 0))
        else:
            sock.sendto(body, (target, port))


def ping(variant, source, target, token):
    """An echo request by a socket that needs no privilege (net.ipv4.ping_group_range)."""
    words = variant.split()
    six = is_six(target)
    with made(six, socket.SOCK_DGRAM, 58 if six else 1) as sock:
        _prepare(sock, words, six, source)
        if not _UNBOUND & set(words):
            sock.bind((source, 0))
        body = struct.pack("!BBHHH", 128 if six else 8, 0, 0, 0, 1) + token.encode()
        if "control" in words:
            sock.sendmsg([body], _control(six, source), 0, (target, 0))
        else:
            sock.sendto(body, (target, 0))
        if "answer" in words:
            sock.settimeout(2)
            try:
                sock.recv(2000)
            except TimeoutError:
                raise OSError(errno.ETIMEDOUT, "no answer") from None


def raw(family, kind, protocol):
    socket.socket(family, kind, protocol).close()


def privilege(six, option):
    """A socket option that none but root may set."""
    with made(six, socket.SOCK_STREAM) as sock:
        sock.setsockopt(_level(six) if option != 36 else socket.SOL_SOCKET, option, 1)


# --- connections --------------------------------------------------------------------------------------------------------------


def _begin(variant, source, target, port):
    """A socket on its way to be connected."""
    protocol, *words = variant.split()
    six = is_six(target) or "mapped" in words
    sock = opened(protocol, six)
    try:
        sock.setblocking(False)
        _prepare(sock, words, six, source)
        if source and not _UNBOUND & set(words):
            sock.bind((mapped(source) if "mapped" in words else source, 0))
        where = (mapped(target) if "mapped" in words else target, port)
        if "fast" in words:
            sock.sendto(b"", MSG_FASTOPEN, where)
        else:
            sock.connect(where)
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        raise
    return sock


def _finish(sock, token):
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        return errno.errorcode[error]
    source = sock.getsockname()[0].removeprefix("::ffff:")
    with contextlib.suppress(OSError):
        sock.send(token.encode())
    return f"ok {source}"


def connect_all(items, patience):
    """Connect [variant, source, target, port, token] all at once; ``ok`` and the source, or the error's name."""
    said, poll, waiting = [None] * len(items), select.poll(), {}
    for place, (variant, source, target, port, token) in enumerate(items):
        try:
            sock = _begin(variant, source, target, port)
        except OSError as error:
            said[place] = errno.errorcode.get(error.errno, str(error))
            continue
        waiting[sock.fileno()] = (place, sock, token)
        poll.register(sock, select.POLLOUT)
    end = time.monotonic() + patience
    while waiting and (left := end - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            poll.unregister(descriptor)
            place, sock, token = waiting.pop(descriptor)
            said[place] = _finish(sock, token)
            sock.close()
    for place, sock, _ in waiting.values():
        said[place] = "ETIMEDOUT"
        sock.close()
    return said


# --- frames -------------------------------------------------------------------------------------------------------------------


def wait_for_carrier(name):
    """A bridge forwards from a port that runs, which the kernel tells it within a second (net/core/link_watch.c).

    Before that, the flag may still speak of the program that had it last.
    """
    time.sleep(1.1)
    end = time.monotonic() + 5
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while time.monotonic() < end:
            flags = struct.unpack_from(
                "H", fcntl.ioctl(sock, 0x8913, struct.pack("16s24x", name.encode())), 16
            )[0]
            if flags & 0x40:  # IFF_RUNNING
                return
            time.sleep(0.01)
    raise OSError(errno.ENETDOWN, name)


def attached(name, *, tap):
    """A descriptor of the program behind a tap or tun."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002 if tap else 0x1001))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def frames(name, tap, items):
    """Be the guest behind a tap, or the program behind a tun, and write what one is told (hexadecimal)."""
    descriptor = attached(name, tap=tap)
    try:
        wait_for_carrier(name)
        for item in items:
            os.write(descriptor, bytes.fromhex(item))
    finally:
        os.close(descriptor)


def shown(six, port):
    """Whether the kernel's list of sockets has one at a local port."""
    rows = Path("/proc/net", "udp6" if six else "udp").read_text().splitlines()[1:]
    if not any(row.split()[1].endswith(f":{port:04X}") for row in rows):
        raise OSError(errno.ENOENT, "")


def netlink(protocol, kind, flags, body):
    """One request by netlink; its refusal is the outcome."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        payload = bytes.fromhex(body)
        sock.send(struct.pack("=IHHII", 16 + len(payload), kind, flags | 5, 1, 0) + payload)
        answer = sock.recv(65536)
        if int.from_bytes(answer[4:6], "little") == 2:
            number = -struct.unpack_from("=i", answer, 16)[0]
            if number:
                raise OSError(number, "")


ATTEMPTS = {
    "send": send,
    "ping": ping,
    "bind": bind_alone,
    "raw socket": raw,
    "privileged option": privilege,
    "frames": frames,
    "netlink": netlink,
    "shown": shown,
}
