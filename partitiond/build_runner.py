"""The process that builds one release: it goes on whatever becomes of the daemon, and says on the disk what came of it.

Started by ``build_keeper.start``, as root, in a session of its own; the steps of the build run as the software user, each ended
with its session when this process ends, by SIGTERM or otherwise (``execute.as_user``).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import binary_cache, build_keeper, buildout, files, last_good, procfs, signals, software_build
from partitiond.build_keeper import Outcome, Places, Runner
from partitiond.errors import FAMILY, sentence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from partitiond.config import Config

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 5.0


def main(arguments: Sequence[str]) -> None:
    """Be the runner. Called in a new interpreter that leads a session of its own."""
    # nobody's child, so that nobody has to wait for it
    if os.fork():
        os._exit(0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with signals.heard({signal.SIGTERM: stop.set}):
        _build(arguments, stop)


def _build(arguments: Sequence[str], stop: threading.Event) -> None:
    directory, outcomes, tell = arguments
    places = Places(Path(directory), Path(outcomes))
    lock = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not _take(lock):
        logger.warning("another one builds already")
        return
    # a session of an earlier runner, whose lock we have now
    build_keeper.end_session(places)
    job = json.loads(places.job.read_bytes())
    own = Runner(job["url"], os.getpid(), procfs.started(os.getpid()) or 0, procfs.boot())
    _write(places, own)
    ready = int(tell)
    try:
        os.write(ready, b"ready")
    except BrokenPipeError:
        logger.warning("who started the build is gone; it goes on")
    os.close(ready)
    try:
        _run(places, job, stop, own)
    finally:
        places.record.unlink(missing_ok=True)


def _take(lock: int) -> bool:
    """Take the lock; who looks whether it is held has it for a moment, too."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _run(places: Places, job: dict[str, Any], stop: threading.Event, own: Runner) -> None:
    text = places.directory / "config.cfg"
    files.write_path(text, job["config"].encode(), mode=0o600)
    config, url = last_good.read(text, Path(job["file"])), str(job["url"])
    try:
        how = software_build.build_software(
            config, url, stop=stop, force=bool(job["force"]), session=places.session
        )
    except (*FAMILY, OSError) as error:
        if stop.is_set():
            logger.info("ended on request")
            return
        logger.warning("%s", sentence(error))
        build_keeper.save_outcome(places, _failure(url, error))
        return
    uploads = how == "built" and config.software.cache.uploads(url)
    if uploads:  # before anybody hears of the outcome: from then on nobody has to wait
        _write(places, replace(own, uploading=time.time()))
    build_keeper.save_outcome(places, Outcome(url, how))
    if uploads:
        _upload(config, url, stop, places)


def _write(places: Places, own: Runner) -> None:
    files.write_path(places.record, json.dumps(asdict(own)).encode(), mode=0o600)


def _failure(url: str, error: Exception) -> Outcome:
    if isinstance(error, FAMILY):
        return Outcome(url, code=error.code, message=str(error), hint=error.hint)
    return Outcome(url, code="software.system", message=str(error), hint="look at the resource named")


def _upload(config: Config, url: str, stop: threading.Event, places: Places) -> None:
    """Put the release into the network cache; it is there for this node either way."""
    with buildout.Log(buildout.software_log(config, url), f"uploading {url}") as log:
        try:
            binary_cache.upload(config, url, stop=stop, log=log, session=places.session)
        except (*FAMILY, OSError) as error:
            buildout.note(log, f"not uploaded: {sentence(error)}")
            logger.warning("%s: not uploaded: %s", url, sentence(error))
