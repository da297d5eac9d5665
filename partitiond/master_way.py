"""The way to a master that is reached by a tunnel of the operator's: which partition keeps it, and what is wrong with it.

A node whose ``master_url`` names the place where a client ``[tunnel NAME]`` of its own listens is cut off from its master by
the end of that tunnel. So the partition that keeps it is not offered to the master: whoever stopped an instance there would
stop the tunnel, with nobody left who could be told to start it again, and one that is destroyed takes its identity along.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from netplan.errors import NetplanError
from partitiond import remembered, supervision, tunnel_status

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.node_plan import Observation, Plan

_PORTS = {"http": 80, "https": 443}


class Way(NamedTuple):
    """The public name of the tunnel to the master, and the partition that keeps it."""

    tunnel: str
    partition: Partition


def find(node: Node) -> Way | None:
    """The way to the master, where it is a tunnel of this node; one that is refused is one, too."""
    url = urlsplit(node.config.master_url)
    host = "127.0.0.1" if url.hostname == "localhost" else url.hostname
    place = f"{host}:{url.port or _PORTS.get(url.scheme)}"
    for given in node.config.tunnels:
        partition = node.partition(given.partition)
        if partition is None or given.values.get("mode", "").strip() != "client":
            continue
        listen = given.values.get("listen", "").strip()
        if place == (listen if ":" in listen else f"{partition.ipv4}:{listen}"):
            return Way(f"{partition.id}/{given.name}", partition)
    return None


def offered(node: Node) -> tuple[Partition, ...]:
    """The partitions that the master may use."""
    way = find(node)
    return tuple(item for item in node.partitions if way is None or item.id != way.partition.id)


def open_cases(context: Context, seen: Observation, todo: Plan) -> list[str]:
    """What ``partitiond status`` says of the way: that it is down, that an instance stands in it."""
    way = find(seen.node)
    if way is None:
        return []
    found = []
    if remembered.shown(context, way.partition.id).instance_guid:
        found.append(
            f"{way.partition.id} keeps the tunnel to the master and holds an instance: stopped or destroyed, it cuts the node"
            " off; name another partition in [tunnel], whose certificate the master's side allows"
        )
    if reason := _why_down(context, way, seen, todo):
        found.append(f"the master is reached by the tunnel {way.tunnel}, which is not up: {reason}")
    elif context.master.as_json()["reachable"] is False:
        found.append(
            f"the master is reached by the tunnel {way.tunnel}, whose near end is up: partitiond tunnel check {way.tunnel}"
            " says what its far end does"
        )
    return found


def _why_down(context: Context, way: Way, seen: Observation, todo: Plan) -> str:
    """Why the tunnel is not up; empty when it is."""
    if why := remembered.halted(context).get(way.partition.id):
        return why
    declared = todo.declared[way.partition.id]
    for refused in declared.refused:
        if refused.name == way.tunnel:
            return f"refused: {refused.reason}"
    running = supervision.running_groups(seen.processes)
    wanted = {way.partition.id: declared}
    try:
        states = list(
            tunnel_status.states([way.partition], wanted, todo.published, running, datetime.now(UTC))
        )
    except NetplanError as error:
        return str(error)
    return next((one.reason or "" for one in states if one.tunnel.name == way.tunnel), "")
