"""``tunnel check``: real connections through the tunnels of a node, each made as the user whose tunnel it is.

As that user and not as root, whom the packet filter lets through everywhere: a tunnel to another partition's private address
would seem to work, and a tenant could let root knock at doors that are closed to itself. Where a certificate that a server
allows is that of another partition of this node, that one goes through, as its own user and from its own address.

Promises: all are checked side by side and within a bound; nothing of the node is changed.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from netplan import sock_diag
from partitiond import converge, errands, identities, tunnel_declarations, tunnel_expiry
from partitiond.errors import PartitiondError, sentence
from stunnel_mgr import check
from stunnel_mgr.check import CheckResult, OwnSide
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.tls_probe import Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.identities import PublicIdentity
    from partitiond.node import Partition
    from partitiond.tunnel_declarations import PartitionTunnels
    from stunnel_mgr.check import Outcome
    from stunnel_mgr.model import Endpoint, Mode, Refused, Tunnel
    from stunnel_mgr.render import IdentityFiles

FINE = ("ok", "idle")
"""Outcomes that are nobody's trouble: an idle tunnel is as it was declared."""
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST_MESSAGE = 1000
_UNKNOWN: Outcome = "undecided"

_HINTS: Mapping[str, str] = {
    "ok": "",
    "idle": "name a certificate that may connect, in its declaration",
    "refused_declaration": "mend the declaration",
    "listener_down": "partitiond apply starts it; _stunnel.log of the partition below log_dir says why it ended",
    "foreign_listener": "end what listens there, or give the tunnel another port; then partitiond apply",
    "stunnel_fails": "partitiond apply; _stunnel.log of the partition below log_dir says what it does",
    "wrong_certificate": "partitiond apply; if it stays, something else listens there with a key of its own",
    "own_expired": "partitiond apply makes a new one, which the other side must be told",
    "peer_expired": "get the certificate that the other side has now, and declare that",
    "unreachable": "is the far end up, and its address and port as declared? ask its operator for its tunnel check",
    "no_tls": "is the port that of a tunnel, and does that answer? ask the operator of the far end for its tunnel check",
    "wrong_server": "if the far end has a new certificate, declare that one; else somebody is in its place",
    "refused_by_pin": "the far end must allow this partition's certificate; .slapos-resource has it",
    "service_down": "start the service behind the tunnel's server end",
    "undecided": "try again; if it stays, the message says what stood in the way",
}


@dataclass(frozen=True, slots=True)
class _Subject:
    """One declaration: a tunnel that can be tried, or one of which all is known already."""

    name: str
    partition: str
    mode: Mode | None
    tunnel: Tunnel | None = None
    known: CheckResult | None = None


@dataclass(frozen=True, slots=True)
class _Scene:
    """What the checks are made by."""

    config: Config
    partitions: Mapping[str, Partition]
    published: Mapping[str, PublicIdentity | None]
    wanted: Mapping[str, PartitionTunnels]
    owners: Mapping[Endpoint, frozenset[int]]


@dataclass(frozen=True, slots=True)
class _Job:
    """A part of the check of one subject, and the partition as which it is made; ``guest`` where that is not its own."""

    subject: int
    partition: str
    call: Callable[[], dict[str, Any]]
    guest: bool = False


def run(context: Context, name: str | None = None) -> dict[str, Any]:
    """The ``tunnel check`` object, of a tunnel, of all of a partition, or of all.

    Each has an ``outcome`` (``stunnel_mgr.check.CheckResult`` says what they mean), a ``message``, a ``hint`` what to do, and
    the ``seconds`` that it took. Raises PartitiondError ``tunnel.unknown``.
    """
    seen = converge.observe(context)
    everybody = seen.node.partitions
    published = identities.observe(seen.node.config, everybody)
    wanted = converge.declared_tunnels(context, seen.node, published, everybody)
    subjects = [subject for item in everybody for subject in _of(wanted[item.id])]
    subjects += [_refused(one) for one in tunnel_declarations.homeless(seen.node)]
    if name is not None:
        chosen = [one for one in subjects if name in (one.name, one.partition)]
        if not chosen and seen.node.partition(name) is None:
            raise PartitiondError(
                "tunnel.unknown",
                "there is no such tunnel or partition",
                resource=name,
                hint="partitiond tunnel list has them all",
            )
        subjects = chosen
    listening = sock_diag.listeners([one.tunnel.listen for one in subjects if one.tunnel])
    scene = _Scene(seen.node.config, {item.id: item for item in everybody}, published, wanted, listening)
    return {"checks": _checked(scene, subjects)}


def healthy(value: dict[str, Any]) -> bool:
    """Whether nothing of what was checked is in trouble."""
    return all(one["outcome"] in FINE for one in value["checks"])


# --- what is to be checked --------------------------------------------------------------------------------------------


def _of(wanted: PartitionTunnels) -> Iterator[_Subject]:
    for tunnel in wanted.tunnels:
        known = None
        if tunnel.idle_reason:
            known = CheckResult("idle", tunnel.idle_reason)
        elif tunnel.name in wanted.blocked:
            known = CheckResult("foreign_listener", wanted.blocked[tunnel.name])
        yield _Subject(tunnel.name, tunnel.partition, tunnel.mode, tunnel, known)
    yield from map(_refused, wanted.refused)


def _refused(one: Refused) -> _Subject:
    place = f"{one.file}:{one.line}" if one.line else one.file
    known = CheckResult("refused_declaration", f"{place}: {one.reason}")
    return _Subject(one.name, one.partition, None, known=known)


# --- who checks what --------------------------------------------------------------------------------------------------


def _pair(config: Config, partition: Partition, names: IdentityFiles) -> Pair:
    """The files by which a partition is known."""
    directory = identities.directory_of(config, partition.id)
    return Pair(directory / names.certificate, directory / names.key)


def _own_side(scene: _Scene, tunnel: Tunnel) -> OwnSide | None:
    """What the tunnel shows, and who listens there; None while there is nothing to show."""
    owner, wanted = scene.partitions[tunnel.partition], scene.wanted[tunnel.partition]
    names = wanted.identities.get(tunnel.identity)
    ends = tunnel_expiry.ends(wanted, tunnel, scene.published.get(tunnel.partition))
    if names is None or ends is None:
        return None
    return OwnSide(
        uid=owner.uid,
        identity=_pair(scene.config, owner, names),
        fingerprint=names.fingerprint,
        not_after=ends,
        listeners=scene.owners.get(tunnel.listen, frozenset()),
    )


def _jobs(scene: _Scene, number: int, subject: _Subject) -> Iterator[_Job]:
    tunnel = subject.tunnel
    own = _own_side(scene, tunnel) if tunnel and subject.known is None else None
    if tunnel is None or own is None:
        return
    if tunnel.mode == "client":
        yield _Job(number, tunnel.partition, partial(_told, partial(check.check_client, tunnel, own)))
        return
    yield _Job(number, tunnel.partition, partial(_told, partial(check.check_server, tunnel, own)))
    guest = _guest(scene, tunnel)
    if guest is not None:
        source = guest.ipv6 if tunnel.listen_host.version == 6 else guest.network.stand_in_ipv4
        pair = _pair(scene.config, guest, _names(scene, guest))
        way_in = partial(check.check_way_in, tunnel, own, pair, source=source)
        yield _Job(number, guest.id, partial(_told, way_in), guest=True)


def _names(scene: _Scene, partition: Partition) -> IdentityFiles:
    identity = scene.published[partition.id]
    assert identity is not None  # noqa: S101 - it was found by it
    return identities.files_of(identity)


def _guest(scene: _Scene, tunnel: Tunnel) -> Partition | None:
    """A partition of this node that the server allows: its own first, as that one is sure to be set up."""
    now = datetime.now(UTC)
    allowed = {pin.fingerprint for pin in tunnel.pins if not pin.expired(now)}
    names = [name for name, one in scene.published.items() if one and one.shown.fingerprint in allowed]
    names.sort(key=lambda name: name != tunnel.partition)
    return scene.partitions[names[0]] if names else None


def _told(call: Callable[[], CheckResult]) -> dict[str, Any]:
    """Make a check in words that go through a pipe."""
    began = time.monotonic()
    try:
        found = call()
    except TunnelError as error:
        found = CheckResult("undecided", sentence(error))
    seconds = time.monotonic() - began
    return {"outcome": found.outcome, "message": found.message, "peer": found.peer, "seconds": seconds}


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """The parts of one check."""

    own: CheckResult | None = None
    way_in: CheckResult | None = None
    guest: str = ""
    seconds: float = 0.0


def _checked(scene: _Scene, subjects: list[_Subject]) -> list[dict[str, Any]]:
    jobs: dict[str, list[_Job]] = {}
    for number, subject in enumerate(subjects):
        for job in _jobs(scene, number, subject):
            jobs.setdefault(job.partition, []).append(job)
    errand = partial(_errand, scene)
    answers = errands.run([errand(name, given) for name, given in jobs.items()])
    found: dict[int, _Found] = {}
    for given, said in zip(jobs.values(), answers, strict=True):
        for job, answer in zip(given, said, strict=True):
            result, seconds = _read(answer)
            one = found.setdefault(job.subject, _Found())
            one.seconds = max(one.seconds, seconds)
            if job.guest:
                one.way_in, one.guest = result, job.partition
            else:
                one.own = result
    return [_row(subject, found.get(number)) for number, subject in enumerate(subjects)]


def _errand(scene: _Scene, partition: str, jobs: list[_Job]) -> errands.Errand:
    owner = scene.partitions[partition]
    return errands.Errand(owner.uid, owner.gid, [job.call for job in jobs], check.LONGEST)


def _read(answer: errands.Answer) -> tuple[CheckResult, float]:
    """Take an answer for what it is: the words of a process of the partition's user."""
    if answer.fault or not isinstance(answer.value, dict):
        return CheckResult("undecided", f"the check failed: {answer.fault}"[:_LONGEST_MESSAGE]), 0.0
    outcome, message, peer, seconds = (
        answer.value.get(key) for key in ("outcome", "message", "peer", "seconds")
    )
    known = next((one for one in check.OUTCOMES if one == outcome), _UNKNOWN)
    if not isinstance(peer, str) or not _FINGERPRINT.fullmatch(peer):
        peer = None
    took = seconds if isinstance(seconds, float) and 0 <= seconds < float("inf") else 0.0
    return CheckResult(known, str(message)[:_LONGEST_MESSAGE], peer), took


def _row(subject: _Subject, found: _Found | None) -> dict[str, Any]:
    result = subject.known or _together(found)
    return {
        "name": subject.name,
        "partition": subject.partition,
        "mode": subject.mode,
        "outcome": result.outcome,
        "message": result.message,
        "hint": _HINTS[result.outcome],
        "peer": result.peer,
        "seconds": round(found.seconds, 3) if found else 0.0,
    }


def _together(found: _Found | None) -> CheckResult:
    if found is None or found.own is None:
        return CheckResult(
            "undecided", "the partition's certificate is missing or damaged; partitiond apply makes it"
        )
    if found.way_in is None:
        return found.own
    return check.with_way_in(found.own, found.way_in, found.guest)
