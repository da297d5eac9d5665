"""What keeps polling cheap and polite: one connection, conditional requests, and waiting as long as the master asks."""

import email.utils
import socket
import threading
import time

import production_master
import pytest
from slap_samples import PROXY_COMPUTER
from slap_server import reply

from slap_client import failures
from slap_client.client import SlapClient
from slap_client.errors import SlapError

RELEASE = "/srv/software.cfg"


@pytest.fixture
def production():
    with production_master.running("COMP-7", tls=False) as made:
        made.offer("slappart0", "slappart1")
        made.want("slappart0", RELEASE)
        yield made


@pytest.fixture
def node(production):
    with SlapClient(production.url, "COMP-7", timeout=5) as slap:
        yield slap


# --- conditional requests


def test_what_did_not_change_is_not_sent_again(production, node):
    first = node.computer()
    assert node.computer() is first
    assert node.computer() is first
    assert [(one.status, one.size > 0) for one in production.asked] == [
        (200, True),
        (304, False),
        (304, False),
    ]
    production.want("slappart1", RELEASE)
    second = node.computer()
    assert second is not first
    assert sum(not one.free for one in second.partitions) == 2
    assert node.computer() is second
    assert not production.violations


def test_a_master_without_tags_is_asked_without(production, node):
    production.etags = False
    assert node.computer() is not node.computer()
    assert all("if-none-match" not in one.headers for one in production.asked)


def test_another_client_begins_anew(production, node):
    node.computer()
    with SlapClient(production.url, "COMP-7", timeout=5) as other:
        assert other.computer() == node.computer()
    assert [one.status for one in production.asked] == [200, 200, 304]


def test_a_tag_is_kept_for_a_good_answer_alone(client, master):
    master.answer = reply(PROXY_COMPUTER.replace("COMP-7", "COMP-8"), ETag='"other"')
    for _ in range(2):
        with pytest.raises(SlapError):
            client.computer()
    master.answer = reply("garbage", ETag='"garbage"')
    with pytest.raises(SlapError):
        client.computer()
    assert all("if-none-match" not in seen.headers for seen in master.seen)
    # an error in between does not make the good one forgotten
    master.answer = reply(PROXY_COMPUTER, ETag='W/"good"')
    good = client.computer()
    master.answer = reply("", 503)
    with pytest.raises(SlapError):
        client.computer()
    master.answer = reply("", 304)
    assert client.computer() is good
    assert master.seen[-1].headers["if-none-match"] == 'W/"good"'


@pytest.mark.parametrize("tag", ["no quotes", '"', "", '"x' + "x" * 300 + '"', '"a\tb"', "W/", 'W/"'])
def test_a_tag_that_is_none(client, master, tag):
    master.answer = reply(PROXY_COMPUTER, ETag=tag)
    client.computer()
    client.computer()
    assert "if-none-match" not in master.seen[1].headers


def test_a_tag_is_good_for_that_question_alone(client, master):
    master.answer = reply(PROXY_COMPUTER, ETag='"good"')
    client.computer()
    master.answer = reply("", 304)
    with pytest.raises(SlapError):
        client.partition_certificate("slappart0")
    assert "if-none-match" not in master.seen[1].headers


# --- one connection


def test_one_connection_for_everything(production, node):
    node.computer()
    node.instance_started("slappart0")
    threads = [threading.Thread(target=node.computer) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert production.connections == 1


def test_calls_at_the_same_time_leave_one_connection(production, node):
    production.slow("*", 0.2)
    threads = [threading.Thread(target=node.computer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    production.clear()
    before = production.connections
    assert before > 1
    for _ in range(3):
        node.computer()
    assert production.connections == before


def test_a_connection_that_the_master_closed_is_no_error(production, node):
    node.computer()
    production.drop_connections()
    node.computer()
    production.drop_connections()
    node.instance_started("slappart0")
    production.restart(cold=0)
    node.computer()
    assert [one.status for one in production.asked] == [200, 304, 200, 200]


class Closing:
    """A server that takes one request on each connection after the first answer, and then closes without a word."""

    def __init__(self, answers):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.requests = []
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        """``answers``: for each connection, what to answer to its requests; None closes."""
        for answers in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                for answer in answers:
                    head = b""
                    while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
                        head += more
                    self.requests.append(head.split()[0].decode())
                    if answer is None:
                        break
                    connection.sendall(answer)

    def close(self):
        self._thread.join(10)
        self._listener.close()


def whole(body):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


GOOD = whole(PROXY_COMPUTER.encode())


@pytest.fixture
def closing():
    made = []

    def make(*answers):
        made.append(Closing(answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_get_is_repeated_once_where_a_kept_connection_gave_nothing(closing):
    server = closing([GOOD, None], [GOOD])
    with SlapClient(server.url, "COMP-7", timeout=5) as slap:
        assert slap.computer() == slap.computer()
    assert server.requests == ["GET"] * 3


def test_a_get_is_repeated_no_more_than_once(closing):
    server = closing([GOOD, None], [None])
    with SlapClient(server.url, "COMP-7", timeout=5) as slap:
        slap.computer()
        with pytest.raises(SlapError) as caught:
            slap.computer()
    assert (caught.value.code, caught.value.unsent) == ("slap.unreachable", False)
    assert server.requests == ["GET"] * 3


def test_a_get_is_not_repeated_on_a_fresh_connection(closing):
    server = closing([None])
    with SlapClient(server.url, "COMP-7", timeout=5) as slap, pytest.raises(SlapError):
        slap.computer()
    assert server.requests == ["GET"]


def test_a_get_is_not_repeated_after_the_first_byte(closing):
    server = closing([GOOD, b"HTT"])
    with SlapClient(server.url, "COMP-7", timeout=5) as slap:
        slap.computer()
        with pytest.raises(SlapError) as caught:
            slap.computer()
    assert caught.value.code == "slap.unreachable"
    assert server.requests == ["GET"] * 2


def test_a_report_is_never_repeated(closing):
    server = closing([GOOD, None])
    with SlapClient(server.url, "COMP-7", timeout=5) as slap:
        slap.computer()
        with pytest.raises(SlapError) as caught:
            slap.use_computer("<journal/>")
    # it may have been read
    assert (caught.value.code, caught.value.retryable, caught.value.unsent) == (
        "slap.unreachable",
        True,
        False,
    )
    assert server.requests == ["GET", "POST"]


def test_closing_waits_for_who_uses_it(production):
    node = SlapClient(production.url, "COMP-7", timeout=5)
    production.slow("getFullComputerInformation", 0.3)
    found = []
    thread = threading.Thread(target=lambda: found.append(node.computer()))
    thread.start()
    while not node._transport._calls:
        time.sleep(0.005)
    node.close()
    thread.join()
    assert found
    # who still has it may go on, and leaves nothing open
    production.clear()
    node.computer()
    assert production.connections == 2


# --- waiting


@pytest.mark.parametrize("status", [503, 429, 502])
def test_the_master_says_how_long_to_wait(client, master, status):
    master.answer = reply("", status, **{"Retry-After": "120"})
    with pytest.raises(SlapError) as caught:
        client.computer()
    error = caught.value
    assert (error.code, error.retryable, error.retry_after) == ("slap.unavailable", True, 120.0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("0", 0.0), (" 7 ", 7.0), ("999999999", 3600.0), ("-5", None), ("soon", None), ("1e9", None), ("", None),
     ("9" * 400, None), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0)],
)  # fmt: skip
def test_what_it_says_is_bounded(header, seconds):
    assert failures.seconds_to_wait(header) == seconds


def test_it_may_give_a_date():
    found = failures.seconds_to_wait(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert 90 < found <= 100


def test_what_is_not_to_be_tried_again_has_no_time(client, master):
    master.answer = reply("", 404, **{"Retry-After": "120"})
    with pytest.raises(SlapError) as caught:
        client.computer()
    assert caught.value.retry_after is None
