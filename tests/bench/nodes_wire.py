"""What a byte and a connection cost between two nodes: raw, by stunnel over IPv6, by tinc, by stunnel over tinc.

Ways take turns within each measurement and each round, which begins with another one each time; ratios are of pairs in a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import nodes_pair
from tunnel_table import middle, row, times

if TYPE_CHECKING:
    from nodes_pair import Way

Figures = dict[str, float]
Found = dict[str, dict[str, list[float]]]

SECONDS = 0.8
TRIAL_BYTES, MOST_BYTES = 20_000_000, 6_000_000_000
CONNECT_SECONDS, CONNECT_MOST = 1.0, 8000
REQUESTS = 1000
STREAMS = 8


def _bulk(way: Way, streams: int, size: int) -> Figures:
    before = way.cpu()
    rate = way.numbers("bulk", size, streams)[0]
    words = "1 stream" if streams == 1 else f"{streams} streams"
    figures = {f"{words}, MB/s": rate / 1e6}
    if way.programs and streams == 1:
        # a busy machine shows less than they can do: this is what a core for the busiest of them would carry
        spent = [seconds - before[pid] for pid, seconds in way.cpu().items()]
        figures["processor s a GB, stunnel and tincd of both nodes"] = sum(spent) / size * 1e9
        figures["1 stream, MB/s by the processor time of the busiest process"] = size / 1e6 / max(spent)
    return figures


def _connects(way: Way) -> Figures:
    _, rate, _, _ = way.numbers("connect", 16, CONNECT_SECONDS, CONNECT_MOST)
    return {"new connections/s, 16 at once": rate}


def _requests(way: Way) -> Figures:
    p50, p99 = way.numbers("ask", REQUESTS)
    return {"64-byte request, p50 us": p50, "64-byte request, p99 us": p99}


def measured(rounds: int) -> Found:
    """Measure all ways by turns."""
    found: Found = {}
    with nodes_pair.ways() as ways:
        # as many bytes as take about so long; a first load also lets tinc find out the MTU of the path
        sizes = {}
        for way in ways:
            for _ in range(2):
                rate = way.numbers("bulk", TRIAL_BYTES)[0]
            sizes[way.name] = int(min(MOST_BYTES, rate * SECONDS))
        for one in range(rounds):
            turn = one % len(ways)
            for measure in (
                lambda way: _bulk(way, 1, sizes[way.name]),
                lambda way: _bulk(way, STREAMS, sizes[way.name]),
                _connects,
                _requests,
            ):
                for way in (*ways[turn:], *ways[:turn]):
                    for what, value in measure(way).items():
                        found.setdefault(what, {}).setdefault(way.name, []).append(value)
    return found


def print_ways(rounds: int) -> None:
    """One block for each thing measured."""
    for what, rows in measured(rounds).items():
        print()
        floor = rows.get(nodes_pair.RAW)
        row(what, "median [min..max]", *(["x raw"] if floor else []))
        for name, values in rows.items():
            ratios = [one / other for one, other in zip(values, floor, strict=True)] if floor else []
            row(f"  {name}", middle(values), *([times(ratios)] if floor else []))
