"""What ``mesh status`` says: this node and its peers, as tincd knows them now, and what went wrong in words.

tincd is asked by SIGUSR2, whose answer is in its log. It writes that in the handler of the signal (``sigusr2_handler`` in
process.c of 1.0.36), amid whatever it is doing: so it is asked when somebody wants to know, never by the daemon's passes.
"""

from __future__ import annotations

import ipaddress
import signal
import time
from typing import TYPE_CHECKING, Any

from netplan import counters, tinc_status
from netplan.errors import NetplanError
from partitiond import mesh, mesh_peers, mesh_ping, procfs
from partitiond.mesh_log import NewLines, tail
from partitiond.mesh_process import process_of
from partitiond.mesh_verbs import as_json, keys_of
from partitiond.refusal import as_json as refusal_as_json
from partitiond.supervision import MESH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from netplan.tinc import HostBlock
    from netplan.tinc_status import NodeState, Problem
    from partitiond.config import Config
    from partitiond.config_mesh import MeshKeys
    from partitiond.context import Context
    from partitiond.mesh_peers import Known
    from partitiond.supervision import Process, Supervisor

_ANSWERS_WITHIN = 3.0
_PING_SECONDS = 1.0
_MOMENT = 0.01
_OF_PEERS = ("unreachable", "key")  # what somebody is tried for who has a host block here


def status(context: Context) -> dict[str, Any]:
    """The object of ``mesh status``. Raises PartitiondError ``mesh.off``."""
    config = context.config
    keys = keys_of(config)
    known = mesh_peers.read(keys)
    process = process_of(context.supervisor.processes())
    nodes, announced = _asked(config, context.supervisor, process)
    found = tinc_status.problems(tail(mesh.log_file(config)))
    trips = _round_trips(keys, known, nodes)
    return {
        **as_json(known.own),
        "network": str(keys.network),
        "range": str(keys.own),
        "address": str(keys.address),
        "interface": keys.interface,
        "tincd": {"state": _state(process), "pid": process.pid or None if process else None},
        "peers": [
            _peer(one, nodes.get(one.name) if nodes is not None else None, found, trips)
            for one in known.peers
        ],
        "strangers": sorted(nodes.keys() - known.by_name.keys() - {keys.name}) if nodes else [],
        "problems": [*_of_no_peer(found, known), *_own_twice(keys, announced)],
        "refused": [refusal_as_json(one) for one in known.refused],
        "relays": mesh.wanted(keys, known).relays,
        "dropped": _dropped(config),
    }


def _dropped(config: Config) -> list[dict[str, Any]] | None:
    """Packets that the source checks dropped since the packet filter was made; None where it cannot be read."""
    try:
        found = counters.read_in_force(config.packet_filter).mesh
    except NetplanError:
        return None
    return [{**verdict._asdict(), "packets": packets} for verdict, packets in sorted(found.items())]


def _state(process: Process | None) -> str:
    if mesh.tincd_program() is None:
        return "not installed"
    if process is None:
        return "not set up"
    return "running" if process.pid else "does not run"


def _asked(
    config: Config, supervisor: Supervisor, process: Process | None
) -> tuple[dict[str, NodeState] | None, Mapping[str, tuple[str, ...]]]:
    """Nodes and ranges as tincd knows them; None where it does not say."""
    # one that has no handler yet would end by it
    if process is None or not process.pid or not procfs.handles(process.pid, signal.SIGUSR2):
        return None, {}
    log = NewLines(mesh.log_file(config))
    supervisor.signal(MESH, process.name, "USR2")
    deadline = time.monotonic() + _ANSWERS_WITHIN
    while time.monotonic() < deadline:
        found = tinc_status.read_dump(log.text())
        if found is not None:
            return found
        time.sleep(_MOMENT)
    return None, {}


def _round_trips(
    keys: MeshKeys, known: Known, nodes: Mapping[str, NodeState] | None
) -> Mapping[ipaddress.IPv4Address, float]:
    reachable = {name for name, one in (nodes or {}).items() if one.reachable}
    targets = [one.node_address for one in known.peers if one.name in reachable]
    try:
        return mesh_ping.round_trips(targets, keys.address, _PING_SECONDS)
    except OSError:
        return {}  # the interface has no address yet: nobody answers


def _peer(
    peer: HostBlock,
    state: NodeState | None,
    found: Iterable[Problem],
    trips: Mapping[ipaddress.IPv4Address, float],
) -> dict[str, Any]:
    seconds = trips.get(peer.node_address)
    # with both ends connecting, the second connection may fail beside the one that stands
    stands = state is not None and state.nexthop == peer.name
    passing = ("unreachable", "key") if stands else ()
    said = [one.words for one in found if one.peer == peer.name and one.kind not in passing]
    return {
        **as_json(peer),
        "reachable": state.reachable if state else None,
        "address": state.address if state and state.reachable else None,
        "via": state.nexthop if state and state.nexthop != peer.name else None,
        "direct": state.direct if state else None,
        "round_trip_ms": None if seconds is None else round(seconds * 1000, 2),
        "problem": said[-1] if said else None,
    }


def _of_no_peer(found: Iterable[Problem], known: Known) -> Iterator[str]:
    """What is about this node, or somebody who is no peer; what was wrong with one that was taken away is over."""
    for one in found:
        if not one.peer:
            yield one.words
        elif one.peer not in known.by_name and one.kind not in _OF_PEERS:
            yield f"{one.peer}: {one.words}"


def _own_twice(keys: MeshKeys, announced: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Whom tincd itself gives ranges that are this node's: none, as long as host blocks are judged."""
    for name, ranges in announced.items():
        for one in ranges:
            if name != keys.name and ipaddress.ip_network(one).overlaps(keys.own):
                yield f"{name} has {one}, which overlaps this node's range"


def open_cases(config: Config) -> list[str]:
    """What stands open of the mesh beside what is refused: what tincd said that concerns more than one peer's reach."""
    if config.mesh is None:
        return []
    known = mesh_peers.read(config.mesh)
    found = tinc_status.problems(tail(mesh.log_file(config)))
    return [
        f"mesh: {f'{one.peer}: ' if one.peer else ''}{one.words}"
        for one in found
        if one.kind in ("same_name", "own")
        or (one.kind == "range" and _is_given(one.subject, config.mesh, known))
    ]


def _is_given(subject: str, keys: MeshKeys, known: Known) -> bool:
    """Whether a range that somebody claims is another's; one of a node that is not imported yet is nobody's affair."""
    try:
        claimed = ipaddress.ip_network(subject.partition("#")[0])
    except ValueError:
        return True
    if not isinstance(claimed, ipaddress.IPv4Network):
        return True
    return any(
        claimed.overlaps(one) for one in (keys.own, *(one for peer in known.peers for one in peer.subnets))
    )
