"""What a node learns from its master, as typed and checked documents.

Protocol facts: SLAP classic, slapos.core 1.26, in the forms of slapproxy and of the production master. They
differ in the type of the timestamp, in keys that only one of them sends, in what a free partition carries;
none of that is visible here. One bad entry never spoils the others: it is listed in ``rejected``, so that
nobody takes it for a change or a removal.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from slap_client import checks
from slap_client.checks import Frozen
from slap_client.errors import SlapError
from slap_client.values import Instance, Value

PARTITION_STATES = ("started", "stopped", "destroyed")
SOFTWARE_STATES = ("available", "destroyed")

# Both masters put these beside the user's parameters, in the same dictionary.
RESERVED_PARAMETERS = frozenset(
    {
        "full_address_list",
        "full_ip_list",
        "instance_title",
        "ip_list",
        "root_instance_short_title",
        "root_instance_title",
        "slap_computer_id",
        "slap_computer_partition_id",
        "slap_software_release_url",
        "slap_software_type",
        "slave_instance_list",
        "timestamp",
    }
)


def _nothing() -> Mapping[str, Frozen]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SoftwareDocument:
    """A software release of the node; ``requested_state`` is ``available`` or ``destroyed``."""

    url: str
    requested_state: str


@dataclass(frozen=True, slots=True)
class PartitionDocument:
    """What is wanted of one partition. Text that the master did not give is "".

    ``requested_state`` is ``started``, ``stopped`` or ``destroyed``. ``timestamp`` is opaque: equal or not is
    all it says. ``parameters`` holds the user's own (the "json in xml" key ``_`` is left as is) without the
    reserved keys, which are the fields from ``software_type`` on. ``ip_list`` rows are (interface, address),
    ``full_ip_list`` rows (interface, address, gateway, netmask, network). ``filter`` is the SLA. Titles and
    ``access_status`` are free text in which unprintable characters are replaced. ``connection`` is what the instance
    has published. Mappings are read-only.
    """

    partition_id: str
    requested_state: str
    software_release: str | None = None
    instance_guid: str = ""
    timestamp: str = ""
    parameters: Mapping[str, Frozen] = field(default_factory=_nothing)
    filter: Mapping[str, Frozen] = field(default_factory=_nothing)
    access_status: str = ""
    software_type: str = ""
    ip_list: tuple[tuple[str, ...], ...] = ()
    full_ip_list: tuple[tuple[str, ...], ...] = ()
    slave_instance_list: tuple[Mapping[str, Frozen], ...] = ()
    instance_title: str = ""
    root_instance_title: str = ""
    connection: Mapping[str, Frozen] = field(default_factory=_nothing)

    @property
    def free(self) -> bool:
        """Nobody uses the partition and nothing is to be done for it."""
        return self.requested_state == "destroyed" and self.software_release is None

    @property
    def destroy_requested(self) -> bool:
        """An instance is still there and has to be destroyed."""
        return self.requested_state == "destroyed" and self.software_release is not None


@dataclass(frozen=True, slots=True)
class Rejected:
    """An entry that was left out: its name, or "?" where that can not be told, and why."""

    partition_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ComputerDocument:
    """All that the master wants of this node, in the master's order.

    ``rejected`` are entries of the list of partitions, ``rejected_software`` the reasons for those of the
    list of software. While the first has an entry "?", a partition that is missing here may be behind it.
    """

    computer_id: str
    partitions: tuple[PartitionDocument, ...] = ()
    software: tuple[SoftwareDocument, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    rejected_software: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """The X509 pair of an instance, PEM text; both empty with slapproxy. The key is not part of the repr."""

    certificate: str
    key: str

    def __repr__(self) -> str:
        return f"CertificatePair(certificate={self.certificate!r}, key=<{len(self.key)} characters>)"


def parse_computer(value: Value) -> ComputerDocument:
    """Read the answer of getFullComputerInformation.

    Raises SlapError ``slap.garbage`` when it is no computer or has no list of partitions (one may be empty).
    """
    attributes = _attributes(value, "Computer")
    computer_id = checks.line(attributes.get("_computer_id"), "the computer's id")
    if not computer_id:
        raise checks.garbage("a computer without an id")
    if attributes.get("_computer_partition_list") is None:
        # Reading this as "no partitions" would be reading a fault as an order to clean up.
        raise checks.garbage("a computer without a list of partitions")
    entries = checks.sequence(attributes["_computer_partition_list"], "the list of partitions")
    partitions, rejected = _parse_partitions(entries, computer_id)
    # With the certificate of a partition in place of the computer's, the master leaves the software out.
    software, rejected_software = _parse_software_list(
        checks.sequence(attributes.get("_software_release_list"), "the list of software")
    )
    return ComputerDocument(computer_id, partitions, software, rejected, rejected_software)


def parse_partition(value: Value) -> PartitionDocument:
    """Read one partition (as in a computer, or the answer of registerComputerPartition).

    Raises SlapError ``slap.garbage``, also for an unknown state and for an instance without software.
    """
    attributes = _attributes(value, "ComputerPartition")
    state = attributes.get("_requested_state")
    if not isinstance(state, str) or state not in PARTITION_STATES:
        raise checks.garbage(f"the requested state is none of {', '.join(PARTITION_STATES)}")
    release = attributes.get("_software_release_document")
    url = None if release is None else _release_url(release)
    if url is None and state != "destroyed":
        raise checks.garbage(f"the requested state is {state}, but there is no software release")
    mixed = checks.mapping(attributes.get("_parameter_dict"), "the parameters")
    # slapproxy makes up a guid for free partitions; there is no instance that it could name.
    guid = None if url is None else attributes.get("_instance_guid")
    own: dict[str, Value] = {key: item for key, item in mixed.items() if key not in RESERVED_PARAMETERS}
    return PartitionDocument(
        partition_id=checks.partition_id(attributes.get("_partition_id")),
        requested_state=state,
        software_release=url,
        instance_guid=checks.line(guid, "the instance's guid"),
        timestamp=checks.opaque_stamp(mixed.get("timestamp")),
        parameters=checks.frozen_mapping(own, "the parameters"),
        filter=checks.frozen_mapping(attributes.get("_filter_dict"), "the filter"),
        access_status=checks.shown_text(attributes.get("_access_status"), "the access status"),
        software_type=checks.line(mixed.get("slap_software_type"), "the software type"),
        ip_list=checks.text_rows(mixed.get("ip_list"), "ip_list"),
        full_ip_list=checks.text_rows(mixed.get("full_ip_list"), "full_ip_list"),
        slave_instance_list=checks.frozen_mappings(mixed.get("slave_instance_list"), "slave_instance_list"),
        instance_title=checks.shown_text(mixed.get("instance_title"), "the instance's title"),
        root_instance_title=checks.shown_text(mixed.get("root_instance_title"), "the root instance's title"),
        connection=checks.frozen_mapping(_published(attributes), "the connection parameters"),
    )


def _published(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """What was published. It decides nothing but a courtesy, so what is no dictionary is taken as nothing."""
    found = attributes.get("_connection_dict")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        return {}
    return {key: item for key, item in found.items() if isinstance(key, str)}


def parse_software(value: Value) -> SoftwareDocument:
    """Read one entry of the list of software; no state means available. Raises SlapError ``slap.garbage``."""
    url = _release_url(value)
    state = _attributes(value, "SoftwareRelease").get("_requested_state")
    if state is None:
        state = "available"
    if not isinstance(state, str) or state not in SOFTWARE_STATES:
        raise checks.garbage(f"the requested state is none of {', '.join(SOFTWARE_STATES)}")
    return SoftwareDocument(url, state)


def parse_certificate(value: Value) -> CertificatePair:
    """Read the answer of getComputerPartitionCertificate. Raises SlapError ``slap.garbage``."""
    if not isinstance(value, dict):
        raise checks.garbage("a certificate that is not a dictionary")
    certificate, key = value.get("certificate"), value.get("key")
    if not isinstance(certificate, str) or not isinstance(key, str):
        raise checks.garbage("a certificate or key that is not text")
    if bool(certificate) != bool(key):
        raise checks.garbage("a certificate and a key of which one is empty")
    return CertificatePair(certificate, key)


def _parse_partitions(
    entries: "list[Value] | tuple[Value, ...]", computer_id: str
) -> tuple[tuple[PartitionDocument, ...], tuple[Rejected, ...]]:
    names = [_readable_name(entry) for entry in entries]
    count = Counter(names)
    partitions = []
    rejected = []
    for name, entry in zip(names, entries, strict=True):
        try:
            if name != "?" and count[name] > 1:
                raise checks.garbage(f"{count[name]} entries have this name")
            _check_owner(entry, computer_id)
            partitions.append(parse_partition(entry))
        except SlapError as error:
            rejected.append(Rejected(name, error.message))
    return tuple(partitions), tuple(rejected)


def _readable_name(entry: Value) -> str:
    try:
        return checks.partition_id(_attributes(entry, "ComputerPartition").get("_partition_id"))
    except SlapError:
        return "?"


def _check_owner(entry: Value, computer_id: str) -> None:
    owner = _attributes(entry, "ComputerPartition").get("_computer_id")
    if owner is not None and owner != computer_id:
        raise checks.garbage("the partition belongs to another computer")


def _parse_software_list(
    entries: "list[Value] | tuple[Value, ...]",
) -> tuple[tuple[SoftwareDocument, ...], tuple[str, ...]]:
    states: dict[str, set[str]] = {}
    rejected = []
    for number, entry in enumerate(entries, 1):
        try:
            document = parse_software(entry)
            states.setdefault(document.url, set()).add(document.requested_state)
        except SlapError as error:
            rejected.append(f"software {number}: {error.message}")
    rejected += [f"{url}: wanted available and destroyed" for url in states if len(states[url]) > 1]
    documents = tuple(SoftwareDocument(url, state) for url, (state, *more) in states.items() if not more)
    return documents, tuple(rejected)


def _release_url(value: Value) -> str:
    attributes = _attributes(value, "SoftwareRelease")
    return checks.software_url(attributes.get("_software_release"))


def _attributes(value: Value, class_name: str) -> Mapping[str, Value]:
    if not isinstance(value, Instance) or value.class_name != class_name:
        raise checks.garbage(f"not a {class_name}")
    return value.attributes
