"""Releases that somebody else has built: looked up in a network cache, believed by signature, and put there after a build.

The protocol is that of slapos.libnetworkcache (an extra; shadir holds signed descriptions by key, shacache files by their
SHA-512), the entries are those of slapgrid. Promises: what is taken was signed by a certificate of the configuration, is the
file that was signed, was made for this URL, this ``software_root``, machine and distribution, and unpacks as
``safe_archive`` wants it; on any doubt the release is built instead, and its log says why. Everything that reads what is taken
does so as the software user; only signing and sending, with a key that builds must not see, is root's. All of it is done by
processes of their own, which have a limit of time and of memory and can be ended: whatever a cache does, the lane goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
import resource
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from platform import freedesktop_os_release
from sysconfig import get_config_var
from typing import IO, TYPE_CHECKING, Any

from partitiond import buildout, execute, files, free_space, safe_archive
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from partitiond.config import Config

_TAKEN, _NOT_TAKEN = 0, 3
_LONGEST = 6 * 3600.0
_SENDING_SECONDS = 3600.0  # in which nothing else is built
_MEMORY = 2 * 2**30
_PIECE = 1 << 20
_SHA512 = re.compile(r"[0-9a-f]{128}")
# what says something of the node that built it, or of this one
_NOT_PACKED = frozenset((buildout.COMPLETED, ".netrc", ".bash_history", ".cache"))
_NOT_TAKEN_OUT = frozenset((buildout.COMPLETED, ".netrc"))
_MISSING = "slapos.libnetworkcache is not installed (make install EXTRAS=networkcache)"
_DOUBTS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    MemoryError,
    PartitiondError,
    tarfile.TarError,
    zlib.error,
)

_START = """
import sys
if sys.argv[1] not in sys.path:
    sys.path.insert(0, sys.argv[1])
from partitiond.binary_cache import main
sys.exit(main(sys.argv[2]))
"""


# --- root's side ------------------------------------------------------------------------------------------------------


def fetch(config: Config, url: str, *, stop: threading.Event, log: int, session: Path | None) -> bool:
    """Take a release from the network cache, where it has it; whether it did. What is half built is gone on with instead.

    Raises PartitiondError ``software.cache_only`` for one that may be had in no other way, OSError.
    """
    cache, directory = config.software.cache, buildout.software_directory(config, url)
    forced = cache.forced(url)
    taken = False
    if cache.downloads(url) and (forced or not os.path.lexists(directory)):
        taken = _fetch(config, url, stop=stop, log=log, session=session)
    if forced and not taken:
        raise PartitiondError(
            "software.cache_only",
            "download-from-binary-cache-force-url-list wants it from the binary cache, which does not have it",
            resource=url,
            hint=f"read {buildout.software_log(config, url)}",
            retryable=True,
        )
    return taken


def _fetch(config: Config, url: str, *, stop: threading.Event, log: int, session: Path | None) -> bool:
    directory = buildout.software_directory(config, url)
    waiting = f".{directory.name}.cache"
    buildout.remove_tree(config.software_root, waiting)
    cache = config.software.cache
    job = {
        "url": url,
        "root": str(config.software_root),
        "name": directory.name,
        "target": waiting,
        "cache": cache.download_cache,
        "dir": cache.download_dir,
        "certificates": list(cache.certificates),
        "files": dict(cache.files),
        "spare": config.grid.software_min_free_space,
    }
    try:
        outcome = _as_user(config, {"do": "fetch", **job}, stop=stop, log=log, session=session)
        if not outcome.ok:
            how = outcome.cut_short or f"status {outcome.status}"
            if outcome.status != _NOT_TAKEN:
                buildout.note(log, f"binary cache: nothing is taken ({how})")
            return False
        # what stands there may be built by halves only where the cache is the one way to have it
        buildout.remove_tree(config.software_root, directory.name)
        (config.software_root / waiting).rename(directory)
    finally:
        buildout.remove_tree(config.software_root, waiting)
    buildout.note(log, "binary cache: taken from there")
    return True


def upload(config: Config, url: str, *, stop: threading.Event, log: int, session: Path | None) -> None:
    """Put a built release into the network cache. Raises PartitiondError ``software.upload`` or OSError."""
    cache, directory = config.software.cache, buildout.software_directory(config, url)
    if os.path.lexists(directory / ".shared"):
        buildout.note(log, "it uses shared parts, which no other node has: not uploaded")
        return
    if cache.private_key is None:
        reason = "without a signature nobody would take it"
        raise _not_uploaded(config, url, reason, "set signature-private-key-file")
    packed = f".{directory.name}.upload"
    buildout.remove_tree(config.software_root, packed)
    job = {"do": "pack", "root": str(config.software_root), "name": directory.name, "target": packed}
    try:
        outcome = _as_user(config, job, stop=stop, log=log, session=session)
        if not outcome.ok:
            raise _not_uploaded(config, url, f"it could not be packed ({buildout.ended(outcome)})")
        job = _sending(config, url, packed)
        limit = _SENDING_SECONDS
        outcome = _as_user(config, job, stop=stop, log=log, session=session, user="root", limit=limit)
        if not outcome.ok:
            raise _not_uploaded(config, url, f"it could not be sent ({buildout.ended(outcome)})")
    finally:
        buildout.remove_tree(config.software_root, packed)
    buildout.note(log, "uploaded to the binary cache")


def _sending(config: Config, url: str, packed: str) -> dict[str, Any]:
    cache = config.software.cache
    return {
        "do": "send",
        "url": url,
        "root": str(config.software_root),
        "name": buildout.software_directory(config, url).name,
        "target": packed,
        "owner": pwd.getpwnam(config.software_user).pw_uid,
        "cache": cache.upload_cache,
        "dir": cache.upload_dir,
        "key": str(cache.private_key),
        "certificates": list(cache.certificates),
        "files": dict(cache.files),
    }


def _not_uploaded(config: Config, url: str, why: str, hint: str = "") -> PartitiondError:
    hint = hint or f"read {buildout.software_log(config, url)}, look at [networkcache]"
    return PartitiondError("software.upload", why, resource=url, hint=hint, retryable=True)


def _as_user(
    config: Config,
    job: dict[str, Any],
    *,
    stop: threading.Event,
    log: int,
    session: Path | None,
    user: str | None = None,
    limit: float = _LONGEST,
) -> execute.Outcome:
    """Have a job done by a process of its own: the software user's, or ``user``'s."""
    root = Path(__file__).resolve().parent.parent
    user = user or config.software_user
    return execute.as_user(
        user,
        user,
        [sys.executable, "-I", "-c", _START, str(root), json.dumps(job)],
        cwd=config.software_root,
        env=execute.environment(str(config.software_root), user),
        log=log,
        stop=stop,
        timeout=limit,
        record=session,
    )


# --- the software user's side -------------------------------------------------------------------------------------------


def main(text: str) -> int:
    """Do what root asked for; the exit status says whether it is done."""
    job = json.loads(text)
    # the library, and tarfile, read answers and headers as a whole, however long they are
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    os.umask(0o022)
    target = Path(job["root"], job["target"])
    if job["do"] == "pack":
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(target, flags, 0o600), "wb") as sink:
            source = Path(job["root"], job["name"])
            safe_archive.pack(source, sink, skip=_NOT_PACKED, going_on=lambda: True)
        return _TAKEN
    if job["do"] == "send":
        return _send(job)
    try:
        for sha512 in _trusted(job):
            with tempfile.TemporaryFile(dir=job["root"]) as archive:
                _download(job, sha512, archive)
                _unpack(job, archive, target)
            return _TAKEN
    except _DOUBTS as error:
        _say(f"not used, it is built: {type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - as above: the library's own
        _say(f"not used, it is built: {type(error).__name__}: {error}")
    return _NOT_TAKEN


def _send(job: dict[str, Any]) -> int:
    """Sign and send an archive that the software user has packed; as root, who alone may read the key."""
    try:
        with files.directory(Path(job["root"])) as root, files.plain(job["target"], dir_fd=root) as archive:
            if os.fstat(archive).st_uid != job["owner"]:
                _say("not uploaded: the archive is not the software user's")
                return _NOT_TAKEN
            with open(os.dup(archive), "rb") as stream:
                _of(job, signature_private_key_file=job["key"]).upload_generic(
                    stream,
                    job["name"],
                    software_url=job["url"],
                    software_root=job["root"],
                    multiarch=multiarch(),
                    os=distribution(),
                )
    except Exception as error:  # noqa: BLE001 - the library has an exception of its own that is no child of another
        _say(f"not uploaded: {type(error).__name__}: {error}")
        return _NOT_TAKEN
    return _TAKEN


def _say(text: str) -> None:
    sys.stdout.write(f"--- binary cache: {ascii(text)[1:-1]}\n")
    sys.stdout.flush()


def _client(cache: str, directory: str, **words: Any) -> Any:
    try:
        from slapos.libnetworkcache import NetworkcacheClient  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise PartitiondError("software.cache_missing", _MISSING) from error
    return NetworkcacheClient(cache, directory, **words)


def _of(job: dict[str, Any], **more: str) -> Any:
    words = {name.replace("-", "_"): value for name, value in job["files"].items()} | more
    return _client(job["cache"], job["dir"], signature_certificate_list=job["certificates"] or None, **words)


def _trusted(job: dict[str, Any]) -> Iterator[str]:
    """SHA-512 of what may be taken, as the entries of shadir say; of each that may not, why."""
    client = _of(job)
    found = client.select_generic(job["name"], filter=False)
    if not isinstance(found, list) or not found:
        _say("it does not know this release")
        return
    for entry in found:
        doubt = _doubt(job, client, entry)
        if doubt is None:
            yield json.loads(entry[0])["sha512"]
        else:
            _say(f"an entry is passed over: {doubt}")


def _doubt(job: dict[str, Any], client: Any, entry: object) -> str | None:
    """Why an entry is not believed, or not for this node; None for one that is."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) for one in entry)):
        return "it is no description with a signature"
    try:
        if not client.verifySignatureInCertificateList(*entry):
            return "no certificate of signature-certificate-list has signed it"
        tags = json.loads(entry[0])
        wanted = {"software_url": job["url"], "software_root": job["root"], "multiarch": multiarch()}
        for name, value in wanted.items():
            if tags.get(name) != value:
                return f"its {name} is {tags.get(name)!r}, not {value!r}"
        if not same_distribution(tags.get("os"), distribution()):
            return f"it was built on {tags.get('os')!r}"
        return None if _SHA512.fullmatch(tags.get("sha512", "")) else "it names no file"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read: {error}"


def _download(job: dict[str, Any], sha512: str, sink: IO[bytes]) -> None:
    room = free_space.available(Path(job["root"])) - int(job["spare"])
    digest, size = hashlib.sha512(), 0
    with contextlib.closing(_of(job).download(sha512)) as source:
        while piece := source.read(_PIECE):
            size += len(piece)
            if size > room:
                raise safe_archive.RefusedError(
                    f"it is larger than the {free_space.human(room)} that may be filled"
                )
            digest.update(piece)
            sink.write(piece)
    if digest.hexdigest() != sha512:
        raise safe_archive.RefusedError("it is another file than the one that was signed")
    sink.seek(0)


def _unpack(job: dict[str, Any], archive: IO[bytes], target: Path) -> None:
    final = Path(job["root"], job["name"])
    room = free_space.available(target.parent) - int(job["spare"])
    most = max(0, min(room, safe_archive.MOST_BYTES))
    safe_archive.unpack(archive, target, name=job["name"], final=final, skip=_NOT_TAKEN_OUT, most_bytes=most)
    program = target / "bin" / "buildout"
    if not program.is_file():
        raise safe_archive.RefusedError("it has no bin/buildout")
    with program.open("rb") as stream:
        first = stream.readline(4096).decode("utf-8", "replace")
    interpreter = first.removeprefix("#!").split()[:1]
    inside = interpreter[0].removeprefix(f"{final}/") if interpreter else ""
    if not interpreter or not (target / inside if inside != interpreter[0] else Path(inside)).exists():
        raise safe_archive.RefusedError(f"its buildout is run by {first.strip()[:200]!r}, which is not here")


# --- whose is whose -----------------------------------------------------------------------------------------------------


def multiarch() -> str:
    """The machine, in the words of gcc -dumpmachine, which Debian's Python knows, too."""
    return str(get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu")


def distribution() -> tuple[str, str, str]:
    """The distribution: its name, version and code name, as slapgrid has them."""
    try:
        found = freedesktop_os_release()
    except OSError:
        return ("", "", "")
    return (found.get("ID", ""), found.get("VERSION_ID", ""), found.get("VERSION_CODENAME", ""))


def same_distribution(one: object, other: tuple[str, str, str]) -> bool:
    """Whether what was built on one runs on the other: of Debian the major version counts (slapos.core 1.26)."""
    if not (isinstance(one, list | tuple) and len(one) == 3 and all(isinstance(word, str) for word in one)):
        return False
    return _debian((one[0], one[1], one[2])) == _debian(other)


def _debian(found: tuple[str, str, str]) -> tuple[str, str, str]:
    name, version, code = found
    name = name.lower()
    if name in ("raspbian", "debian"):
        return "debian", version.partition(".")[0], ""
    return name, version, code
