"""The master as a tenant of node A, and nodes that are served by it through tunnels: what operators do, by hand."""

import contextlib
import http.client
import json
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from nodes_world import until

from partitiond.demo import scene

RELEASES = Path(scene.__file__).parent
TITLE, KEEPER = "the-master", "slappart2"
NEAR = 5000  # where a node finds its master: on 127.0.0.1
URL = f"http://127.0.0.1:{NEAR}/"
_BOOTSTRAP = Path("/srv/bootstrap")
_BOOTSTRAP_PORT = 18080
RELEASE = "/srv/releases/master_release/software.cfg"
_ROWS = """
import json, sqlite3, sys
database = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
database.row_factory = sqlite3.Row
names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
table = next(name for name in names if name.rstrip("0123456789") == sys.argv[2])
print(json.dumps([dict(row) for row in database.execute(f"SELECT * FROM {table}")]))
"""


class Tenancy:
    """``a`` holds the master in a partition; before that it is served by root's own slapproxy on its loopback."""

    def __init__(self, world):
        self.world, self.a = world, world["A"]
        # what this is about is the tenant: nobody else may have served anybody
        world.master.stop()

    # --- node A, served by an ordinary slapproxy

    def bootstrap(self):
        url = f"http://127.0.0.1:{_BOOTSTRAP_PORT}/"
        home = self.a.seen(_BOOTSTRAP)
        home.mkdir(mode=0o700)
        (home / "client.cfg").write_text(f"[slapos]\nmaster_url = {url}\n\n[slapconsole]\n")
        (home / "proxy.cfg").write_text(
            f"[slapos]\ncomputer_id = COMP-A\nmaster_url = {url}\n"
            f"software_root = /srv/slapgrid/software\ninstance_root = /srv/slapgrid/instance\n\n"
            f"[slapproxy]\nhost = 127.0.0.1\nport = {_BOOTSTRAP_PORT}\ndatabase_uri = {_BOOTSTRAP}/proxy.db\n"
        )
        for name in ("release", "master_release"):
            shutil.copytree(RELEASES / name, self.a.seen(RELEASE).parents[1] / name)
        self.a.launch(str(scene.master_program()), "proxy", "start", "--cfg", f"{_BOOTSTRAP}/proxy.cfg")
        self.a.configure({"slapos": {"master_url": url}})
        self.a.start()
        until(self.a.offered, "the capacity of A to be posted", self.a)
        self.stock("supply", RELEASE, "COMP-A")

    def stock(self, *words):
        """Run a stock client on A at the first master."""
        self.a.run(str(scene.master_program()), *words, "--cfg", f"{_BOOTSTRAP}/client.cfg")

    def allow(self, *certificates):
        """Ask for the tenant, or change whom it lets in."""
        given = ("--parameters", f"allow={' '.join(certificates)}") if certificates else ()
        self.stock("request", TITLE, RELEASE, *given)

    def published(self):
        """What the tenant published; waits for it."""

        def found():
            asked = self.ask(self.a, f"http://127.0.0.1:{_BOOTSTRAP_PORT}/", TITLE)
            return asked if asked.get("certificate") else None

        return until(found, "the master in a partition to be published", self.a)

    @staticmethod
    def ask(machine, url, title):
        """The connection parameters of an instance, as a master's own interface has them; empty when there are none."""
        said = fetch(machine, url, "slapos.get.v0.instance_tree", json.dumps({"title": title}))
        return json.loads(said).get("connection_parameters") or {} if said else {}

    # --- the others

    def keeper(self, node):
        """The certificate of the partition that keeps a node's tunnel; it is there without any master."""
        node.verb("apply")
        return node.resource(KEEPER)["certificate"]

    def lead(self, node, *, peer, host, port, listen=f"127.0.0.1:{NEAR}", url=URL):
        """Configure a node to find its master by a tunnel, and its stock clients as well."""
        node.configure(
            {
                "slapos": {"master_url": url},
                "tunnel master": {
                    "partition": KEEPER,
                    "mode": "client",
                    "listen": listen,
                    "connect": f"[{host}]:{port}",
                    "peer": f"cert:{peer}",
                },
            }
        )
        client = node.seen("/etc/opt/slapos/client.cfg")
        client.write_text(f"[slapos]\nmaster_url = {url}\n\n[slapconsole]\n")

    def slapos(self, node, *words):
        """Run a stock client on a node, at the master that its tunnel leads to."""
        return node.run(str(scene.master_program()), *words, "--cfg", "/etc/opt/slapos/client.cfg").stdout

    # --- looking at the tenant

    @property
    def partition(self):
        """The partition of A that the master is in."""
        held = self.a.partitions().values()
        return next(item["id"] for item in held if item["software_release"] == RELEASE)

    def rows(self, table):
        """The rows of a table of the tenant's database."""
        path = self.a.path(self.partition) / "srv" / "proxy.db"
        return json.loads(self.a.run(sys.executable, "-I", "-c", _ROWS, str(path), table).stdout)

    def log(self):
        """What the tenant's slapproxy said, as the operator finds it."""
        directory = self.a.seen(Path("/var/log/partitiond") / self.partition)
        return "".join(path.read_text(errors="replace") for path in sorted(directory.glob("slapproxy*")))


def running(node, program):
    """Numbers of a node's processes with a word in their command line, as they are seen from here."""
    return [pid for pid, (_, line) in node.processes().items() if program in line]


def answers(node, url=URL, patience=20):
    """Whether a master answers at a URL on a node."""
    return fetch(node, url, "getRunId", patience=patience) is not None


def fetch(machine, url, path, body=None, patience=20):
    """What is answered at a URL as it is seen from a machine, None without an answer of use."""

    def ask():
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=patience)
        with contextlib.closing(connection):
            try:
                connection.request(
                    "POST" if body else "GET", f"/{path}", body, {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                return answer.read() if answer.status == 200 else None
            except (OSError, http.client.HTTPException):
                return None

    return machine.within(ask)
