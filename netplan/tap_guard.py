"""What may leave a tap: the guard of guests' frames.  Pure."""

from collections.abc import Sequence

from netplan.model import PartitionNetwork, Protected
from netplan.ruleset import Part


def tap_guard(partitions: Sequence[PartitionNetwork], protected: Protected) -> tuple[Part, ...]:
    """Return the sets and chains that hold each tap to what is its own."""
    del partitions, protected
    return ()
