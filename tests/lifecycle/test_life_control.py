"""The control socket: every question has an answer, also when its answering fails."""

import json
import os
import socket
import threading
import time

import pytest

from partitiond import control
from partitiond.bounded_http import Text, Unknown
from partitiond.errors import PartitiondError
from partitiond.peers import Judge
from partitiond.unix_http import UnixConnection


def handle(method, path, body, peer):
    """A daemon that fails in each way there is."""
    if path == "/family":
        raise PartitiondError("some.code", "a sentence", resource="it", hint="do that")
    if path == "/system":
        raise OSError(28, "No space left on device", "/var/lib/somewhere")
    if path == "/mistake":
        return {}["missing"]
    if path == "/text":
        return Text("text/plain; charset=utf-8", b"a line\n")
    if path == "/echo":
        return {"method": method, "body": body}
    if path == "/who":
        return {"uid": peer.uid, "sees_all": peer.sees_all}
    raise Unknown


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "control.sock"
    server = control.serve(path, handle, Judge(lambda: None))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield path
    server.shutdown()
    server.server_close()
    thread.join()


def test_answers(path):
    assert control.call(path, "POST", "/echo", {"a": 1}) == {"method": "POST", "body": {"a": 1}}
    assert control.call(path, "GET", "/echo") == {"method": "GET", "body": {}}


def test_answers_that_are_no_json(path):
    connection = UnixConnection(str(path), 10)
    connection.request("GET", "/text")
    answer = connection.getresponse()
    found = answer.status, answer.getheader("Content-Type"), answer.read()
    connection.close()
    assert found == (200, "text/plain; charset=utf-8", b"a line\n")


@pytest.mark.parametrize(
    ("target", "code", "words", "resource"),
    [
        ("/family", "some.code", "a sentence", "it"),
        ("/system", "system", "No space left on device", "/var/lib/somewhere"),
        ("/mistake", "internal", "KeyError: 'missing'", ""),
        ("/elsewhere", "control.unknown", "/elsewhere", ""),
    ],
)
def test_failures_are_told_apart(path, target, code, words, resource):
    with pytest.raises(PartitiondError) as caught:
        control.call(path, "POST", target, {})
    assert (caught.value.code, caught.value.resource) == (code, resource)
    assert words in str(caught.value)
    # and the daemon goes on
    assert control.call(path, "GET", "/echo")


def test_no_daemon(tmp_path):
    assert control.call(tmp_path / "none", "GET", "/echo") is None
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    assert control.call(left, "GET", "/echo") is None, "a socket that a killed daemon left is no daemon"


def test_only_objects(path):
    assert path.stat().st_mode & 0o777 == 0o666
    for body, status in ((b"[]", b"400"), (b"{", b"400"), (b"[" * 60_000, b"400"), (b"x" * 70_000, b"413")):
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(path))
            head = f"POST /echo HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            channel.sendall(head)
            channel.settimeout(10)
            if status != b"413":
                channel.sendall(body)
            assert channel.recv(100).split()[1] == status


def test_who_asks_is_what_the_kernel_says(path):
    for directory in path.parents:
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(4999)
            os.setuid(4999)
            os.write(writer, json.dumps(control.call(path, "GET", "/who")).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    assert os.waitpid(pid, 0)[1] == 0
    assert json.loads(said) == {"uid": 4999, "sees_all": False}
    assert control.call(path, "GET", "/who") == {"uid": 0, "sees_all": True}


def test_roots_own_door(tmp_path):
    """It is tried first, is nobody else's, and goes with the other."""
    path = tmp_path / "control.sock"
    asked = []

    def judge(connection):
        asked.append(connection.getsockname())
        return Judge(lambda: None)(connection)

    with control.answering(path, handle, judge):
        assert control.roots_own(path).stat().st_mode & 0o777 == 0o600
        assert path.stat().st_mode & 0o777 == 0o666
        assert control.call(path, "GET", "/echo", timeout=5)
        assert asked == [str(control.roots_own(path))]
        control.roots_own(path).unlink()
        assert control.call(path, "GET", "/echo", timeout=5)
        assert asked[1:] == [str(path)]
    assert list(tmp_path.iterdir()) == []


def test_a_full_queue_is_waited_for(tmp_path):
    """As long as the caller has time, and no longer."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            began = time.monotonic()
            with pytest.raises(PartitiondError) as caught:
                control.call(path, "GET", "/echo", timeout=0.3)
            assert time.monotonic() - began >= 0.25
            assert caught.value.code == "control.lost"
