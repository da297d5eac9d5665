"""Partitions with promises of all kinds, on a real node, and what a master is told of them."""

import json
import os
import textwrap
from dataclasses import replace
from pathlib import Path

from partitiond import privacy, promises, verbs
from partitiond.context import Context
from partitiond.event_reader import last
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
    def __init__(self, files, partitions=3, timeout=2):
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
