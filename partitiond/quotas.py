"""Quotas: what each partition exchanged with other nodes this month, by the ledger, and what follows from it.

What was found is remembered in ``state_dir/quotas.json``: a restart tells nothing twice, and ``plan`` and ``apply`` do the same
with and without a daemon. Promises: a ledger that cannot be read changes nothing, so what is limited stays so; a file that is
missing or damaged breaks nothing, the next pass of the meters makes it anew.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from accounting import allowance
from accounting.allowance import EVENTS, Standing
from accounting.errors import AccountingError
from netplan.model import RateLimit
from partitiond import files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from accounting.allowance import Event, Quota
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node import Node

logger = logging.getLogger(__name__)

_SECONDS = 60.0  # from one question to the ledger to the next
_FORM = 1
_NOT_LIMITED = "it is not limited, packet_filter = iptables cannot do that (quota-limit)"
_WORDS = {
    "near": "has used four fifths of its quota",
    "exceeded": "has used up its quota",
    "renewed": "begins a new month with its whole quota",
}


class QuotaBook:
    """What is remembered of each partition that has a quota; from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.Lock()
        # what the file of that inode, size and time holds
        self._read: tuple[object, Mapping[str, Standing]] = (None, {})
        self._judged: tuple[float, object] = (0.0, None)
        self._unread = ""

    def standings(self) -> Mapping[str, Standing]:
        """By partition, as long as the file is the same the same object; nothing where it is missing or damaged."""
        with self._turn:
            mark = _mark(self.path)
            if mark != self._read[0]:
                self._read = (mark, _load(self.path) if mark else {})
            return self._read[1]

    def save(self, standings: Mapping[str, Standing]) -> None:
        """Remember, durably; nothing is written when it is the same. Raises OSError."""
        if standings != self.standings():
            value = {"form": _FORM, "partitions": {name: _row(one) for name, one in standings.items()}}
            files.write_path(self.path, json.dumps(value, sort_keys=True).encode(), mode=0o600)

    def is_due(self, about: object) -> bool:
        """Whether it is time to ask the ledger: once a minute, and when it would be about something else."""
        now = time.monotonic()
        at, before = self._judged
        if before == about and now - at < _SECONDS:
            return False
        self._judged = (now, about)
        return True

    def unread(self, why: str) -> None:
        """Say once what keeps quotas from being judged; empty: nothing any more."""
        if why and why != self._unread:
            logger.warning("quotas: %s; what is limited stays so", why)
        self._unread = why


def judge(context: Context, target: Node) -> None:
    """Ask the ledger what everybody used, remember it, and tell whose quota is used up.

    Where somebody's limit begins or ends, that is applied at once.
    """
    config, book = context.config, context.quotas
    if not config.quotas:
        return
    try:
        holders = context.meters.holders(context)
        owners = {
            item.id: guid
            for item in target.partitions
            if item.id in config.quotas and (guid := holders.get(item.id))
        }
        month = allowance.month_of(context.clock())
        if not book.is_due((config.quotas, owners, month)):
            return
        with context.meters.reader() as ledger:
            used = allowance.used(ledger.usage(month.start, month.end).partitions)
    except AccountingError as error:
        book.unread(str(error))
        return
    before = book.standings()
    judged = {
        name: allowance.judge(
            config.quotas[name], before.get(name), guid, month.name, used.get((name, guid), 0)
        )
        for name, guid in owners.items()
    }
    try:
        _take(context, {name: standing for name, (standing, _) in judged.items()})
    except OSError as error:
        book.unread(f"{book.path} cannot be written: {error.strerror}")
        return
    book.unread("")
    for name, (standing, events) in judged.items():
        for event in events:
            _tell(context, name, config.quotas[name], standing, event)


def _take(context: Context, standings: Mapping[str, Standing]) -> None:
    """Remember what was found, and apply it where it changes what is limited."""
    config, book = context.config, context.quotas
    if limited(config, standings) == limited(config, book.standings()):
        book.save(standings)
        return
    with context.applying:  # else the sweep would come between, and take the change for drift
        book.save(standings)
        context.limits_changed()


def limited(config: Config, standings: Mapping[str, Standing]) -> frozenset[str]:
    """The partitions that are limited: their quota says so, and it is used up."""
    return frozenset(
        name
        for name, quota in config.quotas.items()
        if quota.action == "limit" and name in standings and quota.level(standings[name].used) == "exceeded"
    )


def rate_limits(config: Config, standings: Mapping[str, Standing]) -> dict[str, RateLimit]:
    """What the packet filter should do: for each that may be limited, its rate and whether that is in force."""
    now = limited(config, standings)
    return {
        name: RateLimit(quota.bits_per_second // 8, name in now)
        for name, quota in config.quotas.items()
        if quota.bits_per_second is not None
    }


def _tell(context: Context, name: str, quota: Quota, standing: Standing, event: Event) -> None:
    message = f"{name} {_WORDS[event]} of {standing.month}: {_figures(quota, standing)}"
    if event == "exceeded" and quota.bits_per_second:
        message += (
            f"; {_NOT_LIMITED}"
            if context.config.packet_filter == "iptables"
            else f"; it is limited to {quota.bits_per_second} bit/s each way until the month ends"
        )
    log = logger.info if event == "renewed" else logger.warning
    log("quota %s: %s", event, message)
    context.events.record(
        f"quota.{event}",
        message,
        partition=name,
        month=standing.month,
        bytes=quota.octets,
        used_bytes=standing.used,
        action=quota.action,
    )


def _figures(quota: Quota, standing: Standing) -> str:
    return f"{standing.used} of {quota.octets} bytes with other nodes"


def as_json(context: Context, partition: str, instance: str | None) -> dict[str, Any] | None:
    """The contract's object about a partition; None for one without a quota."""
    quota = context.config.quotas.get(partition)
    if quota is None:
        return None
    standing = context.quotas.standings().get(partition)
    if standing is None or standing.instance != instance:
        standing = Standing(instance or "", allowance.month_of(context.clock()).name, 0)
    return {
        "bytes": quota.octets,
        "used_bytes": standing.used,
        "month": standing.month,
        "action": quota.action,
        "rate_bits_per_second": quota.bits_per_second,
        "state": quota.level(standing.used),
    }


def open_cases(config: Config, partitions: Iterable[tuple[str, Mapping[str, Any] | None]]) -> list[str]:
    """Who has used up its quota, for ``status``; by the objects of :func:`as_json`."""
    found = []
    for name, one in partitions:
        if one is not None and one["state"] == "exceeded":
            rate = one["rate_bits_per_second"]
            what = f"limited to {rate} bit/s each way" if rate else "nothing is done about it (warn)"
            if rate and config.packet_filter == "iptables":
                what = _NOT_LIMITED
            figures = f"{one['used_bytes']} of {one['bytes']} bytes"
            found.append(f"the quota of {name} for {one['month']} is used up ({figures}): {what}")
    return found


def _mark(path: Path) -> object:
    """What changes whenever the file is replaced; None without one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _row(one: Standing) -> dict[str, object]:
    told = {month: sorted(events) for month, events in one.told.items()}
    return {"instance": one.instance, "month": one.month, "used": one.used, "told": told}


def _load(path: Path) -> dict[str, Standing]:
    try:
        value = json.loads(path.read_bytes())
        if value["form"] != _FORM:
            raise ValueError(f"it is of form {value['form']!r}")
        return {name: _standing(row) for name, row in value["partitions"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("quotas: %s is not readable and is made anew: %r", path, error)
        return {}


def _standing(row: Mapping[str, Any]) -> Standing:
    """Decode one partition. Raises ValueError, KeyError, TypeError, AttributeError."""
    told = {
        month: frozenset(event for event in EVENTS if event in events)
        for month, events in row["told"].items()
    }
    one = Standing(row["instance"], row["month"], row["used"], told)
    if not isinstance(one.instance, str) or not isinstance(one.month, str) or type(one.used) is not int:
        raise ValueError(f"{row!r} is no standing")
    return one
