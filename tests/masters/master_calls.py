"""The calls of the strict master: who may make them, with which fields, and what follows.

Like production's, what it does not know is 404, whatever the cause. What a standard node would never send is
answered as production would, and kept in ``violations``: a good node leaves none.
"""

import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import master_wire
from master_books import STATES, Instance, Place, Slave

sys.path.append(str(Path(__file__).resolve().parent.parent / "accounting"))
import strict_master

NODE, INSTANCE, ANY = {"node"}, {"instance"}, {"node", "instance"}
_PLACE = {"computer_id", "computer_partition_id"}
# endpoint: (verb, fields that must be there, fields that may, who may)
CALLS = {
    "getHateoasUrl": ("GET", set(), set(), ANY),
    "getFullComputerInformation": ("GET", {"computer_id"}, set(), ANY),
    "getComputerInformation": ("GET", {"computer_id"}, set(), ANY),
    "registerComputerPartition": ("GET", {"computer_reference", "computer_partition_reference"}, set(), ANY),
    "getComputerPartitionCertificate": ("GET", _PLACE, set(), ANY),
    "getHostingSubscriptionIpList": ("GET", _PLACE, set(), ANY),
    "loadComputerConfigurationFromXML": ("POST", {"xml"}, set(), NODE),
    "useComputer": ("POST", {"computer_id", "use_string"}, set(), NODE),
    "computerBang": ("POST", {"computer_id", "message"}, set(), NODE),
    "buildingSoftwareRelease": ("POST", {"url", "computer_id"}, set(), NODE),
    "availableSoftwareRelease": ("POST", {"url", "computer_id"}, set(), NODE),
    "destroyedSoftwareRelease": ("POST", {"url", "computer_id"}, set(), NODE),
    "softwareReleaseError": ("POST", {"url", "computer_id", "error_log"}, set(), NODE),
    "startedComputerPartition": ("POST", _PLACE, set(), ANY),
    "stoppedComputerPartition": ("POST", _PLACE, set(), ANY),
    "destroyedComputerPartition": ("POST", _PLACE, set(), ANY),
    "softwareInstanceError": ("POST", _PLACE | {"error_log"}, {"slave_reference"}, ANY),
    "softwareInstanceBang": ("POST", _PLACE | {"message"}, set(), ANY),
    "softwareInstanceRename": ("POST", _PLACE | {"new_name"}, {"slave_reference"}, ANY),
    "setComputerPartitionConnectionXml": ("POST", _PLACE | {"connection_xml"}, {"slave_reference"}, ANY),
    "updateComputerPartitionRelatedInstanceList": ("POST", _PLACE | {"instance_reference_xml"}, set(), ANY),
    "requestComputerPartition": (
        "POST",
        {"software_release", "partition_reference"},
        _PLACE
        | {"software_type", "partition_parameter_xml", "filter_xml", "state", "shared_xml", "project_reference"},
        INSTANCE,
    ),
    "revokeComputerCertificate": ("POST", {"computer_id"}, set(), NODE),
}  # fmt: skip
_NONE = b"None"


class RefusedError(Exception):
    """An answer that is no success."""

    def __init__(self, status, body=b""):
        super().__init__(status, body)
        self.status, self.body = status, body


@dataclass
class Calls:
    """Answers calls from ``books``; the caller sees to it that there is one at a time.

    ``reports`` are (partition or release, word, text) in order; ``usage`` is what useComputer brought, as the
    rules of ``tests/accounting/strict_master.py`` see it. ``allocate_after`` is how often a request of a new
    instance meets 408.
    """

    books: object
    authority: object
    url: str = ""
    resources: list = field(default_factory=list)
    allocate_after: int = 1
    reports: list = field(default_factory=list)
    usage: list = field(default_factory=list)
    violations: list = field(default_factory=list)
    pairs: dict = field(default_factory=dict)  # guid: Pair
    pair_days: float = 30.0
    schemas: object = None

    def answer(self, endpoint, method, fields, who):
        """Give the body of a success; raise RefusedError for all else. ``who`` is a reference with an active login."""
        spec = CALLS.get(endpoint)
        if spec is None:
            self.violations.append(f"{endpoint}: no such call")
            raise RefusedError(404)
        verb, needed, allowed, callers = spec
        if method != verb:
            self.violations.append(f"{endpoint}: {method} in place of {verb}")
            raise RefusedError(405)
        if unknown := fields.keys() - needed - allowed:
            self.violations.append(f"{endpoint}: unknown fields {sorted(unknown)}")
        if missing := needed - fields.keys():
            self.violations.append(f"{endpoint}: without {sorted(missing)}")
            raise RefusedError(400)
        kind = "node" if who == self.books.computer else "instance"
        if kind not in callers:
            self.violations.append(f"{endpoint}: by {who}")
            raise RefusedError(403)
        computer = fields.get("computer_id", fields.get("computer_reference", self.books.computer))
        if computer != self.books.computer:
            raise RefusedError(404)
        return getattr(self, f"_{endpoint}")(who, **fields)

    def _instance(self, who, name):
        """The instance in a partition, for who may speak of it."""
        found = self.books.in_partition(name)
        if found is None:
            raise RefusedError(404)
        if who not in (self.books.computer, found.guid):
            self.violations.append(f"{who} speaks of {name}, where {found.guid} is")
            raise RefusedError(403)
        return found

    def _read(self, endpoint, text):
        try:
            return master_wire.read(text)
        except master_wire.UnreadableError as error:
            self.violations.append(f"{endpoint}: {error}")
            raise RefusedError(404) from error  # production's ValueError

    # --- the computer

    def _getHateoasUrl(self, _who):  # noqa: N802 - SLAP's names, here and below
        raise RefusedError(404)

    def _getFullComputerInformation(self, who, computer_id):  # noqa: N802
        only = None
        if who != computer_id:
            only = self.books.instances[who].partition if who in self.books.instances else None
            if only is None:
                raise RefusedError(404)
        return master_wire.write(self.books.computer_document(only))

    _getComputerInformation = _getFullComputerInformation  # noqa: N815

    def _loadComputerConfigurationFromXML(self, _who, xml):  # noqa: N802
        told = self._read("loadComputerConfigurationFromXML", xml)
        try:
            reference = told["reference"]
            places = {one["reference"]: _place(one) for one in told["partition_list"]}
            lacking = {"address", "netmask"} - told.keys()
        except (KeyError, TypeError, AttributeError) as error:
            self.violations.append(f"capacity without {error}")
            raise RefusedError(404) from error
        if lacking or reference != self.books.computer:
            self.violations.append(f"capacity of {reference} without {sorted(lacking)}")
            raise RefusedError(404)
        self.books.offered = told
        busy = {one.partition for one in self.books.instances.values()}
        kept = {name: place for name, place in self.books.places.items() if name in busy}
        self.books.places = {**kept, **places}
        return b"Content properly posted."

    def _computerBang(self, who, computer_id, message):  # noqa: ARG002, N802
        self.reports.append((computer_id, "bang", message))
        for instance in self.books.instances.values():
            if instance.partition is not None:
                instance.timestamp = self.books.stamp()
        return b"OK"

    def _useComputer(self, _who, computer_id, use_string):  # noqa: N802
        if self.schemas is None:
            self.schemas = strict_master.Schemas()
        problem = self.schemas.problem("computer", use_string.encode())
        if problem is not None:
            self.usage.append((use_string, ("invalid", problem)))
            raise RefusedError(400)
        rules = strict_master.Books(computer_id, [*self.books.instances], self.resources)
        self.usage.append((use_string, rules.judge(use_string, time.time())[-1]))
        return b"OK"

    def _revokeComputerCertificate(self, _who, computer_id):  # noqa: N802
        self.authority.revoke(computer_id)
        return master_wire.write(None)

    # --- software

    def _software(self, word, url, text=""):
        if url not in self.books.software:
            raise RefusedError(404)
        self.reports.append((url, word, text))
        self.books.software_status[url] = word

    def _buildingSoftwareRelease(self, _who, url, computer_id):  # noqa: ARG002, N802
        self._software("building", url)
        return _NONE

    def _availableSoftwareRelease(self, _who, url, computer_id):  # noqa: ARG002, N802
        self._software("available", url)
        return _NONE

    def _softwareReleaseError(self, _who, url, computer_id, error_log):  # noqa: ARG002, N802
        self._software("error", url, error_log)
        return _NONE

    def _destroyedSoftwareRelease(self, _who, url, computer_id):  # noqa: ARG002, N802
        if self.books.software.get(url) != "destroyed":
            self.violations.append(f"{url} is told destroyed, which nobody asked for")
            raise RefusedError(404)
        self._software("destroyed", url)
        del self.books.software[url]
        return _NONE

    # --- instances

    def _registerComputerPartition(self, who, computer_reference, computer_partition_reference):  # noqa: ARG002, N802
        name = computer_partition_reference
        if name not in self.books.places:
            raise RefusedError(404)
        if who != self.books.computer:
            self._instance(who, name)
        return master_wire.write(self.books.partition_document(name, _synced=True))

    def _getComputerPartitionCertificate(self, who, computer_id, computer_partition_id):  # noqa: ARG002, N802
        guid = self._instance(who, computer_partition_id).guid
        if guid not in self.pairs:
            self.pairs[guid] = self.authority.login(guid, self.pair_days)
        pair = self.pairs[guid]
        return master_wire.write({"certificate": pair.certificate, "key": pair.key})

    def _getHostingSubscriptionIpList(self, who, computer_id, computer_partition_id):  # noqa: ARG002, N802
        tree = self.books.tree(self._instance(who, computer_partition_id))
        rows = [row for one in tree if one.partition for row in self.books.places[one.partition].ip_list]
        return master_wire.write(rows)

    def _told(self, who, name, word, text=""):
        instance = self._instance(who, name)
        self.reports.append((name, word, text))
        return instance

    def _startedComputerPartition(self, who, computer_id, computer_partition_id):  # noqa: ARG002, N802
        instance = self._told(who, computer_partition_id, "started")
        instance.access_status = "#access Instance correctly started"
        return _NONE

    def _stoppedComputerPartition(self, who, computer_id, computer_partition_id):  # noqa: ARG002, N802
        instance = self._told(who, computer_partition_id, "stopped")
        instance.access_status = "#access Instance correctly stopped"
        return _NONE

    def _destroyedComputerPartition(self, who, computer_id, computer_partition_id):  # noqa: ARG002, N802
        instance = self._told(who, computer_partition_id, "destroyed")
        if instance.state != "destroyed":
            self.violations.append(f"{computer_partition_id} is told destroyed, which nobody asked for")
            return _NONE
        self.authority.revoke(instance.guid)
        self.pairs.pop(instance.guid, None)
        del self.books.instances[instance.guid]
        return _NONE

    def _softwareInstanceError(self, who, computer_id, computer_partition_id, error_log, slave_reference=""):  # noqa: ARG002, N802
        instance = self._told(who, computer_partition_id, "error", error_log)
        instance.access_status = f"#error while instanciating: {error_log[-80:]}"
        return _NONE

    def _softwareInstanceBang(self, who, computer_id, computer_partition_id, message):  # noqa: ARG002, N802
        instance = self._told(who, computer_partition_id, "bang", message)
        for one in self.books.tree(instance):
            one.timestamp = self.books.stamp()
        return b"OK"

    def _softwareInstanceRename(self, who, computer_id, computer_partition_id, new_name, slave_reference=""):  # noqa: ARG002, N802
        self._instance(who, computer_partition_id).title = new_name
        return _NONE

    def _updateComputerPartitionRelatedInstanceList(  # noqa: N802
        self,
        who,
        computer_id,  # noqa: ARG002
        computer_partition_id,
        instance_reference_xml,
    ):
        self._instance(who, computer_partition_id)
        self._read("updateComputerPartitionRelatedInstanceList", instance_reference_xml)
        return _NONE

    def _setComputerPartitionConnectionXml(  # noqa: N802
        self,
        who,
        computer_id,  # noqa: ARG002
        computer_partition_id,
        connection_xml,
        slave_reference="None",
    ):
        target = self._instance(who, computer_partition_id)
        told = self._read("setComputerPartitionConnectionXml", connection_xml)
        if slave_reference not in ("", "None"):
            target = next((one for one in target.slaves if one.guid == slave_reference), None)
            if target is None:
                raise RefusedError(404)
        connection = {key: str(text) for key, text in told.items()}
        if connection != target.connection:
            target.connection = connection
            requester = self.books.instances.get(target.requested_by)
            if requester is not None:
                requester.timestamp = self.books.stamp()
        return _NONE

    def _requestComputerPartition(  # noqa: N802
        self,
        who,
        software_release,
        partition_reference,
        software_type="None",
        partition_parameter_xml="<marshal><dictionary/></marshal>",
        filter_xml="<marshal><dictionary/></marshal>",
        state="<marshal><none/></marshal>",
        shared_xml="<marshal><bool>0</bool></marshal>",
        **_more,
    ):
        name = "requestComputerPartition"
        parameters, sla = self._read(name, partition_parameter_xml), self._read(name, filter_xml)
        wanted, shared = self._read(name, state) or "started", self._read(name, shared_xml)
        if wanted not in STATES or not isinstance(parameters, dict):
            raise RefusedError(404)
        kind = software_type if software_type not in ("", "None") else "RootSoftwareInstance"
        if shared:
            return self._request_slave(who, software_release, partition_reference, parameters)
        asker = self.books.instances[who]
        found = next(
            (
                one
                for one in self.books.instances.values()
                if (one.requested_by, one.title) == (who, partition_reference)
            ),
            None,
        )
        if found is None:
            guid = self.books.new_guid()
            found = Instance(guid, software_release, partition_reference, requested_by=who)
            found.root_title, found.timestamp = asker.root_title, self.books.stamp()
            self.books.instances[guid] = found
        now = (software_release, kind, parameters, sla, wanted)
        if now != (found.release, found.software_type, found.parameters, found.filter, found.state):
            found.release, found.software_type, found.parameters, found.filter, found.state = now
            found.timestamp = self.books.stamp()
        if found.partition is None:
            found.asked += 1
            free = self.books.free_places()
            if found.asked <= self.allocate_after or not free:
                raise RefusedError(408)
            found.partition = free[0]
        return master_wire.write(self.books.request_document(found, self.url))

    def _request_slave(self, who, release, title, parameters):
        host = next(
            (
                one
                for one in self.books.instances.values()
                if one.release == release and one.partition and one.guid != who
            ),
            None,
        )
        if host is None:
            raise RefusedError(408)
        found = next((one for one in host.slaves if (one.requested_by, one.title) == (who, title)), None)
        if found is None or found.parameters != parameters:
            if found is None:
                found = Slave(self.books.new_guid(), title, {}, 0, requested_by=who)
                host.slaves.append(found)
            found.parameters, found.timestamp = parameters, self.books.stamp()
            host.timestamp = self.books.stamp()
        return master_wire.write(self.books.shared_document(found, host, self.url))


def _place(told):
    """Read one partition of a capacity; the address_list becomes ip_list, a tap's IPv4 full_ip_list."""
    tap = told["tap"]
    for row in told["address_list"]:
        if not re.fullmatch(r"[0-9a-fA-F.:]+", row["addr"]) or not row["netmask"]:
            raise KeyError(f"an address: {row}")
    place = Place(ip_list=[(tap["name"], row["addr"]) for row in told["address_list"]])
    if tap.get("ipv4_addr"):
        row = (tap["ipv4_addr"], tap["ipv4_gateway"], tap["ipv4_netmask"], tap["ipv4_network"])
        place.full_ip_list = [(f"route_{tap['name']}", *row)]
    return place
