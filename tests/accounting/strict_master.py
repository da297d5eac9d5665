"""A master that judges usage as production does: by slapos.core's schemas at once, by all its rules afterwards.

Nothing here is the product's: it parses, reads dates and knows instances and resources by itself, so it is
what the product's own judgement is held against. Like the real one it answers 200 to a document that it will
reject as a whole later, and it does not recognise a document that it has already.

    with strict_master.running(guids={"SOFTINST-1"}, resources={"network_out"}) as master:
        master.script("503", "timeout_after_commit")  # for the next uses; then "ok"
        ...
        assert [arrival.reference for arrival in master.accepted] == [...]

As a program, of an interpreter that has lxml: ``<environment>/master/bin/python3 strict_master.py --guid
SOFTINST-1 --resource network_out`` prints its address, then a line of JSON for each document, until its
standard input ends.
"""

import argparse
import contextlib
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

sys.path.append(str(Path(__file__).resolve().parent.parent / "slap_client"))
from slap_server import Master, reply

INTERPRETER = Path("/opt/partitiond/master/bin/python3")
BEHAVIOURS = frozenset(
    "ok slow 400 500 502 503 timeout_after_commit reset_after_commit reset_before".split()
)  # fmt: skip
_BODIES = {
    "400": "",
    "500": "Internal Server Error",
    "502": "<html><body><h1>502 Bad Gateway</h1></body></html>",
    "503": "Service Unavailable",
}
_CERTIFICATE = (
    '<marshal><dictionary id="i2"><string>certificate</string><string></string><string>key</string>'
    "<string></string></dictionary></marshal>"
)


# --- schemas, in a process of an interpreter that has lxml


class Schemas:
    """slapos.core's schemas; one process serves all documents."""

    def __init__(self, interpreter=INTERPRETER):
        command = [str(interpreter), __file__, "--schemas"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()

    def problem(self, schema, content):
        """Say why bytes are not valid by ``computer`` or ``partition``; None where they are."""
        with self._lock:
            header = json.dumps({"schema": schema, "bytes": len(content)}).encode()
            self._process.stdin.write(header + b"\n" + content)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that has the schemas ended")
        return json.loads(line)["problem"]

    def close(self):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _serve_schemas():
    from lxml import etree

    (folder,) = Path(sys.prefix).glob("lib/python3*/site-packages/slapos/slap/doc")
    schemas = {
        name: etree.XMLSchema(etree.parse(str(folder / f"{name}_consumption.xsd")))
        for name in ("computer", "partition")
    }
    while header := sys.stdin.buffer.readline():
        asked = json.loads(header)
        content = sys.stdin.buffer.read(asked["bytes"])
        schema = schemas[asked["schema"]]
        problem = None
        try:
            parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
            if not schema.validate(etree.fromstring(content, parser)):
                problem = str(schema.error_log.last_error) or "not valid"
        except etree.LxmlError as error:  # not well-formed, or too large for its validator
            problem = str(error) or "not well-formed"
        print(json.dumps({"problem": problem}), flush=True)


# --- the rules behind the schema


@dataclass(frozen=True)
class Taken:
    """A movement as the master understood it."""

    resource: str
    reference: str
    quantity: float
    title: str


@dataclass(frozen=True)
class Arrival:
    """A document that came: its state is ``accepted``, ``rejected`` (200 all the same), ``invalid`` (400), or
    ``lost`` (not kept, as told to). ``version`` counts the documents kept under its reference."""

    behaviour: str
    state: str
    reference: str
    title: str
    start: float | None
    stop: float | None
    movements: tuple[Taken, ...]
    violations: tuple[str, ...]
    version: int
    text: str


_DATE = re.compile(
    r"([0-9]{4})[-/]([0-9]{2})[-/]([0-9]{2})[ T]([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]+)?"
    r" ?(?:(UTC|GMT|Z)|([+-])([0-9]{2}):?([0-9]{2}))"
)


def read_date(text):
    """Give Unix seconds of what Zope's DateTime reads without doubt: a whole date with its zone; else None."""
    found = _DATE.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    if found[9]:
        away = timedelta(hours=int(found[10]), minutes=int(found[11]))
        moment = moment - away if found[9] == "+" else moment + away
    return moment.timestamp() + float(found[7] or 0)


@dataclass
class Books:
    """What the master knows: its computer, the instances on it, the services that have a supply."""

    computer: str
    guids: list[str]
    resources: list[str]
    without_open_order: frozenset[str] = frozenset()

    def judge(self, text, now):
        """Give (reference, title, start, stop, movements, violations) of a document that passes the schema."""
        # Only what passed the schema in lxml comes here, from the node under test.
        transactions = ET.fromstring(text.encode()).findall("transaction")  # noqa: S314
        bad = []
        if len(transactions) > 1:
            bad.append(f"only the first of {len(transactions)} transactions is read")
        first = transactions[0]

        def said(node, name):
            return (node.findtext(name) or "").strip()

        dates = []
        for name in ("start_date", "stop_date"):
            dates.append(read_date(said(first, name)))
            if dates[-1] is None:
                bad.append(f"{name} {said(first, name)!r} is no date")
        if dates[1] is not None and dates[1] > now:
            bad.append("it stops in the future")
        if None not in dates and dates[0] > dates[1]:
            bad.append("it starts after it stops")
        if not said(first, "reference"):
            bad.append("it has no reference")
        taken = []
        for node in first.findall("movement"):
            movement = Taken(
                said(node, "resource"),
                said(node, "reference"),
                float(said(node, "quantity").replace("INF", "inf")),
                said(node, "title"),
            )
            taken.append(movement)
            bad.extend(self._wrong(movement))
        return said(first, "reference"), said(first, "title"), *dates, tuple(taken), tuple(bad)

    def _wrong(self, movement):
        known = [*self.guids, self.computer]
        if not movement.resource:
            yield "a movement has no resource"
        elif (count := self.resources.count(movement.resource)) != 1:
            yield f"resource {movement.resource!r} is of {count} services"
        if not movement.reference:
            yield "a movement has no reference"
        elif (count := known.count(movement.reference)) != 1:
            yield f"reference {movement.reference!r} is of {count} items"
        elif movement.reference in self.without_open_order:
            yield f"{movement.reference!r} has no open order"
        if not math.isfinite(movement.quantity) or movement.quantity == 0:
            yield f"quantity {movement.quantity}"


# --- the server


class StrictMaster:
    """``script`` says what happens at the next uses; ``arrivals`` are all that came, in order."""

    def __init__(self, *, computer="COMP-1", guids=(), resources=(), partitions=(), interpreter=INTERPRETER):
        self.books = Books(computer, list(guids), list(resources))
        self.partitions = list(partitions)  # (id, guid or None) as getFullComputerInformation gives them
        self.clock = time.time  # replaced by what simulates days
        self.default = "ok"
        self.outage = None  # a status that every request gets, of any endpoint
        self.slow_seconds = 0.3
        self.keep_alive = False  # as real masters do; the client must then be closed before this
        self.others: list[str] = []  # paths of requests that were no usage
        self._script = deque()
        self._lock = threading.Lock()
        self._arrivals: list[Arrival] = []
        self.schemas = Schemas(interpreter)
        self._server = Master()
        self._server.answer = self._answer
        self.url = self._server.url

    def close(self):
        self._server.close()
        self.schemas.close()

    def script(self, *behaviours):
        """Add what the next requests to useComputer meet, one word each; then ``default`` holds again."""
        for behaviour in behaviours:
            if behaviour not in BEHAVIOURS:
                raise ValueError(behaviour)
        with self._lock:
            self._script.extend(behaviours)

    @property
    def arrivals(self):
        with self._lock:
            return list(self._arrivals)

    @property
    def kept(self):
        """All documents that it has, those that it rejects too."""
        return [arrival for arrival in self.arrivals if arrival.state in ("accepted", "rejected")]

    @property
    def accepted(self):
        return [arrival for arrival in self.arrivals if arrival.state == "accepted"]

    @property
    def violations(self):
        """What is wrong with documents that it has; a good node leaves none."""
        return [(kept.reference, violation) for kept in self.kept for violation in kept.violations]

    @property
    def duplicates(self):
        """Counts of references that it has more than once."""
        counts = Counter(kept.reference for kept in self.kept)
        return {reference: count for reference, count in counts.items() if count > 1}

    def total(self, resource, reference):
        """Give what it would bill: the sum over all that was accepted."""
        return math.fsum(
            movement.quantity
            for arrival in self.accepted
            for movement in arrival.movements
            if (movement.resource, movement.reference) == (resource, reference)
        )

    # --- requests

    def _answer(self, handler):
        seen = self._seen(handler)
        name = seen.path.rpartition("/")[2]
        if self.outage is not None:
            self._reply(handler, _BODIES.get(str(self.outage), ""), int(self.outage))
        elif name == "useComputer" and seen.method == "POST":
            self._use(handler, seen.fields)
        else:
            self.others.append(seen.path)
            self._other(handler, name, seen)

    def _reply(self, handler, body, status=200):
        # what kept connections open would keep close() waiting for them
        reply(body, status, **({} if self.keep_alive else {"Connection": "close"}))(handler)

    def _seen(self, handler):
        # several may be served at a time: the last one of this connection
        return next(seen for seen in reversed(self._server.seen) if seen.peer == handler.client_address)

    def _other(self, handler, name, seen):
        if name == "getFullComputerInformation":
            if seen.fields.get("computer_id") != self.books.computer:
                self._reply(handler, "", 404)
            else:
                self._reply(handler, computer_document(self.books.computer, self.partitions))
        elif name in ("getComputerPartitionCertificate", "getComputerCertificate"):
            self._reply(handler, _CERTIFICATE)
        else:
            # only a destroy is confirmed by words
            body = "OK" if name.startswith("destroyed") else ""
            self._reply(handler, body, 200 if seen.method == "POST" else 404)

    def _use(self, handler, fields):
        with self._lock:
            behaviour = self._script.popleft() if self._script else self.default
        if behaviour == "slow":
            self._server.closing.wait(self.slow_seconds)
        if fields.get("computer_id") != self.books.computer or "use_string" not in fields:
            self._reply(handler, "", 404)
            return
        lost = behaviour in _BODIES or behaviour == "reset_before"
        arrival = self._keep(behaviour, fields["use_string"], lost=lost)
        if behaviour in _BODIES:
            self._reply(handler, _BODIES[behaviour], int(behaviour))
        elif behaviour.startswith("reset"):
            _reset(handler)
        elif behaviour == "timeout_after_commit":
            self._until_client_leaves(handler)
        else:
            self._reply(
                handler,
                "" if arrival.state == "invalid" else "OK",
                400 if arrival.state == "invalid" else 200,
            )

    def _keep(self, behaviour, text, *, lost):
        problem = self.schemas.problem("computer", text.encode())
        known = ("", "", None, None, (), (problem,))
        if problem is None:
            known = self.books.judge(text, self.clock())
        state = "invalid" if problem else "rejected" if known[-1] else "accepted"
        with self._lock:
            before = [old for old in self._arrivals if old.state in ("accepted", "rejected")]
            version = 1 + sum(old.reference == known[0] for old in before)
            arrival = Arrival(behaviour, "lost" if lost else state, *known, version, text)
            self._arrivals.append(arrival)
        return arrival

    def _until_client_leaves(self, handler):
        handler.close_connection = True
        while not self._server.closing.wait(0.01):
            try:
                if not handler.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return
            except BlockingIOError:
                continue
            except OSError:
                return


def _reset(handler):
    """End the connection by RST in place of an answer."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())  # at once, though the handler's files still refer to it


def computer_document(computer, partitions):
    """Marshal a computer with partitions (id, guid), those with a guid started, the others free."""
    numbers = iter(range(2, 1_000_000))

    def text(value):
        return f"<string>{escape(escape(value))}</string>"

    def instance(kind, init, state):
        arguments = "".join(map(text, init))
        pairs = "".join(text(key) + value for key, value in state.items())
        return (
            f'<object id="i{next(numbers)}" module="slapos.slap.slap" class="{kind}"><tuple>{arguments}</tuple>'
            f'<dictionary id="i{next(numbers)}">{pairs}</dictionary></object>'
        )

    def partition(name, guid):
        state = {
            "_computer_id": text(computer),
            "_need_modification": f"<int>{int(guid is not None)}</int>",
            "_partition_id": text(name),
            "_request_dict": "<none/>",
            "_requested_state": text("destroyed" if guid is None else "started"),
            "_software_release_document": "<none/>",
        }
        if guid is not None:
            release = "/srv/software.cfg"
            state["_instance_guid"] = text(guid)
            state["_connection_dict"] = state["_parameter_dict"] = "<dictionary/>"
            state["_software_release_document"] = instance(
                "SoftwareRelease",
                (release, computer),
                {"_computer_guid": text(computer), "_software_release": text(release)},
            )
        return instance("ComputerPartition", (computer, name), state)

    parts = "".join(partition(name, guid) for name, guid in partitions)
    state = {
        "_computer_id": text(computer),
        "_computer_partition_list": f"<list>{parts}</list>",
        "_software_release_list": "<list></list>",
    }
    return f"<marshal>{instance('Computer', (computer,), state)}</marshal>"


@contextlib.contextmanager
def running(**settings):
    master = StrictMaster(**settings)
    try:
        yield master
    finally:
        master.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schemas", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--computer", default="COMP-1")
    parser.add_argument("--guid", action="append", default=[])
    parser.add_argument("--resource", action="append", default=[])
    parser.add_argument("--script", default="", help=f"what comes next, of {', '.join(sorted(BEHAVIOURS))}")
    said = parser.parse_args()
    if said.schemas:
        _serve_schemas()
        return
    settings = {"computer": said.computer, "guids": said.guid, "resources": said.resource}
    with running(**settings, interpreter=sys.executable) as master:
        master.script(*filter(None, said.script.split(",")))
        print(master.url, flush=True)
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
        shown = 0
        while not over.wait(0.05):
            for arrival in (arrivals := master.arrivals)[shown:]:
                print(json.dumps(asdict(arrival)), flush=True)
            shown = len(arrivals)


if __name__ == "__main__":
    main()
