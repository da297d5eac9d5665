"""Persistent taps and tuns by ioctl on /dev/net/tun: no process, 0.2 ms each.

Layouts: include/uapi/linux/if_tun.h; Documentation/networking/tuntap.rst.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from netplan.errors import NetplanError

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TUN = 0x0001
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000  # qemu's virtio-net asks for it; it can be changed at each attach
_REQUEST = struct.Struct("16sH22x")  # struct ifreq: name, flags

_DEVICE = "/dev/net/tun"
_AT_ONCE = 64  # taps held open together: far from any limit of descriptors


def make_taps(
    taps: Iterable[tuple[str, int]],
    *,
    tun: bool = False,
    mark: Callable[[Collection[str]], None] = lambda _: None,
) -> dict[str, NetplanError]:
    """Make each ``(name, owner uid)`` a persistent tap (or ``tun``), or give an existing one to its owner; return
    the failures by name.

    ``mark`` is called with names of taps that are there and not yet persistent: whoever dies before it
    returns takes the new ones along, so that there never is one without a mark.  Raises ``network.no_tun``
    when there is no /dev/net/tun to begin with.
    """
    failed: dict[str, NetplanError] = {}
    waiting = list(taps)
    while waiting:
        these, waiting = waiting[:_AT_ONCE], waiting[_AT_ONCE:]
        devices: dict[str, int] = {}
        try:
            for name, owner in these:
                with _noting(name, tun, failed):
                    devices[name] = _attach(name, owner, _IFF_TUN if tun else _IFF_TAP | _IFF_VNET_HDR)
            mark(devices.keys())
            for name, device in devices.items():
                with _noting(name, tun, failed):
                    fcntl.ioctl(device, _TUNSETPERSIST, 1)
        finally:
            for device in devices.values():
                os.close(device)
    return failed


@contextmanager
def _noting(name: str, tun: bool, failed: dict[str, NetplanError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        code, message, hint = "network.tap", f"cannot make {name}: {error.strerror}", ""
        if error.errno == errno.EBUSY:
            hint = "a process still holds it: stop the virtual machine"
        elif error.errno == errno.EEXIST:  # a plan refuses such a name: it was taken since
            code, message = "network.name_taken", f"an interface of another kind is called {name}"
            hint = f"remove or rename that interface (ip link delete {name})"
        failed[name] = NetplanError(
            code,
            message,
            resource=f"{'tun' if tun else 'tap'}/{name}",
            hint=hint,
            retryable=error.errno == errno.EBUSY,
        )


def _claim(device: int, name: str, kind: int) -> None:
    """Make the link, or attach to the one of that name and kind.

    The kernel calls a name of a link of another kind invalid (tun_set_iff() of drivers/net/tun.c), as it
    does a name that no link can have; here it is EEXIST.
    """
    try:
        fcntl.ioctl(device, _TUNSETIFF, _REQUEST.pack(name.encode(), kind | _IFF_NO_PI))
    except OSError as error:
        if error.errno == errno.EINVAL and name in {one for _, one in socket.if_nameindex()}:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        raise


def _attach(name: str, owner: int, kind: int) -> int:
    """Return a descriptor of the tap, which goes with it unless it is made persistent."""
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NetplanError(
            "network.no_tun",
            f"cannot open {_DEVICE}: {error.strerror}",
            resource=f"tap/{name}",
            hint="load it with 'modprobe tun'; in a container, pass the device /dev/net/tun in",
        ) from error
    try:
        _claim(device, name, kind)
        fcntl.ioctl(device, _TUNSETOWNER, owner)
    except OSError:
        os.close(device)
        raise
    return device
