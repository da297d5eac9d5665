"""Somebody flushes all nft rules while a guest sends as the router: what gets out, and for how long."""

import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from guard_frames import ARP, BROADCAST, arp, ether
from guard_scene import Guest

from netplan import nftables
from tests.netplan.netplan_scene import inside

MAC = "52:54:00:00:00:77"
ROUTER4 = "192.0.2.1"
PATIENCE = 30


def until(what, question):
    deadline = time.monotonic() + PATIENCE
    while not question():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.002)


def nft(*words):
    done = subprocess.run(["/usr/sbin/nft", "-j", *words], check=False, capture_output=True, text=True)
    return json.loads(done.stdout)["nftables"] if done.returncode == 0 and done.stdout else []


def tables():
    return {one["table"]["family"] for one in nft("list", "tables") if "table" in one}


def is_up(name):
    # IFF_UP; sysfs is that of this sandbox
    return bool(int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & 1)


class Attack(threading.Thread):
    """A guest that says again and again that it is the router, each time with another number."""

    def __init__(self, tap, uid):
        super().__init__()
        self.guest = Guest(tap, uid, MAC, "192.0.2.50")
        self.stopped = threading.Event()
        self.sent = {}

    def run(self):
        number = 0
        while not self.stopped.is_set():
            number += 1
            frame = ether(BROADCAST, MAC, ARP, arp(1, MAC, ROUTER4, f"192.0.2.{1 + number % 250}"))
            frame += number.to_bytes(4, "big")
            self.sent[number] = time.monotonic()
            try:
                self.guest.send(frame)
            except OSError:  # EIO: the tap is down
                del self.sent[number]
            time.sleep(0.0005)

    def end(self):
        self.stopped.set()
        self.join()
        self.guest.close()


class Far(threading.Thread):
    """The far end of the wire: the numbers of the frames that arrived."""

    def __init__(self, router):
        super().__init__()
        namespace = os.open(f"/run/netns/{router}", os.O_RDONLY)
        with inside(namespace):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ARP))
            self.socket.bind(("uplink", ARP))
        os.close(namespace)
        self.socket.settimeout(0.1)
        self.seen, self.stopped = [], threading.Event()

    def run(self):
        while not self.stopped.is_set():
            try:
                frame = self.socket.recv(2048)
            except TimeoutError:
                continue
            if frame[6:12] == bytes.fromhex(MAC.replace(":", "")):
                self.seen.append(int.from_bytes(frame[42:46], "big"))

    def end(self):
        self.stopped.set()
        self.join()
        self.socket.close()


@pytest.fixture
def node(bridge, node_config, command):
    made = node_config(3, partitiond={"bridge": bridge.name, "tap_guard": "strict"})
    daemon = command.start("-c", made.path, "run")
    try:
        until(
            "the daemon's start", lambda: (made.root / "run" / "control.sock").exists() and is_up("slaptap2")
        )
        yield made
    finally:
        daemon.terminate()
        _, said = daemon.communicate(timeout=60)
        made.said = said
    assert daemon.returncode == 0, said


def test_a_flush_opens_no_tap_for_long(node, bridge, command, capsys):
    """Where the daemon can hold its tables nothing is flushed; else the taps are down until their guard is back."""
    attack, far = Attack("slaptap0", _uid("slapuser0")), Far(bridge.router)
    far.start()
    attack.start()
    try:
        time.sleep(0.3)
        assert not far.seen, "the guard lets it through"
        assert len(attack.sent) > 20
        began = time.monotonic()
        subprocess.run(["/usr/sbin/nft", "flush", "ruleset"], check=True)
        flushed = time.monotonic()
        held = nftables.knows_persist() and tables() == {"inet", "bridge"}
        until("the guard's return", lambda: tables() == {"inet", "bridge"} and is_up("slaptap0"))
        back = time.monotonic()
        before = set(far.seen)
        time.sleep(0.5)
        assert set(far.seen) <= before | _between(attack.sent, began, back), "still open"
    finally:
        attack.end()
        far.end()
    leaked = sorted(attack.sent[number] for number in far.seen if number in attack.sent)
    lasted = max(leaked) - began if leaked else 0.0
    with capsys.disabled():
        print(
            f"\nflush: {len(leaked)} frames in {lasted * 1000:.0f} ms; all back {(back - began) * 1000:.0f} ms after it ",
            end="",
        )
    if held:
        assert not leaked
        return
    # the taps went down long before the filter was back
    assert lasted < (back - began) * 0.75 + (flushed - began)
    told = command("-c", node.path, "events", "--json").stdout
    repaired = [json.loads(line) for line in told.splitlines() if '"drift.repaired"' in line]
    assert any("filter/partitiond" in one["operations"] for one in repaired)
    assert any("tap/slaptap0" in one["operations"] for one in repaired), "the taps were never down"


def _between(sent, began, ended):
    return {number for number, at in sent.items() if began <= at <= ended}


def _uid(name):
    import pwd

    return pwd.getpwnam(name).pw_uid
