"""A node's network as an operator has it: eth0 with the node's own addresses, and a neighbour at the other end of the wire.

Also here: packets made by hand, so that a test needs no guest and no ping(8), and slapformat's own words about a node.
"""

import contextlib
import ctypes
import json
import os
import pwd
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

from slap_client.marshal import dumps, loads
from slap_client.values import Instance

PATIENCE = 20.0
SYS = Path("/proc/sys/net")
NODE4, NEIGHBOUR4 = "192.0.2.2", "192.0.2.1"
NODE6, NEIGHBOUR6 = "2001:db8:1::1", "2001:db8:1::ffff"
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*arguments):
    return subprocess.run(["/usr/sbin/ip", *arguments], check=True, capture_output=True, text=True).stdout


def ip_lines(*lines, namespace=None):
    where = ["-n", namespace] if namespace else []
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(["/usr/sbin/ip", *where, "-batch", "-"], input=text, text=True, check=True)


def links():
    return {name for _, name in socket.if_nameindex()}


def addresses(link):
    """Addresses of a link by text, with their prefix length; none that the kernel made itself."""
    found = json.loads(ip("-j", "address", "show", "dev", link))[0]["addr_info"]
    return {one["local"]: one["prefixlen"] for one in found if not one["local"].startswith("fe80:")}


def mac(link):
    return json.loads(ip("-j", "link", "show", "dev", link))[0]["address"]


def mtu(link):
    return json.loads(ip("-j", "link", "show", "dev", link))[0]["mtu"]


def routes():
    """Every route and rule as ip(8) prints it; without what the kernel makes for link-local addresses by itself."""
    lines = ip("route", "show", "table", "all") + ip("-6", "route", "show", "table", "all")
    kept = {line for line in lines.splitlines() if not {"fe80", "ff00"} & {word[:4] for word in line.split()}}
    return sorted(kept) + ip("rule").splitlines() + ip("-6", "rule").splitlines()


@contextlib.contextmanager
def inside(namespace):
    """Open sockets in a named namespace: they stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        assert _LIBC.setns(there, _CLONE_NEWNET) == 0
        yield
    finally:
        assert _LIBC.setns(home, _CLONE_NEWNET) == 0
        os.close(home)
        os.close(there)


class Wire:
    """eth0 of the node, and ``wire`` of the neighbour in the namespace ``lan``, who is its router, too."""

    name = "lan"
    _KEPT = (
        *("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/ip_nonlocal_bind"),
        *("ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6"),
        *(f"bridge/bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables", "arptables")),
    )

    def up(self, *, ipv6=True):
        self.kept = {one: (SYS / one).read_text() for one in self._KEPT if (SYS / one).exists()}
        ip_lines(
            "link set lo up",
            f"netns add {self.name}",
            f"link add eth0 type veth peer name wire netns {self.name}",
            "link set eth0 address 52:54:00:00:00:01",
            "link set eth0 up",
            f"address add {NODE4}/24 dev eth0",
            f"route add default via {NEIGHBOUR4}",
        )
        ip_lines(
            "link set lo up", "link set wire up", f"address add {NEIGHBOUR4}/24 dev wire", namespace=self.name
        )
        if ipv6:
            ip_lines(
                f"address add {NODE6}/64 dev eth0 nodad",
                f"route add default via {NEIGHBOUR6} dev eth0",
            )
            ip_lines(f"address add {NEIGHBOUR6}/64 dev wire nodad", namespace=self.name)
        return self

    def down(self):
        ip_lines(
            *(f"link delete {name}" for name in sorted(links() - {"lo"}) if name in ("eth0", "br0", "gw0"))
        )
        ip("netns", "delete", self.name)
        for one, value in self.kept.items():
            if (SYS / one).read_text() != value:
                (SYS / one).write_text(value)

    def inside(self):
        return inside(self.name)

    def sees(self, *lines):
        """Run lines of ip(8) at the neighbour."""
        ip_lines(*lines, namespace=self.name)


@contextlib.contextmanager
def standing_wire(**how):
    made = Wire()
    try:
        yield made.up(**how)
    finally:
        made.down()


# --- packets by hand ------------------------------------------------------------------------------------------------------


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(address, *, patience=PATIENCE):
    """Whether the address answers an echo request within some seconds: sent from the namespace of this thread."""
    six = ":" in address
    family, protocol = (socket.AF_INET6, 58) if six else (socket.AF_INET, 1)
    token = os.urandom(8)
    body = struct.pack("!BBHHH", 128 if six else 8, 0, 0, os.getpid() & 0xFFFF, 1) + token
    if not six:
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    end = time.monotonic() + patience
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # no neighbour yet
                sock.sendto(body, (address, 0))
            while select.select([sock], [], [], 0.1)[0]:
                answer = sock.recv(2000)
                if token in answer and answer[0 if six else 20] == (129 if six else 0):
                    return True
    return False


def running_as(user, script, *arguments):
    """The command line of a Python script as a partition's user."""
    numbers = pwd.getpwnam(user)
    switch = ["--reuid", str(numbers.pw_uid), "--regid", str(numbers.pw_gid), "--clear-groups"]
    return ["/usr/bin/setpriv", *switch, sys.executable, "-I", "-c", script, *map(str, arguments)]


def as_user(user, script, *arguments):
    """What a script said on its standard output, as JSON."""
    done = subprocess.run(
        running_as(user, script, *arguments), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextlib.contextmanager
def started_as(user, script, *arguments):
    """A process of the partition's user that has said that it is ready."""
    process = subprocess.Popen(
        running_as(user, script, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# What a kvm tenant's guest does when it is only looked for: it says where its addresses are, and answers an echo.
GUEST = """
import fcntl, os, struct, sys
from ipaddress import ip_address

def checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

def icmp6(source, target, body):
    pseudo = source + target + struct.pack("!II", len(body), 58)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + source + target + body

def answer(frame, mac, own):
    sender, kind, rest = frame[6:12], frame[12:14], frame[14:]
    head = sender + mac + kind
    if kind == b"\\x08\\x06" and rest[6:8] == b"\\0\\1" and rest[24:28] in own:
        return head + rest[:6] + b"\\0\\2" + mac + rest[24:28] + rest[8:18]
    if kind == b"\\x08\\x00" and rest[9] == 1 and rest[16:20] in own and rest[20] == 8:
        body = b"\\0\\0\\0\\0" + rest[24:int.from_bytes(rest[2:4], "big")]
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        return head + rest[:12] + rest[16:20] + rest[12:16] + body
    if kind == b"\\x86\\xdd" and rest[6] == 58:
        source, body = rest[8:24], rest[40:40 + int.from_bytes(rest[4:6], "big")]
        if body[0] == 135 and body[8:24] in own:
            said = struct.pack("!BBHI", 136, 0, 0, 0x60000000) + body[8:24] + b"\\2\\1" + mac
            return head + icmp6(body[8:24], source, said)
        if body[0] == 128 and rest[24:40] in own:
            return head + icmp6(rest[24:40], source, b"\\x81\\0\\0\\0" + body[4:])

name, mac, *own = sys.argv[1:]
mac, own = bytes.fromhex(mac.replace(":", "")), {ip_address(one).packed for one in own}
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
print("ready", flush=True)
while True:
    said = answer(os.read(tap, 65536), mac, own)
    if said:
        os.write(tap, said)
"""

# A service that says the SHA-256 of what it is given, behind its length in 8 bytes; and somebody who asks it.
SERVICE = """
import hashlib, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 5000), family=family) as listener:
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            content = stream.read(int.from_bytes(stream.read(8), "big"))
            connection.sendall(hashlib.sha256(content).hexdigest().encode())
"""
CLIENT = """
import hashlib, json, os, socket, sys
content = os.urandom(1 << 20)
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    connection.sendall(len(content).to_bytes(8, "big") + content)
    answer = connection.recv(64).decode()
print(json.dumps("same" if answer == hashlib.sha256(content).hexdigest() else answer))
"""

# What an attacker tries; one word for each attempt: "sent", "connected" or the error's name.
# where the machine gives no cgroup of its own, another's address is refused when it is used, not when it is bound
HOOKED = os.path.ismount("/sys/fs/bpf")
CONNECT_REFUSED = "EPERM" if HOOKED else "ECONNREFUSED"

ATTACK = """
import errno, json, os, socket, struct, fcntl, sys

def tried(work):
    try:
        return work()
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode.get(error.errno, repr(error))

def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET

def send(source, target):
    with socket.socket(family(target), socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.sendto(b"x" * 10, (target, 9))
        return "sent"

def connect(source, target, port):
    with socket.socket(family(target), socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.bind((source, 0))
        sock.connect((target, port))
        return "connected"

def attach(name, kind):
    device = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", name.encode(), kind | 0x1000))
        return "open"
    finally:
        os.close(device)

verbs = {"send": send, "connect": connect, "attach": attach}
print(json.dumps([tried(lambda: verbs[verb](*words)) for verb, *words in json.loads(sys.argv[1])]))
"""


def attempts(user, *tries):
    """What comes of each attempt (verb, words…) of a user, in one process of it."""
    return as_user(user, ATTACK, json.dumps(tries))


# --- a master -------------------------------------------------------------------------------------------------------------


class Master:
    """One that remembers the capacity that it was posted, and answers ``wishes`` (marshalled) when asked for them; as long
    as there are none it does not know the node.
    """

    def __init__(self):
        master = self
        self.capacity, self.wishes = None, b""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                fields = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                if self.path.strip("/") == "loadComputerConfigurationFromXML":
                    master.capacity = loads(fields["xml"].encode())
                self.say(b"")

            def do_GET(self):
                if master.wishes:
                    self.say(master.wishes)
                else:
                    self.send_error(404)

            def say(self, content):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format, *args):  # noqa: A002 - http.server's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def as_production_does(self, computer, release, started=()):
        """Answer with every partition and what the production master says of its addresses: those of the tap's IPv4 come
        back as ``full_ip_list``, with a gateway, a netmask and a network.
        """
        rows = []
        for one in self.capacity["partition_list"]:
            tap = one["tap"]
            route = tuple(tap[f"ipv4_{kind}"] for kind in ("addr", "gateway", "netmask", "network"))
            common = {"_computer_id": computer, "_partition_id": one["reference"], "_request_dict": None}
            if one["reference"] in started:
                common |= {
                    "_need_modification": 1,
                    "_requested_state": "started",
                    "_instance_guid": f"SOFTINST-{one['reference']}",
                    "_connection_dict": {},
                    "_filter_dict": {},
                    "_parameter_dict": {
                        "_": "{}",
                        "ip_list": [(tap["name"], address["addr"]) for address in one["address_list"]],
                        "full_ip_list": [(f"route_{tap['name']}", *route)] if tap["ipv4_addr"] else [],
                        "instance_title": "an instance",
                        "root_instance_title": "an instance",
                        "slap_computer_id": computer,
                        "slap_computer_partition_id": one["reference"],
                        "slap_software_release_url": release,
                        "slap_software_type": "default",
                        "slave_instance_list": [],
                        "timestamp": 1785000000123456,
                    },
                    "_software_release_document": Instance(
                        "SoftwareRelease",
                        (release, computer),
                        {
                            "_computer_guid": computer,
                            "_software_instance_list": [],
                            "_software_release": release,
                        },
                    ),
                }
            else:
                common |= {
                    "_need_modification": 0,
                    "_requested_state": "destroyed",
                    "_software_release_document": None,
                }
            rows.append(Instance("ComputerPartition", (computer, one["reference"]), common))
        self.wishes = dumps(
            Instance(
                "Computer",
                (computer,),
                {
                    "_computer_id": computer,
                    "_computer_partition_list": rows,
                    "_software_release_list": [],
                },
            )
        )


# --- slapformat -----------------------------------------------------------------------------------------------------------

_FORMAT = """
import json, logging, sys, time
from slapos import format

sleep = time.sleep
time.sleep = lambda seconds: sleep(0.02)  # accept_dad is 0: an address is ready a moment after it was added
conf = format.FormatConfig(logging.getLogger())
conf.__dict__.update(json.loads(sys.argv[1]))
computer = format.parse_computer_xml(conf, "/nonexistent")
computer.address, computer.netmask = (computer.getAddress()[key] for key in ("addr", "netmask"))
computer.format(alter_user=False, alter_network=True, create_tap=conf.create_tap)
print(json.dumps(format._getDict(computer)))
"""


def slapformat(node, **options):
    """What slapos.core 1.26 itself says of such a node, formatted in a network of its own: the dictionary of its Computer."""
    namespace = "formatted"
    ip("netns", "add", namespace)
    try:
        for name in ("all", "default"):
            command = ["/usr/sbin/ip", "netns", "exec", namespace, "/usr/sbin/sysctl", "-qw"]
            subprocess.run([*command, f"net.ipv6.conf.{name}.accept_dad=0"], check=True)
        ip_lines(
            "link set lo up",
            "link add eth0 type veth peer name other",
            "link set eth0 up",
            f"address add {NODE4}/24 dev eth0",
            f"address add {NODE6}/64 dev eth0",
            "link add gw0 type bridge",
            "link set gw0 up",
            "address add 198.51.100.1/24 dev gw0",
            namespace=namespace,
        )
        config = node.load()
        conf = {
            "computer_id": config.computer_id,
            "dry_run": False,
            "interface_name": "eth0",
            "ipv4_local_network": "10.0.0.0/16",
            "partition_amount": config.partition_amount,
            "partition_base_name": config.partition_base,
            "user_base_name": config.user_base,
            "tap_base_name": config.tap_base,
            "instance_root": str(config.instance_root),
            "software_root": str(config.software_root),
            **options,
        }
        python = ["/opt/partitiond/master/bin/python3", "-c", _FORMAT, json.dumps(conf)]
        done = subprocess.run(
            ["/usr/sbin/ip", "netns", "exec", namespace, *python],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        ip("netns", "delete", namespace)
