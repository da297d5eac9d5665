"""Partitions with promises of all kinds, on a real node, and what a master is told of them."""

import json
import os
import shutil
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

from partitiond import privacy, promises, verbs
from partitiond.context import Context
from partitiond.event_reader import last
from partitiond.promise_book import PromiseBook
from partitiond.state import InstanceState
from slap_client.errors import SlapError

SLAPOS_CORE = next(Path("/opt/partitiond/master/lib").glob("python3.*")) / "site-packages"
PYTHON = "/opt/partitiond/master/bin/python"
RELEASE = "https://example.org/software.cfg"

PLUGIN = """\
# as slapos.cookbook:promise.plugin writes it
import sys
sys.path[0:0] = ['{core}']

extra_config_dict = {config!r}

for module in list(sys.modules):
  if 'slapos' in module or 'pkg_resources' in module:
    del sys.modules[module]

from zope.interface import implementer
from slapos.grid.promise import interface
from slapos.grid.promise.generic import GenericPromise

@implementer(interface.IPromise)
class RunPromise(GenericPromise):
  def __init__(self, config):
    super().__init__(config)
{init}

  def sense(self):
{sense}
{more}
"""


class Master:
    """Takes reports, or does not."""

    def __init__(self):
        self.told, self.down = [], False

    def _take(self, *words):
        if self.down:
            raise SlapError("slap.unavailable", "the master is down", retryable=True)
        self.told.append(words)

    def instance_error(self, partition, message):
        self._take("error", partition, message)

    def instance_started(self, partition):
        self._take("started", partition)

    def bang(self, partition, message):
        self._take("bang", partition, message)


class ToldContext(Context):
    """A context whose master is a list."""

    __slots__ = ("told",)

    @property
    def client(self):
        return self.told


def indented(text, depth):
    return textwrap.indent(textwrap.dedent(text).strip() or "pass", " " * depth)


class PromiseScene:
    def __init__(self, files, partitions=3, timeout=20):
        files.write(slapos={"promise_timeout": timeout}, slapformat={"partition_amount": partitions})
        self.context = ToldContext.of(files.load())
        self.master = self.context.told = Master()
        outcome = verbs.apply(self.context, [])
        assert (outcome["failures"], outcome["left"]) == ([], [])
        self.node = self.context.node
        self.log = files.log
        for item in self.node.partitions:
            self.state(item.index)
            privacy.ensure(self.context, item)
        software = promises.buildout.software_directory(self.context.config, RELEASE)
        (software / "bin").mkdir(parents=True)
        (software / "bin" / "buildout").write_text(f"#!{PYTHON}\n")

    def clear(self):
        """Forget everything, and empty the partitions."""
        for item in self.node.partitions:
            for name in list(item.path.iterdir()):
                if name.is_dir():
                    shutil.rmtree(name)
                elif name.name != ".slapos-resource":
                    name.unlink()
            self.state(item.index)
            self.context.promises.forget(item.id)
        self.context.promises = PromiseBook(self.context.config.state_dir / "promises")
        self.context.wake_instances = lambda: None
        self.patience(20)
        self.master.told.clear()
        self.master.down = False
        for path in self.log.glob("events.jsonl*"):
            path.unlink()

    def patience(self, seconds):
        """Give each promise so much time, until the scene is cleared."""
        config = self.context.config
        self.context.adopt(replace(config, grid=replace(config.grid, promise_timeout=float(seconds))))

    def file(self, *below):
        """A path in the first partition's directory of promises."""
        return self.partition().path.joinpath(".slapgrid/promise", *below).resolve()

    def state(self, number, **other):
        item = self.partition(number)
        values = {
            "life": "started",
            "wanted": "started",
            "instance_guid": f"SOFTINST-{number}",
            "software_release": RELEASE,
        }
        self.context.store.save_instance(InstanceState(item.id, **{**values, **other}))

    def partition(self, number=0):
        return self.node.partitions[number]

    def place(self, number, *below):
        item = self.partition(number)
        path = item.path
        for name in below:
            path /= name
            if not path.exists():
                path.mkdir()
                os.chown(path, item.uid, item.gid)
        return path

    def _put(self, number, directory, name, text, mode):
        item = self.partition(number)
        path = self.place(number, "etc", directory) / name
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, item.uid, item.gid)
        return path

    def promise(self, name, text, number=0, mode=0o755):
        return self._put(number, "promise", name, f"#!/bin/sh\n{textwrap.dedent(text)}\n", mode)

    def plugin(self, name, sense="self.logger.info('fine')", number=0, init="", more="", **config):
        text = PLUGIN.format(
            core=SLAPOS_CORE,
            config=config,
            init=indented(init, 4),
            sense=indented(sense, 4),
            more=textwrap.indent(textwrap.dedent(more), "  "),
        )
        return self._put(number, "plugin", name, text, 0o644)

    def check(self, number=0):
        return dict(promises.check(self.context, self.partition(number), RELEASE).failed)

    def run_pass(self, *, later=True):
        """A pass of the lane, with all promises due."""
        if later:
            for item in self.node.partitions:
                page = self.context.promises.known(item.id)
                for one in page.standings.values() if page else ():
                    one.due = 0.0
        return promises.run_pass(self.context, self.node)

    def page(self, number=0):
        return self.context.promises.known(self.partition(number).id)

    def standings(self, number=0):
        page = self.page(number)
        return {key: one.failed for key, one in page.standings.items()} if page else {}

    def result(self, title, number=0):
        path = self.partition(number).path / ".slapgrid/promise/result" / f"{title}.status.json"
        return json.loads(path.read_text())

    def events(self):
        return [
            (one["event"], one["resource"])
            for one in last(self.log, 1000)
            if one["event"].startswith("promise.")
        ]

    def change(self, number, **values):
        name = self.partition(number).id
        self.context.store.save_instance(replace(self.context.store.instance(name), **values))


_LAUNCH = """
import sys, logging
sys.path[0:0] = [sys.argv[1]]
from slapos.grid.promise import PromiseLauncher, PromiseError
config = eval(sys.argv[2])
try:
    PromiseLauncher(config=config, logger=logging.getLogger()).run()
except PromiseError as error:
    print(error)
"""


def slapgrid_launcher(scene, number=0, **config):
    """Run the promises of a partition by slapos.core's own launcher; what it raises, as text."""
    item = scene.partition(number)
    values = {
        "promise-folder": str(item.path / "etc" / "plugin"),
        "legacy-promise-folder": str(item.path / "etc" / "promise"),
        "promise-timeout": 20,
        "uid": item.uid,
        "gid": item.gid,
        "partition-folder": str(item.path),
        "log-folder": str(item.path / ".slapgrid/promise/log"),
        "force": True,
        "master-url": "http://127.0.0.1:1/",
        "partition-id": item.id,
        "computer-id": "COMP-1",
        **config,
    }
    done = subprocess.run(
        [PYTHON, "-c", _LAUNCH, str(SLAPOS_CORE), repr(values)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
