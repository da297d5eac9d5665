"""``mesh export``, ``import`` and ``remove``: how nodes come to know each other.

Promises: of an import all blocks are taken in or none; a peer that is known gets another key or range only by word; what is
there already is said and not written again. The node is applied by the caller.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from netplan import observe, tinc, tinc_keys
from netplan.errors import NetplanError
from partitiond import addressing, files, mesh, mesh_peers
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from netplan.tinc import HostBlock
    from partitiond.config import Config
    from partitiond.config_mesh import MeshKeys
    from partitiond.context import Context
    from partitiond.mesh_peers import Known

ACTIONS = ("import", "remove")
_STAGE = ".import"


def keys_of(config: Config) -> MeshKeys:
    """What the configuration says of the mesh. Raises PartitiondError ``mesh.off``."""
    if config.mesh is None:
        raise PartitiondError(
            "mesh.off",
            "this node is in no mesh",
            resource=str(config.file),
            hint="write [tinc] with network (of the whole mesh, such as 10.64.0.0/16) and index (this node's number in it),"
            " then partitiond apply",
        )
    return config.mesh


def export(context: Context) -> dict[str, Any]:
    """``mesh export``: the block of this node. Raises PartitiondError ``mesh.off``, ``mesh.no_key``, ``mesh.no_address``."""
    keys = keys_of(context.config)
    known = mesh_peers.read(keys)
    if not known.has_key:
        first = next((one for one in known.refused if known.key_refused), None)
        raise PartitiondError(
            "mesh.no_key",
            first.reason if first else "this node has no key yet",
            resource=str(keys.directory / mesh_peers.KEY),
            hint=first.hint if first else "partitiond apply makes one",
        )
    block = mesh_peers.block_of(keys, known.own.key, keys.addresses or _own_addresses(context))
    return {**as_json(block), "block": tinc.render(block, named=True)}


def as_json(block: HostBlock) -> dict[str, Any]:
    """A node of the mesh as verbs show it."""
    return {
        "name": block.name,
        "addresses": [str(one) for one in block.addresses],
        "port": block.port,
        "ranges": [str(one) for one in block.subnets],
        "fingerprint": tinc_keys.fingerprint(block.key) if block.key else None,
    }


def _own_addresses(context: Context) -> tuple[str, ...]:
    """Where others reach this node: its own IPv6 of the interface, else its first IPv4 there."""
    config, look = context.config, observe.look()
    # what partitions have instead of IPv6 is no matter of where the node is reached
    before = None if config.without_ipv6 else context.store.base()
    if base := addressing.choose_base(addressing.global_ipv6(config, look), before):
        return (str(base.ip),)
    ipv4 = addressing.first_ipv4(config, look)
    if ipv4 is None:
        raise PartitiondError(
            "mesh.no_address",
            f"{config.network.interface} has no address that others could reach this node by",
            resource=str(config.file),
            hint="name one by address in [tinc]",
        )
    return (str(ipv4.ip),)


# --- import -------------------------------------------------------------------------------------------------------------


def change(context: Context, body: dict[str, Any]) -> dict[str, Any]:
    """``import`` (``blocks``, ``replace``) or ``remove`` (``names``), all or nothing.

    Raises PartitiondError, NetplanError with the first thing that is wrong.
    """
    keys = keys_of(context.config)
    if mesh.is_lost(context.config, keys):
        hint = mesh.LOST_HINT.format(keys.directory / mesh_peers.HOSTS)
        raise PartitiondError("mesh.no_directory", mesh.LOST, resource=str(keys.directory), hint=hint)
    if body.get("action") == "remove":
        return _remove(keys, body.get("names", []))
    return _import(keys, str(body.get("blocks", "")).encode(), replace=bool(body.get("replace")))


def _import(keys: MeshKeys, content: bytes, *, replace: bool) -> dict[str, Any]:
    known = mesh_peers.read(keys)
    peers = known.by_name
    found: dict[str, list[str]] = {"added": [], "changed": [], "unchanged": [], "own": []}
    warnings: list[str] = []
    for block in tinc.parse(content):
        what = _judged(block, known, peers, keys, replace=replace)
        found[what].append(block.name)
        if what in ("added", "changed"):
            peers[block.name] = block
            warnings += [f"{block.name}: {name} is not taken over" for name in block.passed_over]
    if len(peers) > mesh_peers.MOST_PEERS:
        hint = "partitiond mesh remove takes those away that are gone"
        raise PartitiondError(
            "mesh.block", f"more than {mesh_peers.MOST_PEERS} peers", resource="mesh", hint=hint
        )
    if found["added"] or found["changed"]:
        _put(
            keys.directory / mesh_peers.HOSTS, [peers[name] for name in (*found["added"], *found["changed"])]
        )
    return {**found, "warnings": warnings}


def _put(hosts: Path, blocks: Sequence[HostBlock]) -> None:
    """Write host blocks, all or none: first where nobody looks, as a disk may be full. Raises PartitiondError."""
    try:
        hosts.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.directory(hosts) as descriptor:
            shutil.rmtree(hosts / _STAGE, ignore_errors=True)  # of one that was killed
            try:
                os.mkdir(_STAGE, 0o700, dir_fd=descriptor)
                with files.directory(hosts, _STAGE) as stage:
                    for one in blocks:
                        files.write(one.name, tinc.render(one).encode(), dir_fd=stage, mode=0o644)
                    files.flush(stage)
                    for one in blocks:
                        os.rename(one.name, one.name, src_dir_fd=stage, dst_dir_fd=descriptor)
            finally:
                shutil.rmtree(hosts / _STAGE, ignore_errors=True)
            os.fsync(descriptor)
    except OSError as error:
        raise _unwritable(hosts, error, "taken in") from error


def _unwritable(hosts: Path, error: OSError, what: str) -> PartitiondError:
    return PartitiondError(
        "mesh.unwritable",
        f"cannot be changed: {error.strerror}; no block was {what}",
        resource=str(hosts),
        hint="make room there, or have it mounted for writing; then the same again",
    )


def _judged(
    block: HostBlock, known: Known, peers: dict[str, HostBlock], keys: MeshKeys, *, replace: bool
) -> str:
    """What becomes of a block."""
    if block.name == keys.name and block.key == known.own.key:
        return "own"
    there = peers.get(block.name)
    if there == block:
        return "unchanged"
    tinc.judge(block, own=known.own, network=keys.network, others=peers.values())
    if there is None:
        return "added"
    if not replace and (there.key != block.key or there.subnets != block.subnets):
        what = "key" if there.key != block.key else "range"
        raise NetplanError(
            "mesh.known",
            f"is known here with another {what}",
            resource=block.resource,
            hint="where that node was made anew: partitiond mesh import --replace",
        )
    return "changed"


def _remove(keys: MeshKeys, names: Sequence[str]) -> dict[str, Any]:
    hosts = keys.directory / mesh_peers.HOSTS
    there = {*mesh_peers.names(hosts)} - {keys.name}
    for name in names:
        if name not in there:
            raise PartitiondError(
                "mesh.unknown_peer",
                "no host block of that name is here",
                resource=tinc.shown(name),
                hint="partitiond mesh status names the peers",
            )
    for name in names:
        try:
            files.remove_path(hosts / name)
        except OSError as error:
            raise _unwritable(hosts, error, f"taken away from {tinc.shown(name)} on") from error
    return {"removed": list(names)}
