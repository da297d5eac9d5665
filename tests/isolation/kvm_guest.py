"""A kvm tenant: qemu as a partition's user on that partition's tap, and a console to say what the guest shall do."""

import contextlib
import os
import pwd
import re
import selectors
import subprocess
import time

QEMU = "/usr/bin/qemu-system-x86_64"
_BOOT, _COMMAND, _END = 60.0, 30.0, 20.0  # seconds: bounds for what hangs, some ten times what it takes
_DONE = re.compile(rb"<<(\d+)>>\r?\n")


def command_line(tap, mac, images):
    """As SlapOS' kvm releases start it, but without a disk and with emulation, for which no device need be opened."""
    kernel, initramfs = images
    return [
        *(QEMU, "-accel", "tcg", "-machine", "pc", "-m", "192M", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-no-reboot", "-kernel", kernel, "-initrd", initramfs),
        *("-append", "console=ttyS0 quiet panic=-1"),
        *("-netdev", f"tap,id=lan,ifname={tap},script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev=lan,mac={mac},romfile="),
    ]


class Guest:
    """One guest that runs. ``console`` is all that it said, ``does`` has it do something."""

    def __init__(self, process, mac):
        self._process, self.mac, self.console = process, mac, b""
        self._said = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(process.stdout, selectors.EVENT_READ)
        os.set_blocking(process.stdout.fileno(), False)

    def _until_done(self, patience):
        end = time.monotonic() + patience
        while not (found := _DONE.search(self._said)):
            if self._selector.select(max(0.0, end - time.monotonic())):
                more = os.read(self._process.stdout.fileno(), 65536)
                assert more, f"the guest ended: {self.text()}"
                self.console += more
                self._said += more
            else:
                assert time.monotonic() < end, f"the guest does not answer: {self.text()}"
        before, self._said = self._said[: found.start()], self._said[found.end() :]
        return int(found[1]), before.decode(errors="replace").replace("\r", "")

    def boot(self):
        status, _ = self._until_done(_BOOT)
        assert status == 0

    def does(self, line):
        """Run a line of shell in the guest, which must succeed; return what it printed."""
        assert "\n" not in line
        assert len(line) < 4000  # a terminal takes 4096 bytes a line (termios(3))
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        status, said = self._until_done(_COMMAND)
        assert status == 0, f"{status}: {said}"
        return said.partition("\n")[2]  # behind the line itself

    def power_off(self):
        """Let the guest end qemu, as a shutdown from inside does."""
        self._process.stdin.write(b"poweroff -f\n")
        self._process.stdin.flush()
        assert self._process.wait(_END) == 0

    def text(self):
        """The console as a log shows it: frames cut short, the marks of ended lines away."""
        lines = _DONE.sub(b"\n", self.console).decode(errors="replace").replace("\r", "").splitlines()
        return "\n".join(line if len(line) <= 110 else f"{line[:109]}…" for line in lines if line)

    def close(self):
        self._selector.close()


@contextlib.contextmanager
def booted(user, tap, mac, images):
    """A guest that waits for its first command; it is gone afterwards, powered off or not."""
    owner = pwd.getpwnam(user)
    switch = ["--reuid", str(owner.pw_uid), "--regid", str(owner.pw_gid), "--init-groups", "--no-new-privs"]
    process = subprocess.Popen(
        ["/usr/bin/setpriv", *switch, "--pdeathsig", "KILL", "--", *command_line(tap, mac, images)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=owner.pw_dir,
        env={"PATH": "/usr/bin:/bin"},
    )
    guest = Guest(process, mac)
    try:
        guest.boot()
        yield guest
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()
        guest.close()
