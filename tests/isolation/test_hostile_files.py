"""Root against hostile users: each hostile thing at each place that root touches below what is not root's.

Whatever lies there: nothing outside is read, written or removed, no secret appears anywhere, nothing is waited for, what is
refused is named in words that steer no terminal, and the rest of the node works.
"""

import contextlib
import logging
import os
from threading import RLock
from types import SimpleNamespace

import hostile_node
import hostile_scene
import pytest
from hostile_node import URL
from hostile_scene import DIRECTORIES, FILES, KINDS, OPERATORS, PATIENCE, PROMPT, Hostile, within

from accounting.disk import DiskMeter
from partitiond import (
    certificates,
    event_reader,
    instance_build,
    programs,
    recovery,
    software_build,
    storage,
    usage_intake,
    verbs,
)
from partitiond.errors import FAMILY, sentence
from partitiond.state import InstanceState
from partitiond.usage_scripts import Limits
from slap_client.documents import CertificatePair
from stunnel_mgr.identity import make_identity

USAGE = "<consumption><movement><resource>cpu</resource><quantity>1</quantity><price>0</price><VAT/></movement></consumption>"
LIMITS = Limits(script=1.0, partition=2.0)
SLOW = frozenset(("deep", "wide"))  # much to do, which takes its time


@pytest.fixture(scope="module")
def scene(module_node_config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_intake, "_QUIET_SECONDS", 0.0)
        yield from hostile_node.standing(module_node_config)


@pytest.fixture(scope="session")
def table(request):
    return hostile_node.table(request.config)


# --- the places -------------------------------------------------------------------------------------------------------

PLACES = {}


def place(*kinds, **other):
    """Register a place: a generator that yields (path, user, what root does there); ``other`` is what becomes of which kinds.

    What root does gives (word, text): ``fine``, or ``refused`` with the rest done; an error raised is ``failed``.
    """

    def add(function):
        name = function.__name__.strip("_").replace("_", " ")
        words = {kind: word for word, group in other.items() for kind in group}
        PLACES[name] = (function, {kind: words.get(kind, "fine") for kind in kinds})
        return function

    return add


TENANTS = (*FILES, *DIRECTORIES)


@place(*KINDS, failed=(*OPERATORS, "fuse"))
def _resource_file(scene):
    path = scene.path / ".slapos-resource"
    yield path, scene.partition.uid, scene.apply
    made = [one for one in scene.path.iterdir() if one.name.startswith(".slapos-resource.")]
    for one in made:
        hostile_scene.remove(one)


@place("fuse", "attributed", failed=("fuse",))
def _partition_itself(scene):
    yield scene.path, scene.partition.uid, scene.apply
    verbs.apply(scene.context, [])


@place(*TENANTS, refused=FILES)
def _etc(scene):
    hostile_scene.remove(scene.path / "etc")
    yield scene.path / "etc", scene.partition.uid, scene.apply


@place(*TENANTS, refused=(*FILES, "fuse", "strange_names", "full_of_links"))
def _etc_tunnel(scene):
    hostile_scene.remove(scene.path / "etc")
    scene.tenant_directory("etc")
    yield scene.path / "etc" / "tunnel", scene.partition.uid, scene.apply


@place(*KINDS, refused=KINDS)
def _tunnel_declaration(scene):
    yield scene.tenant_directory("etc", "tunnel") / "x.cfg", scene.partition.uid, scene.apply


@place(*KINDS, refused=KINDS)
def _pins_of_a_tunnel(scene):
    path = scene.tenant_directory("etc", "tunnel") / "x.cfg"
    path.write_text("[tunnel]\nmode = server\nlisten = 4000\nconnect = 4000\nallow = file:pin.pem\n")
    os.chown(path, scene.partition.uid, scene.partition.gid)
    yield scene.path / "pin.pem", scene.partition.uid, scene.apply
    hostile_scene.remove(path)


@place(*TENANTS, refused=TENANTS)
def _directory_of_pins(scene):
    path = scene.tenant_directory("etc", "tunnel") / "x.cfg"
    path.write_text("[tunnel]\nmode = server\nlisten = 4000\nconnect = 4000\nallow = file:a/b/pin.pem\n")
    os.chown(path, scene.partition.uid, scene.partition.gid)
    scene.tenant_directory("a")
    yield scene.path / "a" / "b", scene.partition.uid, scene.apply
    hostile_scene.remove(path)


def _programs(scene):
    return "fine", str(programs.group(scene.context, scene.partition))


@place(*TENANTS, failed=(*FILES, "fuse"))
def _etc_run(scene):
    hostile_scene.remove(scene.path / "etc")
    scene.tenant_directory("etc")
    yield scene.path / "etc" / "run", scene.partition.uid, lambda: _programs(scene)


@place(*KINDS)
def _program(scene):
    yield scene.tenant_directory("etc", "service") / "prog", scene.partition.uid, lambda: _programs(scene)


def _configure(scene):
    instance_build.configure_instance(scene.context, scene.partition, scene.entry)
    for name in ("buildout.cfg", "software_release"):
        assert (scene.path / name).lstat().st_uid == 0
    return "fine", ""


@place(*KINDS, failed=(*DIRECTORIES, *OPERATORS))
def _instance_profile(scene):
    yield scene.path / "buildout.cfg", scene.partition.uid, lambda: _configure(scene)
    hostile_scene.remove(scene.path / "buildout.cfg")


@place(*KINDS, failed=(*DIRECTORIES, *OPERATORS))
def _software_release_link(scene):
    yield scene.path / "software_release", scene.partition.uid, lambda: _configure(scene)
    hostile_scene.remove(scene.path / "software_release")


@place(*TENANTS, "mount", "immutable", "append_only")
def _metered_tree(scene):
    def measure():
        with DiskMeter() as meter:
            found = {}
            while not found or not found["slappart0"].finished:
                found = meter.measure({"slappart0": scene.path})
        assert found["slappart0"].bytes < 1 << 30
        return "fine", ""

    yield scene.path / "thing", scene.partition.uid, measure


@place(*KINDS, failed=(*OPERATORS, "fuse"))
def _removed_partition(scene):
    yield scene.path / "thing", scene.partition.uid, scene.removed


@place(*KINDS, failed=(*OPERATORS, "fuse"))
def _deep_in_a_removed_partition(scene):
    yield scene.tenant_directory("var", "a", "b") / "thing", scene.partition.uid, scene.removed


@place("attributed")
def _partition_itself_removed(scene):
    yield scene.path, scene.partition.uid, scene.removed
    verbs.apply(scene.context, [])


@place("fuse", "attributed", refused=("fuse",))
def _storage_itself(scene):
    def apply():
        others = scene.home / "data1" / "slappart1"
        others.rmdir()
        word, text = scene.apply()
        assert others.is_dir(), "the others on that disk stood still"
        assert [gap for gap in _gaps(scene) if "slappart1" in gap.reason] == []
        return word, text

    yield scene.home / "data1" / "slappart0", scene.partition.uid, apply
    verbs.apply(scene.context, [])


def _gaps(scene):
    return scene.context.meters.record(scene.context, scene.context.node)


@place("attributed")
def _storage_itself_removed(scene):
    def removed():
        storage.empty(scene.config, "slappart0")
        assert not (scene.home / "data1" / "slappart0").exists()
        return scene.apply()

    yield scene.home / "data1" / "slappart0", scene.partition.uid, removed
    verbs.apply(scene.context, [])


@place(*KINDS, failed=(*OPERATORS, "fuse"))
def _removed_storage(scene):
    def removed():
        try:
            storage.empty(scene.config, "slappart0")
        finally:
            verbs.apply(scene.context, [])
        return "fine", ""

    yield scene.home / "data1" / "slappart0" / "thing", scene.partition.uid, removed


@place(*KINDS)
def _leftover_of_ours(scene):
    def recover():
        recovery.remove_leftovers(scene.config)
        return "fine", ""

    yield scene.path / ".x.0123456789ab.partitiond", scene.partition.uid, recover


@place("junk", "empty_file", "closed_file", "giant", "leased", "attributed_file")
def _certificate(scene):
    """In root's directory: a tenant has only the file itself, which is its own."""
    made = make_identity("slappart0")

    def fetch():
        pair = CertificatePair(made.certificate_pem.decode(), made.key_pem.decode())
        client = SimpleNamespace(partition_certificate=lambda _: pair)
        store = SimpleNamespace(instance=InstanceState)
        certificates.fetch(
            SimpleNamespace(config=scene.config, client=client, applying=RLock(), store=store),
            scene.partition,
        )
        assert (scene.certificates / "slappart0.key").read_text() == pair.key
        return "fine", ""

    scene.certificates.mkdir(exist_ok=True)
    yield scene.certificates / "slappart0.key", scene.partition.uid, fetch


def _eggs(scene):
    software_build._link_eggs(
        scene.config.software_root, scene.software, scene.soft.pw_uid, scene.soft.pw_gid
    )
    return "fine", ""


@place(*TENANTS, failed=(*FILES, "fuse"))
def _eggs_of_a_release(scene):
    hostile_scene.remove(scene.software / "eggs")
    yield scene.software / "eggs", scene.soft.pw_uid, lambda: _eggs(scene)
    scene.make_software()


@place(*TENANTS, failed=("fuse",))
def _egg(scene):
    yield scene.software / "eggs" / "a.egg", scene.soft.pw_uid, lambda: _eggs(scene)


@place(*TENANTS)
def _metadata_of_an_egg(scene):
    path = scene.software / "eggs" / "b.egg" / "b.dist-info" / "METADATA"
    path.unlink()
    yield path, scene.soft.pw_uid, lambda: _eggs(scene)
    scene.make_software()


@place(*TENANTS, failed=(*FILES, "fuse"))
def _links_to_eggs(scene):
    hostile_scene.remove(scene.software / "develop-eggs")
    yield scene.software / "develop-eggs", scene.soft.pw_uid, lambda: _eggs(scene)
    scene.make_software()


@place(*TENANTS, failed=set(TENANTS) - {"empty_file", "junk", "closed_file", "attributed_file"})
def _profile_of_a_release(scene):
    def profile():
        return "fine", instance_build.instance_profile(scene.context, scene.partition, scene.entry).decode(
            "utf-8", "replace"
        )

    (scene.software / "instance.cfg").unlink()
    yield scene.software / "instance.cfg", scene.soft.pw_uid, profile
    scene.make_software()


@place(*KINDS, failed=(*OPERATORS, "fuse"))
def _removed_release(scene):
    def remove():
        try:
            software_build.remove_software(scene.config, URL)
            assert not scene.software.exists()
        finally:
            scene.make_software()
        return "fine", ""

    yield scene.software / "thing", scene.soft.pw_uid, remove


def _intake(scene):
    """Run the scripts and take the files of both partitions in; the other's good one counts whatever lies in the first."""
    place = scene.other.path / "var" / "xml_report"
    place.mkdir(parents=True, exist_ok=True)
    (place / "good").write_text(USAGE)
    os.chown(place / "good", scene.other.uid, scene.other.gid)
    hostile_scene.remove(scene.config.state_dir / "refused-usage")
    store, ledger = scene.context.store, scene.context.meters.ledger()
    before, events = len(ledger.intake_waiting()), _told(scene)
    for item in scene.context.node.partitions:
        store.save_instance(InstanceState(item.id, life="started", wanted="stopped", instance_guid=item.id))
    try:
        result = usage_intake.run(scene.context, scene.context.node, ledger, frozenset({"cpu"}), LIMITS)
    finally:
        for item in scene.context.node.partitions:
            store.save_instance(InstanceState(item.id))
    assert result.failures == []
    assert [one.guid for one in ledger.intake_waiting()[before:]] == ["slappart1"]
    told = _told(scene)[len(events) :]
    assert {one["partition"] for one in told} <= {"slappart0"}
    assert all(one["message"].isprintable() for one in told)
    return "refused" if told else "fine", str(told)


def _told(scene):
    return [
        one for one in event_reader.last(scene.config.log_dir, 10_000) if one["event"].startswith("usage.")
    ]


@place(*KINDS, refused=KINDS)
def _usage_file(scene):
    yield scene.tenant_directory("var", "xml_report") / "x", scene.partition.uid, lambda: _intake(scene)


@place(*TENANTS, fine=("directory",), refused=set(TENANTS) - {"directory"})
def _usage_files(scene):
    hostile_scene.remove(scene.path / "var" / "xml_report")
    yield scene.tenant_directory("var") / "xml_report", scene.partition.uid, lambda: _intake(scene)


@place(*TENANTS, refused=(*FILES, "fuse"))
def _reports(scene):
    hostile_scene.remove(scene.path / "etc")
    yield scene.tenant_directory("etc") / "report", scene.partition.uid, lambda: _intake(scene)
    hostile_scene.remove(scene.path / "etc")


@place(*KINDS, refused=("giant", "leased", "attributed_file"))
def _report(scene):
    yield scene.tenant_directory("etc", "report") / "x", scene.partition.uid, lambda: _intake(scene)


# --- the matrix -------------------------------------------------------------------------------------------------------


CELLS = [(name, kind) for name, (_, words) in PLACES.items() for kind in words]


@pytest.mark.parametrize(
    ("name", "kind"), CELLS, ids=[f"{name}-{kind}".replace(" ", "_") for name, kind in CELLS]
)
def test_hostile(scene, table, caplog, name, kind):
    function, words = PLACES[name]
    with contextlib.contextmanager(function)(scene) as (path, uid, act), contextlib.ExitStack() as stack:
        hostile_scene.remove(path)
        stack.callback(Hostile(kind, path, uid, scene.canary).close)
        scene.canary.set()
        caplog.set_level(logging.INFO)
        result, error, took = within(PATIENCE, act)
        if error is not None:
            assert isinstance(error, (*FAMILY, OSError)), error
            result = "failed", f"{error!r} {error} {sentence(error)}"
            assert sentence(error).isprintable()
            assert getattr(error, "resource", None) or getattr(error, "filename", None), repr(error)
        word, text = result
        assert word == words[kind], text
        assert kind in SLOW or took < PROMPT
        assert scene.canary.changes() == []
        assert not scene.canary.leaks(text)
        assert not scene.canary.leaks(caplog.text)
    assert scene.canary.leaks_below(scene.files.root) == []
    table.cells[name, word] += 1
