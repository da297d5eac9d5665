"""How long a lost node takes to be as it was: its machine gone with all that was on it, then ``partitiond run`` alone.

The machine is a sandbox, so its users, state, roots and network go with it; the new one gets the directory of the
configuration, and the master says the rest. Parts are told from the node's own events. The floor are the same buildouts by
their users in empty directories, one after the other, an interpreter for each; of instances some are measured.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import life
from tunnel_table import middle, row

from partitiond import execute
from partitiond.demo.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from partitiond.demo.node import Node

_EVENTS = Path("/var/log/partitiond/events.jsonl")
_FLOOR = Path("/srv/floor")
_BUILDOUT = "import sys; from zc.buildout.buildout import main; sys.argv[0] = 'buildout'; main()"
# the daemon's own intervals, not those of a demonstration
_SETTINGS = {"partitiond": {"software_interval": None, "instances_interval": None, "meter_interval": None}}
PATIENCE = 180.0
SAMPLE = 5

# by the master's interpreter, as a command for each wish would take longer than the node
_CLIENT = """\
import sys
from slapos.slap import slap
url, computer, release, count = sys.argv[1:]
client = slap()
client.initializeConnection(url)
client.registerSupply().supply(release, computer)
for number in range(int(count)):
    client.registerOpenOrder().request(
        software_release=release, partition_reference=f"instance{number}",
        filter_kw={"computer_guid": computer})
"""


def _ask(world: World, node: Node, count: int) -> None:
    """Let a release be offered, and want so many instances of it on a node."""
    place = Path("/srv/releases/bench")
    release = world.release("bench")
    shown = world.master.seen(place)
    shown.mkdir()
    here = release.removesuffix("/software.cfg")
    (shown / "software.cfg").write_text(life.SOFTWARE.format(wheels=life.WHEELS, here=here))
    (shown / "instance.cfg.in").write_text(life.INSTANCE)
    python = (str(life.MASTER / "python3"), "-I", "-W", "ignore", "-c", _CLIENT)
    world.master.run(*python, world.master.url, node.computer, release, str(count))


def _events(node: Node) -> list[dict[str, Any]]:
    path = node.seen(_EVENTS)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _all_started(node: Node, count: int) -> bool:
    found = {one["partition"] for one in _events(node) if one["event"] == "instance.started"}
    return len(found) == count


def _check(node: Node, count: int) -> None:
    """All instances are there, and what they run runs."""
    running = [
        one["id"]
        for one in node.partitions().values()
        if one["state"] == "started" and {"RUNNING"} == {process["state"] for process in one["processes"]}
    ]
    if len(running) != count:
        sys.exit(f"{len(running)} of {count} instances run: {json.dumps(_events(node)[-5:])}")


def _up(node: Node, count: int) -> dict[str, float]:
    """Run the daemon of a node until all instances are started; seconds from its start."""
    began = time.time()
    node.start()
    end = began + PATIENCE
    while not _all_started(node, count):
        if time.time() > end:
            sys.exit(
                f"not rebuilt within {PATIENCE:.0f} s: {node.tail()}\n{json.dumps(_events(node), indent=1)[-5000:]}"
            )
        time.sleep(0.05)
    _check(node, count)
    return _parts(_events(node), began)


def _parts(events: list[dict[str, Any]], began: float) -> dict[str, float]:
    at: dict[str, list[float]] = {}
    for one in events:
        at.setdefault(one["event"], []).append(datetime.fromisoformat(one["time"]).timestamp() - began)
    return {event: max(times) for event, times in at.items()} | {"first": min(at["instance.started"])}


def _lost_and_rebuilt(world: World, node: Node, count: int) -> dict[str, float]:
    """Lose it, and have it again."""
    world.lose(node)
    world.rebuild(node)
    if _events(node) or node.seen("/srv/slapgrid").exists():
        sys.exit("something of the lost node is still there")
    return _up(node, count)


# --- the floor --------------------------------------------------------------------------------------------------------


def _floor(node: Node, count: int) -> dict[str, float]:
    """The buildouts alone."""
    software = next(node.seen("/srv/slapgrid/software").glob("[0-9a-f]*"))
    place = Path("/srv/slapgrid/software", software.name)
    own = _FLOOR / "software"
    python = (sys.executable, "-I", "-c", _BUILDOUT, "-U", "-N", "-c", "buildout.cfg")
    found = {"software": _run(node, own, place, python)}
    each = [
        _run(node, _FLOOR / partition, node.path(partition), (str(place / "bin" / "buildout"), "-U"))
        for partition in list(node.partitions())[:SAMPLE]
    ]
    found["instances"] = count * statistics.median(each)
    return found


def _run(node: Node, own: Path, like: Path, command: Sequence[str]) -> float:
    """Seconds of a command in an empty directory with the profile of another, by the owner of that one."""
    owner = node.seen(like).stat()
    shown = node.seen(own)
    shown.mkdir(parents=True)
    (shown / "buildout.cfg").write_bytes((node.seen(like) / "buildout.cfg").read_bytes())
    for path in (shown, shown / "buildout.cfg"):
        os.chown(path, owner.st_uid, owner.st_gid)
    ids = ("--reuid", str(owner.st_uid), "--regid", str(owner.st_gid), "--init-groups")
    run = ("/bin/sh", "-ec", 'cd "$0"; HOME=$0 exec "$@"', str(own), *command)
    began = time.perf_counter()
    node.run(execute.SETPRIV, *ids, "--", *run)
    return time.perf_counter() - began


def print_rebuild(count: int, rounds: int) -> None:
    """From ``partitiond run`` on a new machine until all instances are started; and the floor."""
    print()
    row(f"a node with {count} instances, seconds from partitiond run", "rebuilt")
    world = World(1, partitions=count, delay=0.0, loss=0.0, settings=_SETTINGS).up()
    try:
        node = world["A"]
        world.start()
        _ask(world, node, count)
        rebuilt = [_lost_and_rebuilt(world, node, count) for _ in range(rounds)]
        floor = _floor(node, count)
    finally:
        world.close()
    for what, key in (
        ("formatted: users, network, directories, supervisord", "apply.done"),
        ("software available", "software.available"),
        ("first instance started", "first"),
        (f"all {count} instances started, their services running", "instance.started"),
    ):
        row(f"  {what}", middle([one[key] for one in rebuilt]))
    row("  floor: the software's buildout alone", f"{floor['software']:.2f}")
    row(f"  floor: {count} times an instance's buildout alone", f"{floor['instances']:.2f}")
