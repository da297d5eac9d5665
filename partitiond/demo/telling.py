"""How a demonstration tells what it does: numbered steps with their time, and below each what was seen."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from partitiond import present
from partitiond.errors import PartitiondError


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def check(seen: object, otherwise: str) -> None:
    """Go on only when something was seen. Raises PartitiondError ``demo.unexpected``."""
    if not seen:
        raise PartitiondError(
            "demo.unexpected", otherwise, hint="this is a mistake of ours: please report it"
        )


@dataclass(slots=True)
class Telling:
    """The steps so far."""

    began: float = field(default_factory=time.monotonic)
    number: int = 0

    def step(self, text: str) -> None:
        """Announce a step."""
        self.number += 1
        say(f"\n{present.colour(f'{self.number}. {text}', 'bold')}  ({time.monotonic() - self.began:.1f} s)")

    @staticmethod
    def seen(text: str) -> None:
        """Tell what was seen to work."""
        say(f"   {present.colour('✓', 'green')} {text}")
