"""Software releases: what the master wants installed, built one after the other, reported, removed when unused."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from partitiond import buildout, software_build
from partitiond.errors import FAMILY, sentence
from partitiond.passes import Result, pause_after, report

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.state import SoftwareState
    from slap_client.documents import ComputerDocument

logger = logging.getLogger(__name__)


def run_pass(context: Context, document: ComputerDocument, *, force: bool = False) -> Result:
    """Build what is wanted and remove what is to be destroyed; one that fails harms no other."""
    result = Result([], [])
    for entry in document.software:
        if context.stop.is_set():
            break
        state = context.store.software(entry.url)
        try:
            gone = entry.requested_state == "destroyed"
            done = _remove(context, entry.url) if gone else _build(context, state, force)
        except (*FAMILY, OSError) as error:
            if context.stop.is_set():
                break
            result.failures.append((entry.url, error))
            logger.warning("%s: %s", entry.url, sentence(error))
            _record(context, entry.url, "failed", sentence(error))
            continue
        if done:
            result.done.append(f"{entry.url}: {done}")
            logger.info("%s: %s", entry.url, done)
            _record(context, entry.url, done, done)
    return result


def _record(context: Context, url: str, what: str, message: str) -> None:
    """Record in the log of events what became of a release."""
    context.events.record(f"software.{what}", f"{url}: {message}", resource=f"software/{url}")


def _build(context: Context, state: SoftwareState, force: bool) -> str | None:
    url = state.url
    if buildout.completed(context.config, url) and not force:
        if not state.available or not state.reported:
            reported = report(lambda: context.client.software_available(url), url)
            context.store.save_software(
                replace(state, available=True, reported=reported, failures=0, error=None)
            )
        return None
    if state.failures and time.time() < state.next_try and not force:
        return None
    report(lambda: context.client.software_building(url), url)
    logger.info("%s: building, log in %s", url, buildout.software_log(context.config, url))
    try:
        software_build.build_software(context, url)
    except (*FAMILY, OSError) as error:
        if not context.stop.is_set():
            _failed(context, state, error)
        raise
    reported = report(lambda: context.client.software_available(url), url)
    context.store.save_software(
        replace(state, available=True, reported=reported, failures=0, next_try=0.0, error=None)
    )
    context.wake_instances()
    return "available"


def _failed(context: Context, state: SoftwareState, error: Exception) -> None:
    failures = state.failures + 1
    context.store.save_software(
        replace(
            state,
            available=False,
            failures=failures,
            next_try=time.time() + pause_after(failures),
            error=str(error)[-4000:],
        )
    )
    report(lambda: context.client.software_error(state.url, str(error)), state.url)


def _remove(context: Context, url: str) -> str | None:
    users = [state.partition for state in context.store.instances().values() if state.software_release == url]
    if users:
        logger.info("%s: to be removed, but used by %s", url, ", ".join(users))
        return None
    software_build.remove_software(context.config, url)
    context.store.forget_software(url)
    context.client.software_destroyed(url)
    return "removed"
