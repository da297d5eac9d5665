"""The counts of the crash matrix, printed at the end of the run."""

import os

import crash_matrix
import pytest
from crash_chosen import SEED

_ROWS = pytest.StashKey[list]()


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
            pytest.fail(f"seed {SEED}; CRASH_AT=N takes point N alone\n" + "\n".join(report.failures))

    return take


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section(f"crash matrix, seed {SEED}")
    for step, count, how, tally in rows:
        terminalreporter.line(
            f"{step:<16} N={count:<4} {how:<22}"
            f"{tally.points:>5} points, {tally.cases:>5} taken, {tally.healed:>5} converged"
        )
