"""Software releases: what the master wants installed, built one after the other, reported, removed when unused.

A build is a process of its own (``build_keeper``), for which a pass waits while it goes on asking the master: who is no longer
wanted is ended. A pass that ends before it, with the daemon, leaves it running; the next one waits for it again.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from partitiond import build_keeper, buildout, free_space, log_digest, software_build
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.passes import Result, pause_after, report
from partitiond.state import software_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from partitiond.build_keeper import Outcome, Runner
    from partitiond.context import Context
    from slap_client.documents import ComputerDocument, SoftwareDocument

logger = logging.getLogger(__name__)

# how soon a pass that waits for a build notices that the daemon ends
_TICK = 0.25
_ERROR_LIMIT = 4000
# that often in one pass a build whose process was killed is begun again
_MOST_STARTS = 2


def run_pass(
    context: Context,
    document: ComputerDocument,
    *,
    force: bool = False,
    ask: Callable[[], ComputerDocument] | None = None,
    only: frozenset[str] = frozenset(),
) -> Result:
    """Build what is wanted and remove what is to be destroyed; one that fails harms no other.

    ``ask`` gives what the master wishes by now, which is asked for while a build goes on; ``only`` are URLs, or names of
    directories, to which the pass is limited.
    """
    work = _Pass(context, document, force, ask or (lambda: document), only)
    work.take_over()
    while not context.stop.is_set() and work.step():
        continue
    return work.result


@dataclass(slots=True)
class _Pass:
    context: Context
    document: ComputerDocument
    force: bool
    ask: Callable[[], ComputerDocument]
    only: frozenset[str]
    result: Result = field(default_factory=lambda: Result([], []))
    tried: set[str] = field(default_factory=set)

    def take_over(self) -> None:
        """Deal with what was built while nobody waited for it, and with a build that goes on."""
        context = self.context
        self._settle()
        found = build_keeper.running(context.config)
        if found is None:
            if build_keeper.end_cut_off(context.config):
                logger.warning("a build was cut off; what was left of it is ended, and it is gone on with")
            return
        if found.uploading:
            self._settle()
            return  # until there is something to build nobody has to wait for it
        logger.info("%s: is being built already, log in %s", found.url, _log(context, found.url))
        self._wait(found)
        self._settle()

    def step(self) -> bool:
        """Deal with one release; False when there is none left."""
        gone = (one for one in self.document.software if one.requested_state == "destroyed")
        wanted = (one for one in self.document.software if one.requested_state != "destroyed")
        # what is quick comes first: a build may take hours
        entry = next((one for one in (*gone, *wanted) if self._is_next(one.url)), None)
        if entry is None:
            return False
        self.tried.add(entry.url)
        try:
            self._deal(entry)
        except (*FAMILY, OSError) as error:
            if getattr(error, "unsent", False):  # it was said when the master was last told, or it is away
                self.result.failures.append((entry.url, error))
            elif not self.context.stop.is_set():
                self._failed(entry.url, error)
        return True

    def _is_next(self, url: str) -> bool:
        return url not in self.tried and (not self.only or bool(self.only & {url, software_name(url)}))

    def _deal(self, entry: SoftwareDocument) -> None:
        if entry.requested_state == "destroyed":
            if _remove(self.context, entry.url):
                self._done(entry.url, "removed", "removed")
        elif _is_due(self.context, entry.url, self.force):
            self._build(entry.url)

    def _build(self, url: str) -> None:
        context = self.context
        try:
            free_space.require(
                context.config.software_root,
                context.config.grid.software_min_free_space,
                code="software.no_space",
                key="software_min_free_space",
                resource=url,
            )
        except PartitiondError as error:
            _save_failure(context, url, error)
            raise
        report(lambda: context.client.software_building(url), url)
        logger.info("%s: building, log in %s", url, _log(context, url))
        for _ in range(_MOST_STARTS):
            self._start(url)
            if self._settle(url) or context.stop.is_set() or not self._is_wanted(url):
                return
            logger.warning("%s: the process that builds was killed; it is gone on with", url)
        cut_off = PartitiondError(
            "software.cut_off",
            "the process that builds it was killed again and again",
            resource=url,
            hint="look for the kernel's word of memory that ran out (dmesg)",
            retryable=True,
        )
        _save_failure(context, url, cut_off)
        raise cut_off

    def _start(self, url: str) -> None:
        """Begin a build and wait for its end, or for that of the pass."""
        config = self.context.config
        while not self.context.stop.is_set():
            found = build_keeper.running(config)
            earlier = found is not None and (found.url != url or found.uploading)
            if found is None:
                build_keeper.end_cut_off(config)
                build_keeper.start(config, url, force=self.force)
                found = build_keeper.running(config)
            if found is not None:
                self._wait(found)
            # one that is over has left what came of it, or was killed; of an earlier one only the place was waited for
            if not earlier:
                if not self.context.stop.is_set():
                    self._end_if_dead()
                return

    def _end_if_dead(self) -> None:
        if build_keeper.running(self.context.config) is None:
            build_keeper.end_cut_off(self.context.config)

    def _wait(self, runner: Runner) -> None:
        """Wait until a build is over or told what came of it, no longer wanted, or the daemon ends."""
        context = self.context
        asked = time.monotonic()
        while not context.stop.is_set() and not self._waited(runner):
            if not runner.uploading and any(
                one.url == runner.url for one in build_keeper.outcomes(context.config)
            ):
                return  # what it still does, only the next build has to wait for
            if time.monotonic() - asked < context.config.intervals.software:
                continue
            asked = time.monotonic()
            self._hear()
            if not self._is_wanted(runner.url):
                logger.info("%s: is to be destroyed; its build is ended", runner.url)
                build_keeper.end(context.config, runner.url)
                self.tried.discard(runner.url)
                return

    def _waited(self, runner: Runner) -> bool:
        try:
            return build_keeper.wait(runner, _TICK)
        except KeyboardInterrupt:
            logger.warning("%s: its build goes on; partitiond logs -f software shows it", runner.url)
            raise

    def _hear(self) -> None:
        """Hear what the master wishes by now; what it does not say stays as it was."""
        try:
            self.document = self.ask()
        except FAMILY as error:
            logger.info("while a build goes on: %s", sentence(error))

    def _is_wanted(self, url: str) -> bool:
        """Whether nobody has asked for its removal; one that is not listed any more is kept, and so built to its end."""
        return all(one.url != url or one.requested_state != "destroyed" for one in self.document.software)

    def _settle(self, url: str | None = None) -> bool:
        """Deal with what builds came to; whether ``url`` was among them."""
        context, seen = self.context, False
        for outcome in list(build_keeper.outcomes(context.config)):
            seen = seen or outcome.url == url
            self.tried.add(outcome.url)
            if not self._is_wanted(outcome.url):
                self.tried.discard(outcome.url)
            else:
                try:
                    self._take_outcome(outcome)
                except (
                    PartitiondError
                ) as error:  # what is remembered of this one cannot be read; others go on
                    self._failed(outcome.url, error)
            build_keeper.forget_outcome(context.config, outcome.url)
        return seen

    def _take_outcome(self, outcome: Outcome) -> None:
        context = self.context
        if outcome.code:
            error = outcome.error()
            _save_failure(context, outcome.url, error)
            self._failed(outcome.url, error)
            return
        context.wake_instances()
        _save_success(context, outcome.url)
        words = "available, from the binary cache" if outcome.how == "cached" else "available"
        self._done(outcome.url, "available", words)

    def _done(self, url: str, what: str, words: str) -> None:
        self.result.done.append(f"{url}: {words}")
        logger.info("%s: %s", url, words)
        self._record(url, what, words)

    def _failed(self, url: str, error: Exception) -> None:
        self.result.failures.append((url, error))
        logger.warning("%s: %s", url, sentence(error))
        self._record(url, "failed", sentence(error))

    def _record(self, url: str, what: str, message: str) -> None:
        """Record in the log of events what became of a release."""
        self.context.events.record(f"software.{what}", f"{url}: {message}", resource=f"software/{url}")


def _log(context: Context, url: str) -> str:
    return str(buildout.software_log(context.config, url))


def _is_due(context: Context, url: str, force: bool) -> bool:
    """Whether a release has to be built now; of one that is whole the master is told, if it does not know."""
    if force:
        return True
    state = context.store.software(url)
    if buildout.completed(context.config, url):
        if not state.available or not state.reported:
            _save_success(context, url)
        return False
    return not (state.failures and time.time() < state.next_try)


def _save_success(context: Context, url: str) -> None:
    reported = report(lambda: context.client.software_available(url), url)
    state = context.store.software(url)
    context.store.save_software(
        replace(state, available=True, reported=reported, failures=0, next_try=0.0, error=None)
    )


def _save_failure(context: Context, url: str, error: Exception) -> None:
    """Remember a failure, which gives a pause that grows, not the same for all nodes; and tell the master why."""
    state = context.store.software(url)
    failures = state.failures + 1
    pause = pause_after(failures) * random.uniform(1.0, 1.2)  # noqa: S311 - jitter, no secret
    context.store.save_software(
        replace(
            state,
            available=False,
            failures=failures,
            next_try=time.time() + pause,
            error=str(error)[:_ERROR_LIMIT],
        )
    )
    report(lambda: context.client.software_error(url, log_digest.for_master(str(error))), url)


def note_listed(context: Context, listed: Iterable[SoftwareDocument]) -> None:
    """Remember which releases the master does not list any more; they are kept, since it did not say that they should go."""
    urls = {one.url for one in listed}
    for state in context.store.softwares():
        if state.listed != (state.url in urls):
            context.store.save_software(replace(state, listed=not state.listed))
            if state.listed:
                logger.warning("%s: the master does not list it any more; it is kept", state.url)


def _remove(context: Context, url: str) -> bool:
    """Remove a release, unless partitions use it; whether it is gone."""
    states, damaged = context.store.readable()
    # nobody knows whether one that cannot be read uses it
    users = sorted((*damaged, *(name for name, one in states.items() if one.software_release == url)))
    state = context.store.software(url)
    if users:
        words = ", ".join(users)
        if state.kept_for != words:
            message = f"{url}: to be removed, but used by {words}; kept as long as it is"
            logger.info("%s", message)
            context.events.record("software.kept", message, resource=f"software/{url}", partitions=users)
            context.store.save_software(replace(state, kept_for=words))
        return False
    discard(context, url)
    context.ends.tell(context, url, lambda client: client.software_destroyed(url))
    return True


def discard(context: Context, url: str) -> None:
    """Remove a release, its build, if it is being built, and what is remembered of it. Raises PartitiondError, OSError."""
    build_keeper.end(context.config, url)
    software_build.remove_software(context.config, url)
    build_keeper.forget_outcome(context.config, url)
    context.store.forget_software(url)
