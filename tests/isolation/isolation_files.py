"""What a user tries with files, directories, devices and Unix sockets of others.  Each attempt ends in OSError, or got in."""

import contextlib
import ctypes
import errno
import fcntl
import http.client
import os
import socket
import stat
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100


def system(result):
    """The result of a function of libc, or its error."""
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def refused(number=errno.EACCES):
    raise OSError(number, os.strerror(number))


def opened(path, flags):
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))


def list_directory(path):
    os.listdir(path)


def named(path, name):
    if name not in os.listdir(path):
        refused(errno.ENOENT)


def enter(path):
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path)
    finally:
        os.fchdir(here)
        os.close(here)


def look_inside(path):
    os.lstat(path)


def read(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.pread(descriptor, 16, 0)
    finally:
        os.close(descriptor)


def write(path):
    opened(path, os.O_WRONLY)


def append(path):
    opened(path, os.O_WRONLY | os.O_APPEND)


def truncate(path):
    opened(path, os.O_WRONLY | os.O_TRUNC)


def create(path):
    opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def make_directory(path):
    os.mkdir(path)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def make_link(path):
    os.symlink("/etc/shadow", path)


def rename(path, target):
    os.rename(path, target)


def take(path, home):
    os.rename(path, os.path.join(home, f"taken-{abs(hash(path))}"))


def remove(path):
    os.unlink(path)


def remove_directory(path):
    os.rmdir(path)


def open_up(path):
    os.chmod(path, 0o777 if stat.S_ISDIR(os.lstat(path).st_mode) else 0o666)


def hand_over(path):
    os.chown(path, os.getuid(), -1)


def touch(path):
    os.utime(path, (1, 1))


def set_attribute(path):
    os.setxattr(path, "user.matrix", b"x")


def set_list(path):
    """An access control list that lets this user in (include/uapi/linux/posix_acl_xattr.h)."""
    uid, none = os.getuid(), 0xFFFFFFFF
    rows = ((1, 7, none), (2, 7, uid), (4, 7, none), (16, 7, none), (32, 0, none))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)
    os.setxattr(path, "system.posix_acl_access", value)


def hard_link(path, home):
    target = os.path.join(home, f"linked-{abs(hash(path))}")
    os.link(path, target)
    os.unlink(target)


def bind_by_handle(path):
    """A file by its handle, past the directories above (open_by_handle_at(2))."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    system(_LIBC.name_to_handle_at(AT_FDCWD, path.encode(), handle, ctypes.byref(mount), 0))
    base = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.close(system(_LIBC.open_by_handle_at(base, handle, os.O_RDONLY)))
    finally:
        os.close(base)


def watch(path):
    """Be told of what happens there (inotify(7))."""
    descriptor = system(_LIBC.inotify_init1(os.O_CLOEXEC))
    try:
        system(_LIBC.inotify_add_watch(descriptor, path.encode(), 0xFFF))
    finally:
        os.close(descriptor)


def watch_whole(path):
    """The same by fanotify(7): FAN_REPORT_FID asks for no privilege since Linux 5.13."""
    descriptor = system(_LIBC.fanotify_init(0x200, os.O_RDONLY))
    try:
        mask = ctypes.c_uint64(0x2)  # FAN_MODIFY
        system(_LIBC.fanotify_mark(descriptor, 1, mask, AT_FDCWD, path.encode()))
    finally:
        os.close(descriptor)


def execute(path):
    pid = os.posix_spawn(
        path, [path], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    )
    if os.waitpid(pid, 0)[1]:
        refused(errno.ENOEXEC)


def open_pin(path):
    """What is pinned in a bpffs, by bpf(2): BPF_OBJ_GET."""
    name = ctypes.create_string_buffer(path.encode())
    attributes = struct.pack("=QII", ctypes.addressof(name), 0, 0)
    number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
    os.close(system(_LIBC.syscall(number, 7, attributes, len(attributes))))


def node_again(path, home, rdev):
    """A device node of one's own with the numbers of another's device."""
    target = os.path.join(home, f"node-{rdev}")
    os.mknod(target, stat.S_IFBLK | 0o600, rdev)
    os.unlink(target)


def device_read(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.pread(descriptor, 512, 0)
    finally:
        os.close(descriptor)


def device_write(path):
    """Write what is there again."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, os.pread(descriptor, 512, 0), 0)
    finally:
        os.close(descriptor)


def device_control(path):
    """BLKFLSBUF needs a privilege, BLKGETSIZE64 only an open descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, 0x80081272, bytes(8))
    finally:
        os.close(descriptor)


def attach(name, flags):
    """Be the program behind a tap or tun (TUNSETIFF)."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), flags | 0x1000))
    finally:
        os.close(descriptor)


def set_link(name, request, value):
    """SIOCSIFFLAGS, SIOCSIFHWADDR, SIOCSIFMTU… of a network interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, request, struct.pack("16s24s", name.encode(), bytes.fromhex(value)))


def reach_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        try:
            sock.connect(path)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # it is one of datagrams
                raise
            reach_datagram(path)


def reach_datagram(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", path)


class _Unix(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


def ask(path, method, target, body, needle):
    """HTTP on a Unix socket: got in by whatever answer that is no refusal and names what is looked for."""
    with contextlib.closing(_Unix(path)) as connection:
        connection.request(method, target, body or None)
        answer = connection.getresponse()
        said = answer.read()
    if answer.status in (401, 403, 404, 429, 503) or needle.encode() not in said:
        refused()
    return answer.status


ATTEMPTS = {
    "list": list_directory,
    "named": named,
    "enter": enter,
    "look inside": look_inside,
    "read": read,
    "write": write,
    "append": append,
    "truncate": truncate,
    "create": create,
    "mkdir": make_directory,
    "mkfifo": make_fifo,
    "bind a socket": make_socket,
    "symlink": make_link,
    "rename": rename,
    "take away": take,
    "delete": remove,
    "rmdir": remove_directory,
    "chmod": open_up,
    "chown": hand_over,
    "utime": touch,
    "setxattr": set_attribute,
    "set acl": set_list,
    "hard link": hard_link,
    "by handle": bind_by_handle,
    "inotify": watch,
    "fanotify": watch_whole,
    "execute": execute,
    "open pin": open_pin,
    "mknod again": node_again,
    "read device": device_read,
    "write device": device_write,
    "ioctl device": device_control,
    "attach": attach,
    "set link": set_link,
    "connect": reach_socket,
    "datagram": reach_datagram,
    "ask": ask,
}
