"""The operator's directory of the mesh: this node's key and the host blocks of its peers, read and judged.

Promises: what is wrong with one file costs that peer alone; of two that clash the one whose name comes first stays; nothing
here is a tenant's, and what is not root's is not read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from netplan import tinc, tinc_keys
from netplan.errors import NetplanError
from netplan.tinc_syntax import NAME
from partitiond import files
from partitiond.errors import PartitiondError
from partitiond.refusal import Refusal
from partitiond.settled import Settled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from netplan.tinc import HostBlock
    from partitiond.config_mesh import MeshKeys

KEY, HOSTS = "rsa_key.priv", "hosts"
MOST_PEERS = 1000
_ROOT = frozenset((0,))
_KEY_LIMIT = 1 << 16
_ARMOUR = "-----BEGIN "

_read: Settled[Known] = Settled()


@dataclass(frozen=True, slots=True)
class Known:
    """What lies there: this node, the peers that may join, and what is refused.

    ``own`` has no key (an empty text) where there is none yet, or none of use: then ``has_key`` is False, and ``key_refused``
    tells the two apart.
    """

    own: HostBlock
    peers: tuple[HostBlock, ...]
    refused: tuple[Refusal, ...]
    key_refused: bool = False

    @property
    def has_key(self) -> bool:
        """Whether this node has a key of use."""
        return bool(self.own.key)

    @property
    def by_name(self) -> dict[str, HostBlock]:
        """The peers by their names."""
        return {one.name: one for one in self.peers}


def read(keys: MeshKeys) -> Known:
    """Read the directory; one that is missing is empty. Raises nothing of what lies in it: that is refused."""
    hosts = keys.directory / HOSTS
    found = names(hosts)
    paths = [str(path) for path in (keys.directory, keys.directory / KEY, hosts)]
    return _read.get(
        str(keys.directory),
        [*paths, *(f"{hosts}/{name}" for name in found)],
        keys,
        partial(_read_all, keys, found),
    )


def names(hosts: Path) -> list[str]:
    """Names of the host blocks that lie there."""
    try:
        with files.directory(hosts) as descriptor:
            return [name for name in files.names(descriptor, MOST_PEERS) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_all(keys: MeshKeys, found: list[str]) -> Known:
    refused: list[Refusal] = []
    public = ""
    try:
        public = _own_key(keys.directory)
    except FileNotFoundError:
        pass
    except (NetplanError, PartitiondError, OSError) as error:
        refused.append(_refusal("this node's key", keys.directory / KEY, error))
    own = block_of(keys, public)
    peers: list[HostBlock] = []
    for name in found:
        if name == keys.name:
            continue  # who runs tincd by hand has this node's own there, too
        path = keys.directory / HOSTS / name
        try:
            peer = read_peer(path)
            tinc.judge(peer, own=own, network=keys.network, others=peers)
        except (NetplanError, PartitiondError, OSError) as error:
            refused.append(_refusal(f"peer {tinc.shown(name)}", path, error))
        else:
            peers.append(peer)
    key_refused = not public and files.there(str(keys.directory / KEY))
    return Known(own, tuple(peers), (*refused, *_of_no_use(keys, peers)), key_refused)


def block_of(keys: MeshKeys, public: str, addresses: tuple[str, ...] = ()) -> HostBlock:
    """This node as others shall know it."""
    return tinc.HostBlock(
        name=keys.name,
        key=public,
        subnets=(keys.own,),
        addresses=tuple(tinc.Endpoint(one) for one in addresses),
        port=keys.port,
        cipher=keys.cipher,
        digest=keys.digest,
    )


def _own_key(directory: Path) -> str:
    """The public half of this node's key. Raises FileNotFoundError, NetplanError, PartitiondError, OSError."""
    with files.directory(directory) as descriptor:
        content = files.read(KEY, dir_fd=descriptor, limit=_KEY_LIMIT, owners=_ROOT)
        mode = os.stat(KEY, dir_fd=descriptor, follow_symlinks=False).st_mode
    if stat.S_IMODE(mode) & 0o077:
        words = f"others than root may read it (mode {stat.S_IMODE(mode):04o})"
        raise tinc_keys.refused(
            words, KEY, "chmod 600, or remove it where it is no secret any more, then partitiond apply"
        )
    text = content.decode("ascii", "replace")
    # tincd -K comments keys out that are not the last
    return tinc_keys.public_of(text[max(text.find(_ARMOUR), 0) :], KEY)


def read_peer(path: Path) -> HostBlock:
    """Read the host file of a peer, whose name is the file's. Raises NetplanError, PartitiondError, OSError."""
    if not NAME.fullmatch(path.name):
        words = "the file's name is no name of a node"
        raise NetplanError("mesh.name", words, resource=tinc.shown(path.name), hint="remove the file")
    with files.directory(path.parent) as descriptor:
        content = files.read(path.name, dir_fd=descriptor, limit=tinc.MOST_BLOCK, owners=_ROOT)
    found = tinc.parse(content, file_name=path.name)
    if len(found) != 1:
        raise NetplanError(
            "mesh.block",
            "holds more than one block",
            resource=path.name,
            hint="take it in by partitiond mesh import",
        )
    if found[0].name != path.name:
        words = f"holds the block of {found[0].name}"
        raise NetplanError(
            "mesh.name", words, resource=path.name, hint="take it in by partitiond mesh import"
        )
    return found[0]


def _of_no_use(keys: MeshKeys, peers: list[HostBlock]) -> Iterator[Refusal]:
    """What ``connect_to`` names and cannot be connected to."""
    known = {one.name: one for one in peers}
    for name in keys.connect_to:
        peer = known.get(name)
        if peer is not None and peer.addresses:
            continue
        reason = (
            "its host block says nowhere where it is (Address)" if peer else "no host block of it is here"
        )
        yield Refusal(
            resource="mesh",
            name=f"connect_to {name}",
            partition="",
            file=str(keys.directory / HOSTS / name),
            line=None,
            code="mesh.connect_to",
            reason=reason,
            hint="partitiond mesh export there, partitiond mesh import here; or take it out of connect_to",
        )


def _refusal(name: str, path: Path, error: Exception) -> Refusal:
    family = error if isinstance(error, NetplanError | PartitiondError) else None
    reason = str(error) if family else getattr(error, "strerror", None) or str(error)
    return Refusal(
        resource="mesh",
        name=f"mesh: {name}",
        partition="",
        file=str(path),
        line=None,
        code=family.code if family else "mesh.unreadable",
        reason=reason,
        hint=family.hint if family else "look at the file",
    )
