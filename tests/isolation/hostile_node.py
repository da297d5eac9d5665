"""A node whose first partition is hostile, and the table of what was tried on it."""

import json
import os
import pwd
import stat
from collections import Counter

from hostile_scene import Canary

from partitiond import buildout, instance_cleanup, lanes, present, status, tunnel_status, verbs
from partitiond.context import Context
from slap_client.documents import PartitionDocument

URL = "http://127.0.0.1:1/software.cfg"


class Scene:
    """A node of two partitions, set up: slappart0 is hostile, slappart1 is the rest of the node."""

    def __init__(self, files):
        self.files = files
        self.canary = Canary(files.root)
        self.home = files.root / "home"
        (self.home / "data1").mkdir(parents=True)
        self.certificates = files.root / "pki"
        files.write(
            slapformat={"instance_storage_home": self.home, "partition_amount": 2},
            slapos={"certificate_repository_path": self.certificates},
            # what is tried here is done outside of them, and without the pass that would make them
            partitiond={"private_namespaces": "off"},
        )
        self.context = Context.of(files.load())
        outcome = verbs.apply(self.context, [])
        assert (outcome["failures"], outcome["left"], outcome["refused"]) == ([], [], [])
        lanes.usage(self.context)
        # SQLite keeps a reader's descriptor for the next one as long as the ledger is open (unixClose in os_unix.c)
        status.node(self.context)
        self.config = self.context.config
        self.partition, self.other = self.context.node.partitions
        self.soft = pwd.getpwnam(self.config.software_user)
        self.software = buildout.software_directory(self.config, URL)
        self.make_software()
        self.entry = PartitionDocument("slappart0", "started", software_release=URL)

    def make_software(self):
        own = self.soft.pw_uid, self.soft.pw_gid
        for path in (
            self.software,
            *(
                self.software / name
                for name in ("bin", "eggs", "develop-eggs", "eggs/b.egg", "eggs/b.egg/b.dist-info")
            ),
        ):
            path.mkdir(exist_ok=True)
            os.chown(path, *own)
        for name, text in (
            ("bin/buildout", "#!/bin/sh\nexit 0\n"),
            ("instance.cfg", "[buildout]\nparts =\n"),
            ("eggs/b.egg/b.dist-info/METADATA", "Name: b\n"),
            (".completed", "now\n"),
        ):
            (self.software / name).write_text(text)
            (self.software / name).chmod(0o755)
            os.chown(self.software / name, *own)

    @property
    def path(self):
        return self.partition.path

    def tenant_directory(self, *names):
        path = self.path
        for name in names:
            path /= name
            path.mkdir(exist_ok=True)
            os.chown(path, self.partition.uid, self.partition.gid)
        return path

    def apply(self):
        """Let root do its round, with the file of the other partition to be made again in it."""
        missing = self.other.path / ".slapos-resource"
        missing.unlink()
        value = verbs.apply(self.context, [])
        assert missing.is_file(), "the rest of the node stood still"
        shown = [present.applied(value), present.plan(verbs.plan(self.context))]
        shown += [
            present.status(status.node(self.context)),
            present.tunnels(tunnel_status.listing(self.context)),
        ]
        text = "\n".join(shown)
        assert all(one.isprintable() or one == "\n" for one in text), "it steers a terminal"
        text.encode("utf-8")
        told = [(one["resource"], one["message"]) for one in value["failures"]]
        told += [(one["name"], one["reason"]) for one in value["refused"]]
        assert all(resource and "slappart0" in resource and why for resource, why in told), told
        return ("failed" if value["failures"] else "refused" if value["refused"] else "fine"), json.dumps(
            value
        ) + text

    def removed(self):
        """Remove the partition as when its instance is destroyed, and have it made again."""
        try:
            instance_cleanup.clean(self.context, self.context.node, self.partition)
            assert not self.path.exists()
        finally:
            verbs.apply(self.context, [])
        found = os.lstat(self.path)
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (
            self.partition.uid,
            self.partition.gid,
            0o750,
        )
        return "fine", ""


def standing(files):
    """Make the scene, for a fixture."""
    made = Scene(files)
    try:
        yield made
    finally:
        made.context.meters.close()


class Table:
    """The counts of the matrix, printed at the end of the run."""

    def __init__(self):
        self.cells = Counter()
        self.races = Counter()

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("root against hostile files")
        for name in sorted({place for place, _ in self.cells}):
            counts = "  ".join(
                f"{word} {self.cells[name, word]:>2}" for word in ("fine", "refused", "failed")
            )
            terminalreporter.line(f"{name:<30} {counts}")
        terminalreporter.line(
            f"{self.cells.total()} cells and {self.races.total()} rounds of {len(self.races)} races without a breach"
        )


def table(config):
    """The table of this run, printed at its end."""
    name = "hostile-table"
    if not config.pluginmanager.has_plugin(name):
        config.pluginmanager.register(Table(), name)
    return config.pluginmanager.get_plugin(name)
