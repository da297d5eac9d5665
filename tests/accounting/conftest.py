"""The tables of what was sent and what was counted, printed at the end of the run."""

import pytest

_TABLES = pytest.StashKey[list]()


@pytest.fixture
def table(request):
    """Print lines under a title at the end of the run."""
    tables = request.config.stash.setdefault(_TABLES, [])
    return lambda title, lines: tables.append((title, list(lines)))


def pytest_terminal_summary(terminalreporter, config):
    for title, lines in config.stash.get(_TABLES, []):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)
