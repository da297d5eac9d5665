"""The application of the demonstration: what it is given goes through MariaDB and memcached and comes back as a page.

Arguments: the address and the port of its page, the port of memcached at that address, and the options of mariadb(1). Both
clients know nothing of tunnels. ``GET /?text=…`` writes a row and reads all rows, sets a value and gets it; the page is JSON:
``rows`` (texts, oldest first), ``cached`` (what the cache gave), ``row_server`` and ``cache_server`` (what they say they are).
"""

import http.server
import json
import socket
import subprocess
import sys
import urllib.parse

_PATIENCE = 10.0
_TABLE = "CREATE TABLE IF NOT EXISTS notes (number INT AUTO_INCREMENT PRIMARY KEY, text BLOB NOT NULL)"


def rows(options: str, text: str) -> list[str]:
    """Write a row with the stock client, and read all of them and the server's name."""
    statements = [_TABLE]
    if text:
        statements.append(f"INSERT INTO notes (text) VALUES (X'{text.encode().hex()}')")  # noqa: S608 - hexadecimal digits
    statements += ["SELECT HEX(text) FROM notes ORDER BY number", "SELECT HEX(VERSION())"]
    done = subprocess.run(
        ["/usr/bin/mariadb", f"--defaults-file={options}", "--batch", "--skip-column-names"],
        input=";\n".join(statements) + ";\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=_PATIENCE,
    )
    if done.returncode:
        raise OSError(f"mariadb exited {done.returncode}: {done.stderr.strip()}")
    return [bytes.fromhex(line).decode() for line in done.stdout.split()]


def cached(host: str, port: int, text: str) -> list[str]:
    """Set a value and get it, and the server's version, by memcached's text protocol."""
    value = text.encode()
    with (
        socket.create_connection((host, port), _PATIENCE) as connection,
        connection.makefile("rwb") as stream,
    ):
        if value:
            stream.write(b"set text 0 0 %d\r\n" % len(value) + value + b"\r\n")
            stream.flush()
            if (said := stream.readline()) != b"STORED\r\n":
                raise OSError(f"memcached said {said!r} to set")
        stream.write(b"get text\r\n")
        stream.flush()
        head, back = stream.readline().split(), b""
        if head[:1] == [b"VALUE"]:
            back = stream.read(int(head[3]) + 2)[:-2]
            stream.readline()
        elif head != [b"END"]:
            raise OSError(f"memcached said {head!r} to get")
        stream.write(b"version\r\n")
        stream.flush()
        return [back.decode(), stream.readline().decode().strip()]


class Page(http.server.BaseHTTPRequestHandler):
    """The one page."""

    def do_GET(self) -> None:
        """Answer with the page, or with status 503 and why there is none."""
        text = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("text", [""])[0]
        try:
            *texts, server = rows(sys.argv[4], text)
            value, cache = cached(sys.argv[1], int(sys.argv[3]), text)
        except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            self._answer(503, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._answer(200, {"rows": texts, "cached": value, "row_server": server, "cache_server": cache})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Page).serve_forever()
