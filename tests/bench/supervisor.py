"""``make bench-supervisor``: hundreds of groups under one supervisord, beside one without our plug-in, in private namespaces.

For each number of groups, of two ``sleep`` each, which run as ``nobody``:

- **start**: from the start of supervisord until all are RUNNING, and the processor time of all that;
- **a group more**: its file, telling supervisord of it, starting it: our ``update`` and ``start_group``, beside supervisor's
  ``reloadConfig``, ``addProcessGroup`` and ``startProcessGroup``;
- **all states**: asking for the state of all processes;
- **a child ends**: from its end until supervisord has started it again;
- **at rest**: processor time, wake-ups, memory and descriptors of supervisord;
- **killed** (ours only): from kill -9 until all run again, a tenth of them without having been stopped.

``stock`` has the defaults of supervisor but for ``minfds``: 15000, for three descriptors of each of many programs, or what is
near the need. Times are medians of what was repeated (and the least), in ms if not said otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import config, files, procfs
from partitiond.supervision import Group, Process, Program, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path("/srv/bench-supervisor")
NOBODY = 65534
TICK = 1000 / os.sysconf("SC_CLK_TCK")
REST = 20.0
CONFIGURATION = f"""[slapos]
computer_id = COMP-1
master_url = http://127.0.0.1:1/
software_root = {ROOT}/software
instance_root = {ROOT}/instance
[slapformat]
interface_name = br0
partition_amount = 500
[partitiond]
state_dir = {ROOT}/state
log_dir = {ROOT}/log
run_dir = {ROOT}/run
keep_running = {{keep}}
"""


class Stock(Supervisor):
    """supervisord without our plug-in, with so many descriptors."""

    minfds = 15000

    def render(self) -> str:
        """The same configuration but for the plug-in."""
        text = super().render()
        own = text[text.index("[rpcinterface:partitiond]") : text.index("[supervisorctl]")]
        return text.replace(own, "").replace("minfds=1024", f"minfds={self.minfds}")


class Near(Stock):
    """As near the need as three descriptors for each program let it be."""

    @property
    def minfds(self) -> int:  # type: ignore[override]
        return 200 + 4 * 2 * len(self.group_names())


@contextmanager
def standing(kind: type[Supervisor], count: int) -> Iterator[Supervisor]:
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(mode=0o755, parents=True)
    path = ROOT / "slapos.cfg"
    path.write_text(
        CONFIGURATION.format(keep=" ".join(f"slappart{number}" for number in range(0, count, 10)))
    )
    made = kind(config.load(path))
    for directory in (made.groups_directory, made.log.parent, made.pidfile.parent):
        directory.mkdir(parents=True)
    for number in range(count):
        made.write_group(group(f"slappart{number}"))
    files.write_path(made.configuration, made.render().encode())
    try:
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(ROOT)


def group(name: str) -> Group:
    logs = ROOT / "log" / name
    logs.mkdir(parents=True, exist_ok=True)
    program = Program(name="a", process_name="a", command="/bin/sleep 5000", restart=True)
    programs = (program, replace(program, name="b", process_name="b"))
    return Group(name, "nobody", NOBODY, NOBODY, Path("/"), logs, programs)


def all_run(supervisor: Supervisor) -> tuple[Process, ...]:
    while True:
        found = supervisor.processes()
        if found and all(one.state == "RUNNING" for one in found):
            return found
        time.sleep(0.05)


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return (time.monotonic() - began) * 1000


def ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def wake_ups(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def memory(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) / 1024


def a_group_more(supervisor: Supervisor, number: int) -> tuple[float, float]:
    """What it takes, and what of it supervisord was busy with telling."""
    name = f"more{number}"
    supervisor.write_group(group(name))
    told = timed(supervisor.update)
    return told, told + timed(lambda: supervisor.start_group(name))


def a_child_ends(supervisor: Supervisor) -> float:
    """From the end of a process to the begin of the next, told from the time at which that began."""
    before = next(one for one in supervisor.processes() if one.name == "a")
    os.kill(before.pid, signal.SIGKILL)
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    time.sleep(2.5)  # nobody asks meanwhile: that would wake supervisord
    after = next(
        one for one in supervisor.processes() if (one.group, one.name) == (before.group, before.name)
    )
    family = procfs.family_of(after.pid)
    assert family is not None
    assert after.pid != before.pid
    return max(0.0, family.start / os.sysconf("SC_CLK_TCK") - began) * 1000


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f})"


def row(what: str, values: list[str]) -> None:
    print(f"  {what:<34}" + "".join(f"{value:>22}" for value in values), flush=True)


def measure(kind: type[Supervisor], count: int, repetitions: int) -> dict[str, str]:
    found = {}
    with standing(kind, count) as supervisor:
        began = time.monotonic()
        supervisor.start()()
        started = all_run(supervisor)
        seconds = time.monotonic() - began
        pid = supervisor.pid()
        spent = ticks(pid) + sum(ticks(one.pid) for one in started)
        found["start, until all are RUNNING, s"] = f"{seconds:.1f} (CPU {spent / 1000:.1f})"
        supervisor.update()
        spent = ticks(pid)
        more = [a_group_more(supervisor, number) for number in range(repetitions)]
        spent = (ticks(pid) - spent) / repetitions
        found["a group more: told"] = median([one for one, _ in more])
        found["a group more: told and started"] = median([one for _, one in more])
        found["a group more: CPU of supervisord"] = f"{spent:.0f}"
        all_run(supervisor)
        states = [timed(supervisor.processes) for _ in range(repetitions)]
        found["all states"] = median(states)
        ended = [a_child_ends(supervisor) for _ in range(min(3, repetitions))]
        found["a child ends: started again after"] = f"{statistics.median(ended):.0f}"
        all_run(supervisor)
        before, woken = ticks(pid), wake_ups(pid)
        time.sleep(REST)
        found["at rest: CPU %"] = f"{(ticks(pid) - before) / REST / 10:.2f}"
        found["at rest: wake-ups per minute"] = f"{(wake_ups(pid) - woken) / REST * 60:.0f}"
        found["at rest: PSS MiB"] = f"{memory(pid):.0f}"
        found["at rest: descriptors"] = str(len(os.listdir(f"/proc/{pid}/fd")))  # noqa: PTH208 - a count
        if kind is Supervisor:
            found["killed: all run again after, s"] = killed(supervisor, pid)
        found["end, with all processes"] = f"{timed(supervisor.shutdown):.0f}"
    return found


def killed(supervisor: Supervisor, pid: int) -> str:
    before = {one.pid for one in supervisor.processes()}
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    supervisor.start()()
    after = {one.pid for one in all_run(supervisor)}
    return f"{time.monotonic() - began:.1f} ({len(after & before)} kept)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[100, 300, 500])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--ours", action="store_true", help="ours alone")
    options = parser.parse_args()
    kinds: dict[str, type[Supervisor]] = {"ours": Supervisor, "stock, 15000": Stock, "stock, near": Near}
    if options.ours:
        kinds = {"ours": Supervisor}
    for count in options.groups:
        print(f"{count} groups of two programs; load {os.getloadavg()[0]:.1f}")
        row("", list(kinds))
        found = [measure(kind, count, options.repetitions) for kind in kinds.values()]
        for what in found[0]:
            row(what, [one.get(what, "-") for one in found])


if __name__ == "__main__":
    main()
