"""What a hostile user may put in root's way, canaries that must stay as they are, and a bound for what root does."""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import select
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

PATIENCE = 30.0
# what must not block may take this long on a busy machine; what blocks here takes 45 s (a lease) or for ever
PROMPT = 5.0
GIANT = 10 << 40
_RENAME_EXCHANGE = 2  # include/uapi/linux/fs.h
_MNT_DETACH = 2
_FS_IOC_SETFLAGS = 0x40086602
_libc = ctypes.CDLL(None, use_errno=True)


class Canary:
    """Root's files outside, one of them a secret; any reading, writing or changing of them shows."""

    def __init__(self, base):
        self.root = base / f"canary-{secrets.token_hex(3)}"
        self.secret = b"SECRET-" + secrets.token_hex(16).encode()
        self.directory = self.root / "directory"
        self.file = self.root / "file"
        self.directory.mkdir(parents=True)
        self.root.chmod(0o755)
        self.directory.chmod(0o755)
        for path in (self.file, self.directory / "x.cfg", self.directory / "prog", self.directory / "tunnel"):
            path.write_bytes(self.secret)
            path.chmod(0o600)
        # what a walk through a link would find: the same names as in the partition
        (self.directory / "sub").mkdir()
        (self.directory / "sub" / "file").write_bytes(self.secret)
        self.set()

    def set(self):
        """Take the present state as the right one."""
        for path in self._all():
            # an access time before the change time is what relatime renews at a reading
            os.utime(path, ns=(1, os.lstat(path).st_mtime_ns), follow_symlinks=False)
        self.before = self.look()

    def look(self):
        found = {}
        for path in self._all():
            one = os.lstat(path)
            content = b""
            if stat.S_ISREG(one.st_mode):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
                content = os.read(descriptor, 1000)
                os.close(descriptor)
            found[str(path)] = (
                one.st_mode,
                one.st_uid,
                one.st_gid,
                one.st_mtime_ns,
                one.st_atime_ns,
                one.st_size,
                content,
            )
        return found

    def _all(self):
        paths, pending = [self.root], [self.root]
        while pending:
            here = pending.pop()
            descriptor = os.open(here, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
            for name in os.listdir(descriptor):  # noqa: PTH208 - by descriptor, so that the access time stays
                paths.append(here / name)
                if (here / name).is_dir():
                    pending.append(here / name)
            os.close(descriptor)
        return sorted(paths)

    def changes(self):
        """What is not as it was, by path."""
        now = self.look()
        return sorted(
            path for path in self.before.keys() | now.keys() if self.before.get(path) != now.get(path)
        )

    def leaks(self, text):
        return self.secret in (
            text if isinstance(text, bytes) else str(text).encode("utf-8", "backslashreplace")
        )

    def leaks_below(self, *roots):
        """Files of these trees that hold the secret; a hard link to it is the hostile thing itself."""
        own = {(one.st_dev, one.st_ino) for one in (os.lstat(path) for path in self._all())}
        found = []
        for root in roots:
            for top, _, names in os.walk(root):
                for name in names:
                    path = os.path.join(top, name)
                    one = os.lstat(path)
                    small = stat.S_ISREG(one.st_mode) and one.st_size < 1 << 20
                    if small and (one.st_dev, one.st_ino) not in own and self.secret in _content(path):
                        found.append(path)
        return found


def _content(path):
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 1 << 20)
    finally:
        os.close(descriptor)


class HungError(AssertionError):
    pass


def within(seconds, call):
    """Call in a thread of its own; give (result, error, seconds taken), or fail when it does not end in time."""
    box = []

    def run():
        try:
            box.append((call(), None))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller judges it
            box.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        frame = sys._current_frames().get(thread.ident)
        raise HungError(f"still at it after {seconds} s:\n" + "".join(traceback.format_stack(frame)[-4:]))
    return (*box[0], time.monotonic() - began)


# --- hostile things ---------------------------------------------------------------------------------------------------

_LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.pause()
"""


class Hostile:
    """One thing at one path, made as its user would; undone by ``close``."""

    def __init__(self, kind, path, uid, canary):
        self.path, self.uid, self.canary = Path(path), uid, canary
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._remove)
        try:
            getattr(self, f"_{kind}")()
            if kind not in ("hard_link", "fuse", *OPERATORS):
                os.lchown(self.path, uid, uid)
        except BaseException:
            self.close()
            raise

    def close(self):
        self._stack.close()

    def _remove(self):
        remove(self.path)

    def _link_to_file(self):
        self.path.symlink_to(self.canary.file)

    def _link_to_directory(self):
        self.path.symlink_to(self.canary.directory)

    def _link_to_nothing(self):
        self.path.symlink_to(self.canary.root / "nothing")

    def _link_to_itself(self):
        self.path.symlink_to(self.path.name)

    def _link_upwards(self):
        self.path.symlink_to("../" * 30 + str(self.canary.directory).lstrip("/"))

    def _hard_link(self):
        os.link(self.canary.file, self.path)

    def _fifo(self):
        os.mkfifo(self.path)

    def _socket(self):
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.open(self.path.parent, os.O_PATH)
            listener.bind(f"/proc/self/fd/{here}/{self.path.name}")
            os.close(here)

    def _device(self):
        os.mknod(self.path, stat.S_IFCHR | 0o666, os.makedev(1, 5))

    def _empty_file(self):
        self.path.write_bytes(b"")
        self.path.chmod(0o755)

    def _junk(self):
        self.path.write_bytes(b"\xff\xfe\0[tunnel]\n\x1b]0;x\x07" + bytes(range(256)))

    def _closed_file(self):
        self.path.write_bytes(b"x")
        self.path.chmod(0)

    def _giant(self):
        with self.path.open("wb") as file:
            file.truncate(GIANT)
        self.path.chmod(0o755)

    def _leased(self):
        self.path.write_bytes(b"x")
        self.path.chmod(0o755)
        os.chown(self.path, self.uid, self.uid)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _LEASE, str(self.path)], user=self.uid, stdout=subprocess.PIPE
        )
        self._stack.callback(_end, child)
        assert child.stdout.readline() == b"held\n"

    def _directory(self):
        self.path.mkdir()

    def _closed_directory(self):
        self.path.mkdir()
        (self.path / "file").write_bytes(b"x")
        self.path.chmod(0)

    def _deep(self):
        self.path.mkdir()
        here = os.open(self.path, os.O_RDONLY)
        for _ in range(10_000):
            os.mkdir("d" * 20, dir_fd=here)
            following = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = following
        os.close(here)

    def _wide(self):
        self.path.mkdir()
        here = os.open(self.path, os.O_RDONLY)
        for number in range(20_000):
            os.close(os.open(f"{number:0>200}", os.O_WRONLY | os.O_CREAT, dir_fd=here))
        os.close(here)

    def _strange_names(self):
        self.path.mkdir()
        for name in strange_names():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(os.fsencode(self.path) + b"/" + name, os.O_WRONLY | os.O_CREAT))

    def _attributed(self):
        self.path.mkdir()
        (self.path / "below").mkdir()
        (self.path / "file").write_bytes(b"x")
        for path in (self.path, self.path / "below", self.path / "file"):
            burden(path, self.uid)

    def _attributed_file(self):
        self.path.write_bytes(b"x")
        self.path.chmod(0o755)
        burden(self.path, self.uid)

    def _full_of_links(self):
        self.path.mkdir()
        (self.path / "a").symlink_to(self.canary.directory)
        (self.path / "b").symlink_to(self.canary.file)
        (self.path / "c").symlink_to("/")
        (self.path / "x.cfg").symlink_to(self.canary.file)
        os.link(self.canary.file, self.path / "prog")

    def _mount(self):
        self.path.mkdir()
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "none", str(self.path)], check=True)
        self._stack.callback(_unmount, self.path)

    def _bind(self):
        self.path.mkdir()
        subprocess.run(["/usr/bin/mount", "--bind", str(self.canary.directory), str(self.path)], check=True)
        self._stack.callback(_unmount, self.path)

    def _fuse(self):
        """A file system of the user's own that nobody answers for, as fusermount3 would mount it."""
        device = Path("/dev/fuse")
        if not device.exists():
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 229))
            self._stack.callback(device.unlink)
        self.path.mkdir()
        os.chown(self.path, self.uid, self.uid)
        descriptor = os.open(device, os.O_RDWR)
        self._stack.callback(os.close, descriptor)
        options = f"fd={descriptor},rootmode=40000,user_id={self.uid},group_id={self.uid}"
        assert _libc.mount(b"hostile", os.fsencode(self.path), b"fuse", 0, options.encode()) == 0, (
            os.strerror(ctypes.get_errno())
        )
        self._stack.callback(_unmount, self.path)

    def _immutable(self):
        self._flagged(0x10)  # FS_IMMUTABLE_FL, include/uapi/linux/fs.h

    def _append_only(self):
        self._flagged(0x20)  # FS_APPEND_FL

    def _flagged(self, flag):
        self.path.write_bytes(b"x")
        os.chown(self.path, self.uid, self.uid)
        # by descriptor: it may be moved with what it lies in
        descriptor = os.open(self.path, os.O_RDONLY)
        self._stack.callback(os.close, descriptor)
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, struct.pack("l", flag))
        self._stack.callback(fcntl.ioctl, descriptor, _FS_IOC_SETFLAGS, struct.pack("l", 0))


FILES = (
    "link_to_file link_to_directory link_to_nothing link_to_itself link_upwards hard_link fifo socket device empty_file junk"
    " closed_file giant leased attributed_file"
).split()
DIRECTORIES = "directory closed_directory deep wide strange_names attributed full_of_links fuse".split()
# what only root can make, so a mistake of the operator's; named, and never followed
OPERATORS = "mount bind immutable append_only".split()
KINDS = (*FILES, *DIRECTORIES, *OPERATORS)


_BURDEN = """
import os, sys
for number in range(400):
    os.setxattr(sys.argv[1], f"user.{number:0>200}", b"")
"""


def burden(path, uid):
    """Give a file to a user, who attaches to it more names than the kernel lists (64 KiB, listxattr(2))."""
    os.chown(path, uid, uid)
    subprocess.run([sys.executable, "-I", "-c", _BURDEN, str(path)], user=uid, group=uid, check=True)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what matters
        os.listxattr(path)
    assert caught.value.errno == errno.E2BIG


def strange_names():
    """Names of files that mean something to a shell, a terminal, a configuration, a path or a format."""
    return (
        b"new\nline",
        b"a\n[program:evil]\ncommand=id",
        b"%(here)s",
        b"%",
        b"%%n",
        b"...",
        b"..\\..",
        b" ",
        b" leading",
        b"trailing ",
        b"-rf",
        b"--help",
        b";id",
        b"#x",
        b"a;b",
        b"a#b",
        b"$(id)",
        b"${buildout:directory}",
        b"`id`",
        b"'\"",
        b"\\",
        b"\x1b]0;owned\x07",
        b"\x1b[2J",
        b"\r\x08",
        b"\x7f\x01",
        b"\xff\xfe\xfd",
        b"\xed\xa0\x80",
        "\u202e\u2028\x85".encode(),
        b"[x]",
        b"*",
        b"x" * 255,
        b"y" * 251 + b".cfg",
        b"\x1b[31m.cfg",
        b"new\nline.cfg",
        b"\xff.cfg",
        b"%(x)s.cfg",
        b"..cfg",
        b"-x.cfg",
        b" .cfg",
        b".slapos-resource\n",
        b".a.0123456789ab.partitiond",
        b".removing-0123456789abcdef",
    )


def _end(child):
    child.kill()
    child.wait()
    child.stdout.close()


def _unmount(path):
    # it may have been moved with what it lies in
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        points = [line.split()[4] for line in table]
    for point in points:
        if point.startswith("/srv/") and point.rpartition("/")[2] == path.name:
            # umount(8) looks at the place first, which a FUSE file system refuses even to root
            assert _libc.umount2(os.fsencode(point), _MNT_DETACH) == 0, os.strerror(ctypes.get_errno())


# --- races ------------------------------------------------------------------------------------------------------------

_SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
swap, one, other = libc.renameat2, os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2])
print("swapping" if swap(-100, one, -100, other, 2) == 0 else "cannot", flush=True)
while True:
    for _ in range(7):
        swap(-100, one, -100, other, 2)
"""


@contextlib.contextmanager
def swapping(one, other, uid):
    """A process of the user that exchanges two names as fast as it can (renameat2(2), RENAME_EXCHANGE)."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", _SWAP, str(one), str(other)], user=uid, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"swapping\n"
        yield
        assert child.poll() is None, "the adversary gave up"
    finally:
        _end(child)


def exchange(one, other):
    assert _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _RENAME_EXCHANGE) == 0


def remove(path):
    """Remove whatever has that name."""
    subprocess.run(["/bin/rm", "-rf", "--", str(path)], check=True)


_HUNT = """
import os, sys
directory, target = sys.argv[1:]
os.chdir(directory)
won = 0
print("hunting", flush=True)
while True:
    for name in os.listdir("."):
        if name.endswith(".partitiond"):
            try:
                os.symlink(target, "bait")
                os.rename("bait", name)
            except OSError:
                continue
            won += 1
            if won == 1:
                print("won", flush=True)
"""


@contextlib.contextmanager
def hunting(directory, target, uid):
    """A process of the user that puts a link to ``target`` in the place of each temporary file of root's that it sees.

    Gives what says whether it ever did.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", _HUNT, str(directory), str(target)], user=uid, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"hunting\n"
        yield lambda: bool(select.select([child.stdout], [], [], PATIENCE)[0])
        assert child.poll() is None, "the adversary gave up"
    finally:
        _end(child)
