"""``slapos.cfg`` as a typed, validated value, with the place of every mistake.

Promises: an existing configuration of slapos.core 1.26 is read with the same meaning; every bad value is reported at once,
with file, line, key, what was read and what is allowed; an unknown key is a warning with a suggestion, never an error.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import ipaddress
import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from netplan import addresses
from partitiond import (
    accounting_config,
    config_grid,
    config_guard,
    config_managers,
    config_mesh,
    config_network,
    config_reader,
    config_software,
    config_unmanaged,
    config_unread,
    device_config,
    metrics_config,
    privacy_config,
    quota_config,
    tunnel_config,
)
from partitiond.accounting_config import AccountingKeys
from partitiond.config_grid import GridKeys
from partitiond.config_reader import Reader
from partitiond.config_software import SoftwareKeys
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accounting.allowance import Quota
    from netplan.model import Backend, ClosedPort
    from partitiond.config_guard import GuardKeys
    from partitiond.config_mesh import MeshKeys
    from partitiond.config_network import NetworkKeys
    from partitiond.config_unmanaged import Unmanaged
    from partitiond.device_config import OperatorDevice
    from partitiond.tunnel_config import OperatorTunnel

# the control socket lies below it, and struct sockaddr_un holds 108 bytes
_RUN_DIR_LENGTH = 90

_SLAPOS_KEYS = frozenset(
    (
        "computer_id master_url master_rest_url software_root instance_root shared_part_list key_file cert_file"
        " build_time_part_list signature_private_key_file"
        " certificate_repository_path master_ca_file partition_amount pidfile_software pidfile_instance"
        " pidfile_report software_min_free_space instance_min_free_space maximum_periodicity promise_timeout"
        " partition_timeout manager_list root_check force_stop forbid_supervisord_automatic_launch buildout_debug"
        " ipv6_prefixshift instance_storage_home ipv4_global_network"
    ).split()
)
_FORMAT_KEYS = frozenset(
    (
        "interface_name ipv6_interface create_tap tap_ipv6 create_tun tun_ipv6 partition_has_ipv6_range"
        " ipv6_prefixshift ipv4_local_network tap_gateway_interface partition_amount partition_base_name"
        " user_base_name tap_base_name software_user instance_storage_home computer_xml computer_json"
        " input_definition_file output_definition_file log_file alter_user alter_network root_check dry_run now"
    ).split()
)
_OWN_KEYS = frozenset(
    (
        "bridge bridge_ports uid_base ipv4_partition_network state_dir log_dir run_dir packet_filter"
        " address_ownership tap_guard capacity_interval software_interval instances_interval report_interval"
        " meter_interval metrics_listen destroy_guard master_fingerprint buildout_version"
        " report_ambiguous offline_builds private_namespaces promise_interval keep_running prerm_timeout"
    ).split()
)
_KNOWN: Mapping[str, frozenset[str]] = {
    "slapos": _SLAPOS_KEYS,
    "slapformat": _FORMAT_KEYS,
    "partitiond": _OWN_KEYS,
}
# sections with a meaning of their own for other programs or with free keys
_OPEN_SECTIONS = (
    "slapproxy",
    "slapconsole",
    config_software.SECTION,
    config_mesh.SECTION,
    accounting_config.SECTION,
    "firewall",
    "disabled-firewall",  # as slapos.core ships it
    "routable_ipv4",
    device_config.SECTION,
    config_guard.SECTION,
    privacy_config.SECTION,
    quota_config.SECTION,
)

# each is made the node's own
_OWN_DIRECTORIES = (
    ("slapos", "instance_root"),
    ("slapos", "software_root"),
    ("partitiond", "state_dir"),
    ("partitiond", "log_dir"),
    ("partitiond", "run_dir"),
)

_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,24}")
_TAP_NAME = re.compile(r"[a-z][a-z0-9_-]{0,10}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_COMPUTER = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds between two passes of each lane."""

    capacity: float = 86400
    software: float = 300
    instances: float = 300
    report: float = 86400
    meter: float = 10
    promise: float = 120


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that the operator decides; paths are absolute."""

    file: Path
    computer_id: str
    master_url: str
    software_root: Path
    instance_root: Path
    interface: str
    partition_amount: int
    ipv6_interface: str
    network: NetworkKeys
    guard: GuardKeys
    create_tap: bool
    ipv6_range: bool
    ipv6_prefixshift: int
    ipv4_network: ipaddress.IPv4Network
    partition_base: str
    user_base: str
    tap_base: str
    software_user: str
    uid_base: int
    state_dir: Path
    log_dir: Path
    run_dir: Path
    packet_filter: Backend
    address_ownership: bool
    destroy_guard: bool
    intervals: Intervals
    key_file: Path | None
    cert_file: Path | None
    certificate_repository: Path | None
    master_ca_file: Path | None
    maximum_periodicity: int
    shared_part_list: str
    offline_builds: bool
    computer_xml: Path | None
    computer_json: Path | None
    metrics_listen: ClosedPort | None
    tunnels: tuple[OperatorTunnel, ...] = ()
    instance_storage_home: Path | None = None
    block_devices: tuple[OperatorDevice, ...] = ()
    shared_namespaces: frozenset[str] = frozenset()
    grid: GridKeys = field(default_factory=GridKeys)
    software: SoftwareKeys = field(default_factory=SoftwareKeys)
    accounting: AccountingKeys = field(default_factory=AccountingKeys)
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    # of a node that owns nothing of the machine
    unmanaged: Unmanaged | None = None
    mesh: MeshKeys | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)
    # file and drop-ins as one text, which reads back as the same configuration
    text: str = field(default="", compare=False, repr=False)

    @property
    def without_ipv6(self) -> bool:
        """Whether partitions are to have no IPv6 address, whatever the interface has."""
        return self.network.partition_network is not None or bool(self.mesh and self.mesh.replaces_ipv6)


def load(
    path: Path, overrides: Mapping[tuple[str, str], str] | None = None, *, stood_at: Path | None = None
) -> Config:
    """Read a configuration file and its drop-ins ``<file>.d/*.cfg``; ``overrides`` are values by section and key.

    ``stood_at``: this is a copy, and the configuration is that of the file there, with what lies beside it.

    Raises PartitiondError ``config.unreadable``, ``config.syntax`` or ``config.value`` (every bad value in one message).
    """
    drop_ins = sorted(Path(f"{path}.d").glob("*.cfg")) if Path(f"{path}.d").is_dir() else []
    files = (path, *drop_ins)
    parser = configparser.ConfigParser(interpolation=None, strict=True, inline_comment_prefixes=(";", "#"))
    for file in files:
        config_reader.read(parser, file)
    for (section, key), value in (overrides or {}).items():
        parser.read_dict({section: {key: value}}, source="the command line")
    reader = Reader(parser, files, given=frozenset(overrides or ()))
    _warn_unknown(reader)
    config_managers.warn(reader)
    config_unread.check(reader, managed=not config_unmanaged.chosen(reader))
    _check_shapes(reader)
    config = _build(stood_at or path, reader)
    _check_together(config, reader)
    if reader.problems:
        raise PartitiondError(
            "config.value",
            "\n".join(reader.problems),
            resource=str(path),
            hint="correct the lines named above",
        )
    return config


def _check_together(config: Config, reader: Reader) -> None:
    """What each value allows alone, but not beside the others."""
    if config.software_user == "root":
        reader.bad(
            "slapformat", "software_user", "root", "a user of its own: what it runs comes from releases"
        )
    if len(str(config.run_dir)) > _RUN_DIR_LENGTH:
        reader.bad(
            "partitiond", "run_dir", str(config.run_dir), f"a path of at most {_RUN_DIR_LENGTH} characters"
        )
    _check_networks(config, reader)
    members = {f"{config.user_base}{index}" for index in range(config.partition_amount)}
    if config.software_user in members and config.unmanaged is None:
        reader.bad("slapformat", "software_user", config.software_user, "no user of a partition")
    seen: dict[Path, str] = {}
    for section, key in _OWN_DIRECTORIES:
        path = getattr(config, key)
        if path in seen:
            reader.bad(section, key, str(path), f"another directory than {seen[path]}")
        seen.setdefault(path, key)
        index = (
            path.relative_to(config.instance_root).parts if path.is_relative_to(config.instance_root) else ()
        )
        if key != "software_root" and path.is_relative_to(config.software_root):
            # the software user could put files of its own in the place of root's
            reader.bad(section, key, str(path), "a directory outside of software_root")
        if index and re.fullmatch(re.escape(config.partition_base) + "[0-9]+", index[0]):
            reader.bad(section, key, str(path), "a directory outside of the partitions")
    _check_storage(config, reader)


def _check_storage(config: Config, reader: Reader) -> None:
    """Refuse what root will not pass through anyway: a home that the software user or a tenant could change."""
    home, section = config.instance_storage_home, _storage_section(reader)
    if home and home.is_relative_to(config.software_root):
        reader.bad(section, "instance_storage_home", str(home), "a directory outside of software_root")
    below = (
        home.relative_to(config.instance_root).parts
        if home and home.is_relative_to(config.instance_root)
        else ()
    )
    if below and re.fullmatch(re.escape(config.partition_base) + "[0-9]+", below[0]):
        reader.bad(section, "instance_storage_home", str(home), "a directory outside of the partitions")


def _check_networks(config: Config, reader: Reader) -> None:
    world = config.network.partition_network
    if world and world.overlaps(config.ipv4_network):
        words = f"a network apart from ipv4_local_network, which is {config.ipv4_network}"
        value = reader.raw("partitiond", "ipv4_partition_network")
        reader.bad("partitiond", "ipv4_partition_network", value, words)
    mesh = config.mesh.network if config.mesh else None
    others = {"ipv4_local_network": config.ipv4_network, "ipv4_partition_network": world}
    others |= {"the tuns' network": addresses.TUN_NETWORK} if config.network.create_tun else {}
    for key, other in others.items():
        if mesh and other and mesh.overlaps(other):
            value, words = reader.raw("tinc", "network"), f"a network apart from {key}, which is {other}"
            reader.bad("tinc", "network", value, words)
    for partition, routable in config.network.routable.items():
        if any(routable.interface.ip in one for one in (world, config.ipv4_network, mesh) if one):
            words = "an address outside of ipv4_local_network, ipv4_partition_network and the mesh"
            reader.bad("routable_ipv4", partition, reader.raw("routable_ipv4", partition), words)
    bridge = config.network.bridge or ""
    mesh_link = config.mesh.interface if config.mesh else ""
    for section, key, name in (("partitiond", "bridge", bridge), ("tinc", "interface", mesh_link)):
        if re.fullmatch(rf"(?:{re.escape(config.tap_base)}|slaptun)[0-9]+", name):
            reader.bad(section, key, name, "another name: taps and tuns of partitions are called so")
    if config.mesh and config.software_user == config_mesh.TINCD_USER:
        reader.bad(
            "slapformat", "software_user", config.software_user, "another name: tincd's user is called so"
        )
    if mesh_link and mesh_link in (bridge, *config.network.bridge_ports, config.interface, "lo"):
        reader.bad("tinc", "interface", mesh_link, "a name of its own: the interface is made")
    if config.create_tap and config.network.create_tun and config.tap_base == "slaptun":
        reader.bad("slapformat", "tap_base_name", "slaptun", "another name: tun interfaces are called so")


# the forms of values that are read as text
_SHAPES = {
    "buildout_version": (re.compile(r"[0-9]+(?:\.[0-9]+)*"), "a version such as 4.2.0"),
}
# a node that was told to be left alone must not be changed
_REFUSED = {
    "alter_network": (False, "partitiond owns the node's network", "true"),
    "alter_user": (False, "partitiond owns the partitions' users", "true"),
    "dry_run": (True, "partitiond plan shows what would be done", "false"),
}


def _check_shapes(reader: Reader) -> None:
    """Refuse bad values of keys that nothing else reads."""
    for key, (shape, words) in _SHAPES.items():
        value = reader.raw("partitiond", key)
        if value and not shape.fullmatch(value):
            reader.bad("partitiond", key, value, words)
    left_alone = config_unmanaged.KEYS if config_unmanaged.chosen(reader) else ()
    for key, (refused, why, allowed) in _REFUSED.items():
        if key not in left_alone and reader.truth("slapformat", key, not refused) == refused:
            reader.bad("slapformat", key, reader.raw("slapformat", key), f"{allowed} ({why})")


def _warn_unknown(reader: Reader) -> None:
    sections = (*_KNOWN, *_OPEN_SECTIONS)
    for section in reader.parser.sections():
        if section in _KNOWN:
            _warn_keys(reader, section, _KNOWN[section])
        elif section not in sections and not section.startswith(("tunnel ", "manager:", "multimaster/")):
            reader.warnings.append(
                f"{reader.place(section, '')}: unknown section{_suggest(section, sections)}"
            )


def _warn_keys(reader: Reader, section: str, known: frozenset[str]) -> None:
    for key in reader.parser[section]:
        if key in ("bridge_name", "no_bridge"):
            reader.warnings.append(
                f"{reader.place(section, key)}: {key} is not read; set bridge in [partitiond] instead"
            )
        elif key not in known:
            reader.warn_unknown(section, key, known)
        elif key == "input_definition_file" and not config_unmanaged.chosen(reader):
            words = "a definition of the node by file is for nodes with alter_user and alter_network = false"
            reader.warnings.append(f"{reader.place(section, key)}: {words}")


def _suggest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, sorted(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def _master_url(reader: Reader) -> str:
    value = reader.text("slapos", "master_url", None, None, "an http:// or https:// URL")
    if value and not (re.fullmatch(r"https?://[^\s\"'%$\\]+", value) and _names_a_host(value)):
        reader.bad("slapos", "master_url", value, "an http:// or https:// URL")
    return value


def _names_a_host(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _amount(reader: Reader) -> int:
    elsewhere = reader.raw("slapos", "partition_amount") and not reader.raw("slapformat", "partition_amount")
    return reader.number("slapos" if elsewhere else "slapformat", "partition_amount", None, 0, 10000)


def _storage_section(reader: Reader) -> str:
    # slapformat reads both and lets [slapos] win, slapgrid only [slapos]
    return "slapos" if reader.raw("slapos", "instance_storage_home") else "slapformat"


def _name(reader: Reader, key: str, default: str) -> str:
    words = "lower-case letters, digits, - and _, at most 25"
    return reader.text("slapformat", key, default, _NAME, words)


def _link(reader: Reader, section: str, key: str, default: str | None) -> str:
    words = "a name of a network interface, at most 15 characters"
    return reader.text(section, key, default, _INTERFACE, words)


def _packet_filter(reader: Reader) -> Backend:
    chosen = reader.choice("partitiond", "packet_filter", "nftables", ("nftables", "iptables"))
    return "iptables" if chosen == "iptables" else "nftables"


def _ipv4_network(reader: Reader, amount: int) -> ipaddress.IPv4Network:
    words = "an IPv4 network such as 10.0.0.0/16 with room for all partitions"
    value = reader.raw("slapformat", "ipv4_local_network") or "10.0.0.0/16"
    try:
        network = ipaddress.IPv4Network(value, strict=False)
    except ValueError:
        reader.bad("slapformat", "ipv4_local_network", value, words)
        network = ipaddress.IPv4Network("10.0.0.0/16")
    if network.prefixlen < 8 or network.is_loopback or network.is_multicast or network.is_link_local:
        reader.bad("slapformat", "ipv4_local_network", value, words)
    if network.num_addresses < amount + 3:
        words = f"a network with room for {amount} partitions"
        reader.bad("slapformat", "ipv4_local_network", str(network), words)
    return network


def _prefix_shift(reader: Reader, amount: int) -> int:
    shift = reader.number("slapformat", "ipv6_prefixshift", 16, 2, 64)
    if 2**shift < 4 * amount:
        words = f"a number s with 2^s ≥ 4 × {amount} partitions"
        reader.bad("slapformat", "ipv6_prefixshift", str(shift), words)
    return shift


def _key_pair(reader: Reader) -> tuple[Path | None, Path | None]:
    key_file = reader.optional_path("slapos", "key_file")
    cert_file = reader.optional_path("slapos", "cert_file")
    if (key_file is None) != (cert_file is None):
        reader.problems.append(
            f"{reader.place('slapos', '')}: key_file and cert_file go together; one is missing"
        )
    return key_file, cert_file


def _enforced(reader: Reader) -> bool:
    return reader.choice("partitiond", "address_ownership", "enforce", ("enforce", "off")) == "enforce"


def _intervals(reader: Reader) -> Intervals:
    defaults = dataclasses.asdict(Intervals())
    return Intervals(
        **{
            lane: reader.number("partitiond", f"{lane}_interval", int(seconds), 1, 10**8)
            for lane, seconds in defaults.items()
        }
    )


def _own_directory(reader: Reader, key: str, default: str, unmanaged: Unmanaged | None) -> Path:
    if unmanaged is not None:
        default = config_unmanaged.directory(
            reader.own_path("slapos", "instance_root", None), key.removesuffix("_dir")
        )
    return reader.own_path("partitiond", key, default)


def _build(path: Path, reader: Reader) -> Config:
    own = config_unmanaged.read(reader)
    amount = len(own.partitions) if own else _amount(reader)
    interface = _link(reader, "slapformat", "interface_name", "" if own else None)
    bridge = _link(reader, "partitiond", "bridge", "")
    local_network = _ipv4_network(reader, amount)
    ipv6_interface = _link(reader, "slapformat", "ipv6_interface", interface) or interface
    partition_base = own.base if own else _name(reader, "partition_base_name", "slappart")
    tap_words = "1 to 11 characters"
    tap_base = reader.text("slapformat", "tap_base_name", "slaptap", _TAP_NAME, tap_words)
    uid_base = reader.number("partitiond", "uid_base", 5000, 100, 2**31 - 1 - 10000)
    shift = _prefix_shift(reader, amount)
    key_file, cert_file = _key_pair(reader)
    partitions = frozenset(f"{partition_base}{index}" for index in range(amount))
    return Config(
        file=path.absolute(),  # supervisord, and what it starts, run elsewhere
        computer_id=reader.text(
            "slapos", "computer_id", None, _COMPUTER, "letters, digits, . _ -, at most 64"
        ),
        master_url=_master_url(reader),
        software_root=reader.own_path("slapos", "software_root", None),
        instance_root=reader.own_path("slapos", "instance_root", None),
        interface=interface,
        ipv6_interface=ipv6_interface,
        partition_amount=amount,
        network=config_network.read(
            reader,
            interface=interface,
            ipv6_interface=ipv6_interface,
            bridge=bridge or None,
            partitions=partitions,
        ),
        guard=config_guard.read(reader, bridge=bridge or None, partitions=partitions),
        create_tap=reader.truth("slapformat", "create_tap", True) and own is None,
        ipv6_range=reader.truth("slapformat", "partition_has_ipv6_range", True),
        ipv6_prefixshift=shift,
        ipv4_network=local_network,
        partition_base=partition_base,
        user_base=_name(reader, "user_base_name", "slapuser"),
        tap_base=tap_base,
        software_user=own.user if own else _name(reader, "software_user", "slapsoft"),
        uid_base=uid_base,
        state_dir=_own_directory(reader, "state_dir", "/var/lib/partitiond", own),
        log_dir=_own_directory(reader, "log_dir", "/var/log/partitiond", own),
        run_dir=_own_directory(reader, "run_dir", "/run/partitiond", own),
        packet_filter=_packet_filter(reader),
        address_ownership=_enforced(reader),
        destroy_guard=reader.truth("partitiond", "destroy_guard", True),
        intervals=_intervals(reader),
        key_file=key_file,
        cert_file=cert_file,
        certificate_repository=reader.optional_path("slapos", "certificate_repository_path"),
        master_ca_file=reader.optional_path("slapos", "master_ca_file"),
        maximum_periodicity=reader.number("slapos", "maximum_periodicity", 86400, -1, 10**8),
        shared_part_list=reader.raw("slapos", "shared_part_list"),
        offline_builds=reader.truth("partitiond", "offline_builds", False),
        computer_xml=reader.optional_path("slapformat", "computer_xml"),
        computer_json=reader.optional_path("slapformat", "computer_json"),
        metrics_listen=metrics_config.read(reader),
        tunnels=tuple(tunnel_config.operator_tunnels(reader)),
        instance_storage_home=reader.optional_path(_storage_section(reader), "instance_storage_home"),
        block_devices=device_config.block_devices(reader, partition_base, amount),
        shared_namespaces=partitions
        if own
        else privacy_config.shared_namespaces(reader, partition_base, amount),
        grid=config_grid.read(reader, partitions),
        software=config_software.read(reader),
        accounting=accounting_config.accounting_keys(reader),
        quotas=quota_config.quotas(reader, partition_base, amount),
        unmanaged=own,
        mesh=None if own else config_mesh.read(reader, path.absolute().parent, amount),
        warnings=tuple(reader.warnings),
        text=config_reader.merged(reader.parser),
    )
