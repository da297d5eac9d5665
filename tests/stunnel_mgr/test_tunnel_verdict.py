"""Reading stunnel's log: rounds as stunnel 5.68 wrote them, cut anywhere, and files that are rotated."""

import pytest

from stunnel_mgr.errors import TunnelError
from stunnel_mgr.verdict import LogTail, ReloadVerdict, VerdictReader, read_verdict


def log(*lines):
    return "".join(f"2026.11.22 18:10:58 {line}\n" for line in lines).encode()


READING = ("LOG5[ui]: Reading configuration from file /t/stunnel.conf", "LOG5[ui]: FIPS mode disabled")
GOOD = (
    *READING,
    "LOG4[ui]: Insecure file permissions on /t/key.pem",
    "LOG5[ui]: Configuration successful",
    "LOG6[ui]: Service [a] (FD=3) bound to ::1:23316",
    "LOG6[ui]: Service [b.c] (FD=8) bound to 10.0.0.1:23316",
)
FAILED = (
    *READING,
    "LOG3[ui]: /t/stunnel.conf:14: \"verifyPeer = yos\": The argument needs to be either 'yes' or 'no'",
    "LOG3[ui]: Configuration failed",
    "LOG3[ui]: Failed to reload the configuration file",
)
TAKEN = (
    *READING,
    "LOG5[ui]: Configuration successful",
    "LOG6[ui]: Service [a] (FD=3) bound to ::1:23316",
    "LOG5[ui]: Binding service [b.c] to 10.0.0.1:23316: Address already in use (98)",
    "LOG3[ui]: Binding service [b.c] failed",
)
OK = ReloadVerdict(ok=True)
BAD = ReloadVerdict(
    False, "/t/stunnel.conf:14: \"verifyPeer = yos\": The argument needs to be either 'yes' or 'no'"
)
LOST = ReloadVerdict(
    False, "b.c cannot listen on 10.0.0.1:23316: Address already in use (98)", ("b.c",), listeners_lost=True
)


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ((), None),
        (READING, None),
        (GOOD[:-1], None),  # "Configuration successful" and one of two bound: a failure may still come
        (GOOD, OK),
        (FAILED, BAD),
        (TAKEN, LOST),
        (TAKEN + TAKEN + GOOD, OK),
        (GOOD + TAKEN, LOST),
        (GOOD + READING, OK),
        (FAILED[:2] + FAILED[3:], ReloadVerdict(False, "Failed to reload the configuration file")),
    ],
)
def test_verdicts(lines, verdict):
    data = log(*lines)
    assert read_verdict(data, ["a", "b.c"]) == verdict
    reader = VerdictReader(["a", "b.c"])
    last = None
    for at in range(0, len(data), 7):
        last = reader.feed(data[at : at + 7])
    assert last == verdict


def test_a_start_that_fails_before_the_log_is_open():
    data = (
        b"[ ] Clients allowed=9765\n[.] Reading configuration from file /t/stunnel.conf\n[:] a warning\n"
        b"[!] No trusted certificates found\n[!] Service [a]: Failed to initialize TLS context\n"
        b"[!] Configuration failed\n[ ] Deallocating section [a]\n"
    )
    reason = "No trusted certificates found; Service [a]: Failed to initialize TLS context"
    assert read_verdict(data, ["a"]) == ReloadVerdict(False, reason)


def test_lines_of_others_are_not_believed():
    forged = log(
        *(line.replace("[ui]", "[7]") for line in GOOD), "LOG5[0]: x\\0A2026.11.22 18:10:58 LOG5[ui]: y"
    )
    assert read_verdict(forged + b"LOG6[ui]: Service [a] (FD=3) bound to x\n", ["a"]) is None


def test_garbage_is_bounded():
    reader = VerdictReader(["a"])
    for _ in range(100):
        assert reader.feed(b"\xff" * 10_000) is None
    assert len(reader._rest) <= 16 * 1024
    assert reader.feed(b"\n" + log(*GOOD)) == OK
    long = log("LOG3[ui]: " + "x" * 5000, "LOG3[ui]: Configuration failed")
    assert len(reader.feed(long).reason) == 1000


def test_tail(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"before")
    with LogTail(path) as tail:
        assert tail.read() == b""
        with path.open("ab") as file:
            file.write(b"one")
        assert tail.read(2) == b"on"
        path.rename(tmp_path / "log.1")
        assert tail.read() == b"e"
        path.write_bytes(b"two")
        assert tail.read() == b"two"
        with path.open("ab") as file:
            file.write(b"three")
        path.rename(tmp_path / "log.1")
        path.write_bytes(b"four")
        assert tail.read() == b"threefour"
        path.write_bytes(b"5")
        assert tail.read() == b"5"


def test_tail_before_the_log_is_there(tmp_path):
    path = tmp_path / "log"
    with LogTail(path) as tail:
        assert tail.read() == b""
        path.write_bytes(b"one")
        assert tail.read() == b"one"


def test_unreadable_log(tmp_path):
    with pytest.raises(TunnelError) as caught:
        LogTail(tmp_path)
    assert (caught.value.code, caught.value.retryable) == ("tunnel.observe", True)
