"""Reading logs as one, and the verb: rotations, cut files, hostile bytes, who may."""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from json_schemas import schema
from jsonschema import Draft202012Validator

from partitiond import cli_logs, cli_parser, execute, log_digest, log_reader
from partitiond.errors import PartitiondError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(tmp_path):
    made = log_reader.LogFile("web", tmp_path / "web.log")
    yield made
    made.close()


def texts(lines):
    return [line.text for line in lines]


def test_the_last_lines_reach_into_the_file_put_aside(log, tmp_path):
    (tmp_path / "web.log.1").write_text("".join(f"old {number}\n" for number in range(5)))
    (tmp_path / "web.log").write_text("new 0\nnew 1\nhalf")
    assert texts(log.last(4)) == ["old 3", "old 4", "new 0", "new 1"]
    assert texts(log.finish()) == ["half"]


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_of_a_large_file_the_end_alone_is_read(log, tmp_path, count):
    with (tmp_path / "web.log").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, 2)
        file.write(b"".join(b"\nline %d" % number for number in range(2000)) + b"\n")
    found = texts(log.last(count))
    assert found == [f"line {number}" for number in range(2000 - count, 2000)]
    with (tmp_path / "web.log").open("ab") as file:
        file.write(b"more\n")
    assert texts(log.new()) == ["more"]


def test_following_over_rotation_and_cutting(log, tmp_path):
    path = tmp_path / "web.log"
    assert log.last(10) == []
    assert list(log.new()) == []
    path.write_text("one\ntw")
    assert texts(log.new()) == ["one"]
    with path.open("a") as stream:
        stream.write("o\nlast of the old")
        stream.flush()
        path.rename(tmp_path / "web.log.1")
        assert texts(log.new()) == ["two"], "as long as there is no other, it is read on"
        path.write_text("three\n")
        assert texts(log.new()) == ["last of the old", "three"]
    with path.open("r+b") as stream:  # copied and cut off, as a long build's is
        stream.truncate(0)
    path.write_text("4\n")
    assert texts(log.new()) == ["4"]
    path.unlink()
    assert list(log.new()) == []
    path.write_text("five\n")
    assert texts(log.new()) == ["five"]


def test_lines_without_end_and_bytes_that_are_no_text(log, tmp_path):
    path = tmp_path / "web.log"
    path.write_bytes(b"")
    log.last(10)
    path.write_bytes(b"\xff\xfe\n" + b"x" * (40 << 10) + b"\r\n")
    first, *pieces = texts(log.new())
    assert first == "\\xff\\xfe"
    assert "".join(pieces) == "x" * (40 << 10)
    assert max(map(len, pieces)) <= log_reader.LONGEST


def test_what_is_no_plain_file_is_no_log(log, tmp_path):
    os.mkfifo(tmp_path / "web.log")
    assert list(log.new()) == []
    (tmp_path / "link.log").symlink_to("/etc/passwd")
    (tmp_path / "buildout.log").write_text("x")
    (tmp_path / "buildout.log.1").write_text("x")
    assert list(log_reader.names_of(tmp_path)) == ["buildout"]


@pytest.mark.parametrize(
    "line",
    [
        "logs software -f http://x",
        "logs -f software http://x",
        "logs software http://x -f",
        "-v logs software http://x -f",
    ],
)
def test_names_stand_anywhere(line):
    found = cli_parser.parser().parse_args(line.split())
    assert (found.partition, found.names, found.follow) == ("software", ["http://x"], True)


@pytest.mark.parametrize("line", ["logs", "logs a --foo", "logs a -n -1", "logs a -n x", "logs a b --foo c"])
def test_wrong_use(line, capsys):
    with pytest.raises(SystemExit) as caught:
        cli_parser.parser().parse_args(line.split())
    assert caught.value.code == 64


# --- the verb ---------------------------------------------------------------------------------------------------------

PARTITION = "slappart0"


@pytest.fixture
def node(tmp_path):
    """A configuration and logs, readable by the partition's group as in a real node."""
    tmp_path.chmod(0o755)
    logs = tmp_path / "log"
    for path, gid, mode in ((logs, 0, 0o711), (logs / PARTITION, 1, 0o750), (logs / "software", 0, 0o700)):
        path.mkdir()
        os.chown(path, 0, gid)
        path.chmod(mode)
    (logs / PARTITION / "buildout.log").write_text("configuring\nnothing to do\n")
    (logs / PARTITION / "web.log").write_text("red \x1b[31m\x07 end\n")
    configuration = tmp_path / "slapos.cfg"
    configuration.write_text(
        f"[slapos]\ncomputer_id = C\nmaster_url = http://[::1]/\nsoftware_root = {tmp_path}/s\n"
        f"instance_root = {tmp_path}/i\n[slapformat]\ninterface_name = lo\npartition_amount = 2\n"
        f"[partitiond]\nlog_dir = {logs}\nstate_dir = {tmp_path}/state\nrun_dir = {tmp_path}/run\n"
    )
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    return tmp_path


def verb(node, *words, user=None, **kept):
    as_user = [*(execute.SETPRIV, "--reuid", user, "--regid", user, "--clear-groups", "--")] if user else []
    return subprocess.Popen(
        [*as_user, sys.executable, "-P", "-m", "partitiond", "-c", node / "slapos.cfg", *words],
        env={"PATH": execute.PATH, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        **kept,
    )


def said(process):
    out, error = process.communicate(timeout=30)
    return process.returncode, out, error


def test_all_logs_of_a_partition(node):
    status, out, error = said(verb(node, "logs", PARTITION))
    assert (status, error) == (0, "")
    assert out.splitlines() == [
        "buildout | configuring",
        "buildout | nothing to do",
        "web      | red \\x1b[31m\\x07 end",
    ]
    assert said(verb(node, "logs", PARTITION, "buildout", "-n", "1"))[1] == "nothing to do\n"
    _, out, _ = said(verb(node, "--json", "logs", PARTITION, "web"))
    value = json.loads(out)
    Draft202012Validator(schema("log")).validate(value)
    assert (value["log"], value["line"]) == ("web", "red \x1b[31m\x07 end")
    assert said(verb(node, "logs", "slappart1")) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("slappart2",), "logs.unknown_partition"),
        (("../software",), "logs.unknown_partition"),
        ((PARTITION, "nothing"), "logs.unknown_log"),
        (("software", "http://nobody"), "logs.unknown_software"),
    ],
)
def test_what_is_not_there_is_told(node, words, code):
    status, out, error = said(verb(node, "logs", *words))
    assert (status, out) == (1, "")
    assert code in error
    assert "next:" in error


def test_a_partition_s_user_reads_its_own(node):
    status, out, error = said(verb(node, "logs", PARTITION, "buildout", user="1"))
    assert (status, out, error) == (0, "configuring\nnothing to do\n", "")
    status, out, error = said(verb(node, "logs", PARTITION, user="2"))
    assert (status, out) == (1, "")
    assert "logs.forbidden" in error
    assert "logs.forbidden" in said(verb(node, "logs", "software", user="1"))[2]


def test_following_sees_a_log_that_is_new(node):
    process = verb(node, "logs", "-f", PARTITION, "-n", "0", bufsize=1)
    try:
        # a line that comes before it looks is past: so more, until one is seen
        path = node / "log" / PARTITION / "cron.log"
        seen = ""
        deadline = time.monotonic() + 30
        while "cron" not in seen:
            assert time.monotonic() < deadline
            with path.open("a") as stream:
                stream.write("tick\n")
            if select.select([process.stdout], [], [], 0.2)[0]:
                seen += os.read(process.stdout.fileno(), 4096).decode()
        assert "cron     | tick" in seen
    finally:
        process.send_signal(2)
        assert said(process)[0] == 0


def test_a_reader_that_goes_away_is_no_error(node):
    (node / "log" / PARTITION / "web.log").write_text("line\n" * 100_000)
    process = verb(node, "logs", PARTITION, "web", "-n", "all")
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_release_by_url_and_by_directory(tmp_path):
    (tmp_path / "software").mkdir()
    path = tmp_path / "software" / f"{log_reader.software_name('http://r')}.log"
    path.write_text("x")
    for word in ("http://r", path.stem):
        assert log_reader.of_software(tmp_path, [], word) == {word: path}
    assert log_reader.of_software(tmp_path, ["http://r"], None) == {"http://r": path}
    with pytest.raises(PartitiondError):
        log_reader.of_software(tmp_path, [], "../../etc/passwd")


# --- why it failed ----------------------------------------------------------------------------------------------------

COMPILED = """\
gcc -c foo.c
\x1b[01m\x1b[Kfoo.c:3:10:\x1b[m\x1b[K \x1b[01;31m\x1b[Kfatal error: \x1b[m\x1b[Kzlib.h: No such file or directory
compilation terminated.
make[1]: *** [Makefile:2: foo.o] Error 1
make: *** [Makefile:1: all] Error 2
While:
  Installing.
  Installing python.
Error: System error
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (COMPILED, "foo.c:3:10: fatal error: zlib.h: No such file or directory (installing python)"),
        ("While:\n  Installing.\n  Getting section x.\nError: The referenced section, 'x', was not defined.\n",
         "The referenced section, 'x', was not defined. (getting section x)"),
        ("x\n10%\r50%\r100%\nTraceback (most recent call last):\n  File x\nValueError: bad value\n", "bad value"),
        ("checking for gcc\nconfigure: error: no acceptable C compiler\nWhile:\n  Installing a.\nError: System error\n",
         "configure: error: no acceptable C compiler (installing a)"),
        ("only this\n\n", "only this"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_cause(text, cause):
    assert log_digest.cause(text) == cause


def test_what_a_master_keeps_is_the_cause_at_either_end():
    text = log_digest.for_master("x" * 100 + "\nbuildout failed (exit status 1):\nlots\n")
    assert text.splitlines()[0] == "x" * 100
    assert text[-80:] == "x" * 79 + "…"
    assert log_digest.for_master("short") == "short"


def test_no_log_is_slow_to_read():
    for piece in (
        "\x1b[",
        "Error: ",
        "ld: ",
        "a:1:1: error",
        "Error",
        "\x1b]",
        ": command not found",
        "While:\n  x.\n",
    ):
        short, long = (digested(piece * (size // len(piece))) for size in (1 << 14, 1 << 17))
        assert long < 30 * short + 0.5, "it takes the square of the length"


def digested(text):
    began = time.process_time()
    log_digest.cause(text)
    return time.process_time() - began


def test_the_parser_is_a_plain_one():
    parser = argparse.ArgumentParser()
    cli_logs.add(parser)
    assert parser.parse_args(["slappart0"]).lines == 100
