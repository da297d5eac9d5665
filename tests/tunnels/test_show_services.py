"""Software that knows nothing of tunnels, as Debian packages it: memcached and MariaDB, through a tunnel, byte for byte."""

import contextlib
import subprocess

import pytest
from tunnel_node import Node, until

LISTEN, ENTRY = 4000, 6000
MEGABYTE = 1 << 20
SHORT = 32 * MEGABYTE
SIZES = pytest.mark.parametrize(
    "size", [pytest.param(SHORT, id="32 MiB"), pytest.param(1 << 30, id="1 GiB", marks=pytest.mark.full)]
)
PATIENCE = 600.0
SCHEMA = """
CREATE DATABASE bridged;
CREATE TABLE bridged.bytes (number INT PRIMARY KEY, body LONGBLOB NOT NULL) ENGINE=InnoDB;
CREATE USER tenant@'%';
GRANT ALL ON bridged.* TO tenant@'%';
"""


@pytest.fixture
def node(bridge, node_config):
    """slappart1 reaches slappart0 by a tunnel, whatever serves there; slappart2 is somebody else."""
    made = Node(node_config(3).path)
    made.apply()
    made.serve("slappart0", "service", LISTEN, 5000, [made.pin("slappart1")])
    made.reach("slappart1", "service", ENTRY, (made.public("slappart0"), LISTEN), made.pin("slappart0"))
    made.apply()
    yield made
    made.close()


@contextlib.contextmanager
def serving(node, *command):
    """Run a server as the user of slappart0; it serves on port 5000 of that partition's private IPv4."""
    log = node.configuration.parent / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            node.as_user("slappart0", *command),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: process.poll() is not None or _listens(5000), f"{command[0]} to listen")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _listens(port):
    with open("/proc/net/tcp") as table:
        return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in table)


def passes(node, program, size):
    """What a client of slappart1 puts in is what it gets; nobody comes past the tunnel."""
    host = node.private("slappart1")
    said = node.agent("slappart1", program, {"host": host, "port": ENTRY, "bytes": size}).ask(
        patience=PATIENCE
    )
    assert said["put"] == said["got"]
    rate = 2 * size / MEGABYTE / said["seconds"]
    print(f"{program}: {size >> 20} MiB in and out through a tunnel, {rate:.0f} MB/s of both together")
    (way_around,) = node.agent("slappart1", "probe").ask(
        [{"to": [node.private("slappart0"), 5000], "send": "00"}]
    )
    assert way_around["why"], "the service is reached without the tunnel too"
    (other,) = node.agent("slappart2", "probe").ask([{"to": [host, ENTRY], "send": "00"}])
    assert other["why"], "somebody else reaches the client's end"


@SIZES
def test_memcached(node, size):
    host = node.private("slappart0")
    with serving(node, "/usr/bin/memcached", "-l", host, "-p", "5000", "-U", "0", "-m", "128"):
        passes(node, "memcached", size)


@SIZES
def test_mariadb_with_its_own_client(node, size):
    home = node.path("slappart0") / "srv" / "mariadb"
    node.write("slappart0", "srv/init.sql", SCHEMA)
    own = [
        "--no-defaults",
        f"--datadir={home}",
        "--innodb-log-file-size=16M",
        "--innodb-buffer-pool-size=32M",
    ]
    own += ["--innodb-flush-log-at-trx-commit=0"]
    made = ["/usr/bin/mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(
        node.as_user("slappart0", *made, "--skip-name-resolve"),
        cwd="/",
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    words = [*own, f"--bind-address={node.private('slappart0')}", "--port=5000", f"--socket={home}/sock"]
    words += ["--skip-name-resolve", "--max-allowed-packet=64M", f"--init-file={home.parent}/init.sql"]
    with serving(node, "/usr/sbin/mariadbd", *words):
        passes(node, "mariadb", size)
