"""A strict master that behaves as production does, over TLS, with certificates that it issued itself.

    with production_master.running() as master:
        master.offer("slappart0", "slappart1")          # or let the node post its capacity
        master.supply(url)
        master.want("slappart0", url, parameters={"a": "1"})
        ...                                             # master_url, master_ca_file, cert_file, key_file:
        SlapClient(master.url, master.computer, ca_file=master.ca_file, cert_file=..., key_file=...)
        assert master.words("slappart0") == ["started"]
        assert not master.violations

Knobs: ``cold``, ``override``, ``slow``, ``down``/``up``, ``snapshot``/``restart``, ``renew``, ``revoke``. The state is set by
plain calls from the test; every request is in ``asked``. ``web_url`` is the panel's side, without client
certificates: Person_requestComputer alone. Close the clients before the master, or after: it ends their connections.
"""

import contextlib
import copy
import hashlib
import json
import re
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from master_authority import Authority, server_context
from master_books import STATES, Books, Instance, Place, Slave
from master_calls import Calls, RefusedError
from master_server import Listener

WISHES = ("getFullComputerInformation", "getComputerInformation", "registerComputerPartition")
_CACHE = {"Cache-Control": "public, max-age=1, stale-if-error=604800", "Vary": "REMOTE_USER"}
_NO_CACHE = {"Cache-Control": "max-age=0, must-revalidate"}
_AUTHORIZATION = re.compile("X-SlapPartition computer_id=([^,]+), computer_partition_id=(.+)")


@dataclass(frozen=True)
class Asked:
    """One request: ``who`` is the certificate's reference, ``connection`` the peer, ``size`` the bytes of the answer's body."""

    endpoint: str
    method: str
    fields: dict
    headers: dict
    who: str | None
    connection: tuple
    status: int
    size: int


class ProductionMaster:
    """See the module; ``tls=False`` serves plain HTTP, where everybody is the computer."""

    def __init__(
        self,
        computer="COMP-123",
        *,
        tls=True,
        hosts=("localhost", "127.0.0.1"),
        server_days=30.0,
        resources=(),
    ):
        self.computer, self.tls = computer, tls
        self._directory = tempfile.TemporaryDirectory(prefix="production-master-")
        self.directory = Path(self._directory.name)
        self.authority = Authority()
        self.server_pair = self.authority.server(*hosts, days=server_days)
        self.fingerprint = self.server_pair.fingerprint
        self.ca_file = str(self.directory / "ca.crt")
        Path(self.ca_file).write_text(self.authority.certificate)
        self.computer_pair = self.authority.login(computer)
        self.cert_file, self.key_file = self.computer_pair.write(self.directory, "computer")
        self.books = Books(computer)
        self.calls = Calls(self.books, self.authority, resources=list(resources))
        self.asked: list[Asked] = []
        self.etags = True
        self.tokens: set[str] = set()
        self.title = ""
        self.old_register = False  # an answer without a reference
        self.closing = threading.Event()
        self._cold = 0
        self._overrides: dict[str, list] = {}
        self._slow: dict[str, float] = {}
        self._lock = threading.RLock()
        pair = self.server_pair.write(self.directory, "server")
        context = server_context(*pair, self.authority.certificate) if tls else None
        self._slap = Listener(self._answer, context, self.violations)
        self._web = Listener(self._answer_web, server_context(*pair) if tls else None, self.violations)
        self.url, self.web_url = self._slap.url, self._web.url
        self.calls.url = self.url

    def close(self):
        self.closing.set()
        self._slap.close()
        self._web.close()
        if self.calls.schemas is not None:
            self.calls.schemas.close()
        self._directory.cleanup()

    # --- what is wanted

    def offer(self, *names):
        """Know partitions that no node has offered yet."""
        with self._lock:
            for number, name in enumerate(names):
                rows = [
                    (f"slaptap{number}", f"10.0.0.{number + 2}"),
                    (f"slaptap{number}", f"2001:db8:1::{number + 2:x}"),
                ]
                self.books.places.setdefault(name, Place(ip_list=rows))

    def supply(self, url, state="available"):
        """Want a software release here, or ``destroyed``; None forgets it without a word."""
        with self._lock:
            if state is None:
                self.books.software.pop(url, None)
            else:
                self.books.software[url] = state

    def want(self, name, release=None, state=None, **changes):
        """Allocate a new instance to a free partition, or change the one that is there. Give the instance.

        ``changes`` are fields of ``Instance``: parameters, filter, title, software_type, slaves, …
        """
        with self._lock:
            instance = self.books.in_partition(name)
            if instance is None:
                if release is None or name not in self.books.places:
                    raise ValueError(f"a new instance in {name} needs a release and a place")
                guid = changes.pop("guid", None) or self.books.new_guid()
                instance = Instance(guid, release, changes.get("title", f"instance of {name}"), name)
                instance.root_title = instance.title
                self.books.instances[guid] = instance
            elif release is not None:
                instance.release = release
            if state is not None:
                if state not in STATES:
                    raise ValueError(state)
                instance.state = state
            for key, value in changes.items():
                if not hasattr(instance, key):
                    raise ValueError(key)
                setattr(instance, key, value)
            if "timestamp" not in changes:
                instance.timestamp = self.books.stamp()
            return instance

    def share(self, name, title, **parameters):
        """Add a shared instance to the one in a partition; give it."""
        with self._lock:
            host = self.books.in_partition(name)
            slave = Slave(self.books.new_guid(), title, parameters, self.books.stamp())
            host.slaves.append(slave)
            host.timestamp = self.books.stamp()
            return slave

    def route(self, name, address, gateway, netmask, network):
        """Give a partition a routable IPv4, as a tap's address comes back."""
        with self._lock:
            place = self.books.places[name]
            place.full_ip_list = [(f"route_{place.ip_list[0][0]}", address, gateway, netmask, network)]

    def drop(self, name):
        """Show a busy partition as free, without a destroy: what a wrong master would do."""
        with self._lock:
            del self.books.instances[self.books.in_partition(name).guid]

    # --- certificates

    def renew(self, name, days=30.0):
        """Have another pair for the instance in a partition; the one of before stays active until ``revoke``."""
        with self._lock:
            guid = self.books.in_partition(name).guid
            self.calls.pairs[guid] = self.authority.login(guid, days)
            return self.calls.pairs[guid]

    def revoke(self, reference):
        """End the logins of a computer or instance."""
        with self._lock:
            self.authority.revoke(reference)

    # --- how it fails

    def cold(self, calls=1):
        """Answer 503 to so many questions about the computer: the cache is being filled."""
        with self._lock:
            self._cold = calls

    def override(self, endpoint, status, body=b"", *, times=None, headers=None):
        """Answer an endpoint ("*": each) with a status, so many times or until ``clear``."""
        with self._lock:
            self._overrides[endpoint] = [status, body, times, headers or {}]

    def slow(self, endpoint, seconds):
        """Let an endpoint ("*": each) take so long."""
        with self._lock:
            self._slow[endpoint] = seconds

    def clear(self):
        """Be well again."""
        with self._lock:
            self._overrides.clear()
            self._slow.clear()
            self._cold = 0

    def down(self):
        """Refuse connections, and end those that there are."""
        self._slap.close()

    def up(self):
        """Listen again, at the same address."""
        self._slap.open()

    def drop_connections(self):
        """End all kept connections between two requests, as a master does whose time for them is over."""
        self._slap.drop()

    def snapshot(self):
        """Copy what it knows, for ``restart``."""
        with self._lock:
            return copy.deepcopy(self.books)

    def restart(self, memory=None, *, cold=1):
        """Go down and come up with a cold cache, perhaps with an older memory."""
        self.down()
        with self._lock:
            if memory is not None:
                self.books = self.calls.books = copy.deepcopy(memory)
        self.cold(cold)
        self.up()

    # --- what was asked and told

    @property
    def violations(self):
        """What a standard node would never have sent."""
        return self.calls.violations

    @property
    def reports(self):
        return self.calls.reports

    def words(self, subject):
        """The words told of a partition, a release or the computer, in order."""
        return [word for about, word, _ in list(self.reports) if about == subject]

    def count(self, endpoint, since=0):
        return sum(one.endpoint == endpoint for one in self.asked[since:])

    def counts(self, since=0):
        return Counter(one.endpoint for one in self.asked[since:])

    @property
    def connections(self):
        """How many connections carried a request."""
        return len({one.connection for one in self.asked})

    # --- answering

    def _answer(self, handler, method, endpoint, fields, headers):
        who = self.computer
        if self.tls:
            who = self.authority.who(handler.connection.getpeercert(binary_form=True))
        elif endpoint == "requestComputerPartition":
            with self._lock:  # as with slapproxy, the header says who asks
                found = self.books.in_partition(fields.get("computer_partition_id"))
                who = found and found.guid
        status, body, more = self._judge(endpoint, method, fields, headers, who)
        seconds = self._slow.get(endpoint, self._slow.get("*", 0))
        if seconds:
            self.closing.wait(seconds)
        self._record(handler, endpoint, method, fields, headers, who, status, body)
        handler.reply(status, body, more)

    def _record(self, handler, endpoint, method, fields, headers, who, status, body):
        asked = Asked(endpoint, method, fields, headers, who, handler.client_address, status, len(body))
        with self._lock:
            self.asked.append(asked)

    def _judge(self, endpoint, method, fields, headers, who):
        with self._lock:
            if (said := self._overridden(endpoint)) is not None:
                return said
            if who is None:
                return 401, b"Unauthorized", {}
            self._check_authorization(endpoint, headers, fields)
            if endpoint in WISHES[:2] and self._cold:
                self._cold -= 1
                return 503, b"", {}
            try:
                body = self.calls.answer(endpoint, method, fields, who)
            except RefusedError as refused:
                return refused.status, refused.body, {}
            if endpoint not in WISHES:
                return 200, body, _NO_CACHE if method == "GET" else {}
            tag = f'"{hashlib.sha1(body).hexdigest()}"'  # noqa: S324 - no secret
            more = {
                **_CACHE,
                "Content-Type": "text/xml; charset=utf-8",
                **({"ETag": tag} if self.etags else {}),
            }
            if self.etags and headers.get("if-none-match") == tag:
                return 304, b"", more
            return 200, body, more

    def _overridden(self, endpoint):
        name = endpoint if endpoint in self._overrides else "*"
        if name not in self._overrides:
            return None
        status, body, times, headers = self._overrides[name]
        if times is not None:
            self._overrides[name][2] = times - 1
            if times <= 1:
                del self._overrides[name]
        return status, body, headers

    def _check_authorization(self, endpoint, headers, fields):
        """It may be missing; what is there names the partition that the fields name."""
        told = headers.get("authorization")
        if told is None:
            return
        found = _AUTHORIZATION.fullmatch(told)
        place = fields.get("computer_id"), fields.get("computer_partition_id")
        if found is None or found.groups() != place:
            self.violations.append(f"{endpoint}: Authorization {told!r} for {place}")

    def _answer_web(self, handler, method, endpoint, fields, headers):
        with self._lock:
            status, body = self._register(method, endpoint, fields, headers)
        self._record(handler, endpoint, method, fields, headers, None, status, body)
        handler.reply(status, body, {})

    def _register(self, method, endpoint, fields, headers):
        if (said := self._overridden(endpoint)) is not None:
            return said[:2]
        if (method, endpoint) != ("POST", "Person_requestComputer"):
            self.violations.append(f"{method} {endpoint} at the panel")
            return 404, b""
        if fields.keys() != {"title"}:
            self.violations.append(f"Person_requestComputer with {sorted(fields)}")
        if headers.get("x-access-token") not in self.tokens:
            return 403, b""
        if fields.get("title") == self.title and self.authority.active(self.computer):
            return 500, b"<html><body>ValueError: Certificate still active.</body></html>"
        self.tokens.discard(headers["x-access-token"])
        self.title = fields.get("title", "")
        pair = self.authority.login(self.computer)
        told = {"certificate": pair.certificate, "key": pair.key}
        if not self.old_register:
            told |= {"reference": self.computer, "relative_url": f"compute_node_module/{self.computer}"}
        return 200, json.dumps(told).encode()


@contextlib.contextmanager
def running(*arguments, **settings):
    master = ProductionMaster(*arguments, **settings)
    try:
        yield master
    finally:
        master.close()
