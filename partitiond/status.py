"""What ``status``, ``show`` and ``tunnel list`` say, as the objects of the contract."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accounting.errors import AccountingError
from netplan import holding
from netplan.legacy_cases import OPEN_CASES as LEGACY_CASES
from partitiond import (
    certificate_expiry,
    converge,
    destruction,
    dropped,
    identity_guard,
    incidents,
    last_good,
    master_way,
    mesh_status,
    messages,
    node_pair,
    port_reservation,
    privacy,
    promise_book,
    quotas,
    remembered,
    report_verbs,
    services,
    software_status,
    trial,
    tunnels,
    usage_intake,
)
from partitiond.node import names
from partitiond.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netplan.model import TunSpec
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.node_plan import Observation, Plan
    from partitiond.state import InstanceState
    from partitiond.supervision import Process

# what stays open where the programs at the cgroup (netplan.bpf_programs) are not in force
_OPEN_WITHOUT_PROGRAMS = (
    "datagrams that reach a foreign wildcard socket, or one that shares a port by SO_REUSEADDR, are not stopped",
    "a client of a partition that binds nothing has the node's own source address",
    "another user can listen on a partition's address (nobody reaches it there) and so keep its own service out",
)
_CHECKED_EVERYWHERE = (
    "this kernel does not let a program that sees packets ask for its network namespace (Linux 6.15 does): packets for"
    " a partition's global address are checked in containers, too, and those for private IPv4 are not; of what comes for the"
    " node's own addresses only what the packet filter knows the owner of is metered (TCP, connected UDP)"
)


_FLUSHABLE = (
    "nft flush ruleset by somebody else takes the packet filter away (a running daemon holds it on Linux 6.9 with nft 1.1"
    " and later): until the daemon has loaded it again, some tenths of a second, taps are down, and addresses are held by"
    " the programs at the cgroup alone"
)


def node(context: Context) -> dict[str, Any]:
    """The contract's ``status`` object."""
    states = states_before(context)
    seen = converge.observe(context)
    todo = converge.plan(context, seen)
    config = context.config
    wrong = _incidents(context)
    partitions = [
        _partition(context, item, states.get(item.id), seen, todo, wrong.get(item.id, []))
        for item in seen.node.partitions
    ]
    return {
        "node": {
            "computer_id": config.computer_id,
            "master": {"url": config.master_url, **context.master.as_json()},
            "interface": config.network.interface,
            "bridge": config.network.bridge,
            "source_selection": _source_selection(seen),
            "trial": trial.as_json(config.state_dir),
            "bridge_ports": list(config.network.bridge_ports),
            "open_cases": [
                *_open_cases(seen.node),
                *_without_programs(seen),
                *services.open_cases(context.supervisor, seen.processes),
                *privacy.open_cases(config, seen.node.partitions, seen.processes),
                *_few_sessions(context),
                *destruction.open_cases(context.store.readable()[0].values(), time.time()),
                *identity_guard.open_cases(context),
                *dropped.open_cases(context.store.readable()[0].values()),
                *port_reservation.open_cases(port_reservation.deal(seen.ports, todo.declared.values())),
                *_refused_resources(todo),
                *mesh_status.open_cases(config),
                *remembered.open_cases(context),
                *context.meters.open_cases(),
                *node_pair.open_cases(config),
                *master_way.open_cases(context, seen, todo),
                *certificate_expiry.open_cases(config, seen.node.partitions),
                *messages.open_cases(config.state_dir),
                *software_status.open_cases(context),
                *quotas.open_cases(config, ((one["id"], one["quota"]) for one in partitions)),
                *report_verbs.open_cases(config),
                *filter(None, (tell() for tell in context.troubles.values())),
                *usage_intake.open_cases(context, seen.node, config.accounting.tariff.partition_resources),
            ],
            "drift": [operation.id for operation in todo if operation.partition is None],
        },
        "partitions": partitions,
        "software": software_status.releases(context),
    }


def _open_cases(target: Node) -> list[str]:
    config = target.config
    found = _unguarded(config)
    if config.packet_filter == "iptables":
        found += (f"{name}: {text} (packet_filter = iptables)" for name, text in LEGACY_CASES.items())
    elif not holding.spared():
        found.append(_FLUSHABLE)
    if config.grid.force_stop:
        found.insert(
            0, "force_stop is set: instances are configured and kept stopped, and the master is not told"
        )
    if not config.address_ownership:
        found.insert(0, "address_ownership is off: every user may use every address of the node")
    rejected = last_good.rejected_file(config)
    if rejected is not None:
        found.insert(0, rejected.sentence())
    found += _forwarding(target)
    listen = config.metrics_listen
    if listen is not None and not listen.address.is_loopback:
        found.append(
            f"metrics_listen is {listen.address}: whoever reaches that address reads the metrics of all partitions, but for"
            " partitions' users and guests with addresses of their own"
        )
    interface = config.network.interface
    if config.network.partition_network:
        if target.host_ipv4 is None:
            found.append(
                f"{config.network.ipv4_interface} has no IPv4 address of its own, so the node cannot be offered, and"
                " unbound clients do not reach partitions of this node"
            )
    elif target.address is None:
        found.append(f"{interface} has no global IPv6 address, so partitions have none either")
    elif target.base and not target.base_is_here:
        found.append(f"{interface} has lost {target.base}; the partitions' addresses are kept")
    return found


def _without_programs(seen: Observation) -> list[str]:
    """What is open where the programs at the cgroup are not in force, and what stands in for them."""
    hooks = seen.network.hooks
    if not seen.node.network().hooked or (hooks.version and not hooks.everywhere):
        return []
    if hooks.version:
        return [_CHECKED_EVERYWHERE]
    why = hooks.refused or "they are not loaded; partitiond apply does that"
    return [f"{case} (no programs at the cgroup: {why})" for case in _OPEN_WITHOUT_PROGRAMS]


def _source_selection(seen: Observation) -> str:
    """By what clients that bind nothing get their source."""
    wanted = seen.node.network()
    if wanted.hooked and seen.network.hooks.version:
        return "cgroup-bpf"
    return "routing-table" if wanted.local_source_table else "kernel"


def _unguarded(config: Config) -> list[str]:
    """What is open of what guests may send, as the operator chose it."""
    found: list[str] = []
    if config.packet_filter == "iptables":
        return found  # among the cases of iptables
    if config.create_tap and config.guard.mode == "off":
        found.append("tap_guard is off: guests may send as the node, its router, or each other")
    if config.create_tap and config.guard.mode == "lan":
        found.append(
            "tap_guard is lan: guests may take addresses of hosts of the LAN that are neither the node's nor a router's or"
            " resolver's of it (strict: only their own)"
        )
    if config.create_tap and config.guard.mode != "off":
        found.append(
            "who opens a tap with a virtio header can let a device without checksum offload write two bytes of a checksum"
            " into a frame that was checked (docs/design/isolation.md)"
        )
    return found


def _forwarding(target: Node) -> list[str]:
    """What keeps guests behind routed taps from the world. A setting of the whole node, which is the operator's to make."""
    taps = [item.network.tap for item in target.partitions if item.network.tap]
    wanted = (
        ("ipv6", "net.ipv6.conf.all.forwarding", any(tap.ipv6 for tap in taps)),
        ("ipv4", "net.ipv4.ip_forward", any(tap.ipv4 for tap in taps)),
    )
    return [
        f"{name} is 0: guests behind routed taps reach this node only ({family}); sysctl -w {name}=1"
        + (" (and accept_ra=2 where the node hears router advertisements)" if family == "ipv6" else "")
        for family, name, needed in wanted
        if needed and _is_off(Path("/proc/sys", *name.split(".")))
    ]


def _is_off(setting: Path) -> bool:
    try:
        return setting.read_text("ascii").strip() == "0"
    except FileNotFoundError:
        return True


def _few_sessions(context: Context) -> list[str]:
    limit = tunnels.open_files(context.supervisor)
    if limit >= tunnels.OPEN_FILES:
        return []
    return [
        f"tunnels take {tunnels.most_sessions(limit)} sessions a partition: supervisord began with {limit} open files at most"
    ]


def _refused_resources(todo: Plan) -> list[str]:
    """What is refused but the tunnels, which have a list of their own."""
    return [
        f"{one.name}{f' of {one.partition}' if one.partition else ''} is refused: {one.reason}"
        for one in todo.refused
        if isinstance(one, Refusal) and one.resource != "instance"
    ]


def partition(context: Context, name: str) -> dict[str, Any] | None:
    """The object of one partition, or None."""
    return next((item for item in node(context)["partitions"] if item["id"] == name), None)


def _incidents(context: Context) -> dict[str, list[dict[str, object]]]:
    """What is wrong, by partition; a ledger that cannot be read is an open case already."""
    try:
        with context.meters.reader() as ledger:
            return incidents.as_json(ledger, context.clock())
    except AccountingError:
        return {}


def states_before(context: Context) -> dict[str, InstanceState]:
    """The states of the instances, by partition, for who is going to look at the processes: what these show is never older than
    the state, so that where an instance is started, or stopped, they say so, too.
    """
    return {name: remembered.shown(context, name) for name in names(context.config)}


def _partition(
    context: Context,
    item: Partition,
    state: InstanceState | None,
    seen: Observation,
    todo: Plan,
    wrong: list[dict[str, object]],
) -> dict[str, Any]:
    return partition_object(
        context,
        item,
        state,
        seen.processes,
        block_devices=seen.block_devices.given(item),
        incidents=wrong,
        tunnels=[tunnel.name for tunnel in todo.declared[item.id].tunnels],
        drift=[operation.id for operation in todo if operation.partition == item.id],
    )


def partition_object(
    context: Context,
    item: Partition,
    state: InstanceState | None,
    processes: Sequence[Process],
    *,
    block_devices: Sequence[str] = (),
    incidents: Sequence[dict[str, object]] = (),
    tunnels: Sequence[str] = (),
    drift: Sequence[str] = (),
) -> dict[str, Any]:
    """One partition as the contract has it; ``state`` is from before its processes were looked at, None if it came since."""
    state = state or remembered.shown(context, item.id)
    network = item.network
    return {
        "id": item.id,
        "index": item.index,
        "state": state.life,
        "error": state.error,
        "user": {"name": item.user, "uid": item.uid},
        "path": str(item.path),
        "tap": {
            "name": network.tap.name,
            "mac": item.guest_mac,
            "bridge": network.tap.bridge,
            "ipv4": str(network.tap.ipv4) if network.tap.ipv4 else None,
            "ipv6": str(network.tap.ipv6.ip) if network.tap.ipv6 else None,
            "ipv6_prefixlen": network.tap.ipv6.network.prefixlen if network.tap.ipv6 else None,
        }
        if network.tap
        else None,
        "tun": _tun(network.tun) if network.tun else None,
        "ipv6": str(item.ipv6) if item.ipv6 else None,
        "ipv6_prefixlen": network.ipv6.network.prefixlen if network.ipv6 else None,
        "ipv6_range": str(network.ipv6_range.network_address) if network.ipv6_range else None,
        "ipv6_range_prefixlen": network.ipv6_range.prefixlen if network.ipv6_range else None,
        "ipv4": str(item.ipv4),
        "public_ipv4": str(network.public_ipv4) if network.public_ipv4 else None,
        "routable_ipv4": str(network.routable_ipv4.interface.ip) if network.routable_ipv4 else None,
        "routable_ipv4_prefixlen": network.routable_ipv4.interface.network.prefixlen
        if network.routable_ipv4
        else None,
        "vpn_ipv4": str(network.vpn_ipv4) if network.vpn_ipv4 else None,
        "block_devices": list(block_devices),
        "software_release": state.software_release,
        "instance_guid": state.instance_guid,
        "processes": [_process(process) for process in processes if process.group == item.id],
        "incidents": list(incidents),
        "promises": promise_book.as_json(context.promises.known(item.id)),
        "tunnels": list(tunnels),
        "quota": quotas.as_json(context, item.id, state.instance_guid),
        "drift": list(drift),
    }


def _tun(tun: TunSpec) -> dict[str, Any]:
    return {
        "name": tun.name,
        "ipv4": str(tun.ipv4.ip) if tun.ipv4 else None,
        "ipv4_prefixlen": tun.ipv4.network.prefixlen if tun.ipv4 else None,
        "ipv6": str(tun.ipv6.ip) if tun.ipv6 else None,
        "ipv6_prefixlen": tun.ipv6.network.prefixlen if tun.ipv6 else None,
    }


def _process(process: Process) -> dict[str, Any]:
    return {"name": process.name, "state": process.state, "pid": process.pid or None}
