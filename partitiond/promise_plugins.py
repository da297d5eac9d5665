"""Runs the plugins (``etc/plugin/*.py``) of one partition with the interpreter of its software, each in a process of its own.

Started by ``promise_runner.py`` as the partition's user, with what to do on standard input and the descriptor for the answers
as argument: one line of JSON for each plugin. It keeps to what plugins written for slapgrid (slapos.core 1.26) are called with:
``RunPromise(configuration).run(check_anomaly, can_bang)``, and results that are put into ``configuration["queue"]``.

That interpreter is whatever the release brings, so nothing here is newer than Python 2.7, and nothing but its standard library
is needed. Bangs are left to the daemon, which bounds them.
"""

import sys

if __name__ == "__main__":
    # where this file lies there are modules that are no business of plugins
    del sys.path[0]

import ast
import errno
import json
import os
import re
import select
import signal
import time
import traceback
import types

_GRACE = 1.0
_LIMIT = 64 * 1024
_MESSAGE = 5000
_CACHE = os.path.join(".slapgrid", "promise", "cache")
_LOGS = os.path.join(".slapgrid", "promise", "log")
_INTERFACE = "1.26.1"  # of slapos.core: what plugins that ask are told
_KINDS = {"Test Result": "test", "Anomaly Result": "anomaly", "Empty Result": "none"}


class _Queue(object):
    """Takes what a promise has to say; the last word counts."""

    def __init__(self):
        # type: () -> None
        self.item = None  # type: object

    def put(self, item, *_ignored, **_more):
        # type: (object, *object, **object) -> None
        self.item = item

    put_nowait = put


class _Plugin(object):
    """A plugin that runs."""

    def __init__(self, name, pid, channel, seconds):
        # type: (str, int, int, float) -> None
        self.name, self.pid, self.channel = name, pid, channel
        self.began = time.time()
        self.deadline = self.began + seconds
        self.said = b""
        self.late = False


def main():
    # type: () -> None
    """Run all plugins, so many at a time."""
    with os.fdopen(os.dup(0), "rb") as stream:
        job = json.loads(stream.read().decode("ascii"))
    out = int(sys.argv[1])
    folder = os.path.join(job["cwd"], "etc", "plugin")
    waiting = list(job["plugins"])
    end = time.time() + job["seconds"]
    _prepare(folder, waiting)
    running = []  # type: list[_Plugin]
    while waiting or running:
        while waiting and len(running) < job["side_by_side"] and time.time() < end:
            running.append(_begin(job, folder, waiting.pop(0), out))
        if not running:
            break
        for plugin in _ended(running):
            running.remove(plugin)
            _answer(out, plugin)
    for name in waiting:
        _write(out, {"name": name, "end": "left"})


def _prepare(folder, names):
    # type: (str, list[str]) -> None
    """Import what all plugins of a partition need once, from where the first one says; else each imports it itself.

    As they are written they forget some of it again and import that anew: for one alone nothing would be gained.
    """
    if len(names) < 2:
        return
    try:
        with open(os.path.join(folder, names[0]), "rb") as stream:
            tree = ast.parse(stream.read())
        first = next(item for item in tree.body if isinstance(item, ast.Assign))
        same = ast.parse("sys.path[0:0] = []").body[0]
        if ast.dump(first.targets[0]) == ast.dump(same.targets[0]):  # type: ignore[attr-defined]
            sys.path[0:0] = ast.literal_eval(first.value)
            __import__("slapos.grid.promise.generic")
    except Exception:
        sys.stdout.write(traceback.format_exc())


def _begin(job, folder, name, out):
    # type: (dict[str, object], str, str, int) -> _Plugin
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Plugin(name, pid, read, float(job["timeout"]))  # type: ignore[arg-type]
    status = 1
    try:
        os.setpgid(0, 0)
        os.close(read)
        os.close(out)
        found = _run(job, folder, name)
        os.write(write, json.dumps(found).encode("ascii"))
        status = 0
    except BaseException:
        text = traceback.format_exc()
        os.write(write, json.dumps({"end": "silent", "message": text[-_MESSAGE:]}).encode("ascii"))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _ended(running):
    # type: (list[_Plugin]) -> list[_Plugin]
    """Wait a moment; return those that have ended, by themselves or because their time was over."""
    soonest = min(plugin.deadline for plugin in running)
    listening = [plugin.channel for plugin in running if plugin.channel >= 0]
    pause = 0.05 if len(listening) < len(running) else 0.5
    try:
        ready = select.select(listening, [], [], max(0.0, min(pause, soonest - time.time())))[0]
    except select.error as error:
        if error.args[0] != errno.EINTR:
            raise
        return []
    for plugin in running:
        if plugin.channel in ready:
            piece = os.read(plugin.channel, _LIMIT)
            plugin.said = (plugin.said + piece)[:_LIMIT]
            if not piece:
                os.close(plugin.channel)
                plugin.channel = -1
    return [plugin for plugin in running if _is_over(plugin)]


def _is_over(plugin):
    # type: (_Plugin) -> bool
    if os.waitpid(plugin.pid, os.WNOHANG)[0]:
        _signal(plugin.pid, signal.SIGKILL)  # what it has left in its group
        return True
    if time.time() >= plugin.deadline:
        _signal(plugin.pid, signal.SIGKILL if plugin.late else signal.SIGTERM)
        plugin.late = True
        plugin.deadline = time.time() + _GRACE
    return False


def _signal(pid, number):
    # type: (int, int) -> None
    try:
        os.killpg(pid, number)
    except OSError:
        pass  # nobody is left


def _answer(out, plugin):
    # type: (int, _Plugin) -> None
    seconds = time.time() - plugin.began
    if plugin.channel >= 0:
        # it has ended, so what it said is there, also where a child of its own still holds the other end
        if select.select([plugin.channel], [], [], 0)[0]:
            plugin.said = (plugin.said + os.read(plugin.channel, _LIMIT))[:_LIMIT]
        os.close(plugin.channel)
    found = {"end": "silent", "message": ""}  # type: dict[str, object]
    if plugin.late:
        found["end"] = "late"
    else:
        try:
            found = dict(json.loads(plugin.said.decode("ascii")))
        except (ValueError, TypeError):
            found["message"] = "it wrote something else where its result belongs" if plugin.said else ""
    found["name"], found["seconds"] = plugin.name, seconds
    _write(out, found)


def _write(out, value):
    # type: (int, dict[str, object]) -> None
    line = json.dumps(value).encode("ascii") + b"\n"
    while line:
        line = line[os.write(out, line) :]


# --- in the process of a plugin -----------------------------------------------------------------------------------------


def _run(job, folder, name):
    # type: (dict[str, object], str, str) -> dict[str, object]
    """Load a plugin, run its promise and return what came of it."""
    path = os.path.join(folder, name)
    anomaly = job["mode"] == "anomaly"
    module = _load(folder, name, path)
    queue = _Queue()
    configuration = dict(job["config"])  # type: ignore[call-overload]
    configuration.update(
        {
            "path": path,
            "name": name,
            "log-folder": os.path.join(str(job["cwd"]), _LOGS),
            "partition-folder": job["cwd"],
            "debug": False,
            "promise-timeout": job["timeout"],
            "slapgrid-version": _INTERFACE,
            "queue": queue,
        }
    )
    _add_own(module, configuration)
    promise = module.RunPromise(configuration)
    tested = bool(getattr(promise, "isTested", bool)() or not hasattr(promise, "isTested"))
    sensed = bool(getattr(promise, "isAnomalyDetected", bool)() or not hasattr(promise, "isAnomalyDetected"))
    _keep(promise, module, tested, sensed, sensed if anomaly else tested)
    # it is the daemon that bangs; without its word nobody could bound it
    promise.run(anomaly, False)
    item = getattr(queue.item, "item", None)
    kind = _KINDS.get(item.type()) if item is not None else None
    if kind is None:
        return {"end": "silent", "message": ""}
    failed = bool(item.hasFailed())  # type: ignore[union-attr]
    message = item.message  # type: ignore[union-attr]
    return {
        "end": "said",
        "type": kind,
        "failed": failed,
        "message": ("%s" % message)[-_MESSAGE:] if message else "",
        "periodicity": float(promise.getPeriodicity()),
        "tested": tested,
        "sensed": sensed,
        "bang": failed and kind == "anomaly" and bool(getattr(promise, "_GenericPromise__allow_bang", True)),
    }


def _load(folder, name, path):
    # type: (str, str, str) -> types.ModuleType
    if re.match(r"[a-zA-Z_]", name) is None:
        raise ValueError("Promise plugin name %r is not valid" % name)
    sys.path[0:0] = [folder]
    title = str(os.path.splitext(name)[0])
    module = types.ModuleType(title)
    module.__file__ = path
    # never in place of one that others mean by that name
    sys.modules.setdefault(title, module)
    with open(path, "rb") as stream:
        code = compile(stream.read(), path, "exec")
    exec(code, module.__dict__)  # noqa: S102 - that is what it is for
    if not hasattr(module, "RunPromise"):
        raise AttributeError("Class RunPromise not found in promise %s" % name)
    from slapos.grid.promise import interface  # noqa: PLC0415 - what the plugin's path has
    from slapos.grid.promise.generic import GenericPromise  # noqa: PLC0415 - likewise

    if not interface.IPromise.implementedBy(module.RunPromise):
        raise RuntimeError("RunPromise of %s does not implement the interface IPromise" % name)
    if not issubclass(module.RunPromise, GenericPromise):
        raise RuntimeError("RunPromise of %s is no GenericPromise" % name)
    return module


def _add_own(module, configuration):
    # type: (types.ModuleType, dict[str, object]) -> None
    """Add what the release configured of this promise."""
    own = getattr(module, "extra_config_dict", {})
    if not isinstance(own, dict):
        raise ValueError("extra_config_dict is no dictionary")
    for key, value in own.items():
        if key in configuration:
            raise ValueError("extra_config_dict must not name %r" % key)
        configuration[key] = value


def _keep(promise, module, tested, sensed, started):
    # type: (object, types.ModuleType, bool, bool, bool) -> None
    """Write what slapgrid keeps of each promise, where others look for it."""
    now = time.time()
    minutes = float(promise.getPeriodicity())  # type: ignore[attr-defined]
    source = sys.modules.get(module.RunPromise.__module__, module)
    file = os.path.splitext(getattr(source, "__file__", None) or str(module.__file__))[0] + ".py"
    value = {
        "is_tested": tested,
        "is_anomaly_detected": sensed,
        "periodicity": minutes,
        "next_run_after": now + (minutes * 60 if started else 0),
        "timestamp": now,
        "module_file": file,
        "module_file_mtime": os.stat(file).st_mtime,
    }
    path = os.path.join(_CACHE, os.path.splitext(promise.getName())[0])  # type: ignore[attr-defined]
    temporary = "%s.%d" % (path, os.getpid())
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(descriptor, json.dumps(value).encode("ascii"))
    os.close(descriptor)
    os.rename(temporary, path)


if __name__ == "__main__":
    main()
