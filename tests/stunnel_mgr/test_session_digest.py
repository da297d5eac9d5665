"""What a pass tells of sessions is bounded, and loses no count."""

from datetime import datetime
from ipaddress import ip_address

from stunnel_mgr.session_digest import ReasonSum, SessionSum, digest
from stunnel_mgr.session_records import EndedSession, FailedSession, RefusedPeer

AT = datetime(2026, 11, 23)  # noqa: DTZ001 (the log's own local time)
REMOTE = (ip_address("2001:db8::1"), 4000)


def ended(service="db", subject="CN=a", to_tls=1, to_socket=2):
    return EndedSession(service, REMOTE, subject, AT, 3, to_tls, to_socket, clean=True)


def refused(service="db", reason="not_allowed", remote=REMOTE, subject=None):
    return RefusedPeer(service, remote, subject, AT, reason)


def failed(service="db", reason="backend"):
    return FailedSession(service, REMOTE, "CN=a", AT, reason)


def test_few_are_told_singly():
    records = [ended(), refused(), failed(), ended("web")]
    found = digest(records)
    assert found.ended == (records[0], records[3])
    assert (found.refused, found.failed) == ((records[1],), (records[2],))
    assert (found.ended_sums, found.refused_sums, found.failed_sums) == ((), (), ())


def test_nothing():
    assert digest([]) == digest(iter([]))
    assert digest([]).ended == ()


def test_many_are_summed_by_service_and_subject_or_reason():
    records = [ended()] * 5 + [ended(subject=None, to_tls=None, to_socket=None)] * 4 + [ended("web")] * 2
    records += [refused()] * 5 + [refused(reason="timeout")] * 4 + [failed()] * 3 + [failed(reason="refused")]
    found = digest(records, most=2)
    assert len(found.ended) == len(found.refused) == len(found.failed) == 2
    assert found.ended_sums == (
        SessionSum("db", None, 4, 0, 0, 12),
        SessionSum("db", "CN=a", 3, 3, 6, 9),
        SessionSum("", None, 2, 2, 4, 6),
    )
    assert found.refused_sums == (ReasonSum("db", "timeout", 4), ReasonSum("db", "not_allowed", 3))
    assert found.failed_sums == (ReasonSum("db", "backend", 1), ReasonSum("db", "refused", 1))


def test_strangers_push_no_session_out():
    records = [refused(subject=f"CN={number}") for number in range(10_000)]
    records += [ended(), *(refused(f"s{number}") for number in range(1000))]
    found = digest(records)
    assert found.ended == (ended(),)
    assert len(found.refused) == 20
    assert len(found.refused_sums) == 21
    assert found.refused_sums[0] == ReasonSum("db", "not_allowed", 9980)
    assert found.refused_sums[-1] == ReasonSum("", None, 1000 - 19)


def test_no_session_is_lost_in_the_sums():
    records = [ended(f"s{number % 50}", f"CN={number % 70}") for number in range(10_000)]
    found = digest(records, most=5)
    assert len(found.ended_sums) == 6
    assert len(found.ended) + sum(one.count for one in found.ended_sums) == 10_000
    assert sum(one.bytes_to_tls for one in (*found.ended, *found.ended_sums)) == 10_000


def test_those_without_a_name_are_only_summed():
    found = digest([refused("", "too_many", None)] * 3)
    assert (found.refused, found.refused_sums) == ((), (ReasonSum("", "too_many", 3),))


def test_texts_are_harmless_and_short():
    name = "CN=\x1b]0;x\u202e" + "ÿ" * 900
    found = digest([ended(subject=name), refused(subject=name), ended(subject=name)], most=1)
    for text in (found.ended[0].subject, found.refused[0].subject, found.ended_sums[0].subject):
        assert text.isascii()
        assert text.isprintable()
        assert len(text) <= 203
    assert digest([ended(subject=None)]).ended[0].subject is None
