"""Reserved ports: the setting of this sandbox's kernel, written by us and by others, and the record of which are ours."""

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from netplan import reserved_ports
from netplan.errors import NetplanError
from netplan.reserved_ports import NONE, SETTING, Record, Reserved, here, observe, parse, read, render

FEW = frozenset((3306, 3307))


@pytest.fixture(autouse=True)
def setting():
    before = SETTING.read_text()
    SETTING.write_text("\n")
    yield SETTING
    SETTING.write_text("\n")
    SETTING.write_text(before)


class Kept:
    """Keeps the record in memory; at ``die_at`` of its savings, or right after it, the process is gone."""

    def __init__(self, record=None):
        self.record, self.saved, self.die_at = record, [], None

    def save(self, record):
        if len(self.saved) == self.die_at:
            raise KeyboardInterrupt
        self.saved.append((record, SETTING.read_text().strip()))
        self.record = record

    def apply(self, wanted):
        reserved_ports.apply(frozenset(wanted), self.record, self.save)

    @property
    def seen(self):
        return observe(self.record)


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("\n", ()),
        ("0\n", (0,)),
        ("1-3,5\n", (1, 2, 3, 5)),
        ("80,8080-8081\n", (80, 8080, 8081)),
        ("0-65535", range(65536)),
        ("65534-65535\n", (65534, 65535)),
    ],
)
def test_text_as_the_kernel_has_it(text, ports):
    assert parse(text) == frozenset(ports)
    assert render(ports) == text.strip()
    SETTING.write_text(text)
    assert read() == frozenset(ports)
    assert SETTING.read_text().strip() == text.strip()


@pytest.mark.parametrize("text", ["a", "1,,b", "-1", "3-2", "65536", "1-99999999999999", "1-2-3"])
def test_text_that_is_none(text):
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_the_record_is_read_back():
    record = Record(here(), FEW, settled=True)
    assert Record.decode(record.encode()) == record
    for content in (
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"place": "x", "ports": 1, "settled": true}',
        b'{"place": "x"}',
    ):
        with pytest.raises(ValueError, match=r"."):
            Record.decode(content)


def test_what_others_have_is_kept_and_not_claimed():
    SETTING.write_text("3306,8080-8090\n")
    kept = Kept()
    kept.apply({3306, 3307})
    assert SETTING.read_text() == "3306-3307,8080-8090\n"
    assert kept.record == Record(here(), frozenset((3307,)), settled=True)
    assert kept.seen == Reserved(frozenset((3307,)), frozenset((3306, *range(8080, 8091))))
    assert kept.seen.is_right(frozenset((3306, 3307)))
    assert not kept.seen.is_right(frozenset((3306,)))
    kept.apply({3308})
    assert SETTING.read_text() == "3306,3308,8080-8090\n"
    kept.apply(())
    assert SETTING.read_text() == "3306,8080-8090\n"
    assert kept.record is None
    assert kept.seen.is_right(NONE)


def test_the_record_comes_before_the_setting_and_is_trimmed_after():
    kept = Kept()
    kept.apply(FEW)
    kept.apply({3307, 3308})
    place = here()
    assert kept.saved == [
        (Record(place, FEW, settled=False), ""),
        (Record(place, FEW, settled=True), "3306-3307"),
        (Record(place, FEW | {3308}, settled=False), "3306-3307"),
        (Record(place, frozenset((3307, 3308)), settled=True), "3307-3308"),
    ]


@pytest.mark.parametrize("die_at", [0, 1])
@pytest.mark.parametrize("begin", [(), (3306, 3309)])
@pytest.mark.parametrize("then", [(3306, 3307), (3310,), ()])
def test_killed_between_the_writes(die_at, begin, then):
    SETTING.write_text("8080\n")
    kept = Kept()
    kept.apply(begin)
    kept.saved, kept.die_at = [], die_at
    with pytest.raises(KeyboardInterrupt):
        kept.apply({3306, 3307})
    kept.die_at = None
    assert kept.seen.is_right(frozenset(begin)) is (die_at == 0)
    kept.apply(then)
    assert read() == {8080, *then}
    kept.apply(())
    assert (SETTING.read_text(), kept.record) == ("8080\n", None)


def test_killed_between_record_and_setting():
    kept = Kept()
    kept.apply({3306})
    kept.record = Record(here(), FEW, settled=False)
    assert kept.seen == Reserved(frozenset((3306,)), NONE, settled=False)
    SETTING.write_text("3306,8080\n")
    kept.apply(FEW)
    kept.apply(())
    assert SETTING.read_text() == "8080\n"


def test_who_writes_over_it_has_all_that_he_wrote():
    """One write holds everything: when one of ours is missing, the others are there by another's wish."""
    kept = Kept()
    kept.apply(FEW)
    SETTING.write_text("3306,8080\n")
    assert kept.seen == Reserved(NONE, frozenset((3306, 8080)), settled=False)
    kept.apply(FEW)
    assert SETTING.read_text() == "3306-3307,8080\n"
    kept.apply(())
    assert SETTING.read_text() == "3306,8080\n"


def test_who_adds_to_it_leaves_ours_ours():
    kept = Kept()
    kept.apply(FEW)
    SETTING.write_text(f"{SETTING.read_text().strip()},8080\n")
    assert kept.seen == Reserved(FEW, frozenset((8080,)))
    kept.apply(())
    assert SETTING.read_text() == "8080\n"


@pytest.mark.parametrize("place", ["", "another boot/1", None])
def test_a_record_of_another_place_makes_nothing_ours(place):
    other = (
        here().partition("/")[0] + "/999999" if place is None else place
    )  # of this boot, another namespace
    SETTING.write_text("3306,8080\n")
    kept = Kept(Record(other, FEW, settled=True))
    assert kept.seen == Reserved(NONE, frozenset((3306, 8080)), settled=False)
    assert not kept.seen.is_right(NONE)
    kept.apply(FEW)
    kept.apply(())
    assert (SETTING.read_text(), kept.record) == ("3306,8080\n", None)


def test_another_namespace_is_another_place():
    script = "from netplan.reserved_ports import here; print(here())"
    command = ["/usr/bin/unshare", "--net", sys.executable, "-c", script]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() != here()
    assert done.stdout.partition("/")[0] == here().partition("/")[0]


def test_more_than_the_kernel_takes_at_once():
    others, ours = frozenset(range(10001, 40000, 2)), frozenset(range(10002, 60000, 4))
    SETTING.write_text("\n")
    reserved_ports._replace(SETTING, others, NONE)
    assert read() == others
    kept = Kept()
    kept.apply(ours)
    assert read() == others | ours
    fewer = frozenset(range(10002, 60000, 8))
    kept.apply(fewer)
    assert read() == others | fewer
    kept.apply(())
    assert read() == others
    # at any boundary of what is read at once
    for count in range(810, 830):
        some = frozenset(range(10001, 10001 + 2 * count, 2))
        reserved_ports._replace(SETTING, some, NONE)
        assert read() == some


def test_killed_within_a_long_write_others_keep_theirs():
    class Dying:
        """The setting; the process is gone after its first write."""

        def open(self, *words, **options):
            self.file = SETTING.open(*words, **options)
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, piece):
            assert self.file.write(piece) == len(piece)
            raise KeyboardInterrupt

    others, ours = frozenset(range(40000, 40400, 2)), frozenset(range(10001, 20000, 2))
    with pytest.raises(KeyboardInterrupt):
        reserved_ports._replace(Dying(), others, ours)
    assert read() == others


def test_without_the_setting(tmp_path):
    missing, kept = tmp_path / "missing", Kept(Record(here(), FEW, settled=True))
    assert observe(None, missing) is None
    reserved_ports.apply(FEW, kept.record, kept.save, missing)
    assert kept.record is None
    assert not missing.exists()


def test_a_setting_that_cannot_be_written_is_told(tmp_path):
    """As in a container whose /proc/sys is read-only."""
    lines = """
import subprocess
from netplan import reserved_ports
subprocess.run(["mount", "--bind", "-o", "ro", "/proc/sys", "/proc/sys"], check=True)
try:
    reserved_ports.apply(frozenset((3306,)), None, lambda record: None)
except reserved_ports.NetplanError as error:
    print(error.code, error.resource)
"""
    command = ["/usr/bin/unshare", "--mount", sys.executable, "-c", lines]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.stdout == "network.sysctl ports/reserved\n", done.stderr
    assert read() == NONE


def test_a_refused_write_leaves_a_record_that_heals(monkeypatch):
    kept = Kept()
    with monkeypatch.context() as patched:
        patched.setattr(reserved_ports, "_pieces", lambda _: [b"70000\n"])  # the kernel says EINVAL
        with pytest.raises(NetplanError) as caught:
            kept.apply(FEW)
    assert caught.value.code == "network.sysctl"
    assert kept.seen == Reserved(NONE, NONE, settled=False)
    kept.apply(FEW)
    assert kept.seen.is_right(FEW)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_outgoing_connection_gets_one(host):
    span = SETTING.with_name("ip_local_port_range")
    before = span.read_text()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        span.write_text("20000 20003\n")
        assert reserved_ports.ephemeral() == range(20000, 20004)
        Kept().apply({20001, 20002})
        with ExitStack() as stack:
            stack.enter_context(socket.create_server((host, 19999), family=family))
            clients = [stack.enter_context(socket.socket(family)) for _ in range(3)]
            for client in clients[:2]:
                client.connect((host, 19999))
            assert {client.getsockname()[1] for client in clients[:2]} == {20000, 20003}
            with pytest.raises(OSError, match="Cannot assign requested address"):
                clients[2].connect((host, 19999))
            # whoever names one gets it, as stunnel does
            stack.enter_context(socket.create_server((host, 20001), family=family))
    finally:
        span.write_text(before)
