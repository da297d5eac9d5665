"""The guardian of a trial: a process of its own that takes the trial back when its time is over, or its apply was cut off.

Promises: it is there before the first operation; neither the end of whoever started it, of the daemon or of the operator's
session ends it, nor a hang-up; it changes nothing beside a daemon that runs, which it asks instead; it goes on trying until the
trial is over, and ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import execute
from partitiond.errors import FAMILY, PartitiondError, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from partitiond.trial import Trial

logger = logging.getLogger(__name__)

_POLL = 0.2
_LONGEST_PAUSE = 60.0
_READY_SECONDS = 30.0
_ANSWER_SECONDS = 120.0  # of a daemon that is asked to take it back

# the code that is running now, wherever it was found, and no other
_START = """
import sys
if sys.argv[1] not in sys.path:
    sys.path.insert(0, sys.argv[1])
from partitiond.guardian import main
main(sys.argv[2:])
"""


# --- whoever applies --------------------------------------------------------------------------------------------------


@contextmanager
def guarded(state_dir: Path, identity: str, log: Path, *, may_be_killed: bool) -> Iterator[None]:
    """Have a trial guarded; the block is its apply: when this process dies in it, the trial is taken back at once.

    ``may_be_killed``: an apply that hangs may be ended, and this process with it. Raises PartitiondError
    ``trial.no_guardian``.
    """
    ready, tell = os.pipe2(os.O_CLOEXEC)
    alive, held = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            _start(state_dir, identity, log, (tell, alive), os.getpid() if may_be_killed else 0)
        except OSError as error:
            raise _no_guardian(log) from error
        finally:
            os.close(tell)
            os.close(alive)
        if not _is_ready(ready):
            raise _no_guardian(log)
        yield
    finally:
        os.close(ready)
        os.close(held)


def _start(state_dir: Path, identity: str, log: Path, pipes: tuple[int, int], applier: int) -> None:
    root = Path(__file__).resolve().parent.parent
    arguments = ("--state", state_dir, "--trial", identity, "--ready", pipes[0], "--alive", pipes[1])
    command = [sys.executable, "-I", "-c", _START, root, *arguments, "--applier", applier]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        started = subprocess.Popen(
            [str(word) for word in command],
            cwd="/",
            env={"PATH": execute.PATH, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            pass_fds=pipes,
        )
    finally:
        os.close(descriptor)
    started.wait()  # it leaves a child behind, which is nobody's


def _is_ready(ready: int) -> bool:
    return bool(select.select([ready], [], [], _READY_SECONDS)[0]) and os.read(ready, 16) == b"ready"


def _no_guardian(log: Path) -> PartitiondError:
    return PartitiondError(
        "trial.no_guardian",
        "the process that would take the trial back does not start; nothing was changed",
        resource=str(log),
        hint="read that file",
    )


# --- the guardian itself ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Be the guardian. Called in a new interpreter that leads a session of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--trial", required=True)
    for name in ("--ready", "--alive", "--applier"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args(arguments)
    # nobody's child, so that nobody has to wait for it, and no leader of a session, so that no terminal becomes its own
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%Y-%m-%dT%H:%M:%S%z", stream=sys.stderr)
    guardian = _Guardian(options.state, options.trial, options.alive, _open_process(options.applier))
    with contextlib.suppress(BrokenPipeError):
        os.write(options.ready, b"ready")
    os.close(options.ready)
    guardian.run()


def _open_process(number: int) -> int | None:
    """A descriptor of a process that may be ended; None when there is none, or it has ended: the pipe tells, too."""
    try:
        return os.pidfd_open(number) if number else None
    except ProcessLookupError:
        return None


class _Guardian:
    def __init__(self, state_dir: Path, identity: str, alive: int, applier: int | None) -> None:
        # loaded now: an upgrade in the midst of a trial must not mix two versions
        from partitiond import control, last_good, recovery, rollback, trial  # noqa: PLC0415
        from partitiond.context import Context  # noqa: PLC0415

        self._control, self._last_good, self._recovery = control, last_good, recovery
        self._rollback, self._trial, self._context = rollback, trial, Context
        self._state_dir, self._identity = state_dir, identity
        self._alive: int | None = alive
        self._applier = applier
        self._pause = _POLL
        self._complaint = ""

    def run(self) -> None:
        """Until the trial is over."""
        logger.info("guarding the trial in %s", self._state_dir)
        while True:
            try:
                found = self._trial.read(self._state_dir)
                if found is None or found.id != self._identity:
                    logger.info("the trial is over")
                    return
                self._look(found)
            except FAMILY as error:
                self._complain(sentence(error), busy=error.code == "node.busy")
            except Exception as error:
                # it must not end as long as there is something to take back
                text = f"{type(error).__name__}: {error}"
                if text != self._complaint:
                    logger.exception("unexpected error")
                self._complain(text, busy=False)
            self._wait()

    def _complain(self, text: str, *, busy: bool) -> None:
        if text != self._complaint:
            logger.warning("%s; it is tried again and again", text)
        self._complaint = text
        # who is busy is done soon
        self._pause = 2 * _POLL if busy else min(2 * self._pause, _LONGEST_PAUSE)

    def _look(self, found: Trial) -> None:
        if found.state == "confirmed":
            self._trial.finish_confirmed(self._state_dir)
            return
        why = found.cut_off() if self._alive is None else found.ended()
        if why:
            self._take_back(found, why)
        elif found.state == "applying" and not found.seconds_left() and self._applier is not None:
            logger.warning("the apply takes longer than it can be waited for; it is ended")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._applier, signal.SIGKILL)

    def _take_back(self, found: Trial, why: str) -> None:
        if not self._complaint:
            logger.info("taking it back: %s", why)
        config = self._last_good.read(self._trial.tried_path(self._state_dir), Path(found.config))
        body = {"id": self._identity, "why": why}
        socket = config.run_dir / "control.sock"
        if self._control.call(socket, "POST", "/1/rollback", body, timeout=_ANSWER_SECONDS) is not None:
            logger.info("the daemon has taken it back")
            return
        with self._recovery.exclusive(config, "rollback", wait=1.0):
            context = self._context.of(config)
            try:
                outcome = self._rollback.roll_back(context, self._identity, why, last=False)
            finally:
                context.meters.close()
        if outcome is not None and not outcome.stands:
            left = ", ".join(one.id for one in outcome.left) or ", ".join(
                name for name, _ in outcome.failures
            )
            raise PartitiondError("trial.not_taken_back", f"left: {left}", resource=str(self._state_dir))

    def _wait(self) -> None:
        """Wait a while, or until whoever applies has ended."""
        if self._alive is None:
            time.sleep(self._pause)
            return
        poll = select.poll()
        poll.register(self._alive, select.POLLIN)
        if poll.poll(self._pause * 1000):
            # nothing is ever written to it: this is its end
            os.close(self._alive)
            self._alive = None
