"""A child that is struck at a system call: killed before it, or told that it failed.

By ptrace(2), so that neither the product nor a library is changed: the kernel stops the child at each system call, and those
that are about certain files, by descriptor or by path, are the steps.
"""

import contextlib
import ctypes
import errno
import os
import platform
import signal
import sys
import traceback
from pathlib import Path

# include/uapi/linux/ptrace.h
_TRACEME, _POKEUSER, _SETOPTIONS, _SYSCALL, _GET_SYSCALL_INFO = 0, 6, 0x4200, 24, 0x420E
_SYSGOOD, _EXITKILL = 1, 0x100000
_AT_CALL, _ENTRY = signal.SIGTRAP | 0x80, 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long

CAN_FAIL = platform.machine() == "x86_64"
# struct user_regs_struct (arch/x86/include/asm/user_64.h): the number of the call, and what it returns
_NUMBER_AT, _RESULT_AT = 15 * 8, 10 * 8
# arch/x86/entry/syscalls/syscall_64.tbl: those that write
WRITING = {
    1: "write",
    18: "pwrite64",
    20: "writev",
    74: "fsync",
    75: "fdatasync",
    77: "ftruncate",
    285: "fallocate",
}


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info, at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


def _ptrace(request, pid, address=0, data=0):
    if _LIBC.ptrace(request, pid, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def struck(body, prefix, at, how=signal.SIGKILL):
    """Run ``body`` in a child until its step ``at``; ``how`` is SIGKILL, or the errno that this one step fails with.

    Steps are system calls about files whose path begins with ``prefix``; to fail, only those that write.  Return whether there
    was such a step.  A child that is not killed must come to its end, else AssertionError.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            body()
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it was
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    try:
        return _follow(child, os.fsencode(prefix), at, how)
    finally:
        with contextlib.suppress(ChildProcessError):  # it ended, and was waited for
            os.waitpid(child, os.WNOHANG)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _follow(child, prefix, at, how):
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, 0, _SYSGOOD | _EXITKILL)
    step, pending, reached = 0, False, False
    with open(f"/proc/{child}/mem", "rb", 0) as memory:
        while True:
            _ptrace(_SYSCALL, child)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, "the child failed, see above"
                return reached
            assert os.WIFSTOPPED(status), f"the child died of signal {os.WTERMSIG(status)}"
            if os.WSTOPSIG(status) != _AT_CALL:
                continue  # a signal of its own, which is not passed on
            if pending:
                pending = False
                _ptrace(_POKEUSER, child, _RESULT_AT, -int(how) % 2**64)
                continue
            info = _Info()
            _ptrace(_GET_SYSCALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
            if info.op != _ENTRY or reached or not _is_step(child, memory, info, prefix, how):
                continue
            step += 1
            if step - 1 < at:
                continue
            reached = True
            if how is signal.SIGKILL:
                return True
            _ptrace(_POKEUSER, child, _NUMBER_AT, 2**64 - 1)  # no such call
            pending = True


def _is_step(child, memory, info, prefix, how):
    if how is not signal.SIGKILL and info.number not in WRITING:
        return False
    first, second, *_, fifth, _ = info.arguments
    # mmap(2) has its file as the fifth
    return any(_target(child, one).startswith(prefix) for one in (first, fifth) if one < 1024) or any(
        _text(memory, one).startswith(prefix) for one in (first, second) if one >= 4096
    )


def _target(child, descriptor):
    try:
        return bytes(Path(f"/proc/{child}/fd/{descriptor}").readlink())
    except OSError:
        return b""


def _text(memory, address):
    if address >= 2**47:
        return b""
    try:
        memory.seek(address)
        return memory.read(256).partition(b"\0")[0]
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EFAULT):
            raise
        return b""
