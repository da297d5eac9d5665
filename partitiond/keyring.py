"""The session keyring that everything which we start inherits: kept from being a place where tenants meet.

A keyring is found by whoever inherited it, whatever the user (keyrings(7)): a key that one tenant's process puts into
it, every other tenant's could read.  The one that is made here gives its heirs nothing, so a program that wants a session
keyring makes its own (``keyctl session``), as most never do.
"""

import ctypes
import errno
import logging
import os
import platform

# asm/unistd.h of each: the C library has no function for it
_NUMBERS = {"x86_64": 250, "aarch64": 219, "riscv64": 219}
_JOIN_SESSION_KEYRING, _SETPERM = 1, 5
_FOR_ROOT = 0x003F0000  # KEY_USR_ALL, and nothing for a possessor (include/uapi/linux/keyctl.h, linux/key.h)
logger = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


def leave() -> bool:
    """Let this thread, and what it starts from now on, have a session keyring that gives nothing.

    False where keyrings are not known: not to the kernel, or not to us for this kind of processor.  When the kernel refuses
    (its quota, for one), that is logged: what is to run comes before what hardly anybody uses.
    """
    number = _NUMBERS.get(platform.machine())
    if number is None:
        return False
    try:
        made = _keyctl(number, _JOIN_SESSION_KEYRING, None)
        _keyctl(number, _SETPERM, ctypes.c_uint(made), ctypes.c_uint(_FOR_ROOT))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            logger.warning("the session keyring stays shared by all partitions: %s", error)
        return False
    return True


def _keyctl(number: int, operation: int, *arguments: object) -> int:
    result = _libc.syscall(ctypes.c_long(number), ctypes.c_int(operation), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"keyctl: {os.strerror(code)}")
    return int(result)
