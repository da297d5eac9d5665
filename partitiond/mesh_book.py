"""What the daemon remembers of the mesh between two looks."""

from __future__ import annotations


class MeshBook:
    """Whether peers answered lately, by name; empty where nobody asks."""

    def __init__(self) -> None:
        self.up: dict[str, bool] = {}
