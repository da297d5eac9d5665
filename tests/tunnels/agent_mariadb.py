"""MariaDB's own client, given random bytes as SQL and asked for them again; run as a tenant's.

Its argument is JSON: host, port, ``bytes``. It says the SHA-256 of what it put in and of what it got, and how long that took.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time

ROW = 1 << 20
# what ends a literal or a line, or is changed on the way
_SPECIAL = re.compile(rb"[\0\n\r\\'\x1a]")
_ESCAPED = {0: b"\\0", 10: b"\\n", 13: b"\\r", 92: b"\\\\", 39: b"\\'", 26: b"\\Z"}


def client(*words):
    """Start it without anybody's configuration; an empty name of the user would be that of the login."""
    line = ["/usr/bin/mariadb", "--no-defaults", "--protocol=tcp", "--skip-ssl", "--user=tenant"]
    line += [f"--host={options['host']}", f"--port={options['port']}"]
    line += [
        "--default-character-set=binary",
        "--binary-mode",
        "--max-allowed-packet=64M",
        "--batch",
        "--quick",
    ]
    return subprocess.Popen([*line, *words, "bridged"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def finished(process):
    process.stdout.close()
    if process.wait(60):
        raise OSError(f"the client exited {process.returncode}")


def put():
    digest = hashlib.sha256()
    with client() as process:
        for number in range(options["bytes"] // ROW):
            row = os.urandom(ROW)
            digest.update(row)
            text = _SPECIAL.sub(lambda found: _ESCAPED[found[0][0]], row)
            process.stdin.write(b"INSERT INTO bytes VALUES (%d, _binary'%b');\n" % (number, text))
        process.stdin.close()
        finished(process)
    return digest.hexdigest()


def got():
    digest = hashlib.sha256()
    with client(
        "--raw", "--skip-column-names", "--execute=SELECT body FROM bytes ORDER BY number"
    ) as process:
        process.stdin.close()
        for _ in range(options["bytes"] // ROW):
            digest.update(process.stdout.read(ROW))
            if process.stdout.read(1) != b"\n":
                raise OSError("a row of another length")
        if process.stdout.read(1):
            raise OSError("more rows than were put in")
        finished(process)
    return digest.hexdigest()


options = json.loads(sys.argv[1])
print('"ready"', flush=True)
sys.stdin.readline()
began = time.monotonic()
print(json.dumps({"put": put(), "got": got(), "seconds": time.monotonic() - began}), flush=True)
sys.stdin.read()
