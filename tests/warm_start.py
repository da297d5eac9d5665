"""Programs whose start costs more than what they do, from an interpreter that has imported them already and forks.

``partitiond`` and the stock ``slapos`` take 0.3 to 0.5 s of a processor to be imported, and tests call them a thousand times.
:func:`run` is :func:`subprocess.run` for both: the child has the arguments, environment, directory, descriptors and namespaces
of a process that was started anew, and runs the same entry point. Daemons, and what is killed, are started as ever.
"""

import array
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

_HERE = Path(__file__).resolve()
_SLAPOS = Path(sys.prefix) / "master" / "bin" / "slapos"
_PARTITIOND = ["-P", "-m", "partitiond"]
# what verbs import when they run
_MODULES = {
    "partitiond": """partitiond.cli partitiond.alone partitiond.status partitiond.present partitiond.tunnel_status
        partitiond.tunnel_check partitiond.report_verbs partitiond.mesh_status partitiond.mesh_verbs partitiond.present_mesh
        partitiond.cli_mesh partitiond.cli_node partitiond.usage_query partitiond.usage_text partitiond.recovery
        partitiond.control partitiond.event_reader partitiond.log_reader partitiond.tryout""",
    "slapos": "slapos.cli.entry slapos.cli.request slapos.cli.supply slapos.cli.remove slapos.client",
}
_PATHS = {"partitiond": {"PYTHONPATH": str(_HERE.parent.parent)}, "slapos": {}}
# include/uapi/linux/sched.h: mounts, cgroup, host name, IPC, processes, network
_SPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_LONGEST = 1 << 17


# --- what tests call --------------------------------------------------------------------------------------------------


class _Server:
    """One for each program; it ends with the descriptor that the tests hold."""

    def __init__(self, kind):
        self.kind, self.process, self._lock = kind, None, threading.Lock()
        self._control, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def ask(self, request, descriptors):
        """The channel on which the child's number and its end are told."""
        own, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with channel, self._lock:
            if self.process is None:
                self._start()
            socket.send_fds(self._control, [b"?"], [channel.fileno(), *descriptors])
        own.sendall(json.dumps(request).encode())
        return own

    def _start(self):
        interpreter = _SLAPOS.with_name("python3") if self.kind == "slapos" else sys.executable
        self.process = subprocess.Popen(
            [interpreter, "-P", _HERE, self.kind, str(self._other.fileno())],
            pass_fds=[self._other.fileno()],
            cwd="/",
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **_PATHS[self.kind]},
            stdin=subprocess.DEVNULL,
        )

    def close(self):
        self._control.close()
        self._other.close()
        if self.process is not None:
            self.process.wait(20)


_servers = {}


def begin():
    """Open what is held through all tests; no interpreter is started before it is needed."""
    _servers.update({kind: _Server(kind) for kind in _MODULES})


def end():
    while _servers:
        _servers.popitem()[1].close()


def is_server(command):
    """Whether a command line is that of a server, or of a child of one."""
    return str(_HERE) in command


def numbers():
    """The processes that are servers."""
    return {one.process.pid for one in _servers.values() if one.process is not None}


def known(words):
    """The program of a command line, and its arguments; None when it is another one."""
    words = [str(word) for word in words]
    if words[0] == sys.executable and words[1:4] == _PARTITIOND and words[4:5] != ["demo"]:
        return "partitiond", words[4:]
    if words[0] == str(_SLAPOS) and words[1] in ("supply", "request", "remove"):
        return "slapos", words[1:]
    return None


def run(words, *, env, cwd="/", timeout=60, said=None, space=0):
    """As ``subprocess.run(words, capture_output=True, text=True)``; ``space`` is a process whose namespaces are entered."""
    found = known(words)
    if found is None or not _servers:
        raise ValueError(words)
    kind, arguments = found
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.memfd_create("output"), "w+b")) for _ in range(2)]
        source = stack.enter_context(open(os.memfd_create("input"), "w+b"))
        source.write((said or "").encode())
        source.seek(0)
        request = {"arguments": arguments, "env": env, "cwd": str(cwd), "space": space}
        descriptors = [source.fileno(), *(one.fileno() for one in files)]
        channel = stack.enter_context(_servers[kind].ask(request, descriptors))
        status = _waited(channel, words, timeout)
        texts = []
        for one in files:
            one.seek(0)
            texts.append(one.read().decode())
    return subprocess.CompletedProcess(words, status, *texts)


def _waited(channel, words, timeout):
    """The exit status of a child; one that takes too long is killed."""
    deadline, pid = time.monotonic() + timeout, 0
    while select.select([channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
        said = channel.recv(100).split()
        if not said:
            return -signal.SIGKILL  # it went without a word
        if said[0] == b"ended":
            return int(said[1])
        pid = int(said[1])
    if pid:
        os.kill(pid, signal.SIGKILL)
    raise subprocess.TimeoutExpired(words, timeout)


# --- the interpreter that forks ---------------------------------------------------------------------------------------


def _receive(control):
    numbers = array.array("i")
    message, rest, _, _ = control.recvmsg(1, socket.CMSG_SPACE(numbers.itemsize * 4))
    for _, _, content in rest:
        numbers.frombytes(content)
    return list(numbers) if message else None


def _serve(kind, control):
    for name in _MODULES[kind].split():
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # how one ended is told by itself
    while (descriptors := _receive(control)) is not None:
        if os.fork() == 0:
            control.close()
            _child(kind, socket.socket(fileno=descriptors[0]), descriptors[1:])
        for one in descriptors:
            os.close(one)


def _child(kind, channel, descriptors):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        request = json.loads(channel.recv(_LONGEST))
        channel.send(f"began {os.getpid()}".encode())
        for number, one in enumerate(descriptors):
            os.dup2(one, number)
            os.close(one)
        if request["space"]:
            _enter(request["space"])
            if pid := os.fork():  # only children are in the other namespace of processes
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                channel.send(f"ended {status}".encode())
                os._exit(0)
            channel.close()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        status = _main(kind, request["arguments"]) or 0
    except BaseException:  # noqa: BLE001 - as an interpreter ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not request["space"]:
            channel.send(f"ended {status}".encode())
        os._exit(status)


def _enter(pid):
    """Be where a process is, as nsenter(1) with all namespaces: its cgroup first, which is seen from here."""
    if os.path.ismount("/sys/fs/bpf"):
        group = Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::")[2].strip()
        Path(f"/sys/fs/cgroup{group}/cgroup.procs").write_text("0")
    descriptor = os.pidfd_open(pid)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _SPACES):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)


def _main(kind, arguments):
    sys.argv = [kind, *arguments]
    try:
        if kind == "slapos":
            from slapos.cli.entry import main
        else:
            from partitiond.cli import main
        return main(arguments)
    except SystemExit as found:
        if isinstance(found.code, str):
            print(found.code, file=sys.stderr)
            return 1
        return found.code or 0


if __name__ == "__main__":
    # what pytest holds of modules of the tests is not to be found by the program
    sys.argv[0] = sys.argv[1]
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
