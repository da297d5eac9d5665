"""Who is answered at a port, as real users find out."""

import json
import socket
import subprocess
import sys
import time

GET = """
import json, socket, sys
host, port, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    with socket.create_connection((host, port), 10) as channel:
        channel.sendall(f"GET {path} HTTP/1.0\\r\\n\\r\\n".encode())
        answer = channel.makefile("rb").read()
    print(json.dumps(int(answer.split()[1])))
except OSError as error:
    print(json.dumps(type(error).__name__))
"""


def free_port(address="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.bind((address, 0))
        return one.getsockname()[1]


def get(uid, host, port, path="/metrics"):
    """The status that a user is answered, or the name of its error."""
    switch = ["/usr/bin/setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    line = [*switch, sys.executable, "-I", "-c", GET, host, str(port), path]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def until(condition, what):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def listens(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        return one.connect_ex((host, port)) == 0
