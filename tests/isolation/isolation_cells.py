"""The cells of the isolation matrix: what was tried, by whom, at whose cost, and what came of it; and the table of them."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

# what a kernel says that was built without the thing
LACKING = {"ENOSYS", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EAFNOSUPPORT", "EOPNOTSUPP", "ENOPROTOOPT"}


_ADDRESS = re.compile(r" (range|nobody's IPv[46]|(tun |private |routable )?IPv[46])$")
_WHERE = re.compile(r"(, by | to ).*")


@dataclass(frozen=True, slots=True)
class Job:
    """An attempt: ``agent`` does it, which is the attacker but where the walls of Unix are to be seen without."""

    kind: str
    attacker: str
    victim: str
    what: str
    words: tuple
    agent: str
    allowed: bool = False
    known: str = ""

    def cell(self, got, outcome):
        return Cell(self.kind, self.attacker, self.victim, self.what, self.allowed, got, outcome, self.known)


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair and one attempt.  ``known``: a shared thing by design, named and not counted as a breach."""

    kind: str
    attacker: str
    victim: str
    what: str
    allowed: bool
    got: bool
    outcome: str
    known: str = ""

    @property
    def breach(self):
        return self.got and not self.allowed and not self.known

    @property
    def broken(self):
        return self.allowed and not self.got

    @property
    def slow(self):
        """Refused, but only a clock says so, to a user of this node who could have been told at once.

        A source that nobody has is refused without a word: a reset would go to who has it elsewhere.
        """
        told = self.kind == "private IPv4" or (
            self.kind.startswith("send from") and "nobody's" not in self.kind
        )
        return self.outcome == "ETIMEDOUT" and told and self.attacker != "wire"

    @property
    def attempt(self):
        """What was done, whatever the kind of the address and who was at the other end: it has to get through once."""
        return _ADDRESS.sub("", self.kind), _WHERE.sub("", self.what)

    def __str__(self):
        return f"{self.kind}: {self.attacker} → {self.victim}: {self.what}: {self.outcome}"


@dataclass
class Matrix:
    """All cells of one run."""

    title: str
    attackers: tuple
    cells: list = field(default_factory=list)

    @property
    def breaches(self):
        return [one for one in self.cells if one.breach]

    @property
    def broken(self):
        return [one for one in self.cells if one.broken]

    @property
    def slow(self):
        return [one for one in self.cells if one.slow]

    def shares(self):
        """{kind: (breaches, cells that have to be refused)}."""
        found = defaultdict(lambda: (0, 0))
        for one in self.cells:
            if not one.allowed and not one.known:
                breaches, cells = found[one.kind]
                found[one.kind] = breaches + one.breach, cells + 1
        return dict(found)

    def idle(self):
        """One cell of each attempt that got through for nobody, although this kernel has what it needs."""
        found = defaultdict(list)
        for one in self.cells:
            if not one.allowed:
                found[one.attempt].append(one)
        return [
            rows[0]
            for rows in found.values()
            if not any(one.got for one in rows) and not {one.outcome for one in rows} <= LACKING
        ]

    def lines(self):
        """The table: kinds of resources × attackers; a number of cells, with ``!`` how many of them were breaches."""
        counts = f"{len(self.breaches)} breaches, {len(self.broken)} wrongly refused, {len(self.slow)} refused late"
        yield f"{self.title}: {len(self.cells)} cells, {counts}"
        head = "".join(f"{one.replace('slapuser', 'user'):>11}" for one in self.attackers)
        yield f"{'':<30}{'cells':>7}{'breaches':>9}{head}"
        kinds = list(dict.fromkeys(one.kind for one in self.cells))
        for kind in kinds:
            own = [one for one in self.cells if one.kind == kind]
            counts = Counter(one.attacker for one in own)
            bad = Counter(one.attacker for one in own if one.breach or one.broken)
            row = "".join(_column(counts[one], bad[one]) for one in self.attackers)
            yield f"{kind:<30}{len(own):>7}{sum(bad.values()) or '-':>9}{row}   {_how(own)}"
        known = {one.known: None for one in self.cells if one.known and one.got}
        for reason in known:
            count = sum(one.known == reason and one.got for one in self.cells)
            yield f"open by design: {reason} ({count} cells)"


def _column(count, bad):
    return f"{'-' if not count else f'{count} !{bad}' if bad else count:>11}"


def _how(cells):
    """By what attempts were refused, the commonest first."""
    said = Counter(one.outcome.split()[0] for one in cells if not one.got)
    return ", ".join(f"{name} {count}" for name, count in said.most_common(4))


def first_of_each(cells, most=150):
    """One line for each attempt among these cells, with the number of pairs: for a failure that people read."""
    groups = defaultdict(list)
    for one in cells:
        groups[one.kind, one.attempt].append(one)
    lines = [f"{len(rows)}× {rows[0]}" for rows in groups.values()]
    return "\n".join(lines[:most]) + (f"\n… and {len(lines) - most} more" if len(lines) > most else "")
