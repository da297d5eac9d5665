"""Figures of several bridges as text: medians with their range, beside stunnel's default and no bridge, and targets."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from tunnel_bridges import FLOOR, OURS, USUAL, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# by what was measured, and by the bridge: a value for each round
Found = dict[str, dict[Kind, list[float]]]

NAME, COLUMN = 44, 24


def shown(value: float) -> str:
    """A number with as many digits as say something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def middle(values: Sequence[float]) -> str:
    """The median with the range."""
    return f"{shown(statistics.median(values))} [{shown(min(values))}..{shown(max(values))}]"


def times(ratios: Sequence[float]) -> str:
    """The median of ratios with the range."""
    median, least, most = (
        f"{one:.2f}" if one < 10 else shown(one)
        for one in (statistics.median(ratios), min(ratios), max(ratios))
    )
    return f"x{median} [{least}..{most}]"


def row(name: str, *columns: str, end: str = "") -> None:
    """Print one line."""
    print(f"{name:<{NAME}}{''.join(f'{one:>{COLUMN}}' for one in columns)}  {end}".rstrip(), flush=True)


def print_found(found: Found, targets: Mapping[str, float]) -> None:
    """One block for each thing measured; ``targets`` are at least so many times stunnel's default, for ours."""
    for what, rows in found.items():
        print()
        others = {"x default": USUAL, "x no bridge": FLOOR}
        others = {head: kind for head, kind in others.items() if kind in rows}
        row(what, "median [min..max]", *others)
        for kind, values in rows.items():
            ratios = [_ratios(values, rows[other]) for other in others.values()]
            aimed = targets.get(what) if kind is OURS else None
            row(
                f"  {kind.name}",
                middle(values),
                *map(times, ratios),
                end=at_least(statistics.median(ratios[0]), aimed) if aimed else "",
            )


def _ratios(values: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(values, others, strict=True)]


def at_least(value: float, least: float) -> str:
    """A target that is a lower bound."""
    return f"target >= {least:g}: {_met(value >= least)}"


def at_most(value: float, most: float, unit: str) -> str:
    """A target that is an upper bound."""
    return f"target <= {most:g} {unit}: {_met(value <= most)}"


def _met(true: bool) -> str:
    return "met" if true else "MISSED"
