"""What a user tries with the processes of others and with what processes share: memory, queues, keys, namespaces.

Also here: what an owner lays out so that there is something to be found.
"""

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import traceback
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.shmat.restype = ctypes.c_void_p
_LIBC.syscall.restype = ctypes.c_long
NEWNS, NEWUSER = 0x20000, 0x10000000
# system calls of x86_64 and of arm64 (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h)
_NUMBERS = {
    "x86_64": (
        "keyctl 250 add_key 248 mq_open 240 mq_unlink 241 kcmp 312 ioprio_set 251 perf_event_open 298"
        " get_robust_list 274 pidfd_getfd 438 process_madvise 440 rt_sigqueueinfo 129 move_pages 279"
    ),
    "aarch64": (
        "keyctl 219 add_key 217 mq_open 180 mq_unlink 181 kcmp 272 ioprio_set 30 perf_event_open 241"
        " get_robust_list 100 pidfd_getfd 438 process_madvise 440 rt_sigqueueinfo 138 move_pages 239"
    ),
}[os.uname().machine].split()


def system(result):
    if result is None or result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(name, *arguments):
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return system(_LIBC.syscall(ctypes.c_long(int(_NUMBERS[_NUMBERS.index(name) + 1])), *wide))


def missing():
    raise OSError(errno.ENOENT, "not seen")


def in_child(work, *arguments):
    """Do it in a child of one thread, which may leave its namespaces or stay somebody's tracer; pass on its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            work(*arguments)
        except OSError as error:
            status = error.errno or 255
        except BaseException:  # noqa: BLE001 - a forked child reports and ends, whatever it was
            traceback.print_exc()
            status = 254
        finally:
            os.write(writing, bytes((status,)))
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 1)
    os.close(reading)
    os.waitpid(pid, 0)
    if not said or said[0]:
        number = said[0] if said else errno.ECHILD
        raise OSError(number, os.strerror(number))


# --- /proc --------------------------------------------------------------------------------------------------------------------


def seen(pid):
    if str(pid) not in os.listdir("/proc"):
        missing()


def proc_read(pid, name):
    descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
    try:
        if name != "mem":
            os.read(descriptor, 8)  # pagemap wants so many
    finally:
        os.close(descriptor)


def proc_write(pid, name):
    descriptor = os.open(f"/proc/{pid}/{name}", os.O_WRONLY)
    try:
        if name == "timerslack_ns":  # opens for all, and asks when something is written
            os.write(descriptor, b"50000")
    finally:
        os.close(descriptor)


def proc_list(pid, name):
    os.listdir(f"/proc/{pid}/{name}")


def proc_link(pid, name):
    os.readlink(f"/proc/{pid}/{name}")


def through_root(pid, path):
    os.stat(f"/proc/{pid}/root{path}")


def through_cwd(pid):
    os.listdir(f"/proc/{pid}/cwd")


def standing_files(pid):
    """A descriptor of another, opened again."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            os.close(os.open(f"/proc/{pid}/fd/{name}", os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        return
    missing()


# --- signals, tracing, scheduling ---------------------------------------------------------------------------------------------


def kill(pid, number):
    os.kill(pid, number)


def queue_signal(pid):
    info = struct.pack("iii", signal.SIGUSR1, 0, -1) + bytes(116)
    call("rt_sigqueueinfo", pid, int(signal.SIGUSR1), info)


def kill_by_descriptor(pid):
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGUSR1)
    finally:
        os.close(descriptor)


def take_descriptor(pid):
    descriptor = os.pidfd_open(pid)
    try:
        os.close(call("pidfd_getfd", descriptor, 0, 0))
    finally:
        os.close(descriptor)


def _attach(pid, request):
    system(_LIBC.ptrace(request, pid, None, None))
    if request == 16:  # PTRACE_ATTACH stops it; the end of the tracer lets it go on
        os.waitpid(pid, 0x40000000)  # __WALL


def trace(pid, request):
    in_child(_attach, pid, request)


def read_memory(pid):
    own, far = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
    local = struct.pack("PN", ctypes.addressof(own), 8)
    remote = struct.pack("PN", ctypes.addressof(far), 8)
    try:
        system(_LIBC.process_vm_readv(pid, local, 1, remote, 1, 0))
    except OSError as error:
        if error.errno != errno.EFAULT:  # allowed, only that there is nothing at that place
            raise


def renice(pid):
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))
    os.setpriority(os.PRIO_PROCESS, pid, 1)


def renice_user(uid):
    os.setpriority(os.PRIO_USER, uid, 2)


def pin(pid):
    os.sched_setaffinity(pid, os.sched_getaffinity(pid))


def reschedule(pid):
    os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def io_priority(pid):
    call("ioprio_set", 1, pid, (2 << 13) | 5)


def compare(pid):
    call("kcmp", os.getpid(), pid, 2, 0, 0)


def robust_list(pid):
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    call("get_robust_list", pid, ctypes.byref(head), ctypes.byref(size))


def advise(pid):
    """Nothing to advise: allowed or not is asked first (mm/madvise.c)."""
    descriptor = os.pidfd_open(pid)
    try:
        call("process_madvise", descriptor, struct.pack("PN", 0, 0), 1, 20, 0)
    finally:
        os.close(descriptor)


def move_pages(pid):
    call("move_pages", pid, 0, None, None, None, 0)


def profile(pid):
    attributes = struct.pack("IIQ", 1, 112, 1) + bytes(24) + struct.pack("Q", 1 << 5 | 1 << 6) + bytes(64)
    os.close(call("perf_event_open", attributes[:112], pid, -1, -1, 8))


# --- what processes share -----------------------------------------------------------------------------------------------------


def shared_memory(key):
    identity = system(_LIBC.shmget(key, 0, 0))
    address = _LIBC.shmat(identity, None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        system(-1)
    system(_LIBC.shmdt(ctypes.c_void_p(address)))


def shared_memory_by_number(number, name):
    """By number: one's own may have the same, so the content tells."""
    address = _LIBC.shmat(number, None, 0o10000)  # SHM_RDONLY
    if address in (None, ctypes.c_void_p(-1).value):
        system(-1)
    found = ctypes.string_at(address)
    system(_LIBC.shmdt(ctypes.c_void_p(address)))
    if found != name.encode():
        missing()


def queue(key):
    identity = system(_LIBC.msgget(key, 0))
    system(_LIBC.msgrcv(identity, ctypes.create_string_buffer(64), 8, 0, 0o4000))  # IPC_NOWAIT


def semaphore(key):
    identity = system(_LIBC.semget(key, 0, 0))
    system(_LIBC.semop(identity, struct.pack("Hhh", 0, 1, 0o4000), 1))


def listed(kind, key):
    if not any(str(key) == line.split()[0] for line in Path("/proc/sysvipc", kind).read_text().splitlines()):
        missing()


def posix_queue(name):
    os.close(call("mq_open", name.encode(), os.O_RDWR | os.O_NONBLOCK, 0, None))


def abstract(name):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(f"\0{name}")


def key(description):
    """A key in the session keyring, which a child inherits from its parent (session-keyring(7))."""
    number = call(
        "keyctl", 10, -3, b"user", description.encode(), 0
    )  # KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING
    call("keyctl", 11, number, ctypes.create_string_buffer(16), 16)  # KEYCTL_READ


# --- namespaces ---------------------------------------------------------------------------------------------------------------


def _be_root(flags):
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        system(_LIBC.unshare(flags))
        system(_LIBC.mount(None, b"/", None, 1 << 18 | 16384, None))  # MS_PRIVATE, MS_REC: nothing comes back
        return
    system(_LIBC.unshare(NEWUSER | flags))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _uncover(covered, probe):
    if os.path.exists(probe):
        return
    _be_root(NEWNS)
    for _ in range(4):
        if _LIBC.umount2(covered.encode(), 2) != 0:  # MNT_DETACH
            break
    os.stat(probe)


def uncover(covered, probe):
    in_child(_uncover, covered, probe)


def _mount_proc(probe):
    _be_root(NEWNS)
    system(_LIBC.mount(b"proc", b"/proc", b"proc", 0, None))
    os.stat(probe)


def mount_proc(probe):
    in_child(_mount_proc, probe)


def _read_as_root(path):
    _be_root(NEWNS)
    with open(path, "rb") as stream:
        stream.read(1)


def read_as_root(path):
    in_child(_read_as_root, path)


def _overlay(path):
    _be_root(NEWNS)
    system(_LIBC.mount(b"overlay", b"/mnt", b"overlay", 0, f"lowerdir={path}:/usr".encode()))
    os.listdir("/mnt")


def overlay(path):
    in_child(_overlay, path)


def _bind_mount(path):
    _be_root(NEWNS)
    system(_LIBC.mount(path.encode(), b"/mnt", None, 4096, None))
    os.listdir("/mnt")


def bind_mount(path):
    in_child(_bind_mount, path)


def _privileged_socket(family, kind, protocol):
    _be_root(NEWNS)
    socket.socket(family, kind, protocol).close()


def privileged_socket(family, kind, protocol):
    """As root of a user namespace that does not own the network."""
    in_child(_privileged_socket, family, kind, protocol)


def _join(path, kind):
    with open(path, "rb") as stream:
        system(_LIBC.setns(stream.fileno(), kind))


def join(path, kind):
    in_child(_join, path, kind)


def _join_process(pid, kind):
    system(_LIBC.setns(os.pidfd_open(pid), kind))


def join_process(pid, kind):
    in_child(_join_process, pid, kind)


def _descriptors():
    """What was open before this program opened anything."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that lists
            continue
    return found


AT_START = _descriptors()


def inherited():
    """A descriptor beyond the first three, or one of these that is no pipe: a directory of root's would be a way out."""
    for number, target in AT_START.items():
        if number > 2 or not target.startswith(("pipe:", "/dev/null")):
            return f"{number} {target}"
    return missing()


def knows(name):
    """A variable that whoever started the product had in its environment."""
    if name not in os.environ:
        missing()


def belongs(allowed):
    """A group beyond those that are allowed."""
    more = {*os.getgroups(), os.getgid(), os.getegid()} - set(allowed)
    if not more:
        missing()
    return sorted(more)


def there(how, pid):
    """What any user may ask of a process by its number."""
    {
        "getsid": os.getsid,
        "affinity": os.sched_getaffinity,
        "pidfd": lambda one: os.close(os.pidfd_open(one)),
    }[how](pid)


def privileged():
    """A capability."""
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        if int(status[name], 16):
            return f"{name} {status[name]}"
    return missing()


def owns_new_privileges():
    """Whether a setuid program would still make it another user."""
    if "NoNewPrivs:\t1" in Path("/proc/self/status").read_text():
        raise OSError(errno.EPERM, "")


# --- what is there to be found ------------------------------------------------------------------------------------------------


def _lay_out_shared(what):
    number = what["key"]
    shm = system(_LIBC.shmget(number, 4096, 0o1666))  # IPC_CREAT
    address = _LIBC.shmat(shm, None, 0)
    ctypes.memmove(address, what["name"].encode(), len(what["name"]) + 1)
    system(_LIBC.shmdt(ctypes.c_void_p(address)))
    queue_number = system(_LIBC.msgget(number, 0o1666))
    for _ in range(20):
        system(_LIBC.msgsnd(queue_number, struct.pack("l8s", 1, b"secret"), 8, 0))
    system(_LIBC.semget(number, 1, 0o1666))
    mask = os.umask(0)
    try:
        attributes = struct.pack("llll32x", 0, 4, 64, 0)
        os.close(call("mq_open", what["name"].encode(), os.O_RDWR | os.O_CREAT, 0o666, attributes))
    finally:
        os.umask(mask)
    _keep_key(what["name"].encode())
    return shm


def _keep_key(name):
    """Put a key into the session keyring, into a new one of its own where the inherited one is closed (session-keyring(7))."""
    try:
        call("add_key", b"user", name, b"secret", 6, -3)
    except PermissionError:
        call("keyctl", 1, None)  # KEYCTL_JOIN_SESSION_KEYRING
        call("add_key", b"user", name, b"secret", 6, -3)


def lay_out(kept, what):
    """Make what others look for: open to all by its own mode, as a careless tenant leaves it.

    ``files`` are written and opened to all, ``directories`` too; ``sockets`` listen.  Says which number the memory has.
    """
    for path in what["directories"]:
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o777)
    for path in what["files"]:
        Path(path).write_bytes(b"#!/bin/sh\n")
        os.chmod(path, 0o777)
    for path in what["sockets"]:
        sock = kept[f"unix {path}"] = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        if not path.startswith("\0"):
            os.chmod(path, 0o777)
        sock.listen(64)
    return {"shm": _lay_out_shared(what)}


def take_up(kept, what):
    """The opposite, for what outlives a process."""
    for path in what["sockets"]:
        kept.pop(f"unix {path}").close()
    for path in (*what["files"], *(one for one in what["sockets"] if one[0] == "/")):
        with contextlib.suppress(FileNotFoundError):  # somebody got at it
            os.unlink(path)
    os.rmdir(what["temporary"])
    for get, control, words in (
        *((_LIBC.shmget, _LIBC.shmctl, (0,)), (_LIBC.msgget, _LIBC.msgctl, ())),
        (_LIBC.semget, _LIBC.semctl, (0,)),
    ):
        number = system(get(what["key"], *words, 0))
        system(control(number, *([0] if get is _LIBC.semget else []), 0, None))  # IPC_RMID
    call("mq_unlink", what["name"].encode())


ATTEMPTS = {
    "seen": seen,
    "proc read": proc_read,
    "proc write": proc_write,
    "proc list": proc_list,
    "proc link": proc_link,
    "through root": through_root,
    "through cwd": through_cwd,
    "standing files": standing_files,
    "kill": kill,
    "sigqueue": queue_signal,
    "kill by descriptor": kill_by_descriptor,
    "take descriptor": take_descriptor,
    "ptrace": trace,
    "read memory": read_memory,
    "renice": renice,
    "renice user": renice_user,
    "affinity": pin,
    "scheduler": reschedule,
    "ioprio": io_priority,
    "kcmp": compare,
    "robust list": robust_list,
    "madvise": advise,
    "move pages": move_pages,
    "perf": profile,
    "shm": shared_memory,
    "shm by number": shared_memory_by_number,
    "msg": queue,
    "sem": semaphore,
    "sysvipc": listed,
    "mqueue": posix_queue,
    "abstract": abstract,
    "key": key,
    "uncover": uncover,
    "mount proc": mount_proc,
    "read as root": read_as_root,
    "overlay": overlay,
    "bind mount": bind_mount,
    "privileged socket": privileged_socket,
    "join": join,
    "join process": join_process,
    "inherited": inherited,
    "knows": knows,
    "belongs": belongs,
    "there": there,
    "privileged": privileged,
    "new privileges": owns_new_privileges,
}
