"""The matrix: each step of a round is cut off at each of its points, healed by one command, and compared.

A round goes on in the machine in which the last one ended, so that a case costs a forked victim, a command that heals and
a look at the machine. Several lanes work side by side, each in a machine of its own: the kernel makes them wait more than work.
"""

import difflib
import gc
import logging
import ssl  # noqa: F401 - here once, and not in each child
import time
from dataclasses import dataclass, field
from pathlib import Path

import cryptography.x509  # noqa: F401 - likewise
from crash_machine import enter, finish_child, in_child, start_child
from crash_points import Points
from crash_scene import StandInSupervisor
from crash_state import capture, difference, identities

import stunnel_mgr.identity  # noqa: F401 - likewise
from partitiond import config, converge, recovery, teardown
from partitiond.context import Context
from partitiond.errors import FAMILY

# Seconds that the kernel has to finish what it began: the local route of a new IPv6 address, which is put in by the work
# queue of duplicate address detection (net/ipv6/addrconf.c; seen missing once in some thousand cases).
_SETTLING = 3
_MOST_ROUNDS = 4
MOST_FAILURES = 5  # of one round; then it is known well enough


# --- one command, in a process of its own -----------------------------------------------------------------------------


def run_step(step, settings, supervisor, points=None):
    """Do what the command line does for a step; return what it reports as failed: (resource, code, message)."""
    logging.disable()
    context = Context.of(settings)
    context.supervisor = supervisor(settings, points)
    with recovery.exclusive(settings, step.name):
        outcome = teardown.run(context, purge=step.purge) if step.remove else converge.apply(context)
        if points:
            points.end()
    failures = [(name, getattr(error, "code", "system"), str(error)) for name, error in outcome.failures]
    return failures + [(one.id, "left", one.reason) for one in outcome.left]


def heal(step, settings, supervisor):
    """One command must do, and then a plan must be empty (of a node that was removed there is nothing to plan)."""
    failures = run_step(step, settings, supervisor)
    if step.remove:
        return failures
    context = Context.of(settings)
    context.supervisor = supervisor(settings, None)
    again = converge.plan(context, converge.observe(context))
    return failures + [(one.id, "planned again", one.reason) for one in again]


def victim(step, settings, supervisor, at=None, strike="kill"):
    """Do a step until its point ``at``. Return (labels of the points that were passed, failures); never, if it is killed."""
    points = Points(at, strike)
    try:
        failures = run_step(step, settings, supervisor, points)
    except (*FAMILY, OSError) as error:
        if strike != "fail":
            raise
        failures = [("", getattr(error, "code", "system"), str(error))]
    return points.labels, failures


# --- one lane ---------------------------------------------------------------------------------------------------------


# how a step is struck, and what comes after: the same command again, or the one before it
KILLED, TAKEN_BACK, REFUSED = "killed", "killed, taken back", "refused by the system"


@dataclass(frozen=True)
class Case:
    """The step at this place of the round is struck at this of its points."""

    place: int
    at: int
    how: str


class Lane:
    """One machine in which a round goes round; to be made in a process of its own."""

    def __init__(self, made, supervisor):
        enter()
        self._supervisor = supervisor
        self._steps = made.steps
        self._settings = [_load(step, number) for number, step in enumerate(made.steps)]
        made.prepare()
        gc.freeze()  # a collection would touch, and so copy, every page that is shared with a child
        self.labels, self._wanted, self._owners = self._learn()
        self._before = identities()

    def _learn(self):
        """Go round without harm: by step its points, what the machine is after it, and whose identities are there then.

        The first time is not looked at: what it leaves (directories that stay) the others find. Then until it was the same
        twice: what differs each time cannot be told from the work of a crash.
        """
        self._round()
        last = self._round()
        for _ in range(_MOST_ROUNDS):
            before, last = last, self._round()
            differences = [
                (step.name, list(difflib.unified_diff(labels, labels2, n=0)) or difference(state, state2))
                for step, (labels, state, _), (labels2, state2, _) in zip(
                    self._steps, before, last, strict=True
                )
                if (labels, state) != (labels2, state2)
            ]
            if not differences:
                return zip(*last, strict=True)
        raise AssertionError(differences)

    def _round(self):
        return [(self._learn_step(place), capture(), identities()) for place in range(len(self._steps))]

    def _learn_step(self, place):
        """Do a step without harm in a child; return the labels of its points."""
        step = self._steps[place]
        step.before()
        _, (labels, failures) = in_child(lambda: victim(step, self._settings[place], self._supervisor))
        assert not failures, (step.name, failures)
        step.after()
        return labels

    def go(self, place):
        """Do a step without harm, to come to the next."""
        step = self._steps[place]
        step.before()
        failures = heal(step, self._settings[place], self._supervisor)
        assert not failures, (step.name, failures)
        step.after()

    def take(self, case):
        """Strike a step, heal the machine, and see that all is well; return the place of the step it is healed by.

        Raises AssertionError with what is not well.
        """
        step, self._before = self._steps[case.place], identities()
        strike = "fail" if case.how == REFUSED else "kill"
        step.before()
        code, said = in_child(
            lambda: victim(step, self._settings[case.place], self._supervisor, case.at, strike)
        )
        if strike == "kill":
            assert code == -9, f"exit status {code} in place of SIGKILL: {said}"
        else:
            failures = said[1]
            assert all(code for _, code, _ in failures), f"an error without a code: {failures}"
            if not failures:
                self._compare(case.place, "no error is told, and the node is not as it should be")
        healer = case.place - 1 if case.how == TAKEN_BACK else case.place
        self._heal(healer)
        return healer

    def _heal(self, place):
        """Do a step once, and see that nothing is left to do and nothing differs. Raises AssertionError."""
        step = self._steps[place]
        failures = heal(step, self._settings[place], self._supervisor)
        assert not failures, f"one {step.name} was not enough: {failures}"
        self._compare(place, f"after one {step.name} the machine is not as without the crash")

    def _compare(self, place, what):
        self._steps[place].after()
        deadline = time.monotonic() + _SETTLING
        while (lines := difference(self._wanted[place], capture())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not lines, f"{what}:\n  " + "\n  ".join(lines[:40])
        # an identity that is there before and after the step is the same one: others know it by its fingerprint
        now, stay = identities(), self._owners[place].keys() & self._owners[place - 1].keys()
        changed = sorted(name for name in stay if name in self._before and now[name] != self._before[name])
        assert not changed, f"tunnel identities were made anew: {changed}"


def _load(step, number):
    path = Path(f"/srv/{number}.cfg")
    path.write_text(step.configuration)
    return config.load(path)


# --- all lanes --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the cases of one step."""

    points: int = 0
    cases: int = 0
    healed: int = 0


@dataclass
class Report:
    """What became of a round, by step and how it was struck; ``failures`` are texts."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, other):
        """Take in what another lane did."""
        self.failures += other.failures
        for key, tally in other.tallies.items():
            mine = self.tallies.setdefault(key, Tally())
            mine.points = max(mine.points, tally.points)
            mine.cases += tally.cases
            mine.healed += tally.healed


def run(made, chosen, *, lanes=4, supervisor=StandInSupervisor):
    """Take a round through the matrix. ``chosen`` has, by how a step is struck, what picks points out of its labels."""

    def lane(part):
        return start_child(lambda: _lane(made, part, supervisor), patience=0)

    report = Report()
    waiting = [lane((chosen, share, lanes)) for share in range(lanes)]
    while waiting:
        _, (found, rest) = finish_child(waiting.pop(0))
        report.add(found)
        if rest and len(report.failures) < MOST_FAILURES:  # its machine is not to be trusted any more
            waiting.append(lane(rest))
    return report


def _lane(made, part, supervisor):
    """Do a part of the cases in a new machine, up to the first failure; return the report and the cases that are left."""
    lane = Lane(made, supervisor)
    cases = part if isinstance(part, list) else _share(lane, *part)
    todo = [[case for case in cases if case.place == place] for place in range(len(made.steps))]
    report = Report()
    for case in cases:
        key = made.steps[case.place].name, case.how
        report.tallies[key] = Tally(len(lane.labels[case.place]))
    while any(todo):
        for place, waiting in enumerate(todo):
            # what is taken back stands again where this step begins
            healer = None
            while waiting and healer != place:
                case = waiting.pop(0)
                tally = report.tallies[made.steps[place].name, case.how]
                tally.cases += 1
                try:
                    healer = lane.take(case)
                except AssertionError as error:
                    label = lane.labels[place][case.at]
                    report.failures.append(
                        f"{made.steps[place].name}, {case.how} at {case.at} ({label}): {error}"
                    )
                    return report, [case for waiting in todo for case in waiting]
                tally.healed += 1
            if healer != place:
                lane.go(place)
    return report, []


def _share(lane, chosen, share, lanes):
    """The cases of one lane of several."""
    cases = [
        Case(place, at, how)
        for how, choose in chosen.items()
        for place, labels in enumerate(lane.labels)
        for at in choose(labels[:-1] if how == REFUSED else labels)  # the end is no effect
    ]
    return cases[share::lanes]
