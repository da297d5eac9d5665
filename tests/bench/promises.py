"""``make bench-promises``: what a pass over the promises of many partitions costs, beside slapgrid's own, on this machine.

One promise in each partition: a program (``etc/promise``), and a plugin (``etc/plugin``) with slapos.core of the release on its
path, run by the release's Python. Wall and processor seconds of a pass in which all are due, the start of what runs them
included; slapgrid's (``peer_promises.py``) are without the start of its interpreter, which it needs for each pass, too.
Then one that is due to nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parents[1] / "partitiond")]

from conftest import standing_bridge, standing_files  # noqa: E402 - the scenes of the tests
from promise_scene import PYTHON, PromiseScene  # noqa: E402 - likewise

from partitiond import promises, sandbox  # noqa: E402 - the source tree's own

if TYPE_CHECKING:
    from collections.abc import Callable


def _cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _measured(work: Callable[[], object]) -> tuple[float, float]:
    began, used = time.monotonic(), _cpu()
    work()
    return time.monotonic() - began, _cpu() - used


def _median(work: Callable[[], object], times: int) -> tuple[float, float]:
    runs = [_measured(work) for _ in range(times)]
    return statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)


def _peer(scene: PromiseScene, python: str | None) -> tuple[float, float]:
    """A pass of slapgrid over all partitions: its own seconds, and the processor's less what its start takes."""
    job = {
        "instance_root": str(scene.context.config.instance_root),
        "partitions": [],
        "python": python,
        "anomaly": False,
    }
    program = str(HERE.with_name("peer_promises.py"))

    def run(names: list[str]) -> dict[str, float]:
        done = subprocess.run(
            [PYTHON, "-P", program, json.dumps({**job, "partitions": names})],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "peer")},
        )
        if done.returncode:
            raise SystemExit(f"slapos.core could not be run:\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    _, start = _measured(lambda: run([]))
    found: dict[str, float] = {}
    _, used = _measured(lambda: found.update(run([item.id for item in scene.node.partitions])))
    if found["failed"]:
        raise SystemExit("promises failed with slapos.core")
    return found["seconds"], used - start


def _pass(scene: PromiseScene) -> None:
    scene.run_pass()
    if any(page.failing() for page in scene.context.promises.ran().values()):
        raise SystemExit("promises failed")


def _line(what: str, ours: tuple[float, float], theirs: tuple[float, float] | None = None) -> None:
    text = f"{what:<38} {ours[0]:8.3f} s {ours[1]:8.3f} s"
    if theirs:
        text += f"    slapgrid {theirs[0]:8.3f} s {theirs[1]:8.3f} s    {theirs[0] / ours[0]:5.1f} times"
    print(text, flush=True)


def run(partitions: int, times: int, plugins: int) -> None:
    """Measure and print."""
    print(f"{partitions} partitions; seconds: wall, processor")
    with standing_bridge() as bridge, standing_files(partitions=partitions, interface=bridge.name) as files:
        scene = PromiseScene(files, partitions=partitions, timeout=20)
        try:
            for item in scene.node.partitions:
                scene.promise("fine", "exit 0", number=item.index)
                scene.place(item.index, ".slapgrid")
            _line("a program each", _median(lambda: _pass(scene), times), _peer(scene, None))
            _line("nothing is due", _median(lambda: scene.run_pass(later=False), times))
            one = scene.node.partitions[0]
            _line(
                "one instance, at processing", _median(lambda: promises.check(scene.context, one, ""), times)
            )
            for item in scene.node.partitions:
                (item.path / "etc" / "promise" / "fine").unlink()
            for item in scene.node.partitions[:plugins]:
                scene.plugin("fine.py", number=item.index)
            for item in scene.node.partitions[plugins:]:
                scene.state(item.index, life="stopped", wanted="stopped")
            scene.node = dataclasses.replace(scene.node, partitions=scene.node.partitions[:plugins])
            _line(
                f"a plugin each, {plugins} partitions", _median(lambda: _pass(scene), 1), _peer(scene, PYTHON)
            )
        finally:
            scene.context.meters.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--partitions", type=int, default=100)
    parser.add_argument("--plugins", type=int, default=100, help="partitions of the pass over plugins")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    if not sandbox.inside():
        parser.error("it makes users and networks: make bench-promises")
    run(options.partitions, options.times, min(options.plugins, options.partitions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
