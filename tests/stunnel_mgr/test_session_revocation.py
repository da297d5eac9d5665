"""Who is cut when certificates are taken back, and who is not."""

from datetime import datetime
from ipaddress import ip_address

from stunnel_mgr.revocation import sessions_to_cut
from stunnel_mgr.session_records import LiveSession

AT = datetime(2026, 11, 23)  # noqa: DTZ001 (the log's own local time)
A, B, C = ("CN=a, serialNumber=1", "CN=b, serialNumber=2", "CN=c, serialNumber=3")


def remote(port):
    return ip_address("2001:db8::1"), port


def table(*sessions):
    """Sessions by service, port and subject; a subject with a ! has not finished its handshake."""
    return {
        (service, remote(port)): LiveSession(
            service, remote(port), subject and subject.strip("!"), AT, port, bool(subject) and "!" not in subject
        )
        for service, port, subject in sessions
    }  # fmt: skip


def cut(before, now, sessions, alive=None):
    sessions = table(*sessions)
    keys = sessions if alive is None else [(service, remote(port)) for service, port in alive]
    found = sessions_to_cut(allowed_before=before, allowed_now=now, sessions=sessions, alive=keys)
    return {(one.service, one.remote[1]): (one.reason, one.doubtful) for one in found}


def test_only_the_revoked_peer_is_cut():
    before, now = {"db": {"1": A, "2": B}, "web": {"1": A}}, {"db": {"2": B}, "web": {"1": A}}
    sessions = [("db", 1, A), ("db", 2, B), ("web", 3, A), ("web", 4, None), ("web", 5, "CN=who")]
    assert cut(before, now, sessions) == {("db", 1): (f"the certificate of {A!r} was taken back", False)}


def test_nothing_is_cut_where_nothing_was_taken_back():
    before = {"db": {"1": A}}
    for now in (before, {"db": {"1": A, "2": B}}, {"db": {"1": A}, "new": {"2": B}}):
        alive = [("db", 1), ("db", 2), ("db", 3), ("new", 4), ("other", 5)]
        assert cut(before, now, [("db", 1, A), ("db", 2, "CN=who")], alive) == {}


def test_whose_session_is_not_known_is_cut_and_doubtful():
    before, now = {"db": {"1": A, "2": B}}, {"db": {"2": B}}
    sessions = [("db", 1, None), ("db", 2, f"{B}!"), ("db", 3, B), ("other", 4, B)]
    found = cut(before, now, sessions, [("db", 1), ("db", 2), ("db", 3), ("db", 4), ("db", 9)])
    assert {key: doubtful for key, (_, doubtful) in found.items()} == dict.fromkeys(
        [("db", 1), ("db", 2), ("db", 4), ("db", 9)], True
    )
    assert "handshake" in found["db", 2][0]
    assert "does not say whose" in found["db", 9][0]


def test_two_certificates_of_one_subject_are_both_cut():
    found = cut({"db": {"1": A, "2": A, "3": B}}, {"db": {"2": A, "3": B}}, [("db", 1, A), ("db", 2, B)])
    assert found == {
        ("db", 1): (
            f"one of two certificates of {A!r} was taken back, and the log shows no difference",
            False,
        )
    }


def test_a_service_that_is_gone_loses_all_and_others_nothing():
    found = cut({"db": {"1": A}, "web": {"1": A}}, {"web": {"1": A}}, [("db", 1, A), ("web", 2, A)], None)
    assert found == {("db", 1): ("the tunnel is gone", False)}
    assert cut({"db": {"1": A}}, {}, [], [("db", 7)]) == {("db", 7): ("the tunnel is gone", False)}


def test_a_service_without_any_certificate_left():
    found = cut({"db": {"1": A}}, {"db": {}}, [("db", 1, A)])
    assert found == {("db", 1): (f"the certificate of {A!r} was taken back", False)}


def test_a_subject_that_nobody_allowed_is_cut():
    found = cut({"db": {"1": A, "2": B}}, {"db": {"2": B}}, [("db", 1, C)])
    assert found == {("db", 1): (f"no certificate of {C!r} is allowed", False)}


def test_names_are_escaped_and_the_dead_are_left_alone():
    name = "CN=\x1b]0;x\u202e" + "y" * 5000
    ((reason, _),) = cut({"db": {"1": name}}, {"db": {"2": B}}, [("db", 1, name)]).values()
    assert reason.isprintable()
    assert len(reason) < 200
    assert cut({"db": {"1": A}}, {"db": {"2": B}}, [("db", 1, A)], []) == {}
