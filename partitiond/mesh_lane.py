"""What the daemon does about the mesh: it asks each peer for a sign of life, tells of changes, and of what tincd says anew.

A round trip through the mesh itself is the truth that matters, and costs a packet a peer; tincd is not asked (``mesh_status``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitiond import mesh_peers, mesh_ping, mesh_status

if TYPE_CHECKING:
    from partitiond.context import Context

SECONDS = 20.0
_WITHIN = 1.0
_MISSES = 2  # a packet may be lost


class MeshLane:
    """One pass after the other; what was told is not told again until it was over."""

    def __init__(self) -> None:
        self._missed: dict[str, int] = {}
        self._told: frozenset[str] = frozenset()

    def run(self, context: Context) -> None:
        """Ask the peers, and read the end of tincd's log."""
        keys, book = context.config.mesh, context.mesh
        if keys is None:
            book.up = {}
            return
        peers = mesh_peers.read(keys).peers
        try:
            answered = mesh_ping.round_trips([one.node_address for one in peers], keys.address, _WITHIN)
        except OSError:
            answered = {}  # the interface is not there: then nobody is reached
        found: dict[str, bool] = {}
        for peer in peers:
            missed = 0 if peer.node_address in answered else self._missed.get(peer.name, 0) + 1
            self._missed[peer.name] = missed
            before = book.up.get(peer.name)
            # who never answered is down at once, who did only when it stays silent
            found[peer.name] = missed == 0 or (bool(before) and missed < _MISSES)
            if before is not None and found[peer.name] != before:
                self._tell(context, peer.name, up=found[peer.name])
        self._missed = {name: self._missed[name] for name in found}
        book.up = found
        self._tell_troubles(context)

    @staticmethod
    def _tell(context: Context, name: str, *, up: bool) -> None:
        event, words = (
            ("mesh.peer_up", "answers again") if up else ("mesh.peer_down", "does not answer any more")
        )
        context.events.record(event, f"{name} {words} over the mesh", resource=f"mesh/{name}")

    def _tell_troubles(self, context: Context) -> None:
        now = frozenset(mesh_status.open_cases(context.config))
        for text in sorted(now - self._told):
            context.events.record("mesh.trouble", text, resource="mesh")
        self._told = now
