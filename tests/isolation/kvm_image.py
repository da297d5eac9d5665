"""What the guest of the tests boots: Debian's cloud kernel as it is, and an initramfs made here of busybox and its modules.

``tools/guest`` unpacks both packages into ``.build/guest``; nothing of them is installed on the machine.
"""

import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ROOT / ".build/guest"
_SENDER = Path(__file__).with_name("kvm_send.c")
_DRIVER = "virtio_pci", "virtio_net"  # what a guest needs for its network card; the rest is built in

# Runs what is written to its console, line by line, and says how each line ended.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
stty -echo </dev/console
for module in $(cat /modules/order); do insmod /modules/$module || echo "no $module"; done
again() { # some ten seconds
    for n in $(seq 30); do
        "$@" >/tmp/said 2>&1
        ended=$?
        [ $ended = 0 ] && break
        sleep 0.3
    done
    tail -n 4 /tmp/said
    return $ended
}
# a line of the card's addresses, once duplicate address detection has let it be used
settled() { ip -6 address show dev eth0 | grep -v tentative | grep "$1"; }
echo "$(uname -srm), up since $(cut -d ' ' -f 1 /proc/uptime) s"
echo '<<0>>'
while read -r line; do
    echo "guest# $line"
    eval "$line"
    echo "<<$?>>"
done
poweroff -f
"""

# What udhcpc calls with what the server said; without it an address would be leased and not used.
_LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add $ip/$mask dev $interface
ip route add default via $router dev $interface
echo "leased $ip/$mask from $serverid, router $router"
"""


def needed():
    """Skip where Debian has no such kernel; fail where it was not fetched."""
    if platform.machine() != "x86_64":
        pytest.skip(f"the guest's kernel and qemu-system-x86 are for amd64, this is {platform.machine()}")
    if not PACKAGES.is_dir():
        pytest.fail(f"{PACKAGES} is not there: make {ROOT}/.build/test.stamp, or tools/guest {PACKAGES}")


def _only(pattern):
    (found,) = PACKAGES.glob(pattern)
    return found


def kernel():
    return _only("boot/vmlinuz-*")


def busybox():
    return _only("**/bin/busybox")


# --- modules --------------------------------------------------------------------------------------------------------------


def _content(path):
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data  # .xz since Debian 13


def modules():
    """The modules of the network card by name, each behind what it depends on."""
    files = {path.name.partition(".")[0]: path for path in PACKAGES.glob("**/*.ko*")}
    found = {}

    def add(name):
        if name in found or name not in files:  # else it is built in
            return
        data = _content(files[name])
        (depends,) = re.findall(rb"\0depends=([^\0]*)\0", b"\0" + data)  # the section .modinfo
        for other in filter(None, depends.decode().split(",")):
            add(other)
        found[name] = data

    for name in _DRIVER:
        add(name)
    assert "virtio_net" in found
    return found


# --- the initramfs --------------------------------------------------------------------------------------------------------


def _entry(number, name, mode, content=b""):
    """One entry of an archive in the format newc: Documentation/driver-api/early-userspace/buffer-format.rst."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def initramfs(path):
    """Write the archive that the guest's kernel unpacks: /init, busybox, the modules and the sender of frames."""
    sender = path.with_suffix(".sender")
    subprocess.run(["gcc", "-static", "-Os", "-Wall", "-Werror", "-o", sender, _SENDER], check=True)
    files = {
        "init": _INIT.encode(),
        "lease": _LEASE.encode(),
        "bin/busybox": busybox().read_bytes(),
        "bin/send": sender.read_bytes(),
    }
    sender.unlink()
    parts = modules()
    files |= {f"modules/{name}": data for name, data in parts.items()}
    files["modules/order"] = "\n".join(parts).encode()
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "modules", "proc", "tmp")]
    entries += [(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    path.write_bytes(b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1)))


def place(directory, uid, gid):
    """Put kernel and initramfs where a release has its images: files of the partition's user. Return both."""
    images = directory / "vmlinuz", directory / "initramfs"
    shutil.copyfile(kernel(), images[0])
    initramfs(images[1])
    for path in images:
        os.chown(path, uid, gid)
        path.chmod(0o600)
    return images
