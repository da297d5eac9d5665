"""``register``: what the master's panel gives becomes the node's pair and its lines in ``slapos.cfg``.

Promises: nothing is asked for before everything that can be checked and made was; the answer, which cannot be had twice, is on
disk before it is looked at, and whoever was killed after that goes on with it; the old pair is in force until the new one,
which was checked, takes its place as a whole; of an existing configuration only the lines change that have to. What was there
before is kept beside, with the date.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import config, files, node_pair, pair_files, registration_config
from partitiond.errors import PartitiondError
from partitiond.events import EventLog
from slap_client.errors import SlapError
from slap_client.registration import read_registration, request_computer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from partitiond.config import Config
    from partitiond.registration_config import Wish

_RECORD = "registration.json"
_ROOM = 128 * 1024  # for the panel's answer as JSON text
_SKEW = timedelta(days=1)
_COMPUTER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NAMED = re.compile(r"COMP-[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
_TITLE = 255


@dataclass(slots=True)
class _Work:
    """A registration on its way: where things go, and what was done."""

    wish: Wish
    cfg: Path
    before: str | None
    config: Config
    stamp: str
    steps: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def ssl(self) -> Path:
        """The directory of the pair."""
        return self.cfg.parent / "ssl"

    @property
    def record(self) -> Path:
        """Where the panel's answer waits until all is done."""
        return self.ssl / _RECORD

    @property
    def place(self) -> pair_files.Place:
        """Where the pair goes."""
        return pair_files.Place(self.ssl, "node", "key", "certificate", 0o600, 0o644)

    @property
    def repository(self) -> Path:
        """Where the pairs of instances go."""
        return self.config.certificate_repository or self.ssl / "partition_pki"


def run(wish: Wish, token: Callable[[], str]) -> dict[str, Any]:
    """Register the node, or say what would be done. ``token`` is called when it is needed.

    Raises PartitiondError ``register.*``, ``config.*``, SlapError, OSError.
    """
    work = _look(wish)
    saved = _saved(work)
    if saved is None:
        _refuse_existing(work)
    if wish.dry_run:
        return _intended(work, saved)
    if saved is None:
        saved = _ask(work, token)
    else:
        work.steps.append(
            f"went on with the panel's answer of {saved['at']}, which was saved in {work.record}"
        )
    return _take_over(work, saved)


def _look(wish: Wish) -> _Work:
    """See what there is, and that all of what is asked for fits. Raises PartitiondError."""
    if not (wish.title.strip() and wish.title.isprintable() and len(wish.title) <= _TITLE):
        hint = f"choose one of printable characters, at most {_TITLE}"
        raise PartitiondError(
            "register.title", "a node cannot have that title", resource=wish.title, hint=hint
        )
    cfg = Path(os.path.realpath(wish.cfg))
    try:
        before: str | None = cfg.read_text("utf-8")
    except FileNotFoundError:
        before = None
    except UnicodeDecodeError:
        config.load(cfg)  # says where
        raise
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    ssl = cfg.parent / "ssl"
    known = registration_config.identity(before) if before else ""
    preview = registration_config.render(wish, before, ssl, known or registration_config.PLACEHOLDER)
    found = registration_config.preview(cfg, preview)
    if before is not None:
        registration_config.refuse_idle(wish, found)
    work = _Work(wish, cfg, before, found, stamp)
    if wish.fingerprint and not found.grid.master_fingerprint:
        work.steps.append(
            "the fingerprint holds for the panel; that of the master, if it needs one, is master_fingerprint in [partitiond]"
        )
    authorities = Path(wish.ca_file) if wish.ca_file else found.master_ca_file
    for key, is_, wanted in (
        ("key_file", found.key_file, ssl / "key"),
        ("cert_file", found.cert_file, ssl / "certificate"),
        ("master_ca_file", found.master_ca_file, authorities),
    ):
        if is_ != wanted:
            raise PartitiondError(
                "register.overridden",
                f"{key} is {is_} by a file in {cfg}.d, which goes before what is written here",
                resource=str(cfg),
                hint=f"take {key} out of that file",
            )
    return work


def _refuse_existing(work: _Work) -> None:
    """Keep who has a pair that works from throwing it away. Raises PartitiondError ``register.exists``."""
    if work.wish.force:
        return
    for key, certificate in _present(work):
        try:
            fits = not node_pair.mismatch(certificate, key)
            end = node_pair.ending(certificate.read_bytes())
        except OSError:
            continue
        if fits and end and end > datetime.now(UTC):
            raise PartitiondError(
                "register.exists",
                f"this node has a pair that is valid until {end:%Y-%m-%d}",
                resource=str(certificate),
                hint="nothing is to be done; to replace it all the same, revoke it in the panel and repeat with --force",
            )


def _present(work: _Work) -> list[tuple[Path, Path]]:
    """The pairs (key, certificate) that this node may have: what the configuration names, and what lies where ours go."""
    found = [(work.ssl / "key", work.ssl / "certificate")]
    if work.before is not None:
        named = [
            re.search(rf"^{key}\s*[=:]\s*(/\S+)", work.before, re.MULTILINE)
            for key in ("key_file", "cert_file")
        ]
        if named[0] and named[1]:
            found.insert(0, (Path(named[0][1]), Path(named[1][1])))
    return [pair for pair in dict.fromkeys(found) if all(path.exists() for path in pair)]


def _saved(work: _Work) -> dict[str, str] | None:
    """An answer of the panel that nobody has come to the end with. Raises PartitiondError ``register.pending``."""
    try:
        found = json.loads(work.record.read_bytes())
        saved = {key: str(found[key]) for key in ("title", "web_url", "at", "answer")}
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none, or cut short before there was an answer
    if saved["title"] != work.wish.title or saved["web_url"] != work.wish.web_url:
        raise PartitiondError(
            "register.pending",
            f"a registration as {saved['title']!r} at {saved['web_url']} was cut short after its answer",
            resource=str(work.record),
            hint="go on with it by that title and address, or revoke its certificate in the panel and remove the file",
        )
    return saved


def _ask(work: _Work, token: Callable[[], str]) -> dict[str, str]:
    """Have the panel's answer, on disk."""
    wish = work.wish
    secret = token()
    for directory in (work.cfg.parent, work.ssl):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    # the room for the answer is taken before the token is spent: a full disk must not lose it
    descriptor, name = tempfile.mkstemp(prefix=".registration.", suffix=".partitiond", dir=work.ssl)
    try:
        os.posix_fallocate(descriptor, 0, _ROOM)
        os.fsync(descriptor)
        # what the operator names for the master holds for its panel, too
        ca_file = wish.ca_file or (str(work.config.master_ca_file) if work.config.master_ca_file else None)
        answer = request_computer(wish.web_url, secret, wish.title, ca_file=ca_file, pin=wish.fingerprint)
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        saved = {
            "title": wish.title,
            "web_url": wish.web_url,
            "at": at,
            "answer": answer.decode("utf-8", "replace"),
        }
        content = json.dumps(saved).encode()
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
        Path(name).rename(work.record)
        _sync(work.ssl)
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)
    work.steps.append(f"registered as {wish.title} at {wish.web_url}")
    return saved


def _take_over(work: _Work, saved: Mapping[str, str]) -> dict[str, Any]:
    """Put the panel's answer into force. Every step may be repeated."""
    computer, found, end = _read(work, saved["answer"])
    before = registration_config.identity(work.before) if work.before else ""
    if before and before != computer and not work.wish.force:
        raise PartitiondError(
            "register.another_computer",
            f"the master knows this node as {computer}, but {work.cfg} says {before}, whose instances are not its own",
            resource=str(work.cfg),
            hint=f"repeat with --force to become {computer} (the answer is kept in {work.record}, no token is needed)",
        )
    _keep_old_pair(work, found)
    # partitions' users pass through to what is theirs
    for directory in (work.ssl, work.repository):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        directory.chmod(0o711)
    pair_files.write(work.place, found)
    work.steps.append(f"wrote {work.ssl / 'certificate'} and {work.ssl / 'key'}")
    changed = _write_config(work, computer)
    files.remove_path(work.record)
    _tell(work, computer)
    restart = "systemctl restart partitiond, or start it: systemctl enable --now partitiond"
    return {
        **_result(work, dry_run=False),
        "computer_id": computer,
        "config_action": changed,
        "not_after": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "next": ["look at the configuration: partitiond plan", restart],
    }


def _read(work: _Work, answer: str) -> tuple[str, pair_files.Found, datetime]:
    """The computer's id, the pair and its end, from an answer; one of no use is put aside. Raises PartitiondError."""
    from stunnel_mgr.errors import TunnelError  # noqa: PLC0415 - only for this verb
    from stunnel_mgr.identity import load_identity  # noqa: PLC0415 - cryptography is slow to import

    try:
        given = read_registration(answer.encode())
        certificate, key = given.certificate.encode(), given.key.encode()
        pair, now = load_identity(certificate, key), datetime.now(UTC)
        computer = given.reference or _named(given.certificate)
        if not _COMPUTER.fullmatch(computer):
            raise _useless("it names no computer, neither by a reference nor in the certificate")
        if pair.not_after <= now:
            raise _useless(f"its certificate has ended on {pair.not_after:%Y-%m-%d %H:%M} UTC")
    except (PartitiondError, SlapError, TunnelError) as error:
        aside = work.record.with_name(f"registration.{work.stamp}.refused.json")
        work.record.rename(aside)
        reason = f"{error}; the answer is kept in {aside}, and nothing else was changed"
        hint = "revoke the certificate in the panel, and repeat with a new token"
        raise PartitiondError(
            "register.answer", f"the panel's answer is of no use: {reason}", hint=hint
        ) from error
    if pair.not_before > now + _SKEW:
        work.steps.append(
            f"the certificate begins to be valid on {pair.not_before:%Y-%m-%d}: look at the node's clock"
        )
    return computer, pair_files.Found(key, certificate), pair.not_after


def _useless(why: str) -> PartitiondError:
    return PartitiondError("register.answer", why)


def _named(certificate: str) -> str:
    """The computer of a certificate: in the text before it (older masters), else in its subject."""
    from cryptography import x509  # noqa: PLC0415 - slow to import

    subject = x509.load_pem_x509_certificate(certificate.encode()).subject.rfc4514_string()
    for text in (certificate.partition("-----BEGIN")[0], subject):
        found = _NAMED.search(text)
        if found:
            return found[0]
    return ""


def _keep_old_pair(work: _Work, found: pair_files.Found) -> None:
    """Copy the pair that is about to be replaced to a directory with the date."""
    try:
        key, certificate = ((work.ssl / name).read_bytes() for name in ("key", "certificate"))
    except FileNotFoundError:
        return
    if (key, certificate) == (found.key, found.certificate):
        return  # whoever was cut short had put the new one there
    aside = work.ssl / f"old-{work.stamp}"
    shutil.rmtree(aside, ignore_errors=True)
    files.make_directory(aside, 0o700)
    files.write_path(aside / "key", key, mode=0o600)
    files.write_path(aside / "certificate", certificate, mode=0o644)
    work.kept.append(str(aside))
    work.steps.append(f"kept the old pair in {aside}")


def _write_config(work: _Work, computer: str) -> str:
    """Write the configuration, or set its lines; what was done: ``created``, ``changed`` or ``unchanged``."""
    text = registration_config.render(work.wish, work.before, work.ssl, computer)
    if text == work.before:
        return "unchanged"
    if work.before is None:
        files.write_path(work.cfg, text.encode(), mode=0o644)
        work.steps.append(f"wrote {work.cfg}")
        return "created"
    found = work.cfg.stat()
    mode, owner = found.st_mode & 0o777, (found.st_uid, found.st_gid)
    aside = work.cfg.with_name(f"{work.cfg.name}.old-{work.stamp}")
    files.write_path(aside, work.cfg.read_bytes(), mode=mode, owner=owner)
    files.write_path(work.cfg, text.encode(), mode=mode, owner=owner)
    work.kept.append(str(aside))
    work.steps.append(f"set the lines of the pair in {work.cfg}, which is kept as it was in {aside}")
    return "changed"


def _tell(work: _Work, computer: str) -> None:
    log_dir = work.config.log_dir
    if log_dir.is_dir():
        message = f"registered with the master as {computer} ({work.wish.title})"
        EventLog(log_dir).record("node.registered", message, resource=str(work.ssl / "certificate"))


def _intended(work: _Work, saved: Mapping[str, str] | None) -> dict[str, Any]:
    """What would be done; the panel is not asked, so the computer's id is not known."""
    wish = work.wish
    if saved is None:
        work.steps.append(f"would ask {wish.web_url} to register {wish.title!r}, which spends the token")
    else:
        work.steps.append(
            f"would go on with the panel's answer of {saved['at']}, which is saved in {work.record}"
        )
    if (work.ssl / "key").exists():
        work.steps.append(f"would keep the old pair in {work.ssl / f'old-{work.stamp}'}")
    work.steps.append(f"would write {work.ssl / 'certificate'} and {work.ssl / 'key'}")
    verb = "write" if work.before is None else "set the lines of the pair in"
    work.steps.append(f"would {verb} {work.cfg}")
    return {
        **_result(work, dry_run=True),
        "computer_id": None,
        "config_action": None,
        "not_after": None,
        "next": [],
    }


def _result(work: _Work, *, dry_run: bool) -> dict[str, Any]:
    return {
        "title": work.wish.title,
        "dry_run": dry_run,
        "config": str(work.cfg),
        "certificate": str(work.ssl / "certificate"),
        "key": str(work.ssl / "key"),
        "certificate_repository": str(work.repository),
        "steps": work.steps,
        "kept": work.kept,
    }


def _sync(directory: Path) -> None:
    with files.directory(directory) as descriptor:
        os.fsync(descriptor)
