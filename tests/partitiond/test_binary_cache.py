"""Releases from a network cache: slapproxy's own for the way there and back, one of the test's for all that may be wrong.

Builds are real ones, as the software user, of a release whose build says that it took place.
"""

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from partitiond import (
    binary_cache,
    build_keeper,
    buildout,
    config,
    execute,
    software_build,
    software_status,
    softwares,
)
from partitiond.context import Context
from partitiond.errors import PartitiondError
from partitiond.state import software_name
from slap_client.documents import ComputerDocument, SoftwareDocument

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("slapos") is None or importlib.util.find_spec("slapos.libnetworkcache") is None,
    reason="slapos.libnetworkcache is not installed (tools/environment --with networkcache)",
)

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / "tests" / "lifecycle" / "release"
SLAPOS = Path(sys.prefix) / "master" / "bin" / "slapos"
USER = "daemon"


class Cache:
    """shadir and shacache in one: ``entries`` by key, ``files`` by what they are called, right or wrong."""

    def __init__(self):
        self.entries, self.files, self.asked = {}, {}, []
        cache = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                cache.asked.append(self.path)
                _, kind, name = self.path.split("/")
                found = cache.files.get(name) if kind == "cache" else cache.entries.get(name)
                if found is None:
                    self.send_error(404)
                    return
                content = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def cache():
    made = Cache()
    yield made
    made.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two signers: one that is trusted, and one that is not."""
    base = tmp_path_factory.mktemp("keys")
    for name in ("trusted", "stranger"):
        line = f"req -x509 -nodes -days 30 -subj /CN={name} -newkey rsa:2048 -keyout {base}/{name}.key -out {base}/{name}.crt"
        subprocess.run(["/usr/bin/openssl", *line.split()], check=True, capture_output=True)
    return base


@pytest.fixture
def scene(keys):
    """A node's configuration, with directories of its own in place; ``use`` names the cache."""
    base = Path("/srv/cache-node")
    base.mkdir(mode=0o755)
    for name in ("software", "log", "log/software", "run", "state"):
        (base / name).mkdir(mode=0o755)
    shutil.chown(base / "software", USER, USER)
    shutil.copytree(RELEASE, base / "release")
    certificate = (keys / "trusted.crt").read_text().replace("\n", "\n  ")

    def use(url, directory="dir", **more):
        lines = {
            "signature-certificate-list": f"\n  {certificate}",
            "download-binary-cache-url": f"{url}/cache",
            "download-binary-dir-url": f"{url}/{directory}",
            **{key.replace("_", "-"): value for key, value in more.items()},
        }
        (base / "slapos.cfg").write_text(
            "[slapos]\ncomputer_id = C\nmaster_url = http://[::1]/\nsoftware_min_free_space = 1M\n"
            f"software_root = {base}/software\ninstance_root = {base}/instance\n[slapformat]\n"
            f"interface_name = lo\npartition_amount = 1\nsoftware_user = {USER}\n[partitiond]\noffline_builds = true\n"
            f"log_dir = {base}/log\nstate_dir = {base}/state\nrun_dir = {base}/run\n[networkcache]\n"
            + "".join(f"{key} = {value}\n" for key, value in lines.items())
        )
        return config.load(base / "slapos.cfg")

    url = f"{base}/release/software.cfg"
    yield SimpleNamespace(base=base, url=url, name=software_name(url), use=use, keys=keys)
    shutil.rmtree(base)


def build(found, url, **more):
    return software_build.build_software(found, url, stop=threading.Event(), **more)


def run(found, url):
    """The same by a runner, as the daemon has it."""
    build_keeper.start(found, url, force=False)
    wait(lambda: (runner := build_keeper.running(found)) is None or build_keeper.wait(runner, 1), "it to end")
    (outcome,) = build_keeper.outcomes(found)
    build_keeper.forget_outcome(found, url)
    assert not list(build_keeper.outcomes(found))
    return outcome


def log_of(scene):
    return (scene.base / "log" / "software" / f"{scene.name}.log").read_text()


def directory_of(scene):
    return scene.base / "software" / scene.name


def wait(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def slapproxy(scene):
    """slapos.core's own master with its shacache."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    (scene.base / "cache").mkdir()
    (scene.base / "entries").mkdir()
    (scene.base / "proxy.cfg").write_text(
        f"[slapos]\ncomputer_id = C\nmaster_url = http://127.0.0.1:{port}/\nsoftware_root = /x\ninstance_root = /y\n"
        f"[slapproxy]\nhost = 127.0.0.1\nport = {port}\ndatabase_uri = {scene.base}/proxy.db\n"
        f"shacache_content_directory = {scene.base}/cache\nshacache_metadata_directory = {scene.base}/entries\n"
    )
    with (scene.base / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            [SLAPOS, "proxy", "start", "--cfg", scene.base / "proxy.cfg"],
            env={"PATH": execute.PATH, "HOME": "/root"},
            stdout=log,
            stderr=log,
        )

    def answers():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/getRunId"):
            return True
        return False

    wait(answers, "the proxy to answer")
    yield f"http://127.0.0.1:{port}/shacache"
    process.terminate()
    process.wait(30)


def test_uploaded_by_one_node_and_taken_by_another_without_building(scene, slapproxy):
    key = scene.keys / "trusted.key"
    key.chmod(0o600)  # builds must not see it
    found = scene.use(
        slapproxy,
        signature_private_key_file=key,
        upload_binary_cache_url=f"{slapproxy}/cache",
        upload_binary_dir_url=f"{slapproxy}/dir",
    )
    shutil.chown(scene.base / "release" / "software.py", USER)
    (scene.base / "software" / ".netrc").write_text("machine x login y password secret\n")
    shutil.chown(scene.base / "software" / ".netrc", USER)
    assert run(found, scene.url) == build_keeper.Outcome(scene.url, "built")
    assert "HTTP Error 404" in log_of(scene), log_of(scene)
    assert "uploaded to the binary cache" in log_of(scene), log_of(scene)
    first = tree(directory_of(scene))
    # the second node: the same configuration, nothing built, and a release that cannot be
    buildout.remove_tree(scene.base / "software", scene.name)
    (scene.base / "release" / "build").write_text("fail it was built")
    assert run(found, scene.url) == build_keeper.Outcome(scene.url, "cached")
    second = tree(directory_of(scene))
    assert second.keys() == first.keys()
    different = {name for name in first if first[name] != second[name]}
    assert different <= {".completed", "buildout.cfg"}, different
    assert (directory_of(scene) / ".completed").is_file()
    owners = {path.lstat().st_uid for path in directory_of(scene).rglob("*")}
    assert owners == {directory_of(scene).stat().st_uid}
    (archive,) = (scene.base / "cache").iterdir()
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert not [name for name in names if ".netrc" in name or ".completed" in name]
    assert not [
        path for path in (scene.base / "software").iterdir() if path.name not in (scene.name, ".netrc")
    ]
    # what it gave is whole: its buildout runs
    ran = subprocess.run(
        [directory_of(scene) / "bin" / "buildout", "--version"], capture_output=True, check=False, cwd="/"
    )
    assert ran.returncode == 0, ran.stderr


def tree(top):
    found = {}
    for path in sorted(top.rglob("*")):
        if "__pycache__" not in path.parts and path.suffix != ".pyc":
            seen = path.lstat()
            content = (
                os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None  # noqa: PTH115
            )
            found[str(path.relative_to(top))] = (seen.st_mode & 0o170100, content)
    return found


# --- what is not to be believed ---------------------------------------------------------------------------------------


def packed(scene, *more, interpreter="/bin/sh"):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in ((f"{scene.name}/bin/buildout", f"#!{interpreter}\n".encode()), *more):
            one = tarfile.TarInfo(name) if isinstance(name, str) else name
            one.size, one.mode = len(content), 0o755
            tar.addfile(one, io.BytesIO(content))
    return made.getvalue()


def signed(scene, content, by="trusted", **other):
    tags = {
        "software_url": scene.url,
        "software_root": str(scene.base / "software"),
        "multiarch": binary_cache.multiarch(),
        "os": list(binary_cache.distribution()),
        "sha512": hashlib.sha512(content).hexdigest(),
        **other,
    }
    text = json.dumps(tags)
    made = subprocess.run(
        ["/usr/bin/openssl", "sha1", "-sign", scene.keys / f"{by}.key"],
        input=text.encode(),
        capture_output=True,
        check=True,
    )
    return [text, base64.b64encode(made.stdout).decode()]


def offer(scene, cache, content, entries=None, **other):
    cache.entries[scene.name] = [signed(scene, content, **other)] if entries is None else entries
    cache.files[hashlib.sha512(content).hexdigest()] = content


def fetch(scene, cache, **more):
    found = scene.use(cache.url, **more)
    with buildout.Log(buildout.software_log(found, scene.url), f"building {scene.url}") as log:
        return binary_cache.fetch(found, scene.url, stop=threading.Event(), log=log, session=None)


def test_what_is_right_is_taken(scene, cache):
    offer(scene, cache, packed(scene))
    assert fetch(scene, cache)
    assert (directory_of(scene) / "bin" / "buildout").stat().st_uid == directory_of(scene).stat().st_uid != 0
    assert [path.name for path in (scene.base / "software").iterdir()] == [scene.name]


def linked(scene):
    one = tarfile.TarInfo(f"{scene.name}/bin/x")
    one.type, one.linkname = tarfile.SYMTYPE, "/etc/shadow"
    return one


def wrong_file(scene, cache):
    content = packed(scene)
    offer(scene, cache, content)
    cache.files[hashlib.sha512(content).hexdigest()] = packed(scene, (f"{scene.name}/other", b"x"))


def entry_of(scene, cache, entry):
    content = packed(scene)
    offer(scene, cache, content, [entry])


DOUBTS = {
    "nobody signed": (lambda s, c: entry_of(s, c, [signed(s, packed(s))[0], ""]), "has signed it"),
    "a stranger signed": (lambda s, c: offer(s, c, packed(s), by="stranger"), "has signed it"),
    "the words were changed": (
        lambda s, c: entry_of(s, c, [signed(s, packed(s))[0] + " ", signed(s, packed(s))[1]]), "has signed it"),
    "no signature at all": (lambda s, c: entry_of(s, c, [signed(s, packed(s))[0], "%%%"]), "has signed it"),
    "another release": (lambda s, c: offer(s, c, packed(s), software_url="http://other/"), "its software_url"),
    "another place": (lambda s, c: offer(s, c, packed(s), software_root="/opt/slapgrid"), "its software_root"),
    "another machine": (lambda s, c: offer(s, c, packed(s), multiarch="m68k-linux-gnu"), "its multiarch"),
    "another system": (lambda s, c: offer(s, c, packed(s), os=["Plan9", "4", ""]), "it was built on"),
    "another file": (wrong_file, "checksum|another file"),
    "a name that climbs": (lambda s, c: offer(s, c, packed(s), sha512="../../etc/passwd"), "it names no file"),
    "no file": (lambda s, c: c.entries.update({s.name: [signed(s, b"not there")]}), "404"),
    "a hostile archive": (lambda s, c: offer(s, c, packed(s, (linked(s), b""))), "leads out"),
    "another's directory": (lambda s, c: offer(s, c, packed(s, ("f" * 32 + "/x", b""))), "lies outside"),
    "an interpreter that is not here": (
        lambda s, c: offer(s, c, packed(s, interpreter="/opt/other/bin/python")), "which is not here"),
    "no archive": (lambda s, c: offer(s, c, b"x" * 100), "ReadError|not a gzip"),
    "no list": (lambda s, c: c.entries.update({s.name: {"a": 1}}), "does not know"),
    "no pairs": (lambda s, c: c.entries.update({s.name: [1, [2], ["a"], ["{", "b"]]}), "passed over"),
    "no JSON": (lambda s, c: c.entries.update({s.name: b"<html>"}), "not used"),
    "nothing": (lambda *_: None, "404"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTS)
def test_on_any_doubt_it_is_not_taken_and_the_log_says_why(scene, cache, name):
    import re

    prepare, words = DOUBTS[name]
    prepare(scene, cache)
    assert not fetch(scene, cache)
    assert re.search(words, log_of(scene)), log_of(scene)
    assert list((scene.base / "software").iterdir()) == [], "something of it stays"


def test_a_second_entry_may_be_the_right_one(scene, cache):
    content = packed(scene)
    bad = signed(scene, content, by="stranger")
    offer(scene, cache, content, [bad, signed(scene, content)])
    assert fetch(scene, cache)


def test_who_is_asked_and_who_is_not(scene, cache):
    content = packed(scene)
    offer(scene, cache, content)
    assert not fetch(scene, cache, download_from_binary_cache_url_blacklist=f"{scene.base}/")
    assert not fetch(scene, cache, binary_cache_url_blacklist=f"\n  http://a/\n  {scene.base}/release")
    directory_of(scene).mkdir()
    assert not fetch(scene, cache), "what is half built is gone on with"
    assert cache.asked == []
    forced = {"download_from_binary_cache_force_url_list": f"{scene.base}/"}
    assert fetch(scene, cache, **forced)
    buildout.remove_tree(scene.base / "software", scene.name)
    cache.entries.clear()
    with pytest.raises(PartitiondError) as caught:
        fetch(scene, cache, **forced)
    assert caught.value.code == "software.cache_only"


def test_a_release_is_built_when_the_cache_is_down(scene):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = scene.use(f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert build(found, scene.url) == "built"
    assert "not used, it is built" in log_of(scene)
    assert (directory_of(scene) / "extends-cache").is_dir()
    profile = (directory_of(scene) / "buildout.cfg").read_text()
    assert "shared-part-list =" in profile
    assert "build-time-part-list =" in profile


def test_without_a_signature_nothing_is_uploaded(scene, cache):
    found = scene.use(cache.url, upload_binary_cache_url=cache.url, upload_binary_dir_url=cache.url)
    directory_of(scene).mkdir()
    with buildout.Log(buildout.software_log(found, scene.url), "x") as log:
        with pytest.raises(PartitiondError) as caught:
            binary_cache.upload(found, scene.url, stop=threading.Event(), log=log, session=None)
        assert caught.value.code == "software.upload"
        (directory_of(scene) / ".shared").touch()
        binary_cache.upload(found, scene.url, stop=threading.Event(), log=log, session=None)
    assert "shared parts" in log_of(scene)
    assert cache.asked == []


@pytest.fixture
def silent():
    """A cache that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def uploading_to(scene, url):
    scene.keys.joinpath("trusted.key").chmod(0o600)
    return scene.use(
        "http://127.0.0.1:1",
        signature_private_key_file=scene.keys / "trusted.key",
        upload_binary_cache_url=url,
        upload_binary_dir_url=url,
    )


def test_an_upload_that_hangs_has_a_limit(scene, silent, monkeypatch):
    monkeypatch.setattr(binary_cache, "_SENDING_SECONDS", 1.0)
    found = uploading_to(scene, silent)
    directory_of(scene).mkdir()
    with (
        buildout.Log(buildout.software_log(found, scene.url), "x") as log,
        pytest.raises(PartitiondError, match="could not be sent") as caught,
    ):
        binary_cache.upload(found, scene.url, stop=threading.Event(), log=log, session=None)
    assert caught.value.code == "software.upload"
    assert "took too long" in str(caught.value)
    assert [path.name for path in (scene.base / "software").iterdir()] == [scene.name]


def test_the_lane_goes_on_beside_an_upload_that_hangs(scene, silent, monkeypatch):
    found = uploading_to(scene, silent)
    build_keeper.start(found, scene.url, force=False)
    context = Context.of(found)
    try:
        wait(lambda: build_keeper.running(found).uploading, "it to be built")
        runner = build_keeper.running(found)
        other = "http://other/"
        (scene.base / "software" / software_name(other)).mkdir()
        wished = (SoftwareDocument(other, "destroyed"), SoftwareDocument(scene.url, "available"))
        result = softwares.run_pass(context, ComputerDocument("C", software=wished))
        assert result.done == [f"{scene.url}: available"]
        assert not (scene.base / "software" / software_name(other)).exists()
        assert build_keeper.running(found) == runner
        (row,) = software_status.releases(context)
        assert (row["state"], row["uploading"]) == ("available", True)
        assert software_status.open_cases(context) == []
        monkeypatch.setattr(software_status, "_LONG_UPLOAD", 0.0)
        assert "is being uploaded" in software_status.open_cases(context)[0]
        began = time.monotonic()
        assert build_keeper.end(found)
        assert time.monotonic() - began < build_keeper._GRACE, "it had to be killed"
    finally:
        build_keeper.end(found)
        context.meters.close()


# --- the configuration ------------------------------------------------------------------------------------------------


def test_what_buildout_is_told(scene):
    found = scene.use(
        "http://c",
        signature_private_key_file="/etc/key",
        upload_cache_url="http://c/cache",
        upload_dir_url="http://c/dir",
        shacache_ca_file="/etc/ca",
    )
    options = software_build.options_of(found, Path("/s"), force=False)
    assert options[:3] == ["-U", "-N", "-c"]
    assert set(options) >= {
        "buildout:extends-cache=/s/extends-cache",
        "buildout:networkcache-section=networkcache",
        "networkcache:signature-private-key-file=/etc/key",
        "networkcache:upload-cache-url=http://c/cache",
        "networkcache:upload-dir-url=http://c/dir",
        "networkcache:shacache-ca-file=/etc/ca",
    }
    assert "-N" not in software_build.options_of(found, Path("/s"), force=True)
    pinned = replace(found, software=replace(found.software, buildout_version="4.1.0"))
    assert "versions:zc.buildout=4.1.0" in software_build.options_of(pinned, Path("/s"), force=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("download_binary_cache_url", "ftp://x"),
        ("upload_cache_url", "http://a b/"),
        ("signature_certificate_list", "-----BEGIN CERTIFICATE-----\n  !!!"),
        ("shacache_key_file", "relative"),
    ],
)
def test_bad_values(scene, key, value):
    with pytest.raises(PartitiondError) as caught:
        scene.use("http://c", **{key: value})
    assert key.replace("_", "-") in str(caught.value)


def test_debian_counts_by_its_major_version():
    same = binary_cache.same_distribution
    assert same(["debian", "12.4", "bookworm"], ("debian", "12", ""))
    assert same(["Raspbian", "12", ""], ("debian", "12.1", "x"))
    assert not same(["debian", "13", ""], ("debian", "12", ""))
    assert not same(["ubuntu", "24.04", "noble"], ("ubuntu", "24.10", "oracular"))
    assert not same("('debian', '12', '')", ("debian", "12", ""))
    assert not same(None, ("debian", "12", ""))
