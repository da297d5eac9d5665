"""What slapgrid's keys in ``[networkcache]``, and some in ``[slapos]`` and ``[partitiond]``, say of builds of releases."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config_reader import Reader

SECTION = "networkcache"
_MARKER = "-----BEGIN CERTIFICATE-----"
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_FILES = (
    "signature-private-key-file shacache-ca-file shacache-cert-file shacache-key-file shadir-ca-file shadir-cert-file"
    " shadir-key-file"
).split()
_URLS = (
    "download-binary-cache-url download-binary-dir-url upload-binary-cache-url upload-binary-dir-url upload-cache-url"
    " upload-dir-url download-cache-url download-dir-url"
).split()


@dataclass(frozen=True, slots=True)
class NetworkCache:
    """A network cache: where whole releases are looked up and put, whom to believe, and what buildout is told of it.

    ``options`` are handed to buildout as slapgrid does, for the sources that it downloads itself.
    """

    download_cache: str = ""
    download_dir: str = ""
    upload_cache: str = ""
    upload_dir: str = ""
    certificates: tuple[str, ...] = ()
    private_key: Path | None = None
    files: tuple[tuple[str, str], ...] = ()
    never_download: tuple[str, ...] = ()
    never_upload: tuple[str, ...] = ()
    only_download: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    def downloads(self, url: str) -> bool:
        """Whether a release is looked up."""
        if not (self.download_cache and self.download_dir):
            return False
        return not url.startswith(self.never_download) if self.never_download else True

    def uploads(self, url: str) -> bool:
        """Whether a release is put there once it is built."""
        if not (self.upload_cache and self.upload_dir):
            return False
        return not url.startswith(self.never_upload) if self.never_upload else True

    def forced(self, url: str) -> bool:
        """Whether a release is taken from there or not at all."""
        return bool(self.only_download) and url.startswith(self.only_download)


@dataclass(frozen=True, slots=True)
class SoftwareKeys:
    """``buildout_version`` empty: what a release pins, else ours."""

    build_time_part_list: str = ""
    buildout_version: str = ""
    cache: NetworkCache = field(default_factory=NetworkCache)


def read(reader: Reader) -> SoftwareKeys:
    """Read the keys; what is wrong is the reader's to collect."""
    return SoftwareKeys(
        build_time_part_list=reader.raw("slapos", "build_time_part_list"),
        buildout_version=reader.raw("partitiond", "buildout_version"),
        cache=_cache(reader),
    )


def _cache(reader: Reader) -> NetworkCache:
    urls = {key: _url(reader, key) for key in _URLS}
    paths = {key: reader.optional_path(SECTION, key) for key in _FILES}
    # as slapgrid, which takes the older spelling of [slapos], too
    key = paths["signature-private-key-file"] or reader.optional_path("slapos", "signature_private_key_file")
    never = _list(reader, "download-from-binary-cache-url-blacklist") or _list(
        reader, "binary-cache-url-blacklist"
    )
    files = tuple((name, str(path)) for name, path in paths.items() if path and name.startswith("sha"))
    told = (
        ("signature-private-key-file", str(key or "")),
        ("upload-cache-url", urls["upload-cache-url"]),
        ("upload-dir-url", urls["upload-dir-url"]),
    )
    return NetworkCache(
        download_cache=urls["download-binary-cache-url"],
        download_dir=urls["download-binary-dir-url"],
        upload_cache=urls["upload-binary-cache-url"],
        upload_dir=urls["upload-binary-dir-url"],
        certificates=_certificates(reader),
        private_key=key,
        files=files,
        never_download=never,
        never_upload=_list(reader, "upload-to-binary-cache-url-blacklist"),
        only_download=_list(reader, "download-from-binary-cache-force-url-list"),
        options=tuple((name, value) for name, value in (*told, *files) if value),
    )


def _url(reader: Reader, key: str) -> str:
    value = reader.raw(SECTION, key)
    try:
        parts = urllib.parse.urlsplit(value)
        good = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\"'$\\]", value)
        )
    except ValueError:
        good = False
    if value and not good:
        reader.bad(SECTION, key, value, "an http:// or https:// URL")
    return value


def _list(reader: Reader, key: str) -> tuple[str, ...]:
    """Beginnings of URLs, one a line."""
    return tuple(line.strip() for line in reader.raw(SECTION, key).split("\n") if line.strip())


def _certificates(reader: Reader) -> tuple[str, ...]:
    text = reader.raw(SECTION, "signature-certificate-list")
    found = tuple(
        "\n".join(line.strip() for line in one.split("\n") if line.strip())
        for one in _CERTIFICATE.findall(text)
    )
    if len(found) != text.count(_MARKER) or (text and not found):
        reader.bad(
            SECTION, "signature-certificate-list", text[:60], "certificates as PEM, one after the other"
        )
    return found
