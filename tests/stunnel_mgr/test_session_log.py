"""The reader of stunnel's log, without a stunnel: what each kind of session says, and what an enemy may write."""

import json
import random
import tracemalloc
from datetime import datetime
from ipaddress import ip_address

import pytest

from stunnel_mgr import session_log
from stunnel_mgr.session_log import SessionReader, logged_subject
from stunnel_mgr.session_records import EndedSession, FailedSession, LiveSession, RefusedPeer

AT = datetime(2026, 11, 23, 6, 27, 37)  # noqa: DTZ001 (the log's own local time)
LATER = AT.replace(second=41)
V6 = (ip_address("::1"), 45502)
V4 = (ip_address("127.0.0.1"), 50630)
PEER = "CN=slappart1, serialNumber=abcdef0123"
START = "LOG5[ui]: stunnel 5.68 on x86_64-pc-linux-gnu platform"
SERVER = (
    "LOG5[7]: Service [db] accepted connection from ::1:45502",
    f"LOG5[7]: Certificate accepted at depth=0: {PEER}",
    "LOG5[7]: s_connect: connected 127.0.0.1:5000",
    "LOG5[7]: Service [db] connected remote server from 127.0.0.1:36320",
)
CLIENT = (
    "LOG5[8]: Service [go] accepted connection from 127.0.0.1:50630",
    "LOG5[8]: s_connect: connected ::1:4444",
    "LOG5[8]: Service [go] connected remote server from ::1:45502",
    "LOG5[8]: Certificate accepted at depth=0: CN=srv",
)
SSL = "SSL_accept: ../ssl/statem/statem_srvr.c:3530: error:0A000086:SSL routines::"
REJECTED = (
    "LOG4[7]: CERT: Pre-verification error: self-signed certificate",
    f"LOG4[7]: Rejected by CERT at depth=0: {PEER}",
    f"LOG3[7]: {SSL}certificate verify failed",
)
REFUSED = "LOG3[7]: s_connect: connect 127.0.0.1:5000: Connection refused (111)"
NO_MORE = "LOG3[7]: No more addresses to connect"


def log(*lines, at="2026.11.23 06:27:37"):
    return "".join(f"{at} {line}\n" for line in lines).encode()


def closed(thread, how="closed", to_tls=0, to_socket=0):
    text = (
        f"LOG5[{thread}]: Connection {how}: {to_tls} byte(s) sent to TLS, {to_socket} byte(s) sent to socket"
    )
    return log(text, at="2026.11.23 06:27:41")


def refused(reason, subject=None):
    return RefusedPeer("db", V6, subject, LATER, reason)


def test_a_session_of_a_server_lives_and_ends():
    reader = SessionReader()
    for lines, subject, established in (
        (1, None, False),
        (2, PEER, False),
        (3, PEER, False),
        (4, PEER, True),
    ):
        reader.forget()
        assert reader.feed(b"\n" + log(*SERVER[:lines])) == []
        assert list(reader.live()) == [LiveSession("db", V6, subject, AT, 7, established)]
    assert reader.by_remote() == {("db", V6): LiveSession("db", V6, PEER, AT, 7, established=True)}
    assert reader.feed(closed(7, "closed", 5, 17)) == [EndedSession("db", V6, PEER, AT, 4, 5, 17, clean=True)]
    assert reader.by_remote() == {}


def test_a_session_of_a_client_lives_and_ends():
    reader = SessionReader()
    assert reader.feed(log(*CLIENT[:3])) == []
    assert [session.established for session in reader.live()] == [False]
    assert reader.feed(log(CLIENT[3])) == []
    assert list(reader.live()) == [LiveSession("go", V4, "CN=srv", AT, 8, established=True)]
    assert reader.feed(
        log("LOG3[8]: SSL_read: Connection reset by peer (104)") + closed(8, "reset", 9, 0)
    ) == [EndedSession("go", V4, "CN=srv", AT, 4, 9, 0, clean=False)]


@pytest.mark.parametrize(
    ("lines", "how", "record"),
    [
        (REJECTED, "reset/closed", refused("not_allowed", PEER)),
        (
            ("LOG4[7]: CERT: Pre-verification error: certificate has expired", *REJECTED[1:]),
            "reset/closed",
            refused("expired", PEER),
        ),
        (
            ("LOG4[7]: CERT: Pre-verification error: certificate is not yet valid", *REJECTED[1:]),
            "reset/closed",
            refused("expired", PEER),
        ),
        (("LOG4[7]: CERT: Certificate not found in local repository", *REJECTED[1:]), "reset",
         refused("not_allowed", PEER)),
        ((SERVER[1], *REJECTED), "reset/closed", refused("not_allowed", PEER)),
        ((f"LOG3[7]: {SSL}peer did not return a certificate",), "reset/closed", refused("no_certificate")),
        (("LOG3[7]: SSL_accept: f@../ssl/x.c:1: error:0A0000C7:SSL routines::peer did not return a certificate",),
         "reset/closed", refused("no_certificate")),  # as 5.74 words it, and the next
        (("LOG4[7]: CERT: Pre-verification error: certificate not found in local repository: self-signed certificate",
          *REJECTED[1:]), "reset/closed", refused("not_allowed", PEER)),
        ((SERVER[1], f"LOG3[7]: {SSL}bad signature"), "reset/closed", refused("not_allowed", PEER)),
        ((f"LOG3[7]: {SSL}unsupported protocol",), "reset/closed", refused("protocol")),
        ((f"LOG3[7]: {SSL}http request",), "reset", refused("no_tls")),
        ((f"LOG3[7]: {SSL}wrong version number",), "reset", refused("no_tls")),
        (("LOG3[7]: error queue: x.c:1: error:1:a::lib", f"LOG3[7]: {SSL}http request"), "reset",
         refused("no_tls")),
        ((f"LOG3[7]: {SSL}unexpected eof while reading",), "reset/closed", refused("other")),
        (("LOG3[7]: SSL_accept: Peer suddenly disconnected",), "reset", refused("other")),
        ((SERVER[1], "LOG3[7]: SSL_accept: Connection reset by peer (104)"), "reset", refused("other", PEER)),
        ((), "reset", refused("timeout")),
        ((SERVER[1],), "reset", refused("timeout", PEER)),
        ((), "closed", refused("other")),
        ((SERVER[1], REFUSED, NO_MORE), "reset", FailedSession("db", V6, PEER, LATER, "backend")),
        ((SERVER[3], "LOG3[7]: SSL_connect: Connection reset by peer (104)"), "reset",
         FailedSession("db", V6, None, LATER, "unreachable")),
        ((REFUSED, NO_MORE), "reset", FailedSession("db", V6, None, LATER, "unreachable")),
        ((SERVER[1], "LOG3[7]: s_connect: s_poll_wait 10.0.0.1:5: TIMEOUTconnect exceeded", NO_MORE), "reset",
         FailedSession("db", V6, PEER, LATER, "backend")),
        ((f"LOG3[7]: {SSL}tlsv1 alert unknown ca",), "reset/closed",
         FailedSession("db", V6, None, LATER, "refused")),
        ((SERVER[3], SERVER[1], "LOG3[7]: SSL_read: x.c:1: error:1:SSL routines::ssl/tls alert certificate expired"),
         "closed/reset", FailedSession("db", V6, PEER, LATER, "refused")),
    ],
)  # fmt: skip
def test_outcomes(lines, how, record):
    assert SessionReader().feed(log(SERVER[0], *lines) + closed(7, how)) == [record]


def test_another_process_ends_all_that_live():
    reader = SessionReader()
    assert reader.feed(log(START, *SERVER, *CLIENT)) == []
    ended = [
        EndedSession("db", V6, PEER, AT, 4, None, None, clean=False),
        EndedSession("go", V4, "CN=srv", AT, 4, None, None, clean=False),
    ]
    assert reader.feed(log(START, at="2026.11.23 06:27:41")) == ended
    assert list(reader.live()) == []
    reader.feed(log(*SERVER))
    assert reader.feed(log("LOG5[ui]: Terminated", at="2026.11.23 06:27:41")) == ended[:1]
    assert reader.feed(closed(7)) == []


def test_a_reload_ends_nothing():
    reader = SessionReader()
    reader.feed(log(*SERVER))
    lines = "LOG5[ui]: Reading configuration from file /t/stunnel.conf", "LOG5[ui]: Configuration successful"
    assert reader.feed(log(*lines)) == []
    assert len(list(reader.live())) == 1


def test_only_the_main_thread_tells_of_processes():
    reader = SessionReader()
    reader.feed(log(*SERVER))
    assert reader.feed(log(START.replace("ui", "9"), START.replace("ui", "cron"))) == []
    assert len(list(reader.live())) == 1


def test_too_many_clients():
    text = "LOG4[ui]: Connection rejected: too many clients (>=9765)"
    assert SessionReader().feed(log(text)) == [RefusedPeer("", None, None, AT, "too_many")]


def test_a_number_that_begins_again_ends_the_session_before():
    reader = SessionReader()
    reader.feed(log(*SERVER))
    again = "LOG5[7]: Service [db] accepted connection from ::1:9"
    assert reader.feed(log(again)) == [EndedSession("db", V6, PEER, AT, 0, None, None, clean=False)]
    assert [session.remote[1] for session in reader.live()] == [9]


def test_of_two_sessions_of_one_remote_the_later_counts():
    reader = SessionReader()
    reader.feed(log(*SERVER, SERVER[0].replace("[7]", "[9]")))
    assert reader.by_remote()["db", V6].thread == 9


def test_a_clock_set_back_gives_no_negative_time():
    reader = SessionReader()
    reader.feed(log(*SERVER, at="2026.11.23 06:59:59"))
    assert reader.feed(closed(7))[0].seconds == 0


def test_an_address_of_a_link_goes_by_the_kernel_name():
    reader = SessionReader()
    reader.feed(log("LOG5[7]: Service [db] accepted connection from fe80::2%eth0:45502"))
    assert set(reader.by_remote()) == {("db", (ip_address("fe80::2"), 45502))}


@pytest.mark.parametrize(
    "line",
    [
        "2026.13.23 06:27:37 LOG5[7]: Service [db] accepted connection from ::1:1",
        "2026.11.23 06:27:37 LOG5[7]: Service [db] accepted connection from ::1:65536",
        "2026.11.23 06:27:37 LOG5[7]: Service [db] accepted connection from ::1:\u0661",
        "2026.11.23 06:27:37 LOG5[7]: Service [db] accepted connection from localhost:1",
        "2026.11.23 06:27:37 LOG5[7]: Service [d\x1bb] accepted connection from ::1:1",
        f"2026.11.23 06:27:37 LOG5[7]: Service [{'d' * 64}] accepted connection from ::1:1",
        "2026.11.23 06:27:37 LOG5[123456789012345678901]: Service [db] accepted connection from ::1:1",
        "LOG5[7]: Service [db] accepted connection from ::1:1",
        " 2026.11.23 06:27:37 LOG5[7]: Service [db] accepted connection from ::1:1",
    ],
)
def test_lines_that_are_none(line):
    reader = SessionReader()
    assert reader.feed(line.encode() + b"\n") == []
    assert list(reader.live()) == []


def test_a_subject_that_looks_like_a_line_stays_within_its_own():
    subject = f"CN=x.2026.11.23 06:27:37 {START}"
    reader = SessionReader()
    assert reader.feed(log(*SERVER, SERVER[1].replace(PEER, subject))) == []
    assert [session.subject for session in reader.live()] == [subject]


def test_subjects_are_cut_where_stunnel_cuts_them():
    assert logged_subject(b"CN=a\x00b\n\x7f\xc3\xa9") == "CN=a.b..é"
    long = "é" * 600
    text = logged_subject(long.encode())
    # what is remembered of it, and a digest of all that stunnel says
    assert text.startswith("é" * 80 + "... #")
    assert len(text) == 80 + 5 + 32
    assert text == logged_subject("é".encode() * 495 + "é".encode()[:1])
    assert text != logged_subject("é".encode() * 494)
    reader = SessionReader()
    said = f"Certificate accepted at depth=0: {long}".encode()[:1024]
    reader.feed(log(SERVER[0], "LOG5[7]: ")[:-1] + said + b"\n")
    assert [session.subject for session in reader.live()] == [text]


def test_lines_may_be_cut_anywhere():
    data = log(START, *SERVER, *CLIENT) + b"x" * 9000 + b"\n" + closed(7, "closed", 1, 2) + closed(8, "reset")
    whole = SessionReader().feed(data)
    assert len(whole) == 2
    for step in (1, 7, 4095, 4096, 4097):
        reader, records = SessionReader(), []
        for at in range(0, len(data), step):
            records += reader.feed(data[at : at + step])
            reader = SessionReader.from_json(json.loads(json.dumps(reader.to_json())))
        assert records == whole


def test_a_long_line_hides_nothing_that_comes_after():
    reader = SessionReader()
    for _ in range(100):
        assert reader.feed(b"y" * 100_000) == []
        assert len(reader._rest) <= session_log.MAX_LINE
    reader.feed(log(SERVER[0]))  # the end of that line
    assert list(reader.live()) == []
    reader.feed(log(SERVER[0]))
    assert len(list(reader.live())) == 1


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(session_log, "MAX_LIVE", 500)
    reader = SessionReader()
    tracemalloc.start()
    try:
        for number in range(2000):
            begun = f"LOG5[{number}]: Service [db] accepted connection from 2001:db8::{number}:1"
            reader.feed(log(begun, f"LOG5[{number}]: Certificate accepted at depth=0: CN={number:0>2000}"))
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert [session.thread for session in reader.live()] == list(range(1500, 2000))
    assert reader.forgotten == 1500
    assert used < 500 * 2048


def test_after_a_gap_the_table_is_empty_and_half_a_line_is_not_believed():
    reader = SessionReader()
    reader.feed(log(*SERVER) + b"2026.11.23 06:27:37 LOG5[9]: Serv")
    reader.forget()
    assert reader.feed(log(SERVER[0])) == []
    assert list(reader.live()) == []
    reader.feed(log(SERVER[0]))
    assert len(list(reader.live())) == 1


def state(**changes):
    reader = SessionReader()
    reader.feed(log(*SERVER) + b"\xff")
    return {**json.loads(json.dumps(reader.to_json())), **changes}


def test_the_state_is_kept():
    reader = SessionReader.from_json(state(forgotten=3))
    assert reader.forgotten == 3
    assert reader.to_json() == {**reader.to_json(), **state(forgotten=3)}
    assert reader.feed(b"\n" + closed(7, "closed", 1, 1)) == [
        EndedSession("db", V6, PEER, AT, 4, 1, 1, clean=True)
    ]


GOOD_ROW = [7, "db", "::1", 45502, "2026-11-23T06:27:37", PEER, True, None, False, False]


def bad_rows():
    for at, values in (
        (0, ("7", None, 1.5)), (1, (None, 5, "d" * 5000)), (2, ("host", 5, None)), (3, (-1, 65536, "1", None)),
        (4, ("now", None, "2026-11-23T06:27:37+00:00", "2026-11-23T06:27:37Z")), (5, (5, "x" * 5000)),
        (6, (0, None)), (7, ("because", 1)), (8, (1,)), (9, ("no",)),
    ):  # fmt: skip
        for value in values:
            yield [*GOOD_ROW[:at], value, *GOOD_ROW[at + 1 :]]
    yield GOOD_ROW[:-1]
    yield [*GOOD_ROW, 1]
    yield None


@pytest.mark.parametrize(
    "bad",
    [
        None, [], {}, "x", {"sessions": []}, state(rest=5), state(rest="\u0100"), state(rest="x" * 5000),
        state(skipping=0), state(forgotten="1"), state(sessions=None), state(sessions=[GOOD_ROW, GOOD_ROW]),
        *(state(sessions=[row]) for row in bad_rows()),
    ],
)  # fmt: skip
def test_a_damaged_state_is_an_empty_one(bad):
    reader = SessionReader.from_json(bad)
    assert reader.to_json() == SessionReader().to_json()


def test_the_good_row_is_good():
    assert len(list(SessionReader.from_json(state(sessions=[GOOD_ROW])).live())) == 1


def test_garbage_raises_nothing_and_leaves_a_state_that_is_taken_again():
    dice = random.Random(5)  # noqa: S311 (garbage, no secret)
    good = [*log(START, *SERVER, *CLIENT, *REJECTED, REFUSED).splitlines(), closed(7)[:-1], closed(8)[:-1]]
    reader = SessionReader()
    seen = set()
    for _ in range(20_000):
        line = bytearray(dice.choice(good))
        for _ in range(dice.choice((0, 0, 0, 1, 3))):
            at = dice.randrange(len(line))
            line[at : at + dice.randrange(4)] = dice.randbytes(dice.randrange(4))
        seen |= {
            type(record) for record in reader.feed(bytes(line) + dice.choice((b"\n", b"\n", b"\n", b"")))
        }
        json.dumps([str(record) for record in reader.live()])
    assert seen == {EndedSession, FailedSession, RefusedPeer}
    saved = json.loads(json.dumps(reader.to_json()))
    assert json.loads(json.dumps(SessionReader.from_json(saved).to_json())) == saved
