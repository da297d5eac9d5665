"""Each file of our own is the old or the new one, whole, wherever its writer is killed; and is on the disk before it counts."""

import json
from ipaddress import IPv4Address, IPv6Interface
from types import SimpleNamespace

import pytest
from crash_machine import in_child
from crash_points import Points
from crash_state import pair

from accounting.allowance import Standing
from partitiond import destroy_guard, files, identities, textfile, users
from partitiond.master import MasterContact
from partitiond.quotas import QuotaBook
from partitiond.state import InstanceState, SoftwareState, Store

OLD, NEW = (InstanceState("slappart0", life=life, timestamp=life) for life in ("started", "stopped"))
URL = "http://example.org/software.cfg"


def _instance(state):
    return lambda root: Store(root).save_instance(state)


def _software(available):
    return lambda root: Store(root).save_software(SoftwareState(URL, available=available))


def _base(address):
    return lambda root: Store(root).save_base(IPv6Interface(address))


def _master(reachable):
    return lambda root: MasterContact(root / "master.json").note(reachable)


def _quotas(octets):
    standing = Standing("SOFTINST-1", "2028-02", octets, {"2028-02": frozenset({"near"})})
    return lambda root: QuotaBook(root / "quotas.json").save({"slappart0": standing})


def _used(root):
    found = QuotaBook(root / "quotas.json").standings()
    return {name: one.used for name, one in found.items()} or None


def _textfiles(*names):
    return lambda root: textfile._remember(root / "textfiles.json", {root / name for name in names})


def _guard(*names):
    entries = [SimpleNamespace(partition_id=name, destroy_requested=True, free=False) for name in names]
    document = SimpleNamespace(partitions=entries)
    return lambda root: destroy_guard.decide(root / "guard.json", frozenset(names), document)


def _contact(root):
    return MasterContact(root / "master.json").as_json()["reachable"]


def _guarded(root):
    path = root / "guard.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def _spec(home):
    return users.UserSpec("slapuser0", 5000, home, (), "slappart0")


def _users(home):
    def write(root):
        for name in ("passwd", "group", "shadow", "gshadow"):
            (root / name).touch()
        users.apply(users.plan([_spec(home)], users.observe(root)), root)

    return write


def _home(root):
    user = users.observe(root).users.get("slapuser0")
    # one whose group is missing is not whole, and the plan sees it
    return user.home if user and not users.plan([_spec(user.home)], users.observe(root)) else None


_FILES = {
    "the state of an instance": (
        _instance(OLD),
        _instance(NEW),
        lambda root: Store(root).instance("slappart0"),
    ),
    "what was used of quotas": (_quotas(800), _quotas(900), _used),
    "which textfiles are there": (
        _textfiles("a.prom"),
        _textfiles("a.prom", "b.prom"),
        lambda root: {path.name for path in textfile.remembered(root / "textfiles.json")} or None,
    ),
    "an instance that is forgotten": (
        _instance(OLD),
        _instance(InstanceState("slappart0")),
        lambda root: Store(root).instance("slappart0"),
    ),
    "the state of a release": (_software(False), _software(True), lambda root: Store(root).software(URL)),
    "the first of all states": (
        lambda _root: None,
        _instance(NEW),
        lambda root: Store(root).instance("slappart0"),
    ),
    "the base address": (_base("2001:db8::1/64"), _base("2001:db8:1::1/64"), lambda root: Store(root).base()),
    "the contact to the master": (_master(True), _master(False), _contact),
    "the destroy guard": (_guard("slappart0"), _guard("slappart0", "slappart1"), _guarded),
    "a user": (_users("/old"), _users("/new"), _home),
    "the first user": (lambda _root: None, _users("/new"), _home),
}


@pytest.mark.parametrize("name", _FILES)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, name):
    before, write, read = _FILES[name]

    def scene(place):
        root = tmp_path / str(place)
        root.mkdir()
        before(root)
        return root

    def writer(root, at=None):
        points = Points(at)
        write(root)
        points.end()
        return points.labels

    root = scene("whole")
    old = read(root)
    _, labels = in_child(lambda: writer(root))
    new = read(root)
    assert old != new
    on_the_disk_before_it_counts(labels)
    if name == "the first of all states":
        assert [label.split()[0] for label in labels[:2]] == ["os.mkdir", "fsync"]
    for at in range(len(labels)):
        root = scene(at)
        code, _ = in_child(lambda root=root, at=at: writer(root, at))
        assert code == -9
        assert read(root) in (old, new), labels[at]
        before(root)
        write(root)  # whoever comes next is not hindered
        assert read(root) == new
        for directory in (root, *(path for path in root.iterdir() if path.is_dir())):
            with files.directory(directory) as descriptor:
                files.remove_leftovers(descriptor)
        assert not list(root.rglob(".*"))


def on_the_disk_before_it_counts(labels):
    """Content before the name, the name before the end: fsync, rename, fsync of the directory."""
    for place, label in enumerate(labels):
        if label.startswith("os.rename"):
            assert labels[place - 1].startswith("fsync"), labels
        if label.startswith(("os.rename", "os.remove")):
            assert labels[place + 1].startswith("fsync"), labels


def test_a_pair_of_an_identity_is_whole_or_not_there(tmp_path):
    partition = SimpleNamespace(id="slappart0", uid=0, gid=0, ipv4=IPv4Address("10.0.0.1"))
    config = SimpleNamespace(state_dir=tmp_path)
    directory = identities.directory_of(config, "slappart0")
    directory.mkdir(parents=True)

    def make(at=None):
        points = Points(at)
        identities.make(config, partition)
        points.end()
        return points.labels

    _, labels = in_child(make)
    on_the_disk_before_it_counts(labels[1:])  # it begins by removing the old certificate
    for at in range(len(labels)):
        assert in_child(lambda at=at: make(at))[0] == -9
        assert identities.read(config, partition) is None or pair(directory) == "a pair", labels[at]
    assert identities.read(config, partition), "killed at the end, when all was done"
