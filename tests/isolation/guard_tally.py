"""The counts of the spoof matrix, printed at the end of the run."""

from dataclasses import dataclass, field

_NAME = "spoof matrix"


@dataclass
class Row:
    """One run through all kinds; ``wrong`` says what was not as it should be."""

    what: str
    kinds: int = 0
    cells: int = 0
    fine: int = 0
    fine_seen: int = 0
    hostile: int = 0
    hostile_seen: int = 0
    never: int = 0
    wrong: list = field(default_factory=list)


class Tally:
    """A plugin of pytest that lasts for the run."""

    def __init__(self):
        self.rows = []

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(_NAME)
        for row in self.rows:
            terminalreporter.line(
                f"{row.what:<28}{row.kinds:>4} kinds, {row.cells:>5} cells: {row.fine_seen}/{row.fine} legitimate"
                f" and {row.hostile_seen}/{row.hostile} hostile arrived"
                + (f", {row.never} that are never sent on" if row.never else "")
            )


def row(config, what):
    """Begin a row of the table."""
    tally = config.pluginmanager.get_plugin(_NAME)
    if tally is None:
        tally = Tally()
        config.pluginmanager.register(tally, _NAME)
    tally.rows.append(Row(what))
    return tally.rows[-1]
