"""The counts of the crash matrix, printed at the end of the run."""

import os
import random
import secrets

import crash_matrix
import pytest
from crash_points import family

_ROWS = pytest.StashKey[list]()
_SEED = int(os.environ.get("CRASH_SEED") or secrets.randbelow(10**6))
# what a point is of the network: each is another state of the kernel, at any number of partitions
_NETWORK = ("rtnetlink", "nft", "fcntl.ioctl")
_PROCESSES = ("supervisor.", "subprocess", "started", "os.kill")


def _chance():
    return random.Random(_SEED)  # noqa: S311 - to be repeated, not to be secret


def every(labels):
    return range(len(labels))


def thinned(labels):
    """Every point of the network; of what is done to a file or directory for each partition alike, one by chance.

    What is done once for the node is left out: it is the same with one partition, where every point is taken.
    """
    chance, alike = _chance(), {}
    for place, label in enumerate(labels):
        alike.setdefault(family(label), []).append(place)
    network = [place for place, label in enumerate(labels) if label.startswith(_NETWORK)]
    return sorted({*network, *(chance.choice(places) for places in alike.values() if len(places) > 1)})


def at_processes(labels):
    """What is done to processes, and the point after it."""
    found = {place for place, label in enumerate(labels) if label.startswith(_PROCESSES)}
    return sorted(place for place in found | {place + 1 for place in found} if place < len(labels))


def refusable(labels):
    """Whatever the kernel can refuse of the network, and some points of the rest by chance."""
    network = {place for place, label in enumerate(labels) if label.startswith((*_NETWORK, "open /proc/sys"))}
    return sorted(network | set(some(10)(labels)))


def some(count):
    """So many points by chance."""

    def sample(labels):
        return sorted(_chance().sample(range(len(labels)), min(count, len(labels))))

    return sample


def _asked_for(choose):
    """Or the points that ``CRASH_AT=12,13`` asks for, to look at one failure again."""
    asked = os.environ.get("CRASH_AT")
    if not asked:
        return choose
    return lambda labels: [place for place in map(int, asked.split(",")) if place < len(labels)]


@pytest.fixture
def matrix(request):
    """Take a round of ``count`` partitions through the matrix; fail with what went wrong."""
    rows = request.config.stash.setdefault(_ROWS, [])

    def take(made, count, chosen, **options):
        chosen = {how: _asked_for(choose) for how, choose in chosen.items()}
        report = crash_matrix.run(made, chosen, **options)
        rows.extend((step, count, how, tally) for (step, how), tally in report.tallies.items())
        if report.failures:
            pytest.fail(f"seed {_SEED}; CRASH_AT=N takes point N alone\n" + "\n".join(report.failures))

    return take


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section(f"crash matrix, seed {_SEED}")
    for step, count, how, tally in rows:
        terminalreporter.line(
            f"{step:<16} N={count:<4} {how:<22}"
            f"{tally.points:>5} points, {tally.cases:>5} taken, {tally.healed:>5} converged"
        )
