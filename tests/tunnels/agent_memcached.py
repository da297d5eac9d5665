"""A client of memcached, by its text protocol: random values in, the same out.

Its argument is JSON: host, port, ``bytes``. It says the SHA-256 of what it put in and of what it got, and how long that took.
"""

import hashlib
import json
import os
import socket
import sys
import time

VALUE = 256 << 10
BATCH = 128  # values in memory at once, there and here


def took(stream, reader, count, put, got):
    """Set that many values, and get them again."""
    for number in range(count):
        value = os.urandom(VALUE)
        put.update(value)
        stream.sendall(b"set key%d 0 0 %d\r\n%b\r\n" % (number, VALUE, value))
        line = reader.readline()
        if line != b"STORED\r\n":
            raise OSError(f"set: {line!r}")
    for number in range(count):
        stream.sendall(b"get key%d\r\n" % number)
        line = reader.readline()
        if line != b"VALUE key%d 0 %d\r\n" % (number, VALUE):
            raise OSError(f"get: {line!r}")
        got.update(reader.read(VALUE))
        if (line := reader.read(7)) != b"\r\nEND\r\n":
            raise OSError(f"get: {line!r}")
    return count


options = json.loads(sys.argv[1])
left, put, got = options["bytes"] // VALUE, hashlib.sha256(), hashlib.sha256()
print('"ready"', flush=True)
sys.stdin.readline()
began = time.monotonic()
connection = socket.create_connection((options["host"], options["port"]), timeout=60)
with connection, connection.makefile("rb") as reader:
    while left:
        left -= took(connection, reader, min(left, BATCH), put, got)
print(
    json.dumps({"put": put.hexdigest(), "got": got.hexdigest(), "seconds": time.monotonic() - began}),
    flush=True,
)
sys.stdin.read()
