"""What runs on a node of the mesh, as the user of a partition or as root: asked by lines of JSON, answers by lines of JSON."""

import json
import select
import socket
import struct
import sys
import threading

SIZE = 2000  # more than a packet of the mesh holds
TIMEOUT = 5.0


def say(value):
    print(json.dumps(value), flush=True)


def serve(*endpoints):
    """Give back to each what it says, with the address that it comes from, until the input ends."""

    def answer(channel, peer):
        with channel:
            channel.sendall(f"{peer[0]:15}".encode())
            while data := channel.recv(65536):
                channel.sendall(data)

    def accept(listener):
        while True:
            threading.Thread(target=answer, args=listener.accept(), daemon=True).start()

    for endpoint in endpoints:
        host, port = endpoint.rsplit(":", 1)
        listener = socket.create_server((host, int(port)))
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    say("ready")
    sys.stdin.read()


def received(channel, amount):
    data = b""
    while len(data) < amount:
        piece = channel.recv(amount - len(data))
        if not piece:
            raise ConnectionError("it ended")
        data += piece
    return data


def asked(source, host, port):
    """Who the other end takes us for, or why it cannot be asked."""
    try:
        with socket.socket() as channel:
            channel.settimeout(TIMEOUT)
            if source:
                channel.bind((source, 0))
            channel.connect((host, port))
            who = received(channel, 15).decode().strip()
            data = bytes(SIZE)
            channel.sendall(data)
            assert received(channel, SIZE) == data
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return who


def ask():
    """Each line names sources and targets; the answer has one for each."""
    say("ready")
    for line in sys.stdin:
        say([asked(*one) for one in json.loads(line)])


def flow(host, port):
    """One connection for all; each line is one exchange over it, however long it takes."""
    with socket.create_connection((host, int(port)), TIMEOUT) as channel:
        channel.settimeout(120)
        received(channel, 15)
        say("ready")
        for line in sys.stdin:
            data = line.encode() * 10
            channel.sendall(data)
            say(received(channel, len(data)) == data)


def listen(host, port):
    """Count datagrams by the address that they come from; each line asks for the counts of now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.bind((host, int(port)))
        say("ready")
        counts = {}
        while True:
            ready, _, _ = select.select([channel, sys.stdin], [], [])
            if channel in ready:
                _, (peer, _) = channel.recvfrom(4096)
                counts[peer] = counts.get(peer, 0) + 1
            elif not sys.stdin.readline():
                return
            else:
                say(counts)


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def forge():
    """Send datagrams with a chosen source, as root: each line is [source, host, port, count]; how many the kernel took."""
    say("ready")
    for line in sys.stdin:
        source, host, port, count = json.loads(line)
        body = struct.pack("!HHHH", 4000, port, 8 + 8, 0) + b"forged!!"
        addresses = socket.inet_aton(source) + socket.inet_aton(host)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0) + addresses
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
        sent = 0
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as channel:
            for _ in range(count):
                try:
                    sent += bool(channel.sendto(head + body, (host, 0)))
                except OSError:
                    continue
        say(sent)


globals()[sys.argv[1]](*sys.argv[2:])
