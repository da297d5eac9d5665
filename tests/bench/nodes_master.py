"""Many nodes at one master: what it is asked by a simulated fleet, and what a real slapproxy with as many computers answers.

The fleet is that of ``polling.py``: the daemon's own pacing, and slapos.core's cron beside it. slapproxy is asked with the
bytes that either program sends, replayed on new connections (it closes each), as fast as it answers; every answer is looked
at. It carries as many nodes as ask as often, in the mean, as it answered, or as one core of it could: it is one process of
Python, and a machine that has other things to do shows less.
"""

from __future__ import annotations

import itertools
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import polling
import requests
from tunnel_load import cpu
from tunnel_table import middle, row, shown

from slap_client.client import SlapClient
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DAY = 24 * polling.HOUR
WIDTHS = (1, 8)
_PATIENCE = 60.0
_END_OF_HEAD = b"\r\n\r\n"
# slapproxy has none to name: slapos.core asks for it all the same, with each pass
_HATEOAS = b"GET /getHateoasUrl "


# --- the fleet --------------------------------------------------------------------------------------------------------


def print_fleet(counts: Iterable[int]) -> float:
    """Requests per second in a day of so many nodes; return those of one node in the mean, of the largest fleet."""
    print()
    polling.head(f"requests per second at the master, interval {polling.INTERVAL:.0f} s")
    settled, each = 3 * polling.HOUR, 0.0
    for count in counts:
        asked = polling.simulate(count, settled + DAY, (polling.HOUR, 2 * polling.HOUR), uptime=30.0)
        polling.row(f"{count} nodes: a day", asked, settled, settled + DAY)
        back = 2 * polling.HOUR
        polling.row(f"{count} nodes: the master is back after an hour, 10 minutes", asked, back, back + 600)
        polling.row(f"{count} nodes: slapos.core's cron, an hour, 2 a pass", _cron(count), 0, polling.HOUR)
        each = sum(asked[second] for second in range(int(settled), int(settled + DAY))) / DAY / count
    return each


def _cron(count: int) -> Counter[int]:
    """Each pass asks where the Hateoas is, and then what is wanted, in the same second."""
    return Counter({second: 2 * passes for second, passes in polling.cron(count, polling.HOUR).items()})


# --- what is sent -----------------------------------------------------------------------------------------------------


def recorded(call: Callable[[str], object]) -> bytes:
    """The bytes of the request that a call makes of a master, whose address it is given; that one hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept: list[bytes] = []
        listening = threading.Thread(target=_hear, args=(listener, kept))
        listening.start()
        with suppress(SlapError, requests.RequestException):
            call(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        listening.join(_PATIENCE)
    if not kept:
        sys.exit("a client has not asked its master")
    return kept[0]


def _hear(listener: socket.socket, kept: list[bytes]) -> None:
    listener.settimeout(_PATIENCE)
    channel, _ = listener.accept()
    with channel:
        channel.settimeout(_PATIENCE)
        data = b""
        while _END_OF_HEAD not in data or len(data) < _whole(data):
            data += channel.recv(65536)
        kept.append(data)


def _whole(data: bytes) -> int:
    """How long a message is whose head is there."""
    head, _, _ = data.partition(_END_OF_HEAD)
    sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(head) + len(_END_OF_HEAD) + (int(sizes[0].split(b":")[1]) if sizes else 0)


def ours(computer: str) -> list[bytes]:
    """A pass of ours: both lanes share one question."""

    def ask(url: str) -> object:
        with SlapClient(url, computer) as client:
            return client.computer()

    return [recorded(ask)]


def theirs(computer: str, partitions: int) -> list[bytes]:
    """A minute of slapos.core's: a pass over software and one over instances, each of which is reported."""

    def get(name: str, **query: str) -> bytes:
        return recorded(
            lambda url: requests.get(
                url + name, params=query, headers=polling.PEER_HEADERS, timeout=_PATIENCE
            )
        )

    def post(partition: int) -> bytes:
        place = {"computer_id": computer, "computer_partition_id": f"slappart{partition}"}
        return recorded(
            lambda url: requests.post(
                f"{url}startedComputerPartition", place, headers=polling.PEER_HEADERS, timeout=_PATIENCE
            )
        )

    questions = [get("getHateoasUrl"), get("getFullComputerInformation", computer_id=computer)]
    return [*questions, *questions, *map(post, range(partitions))]


# --- slapproxy --------------------------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """What slapproxy did in one measurement: requests a second, seconds of a processor for each, and of each wait."""

    rate: float
    cpu: float
    waits: list[float]


def asked(proxy: polling.Proxy, questions: list[bytes], width: int, seconds: float) -> Answered:
    """Replay questions by turns, so many at once."""
    turns = _turns(questions)
    waits: list[list[float]] = [[] for _ in range(width)]
    failures: list[str] = []
    before, began = cpu([proxy.pid]), time.perf_counter()
    end = began + seconds
    workers = [
        threading.Thread(target=_replay, args=(proxy.port, turns, end, one, failures)) for one in waits
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        sys.exit(f"slapproxy: {failures[0]}")
    together = [wait for one in waits for wait in one]
    took = time.perf_counter() - began
    return Answered(len(together) / took, (cpu([proxy.pid]) - before) / len(together), together)


def _turns(questions: list[bytes]) -> Iterator[bytes]:
    """One after the other, for ever; next() of it is one step of the interpreter, so threads can share it."""
    return itertools.cycle(questions)


def _replay(port: int, turns: Iterator[bytes], end: float, waits: list[float], failures: list[str]) -> None:
    while time.perf_counter() < end and not failures:
        question, began = next(turns), time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as channel:
            channel.sendall(question)
            with channel.makefile("rb") as stream:
                answer = stream.read()
        waits.append(time.perf_counter() - began)
        fine = b" 404 " if question.startswith(_HATEOAS) else b" 200 "
        if fine not in answer[:16] or len(answer) != _whole(answer):
            failures.append(f"{question[:80]!r} was answered {answer[:200]!r}")


def print_slapproxy(counts: Iterable[int], partitions: int, each: float, rounds: int, seconds: float) -> None:
    """Ask a slapproxy that has so many computers; ``each`` is what one node of ours asks in a second."""
    print()
    heads = ("requests/s", "CPU ms each", "p50 ms", "p99 ms", "nodes at this rate", "nodes by its CPU")
    row(f"slapproxy, {partitions} busy partitions a computer", *heads)
    for count in counts:
        computers = [f"COMP-{number}" for number in range(count)]
        questions = {
            "ours": [one for computer in computers for one in ours(computer)],
            "slapos.core's": [one for computer in computers[:10] for one in theirs(computer, partitions)],
        }
        # what a node of each asks in a second, in the mean
        often = {"ours": each, "slapos.core's": (4 + partitions) / 60}
        with polling.slapproxy(partitions, computers) as proxy:
            _look(proxy, computers, partitions)
            found: dict[tuple[str, int], list[Answered]] = {}
            for _ in range(rounds):
                for who, width in itertools.product(questions, WIDTHS):
                    one = asked(proxy, questions[who], width, seconds)
                    found.setdefault((who, width), []).append(one)
        for (who, width), answers in found.items():
            _print_answers(f"  {count} computers, {who}, {width} at once", answers, often[who])


def _look(proxy: polling.Proxy, computers: list[str], partitions: int) -> None:
    """Each computer is there, and as busy as it is said."""
    for computer in computers:
        with SlapClient(proxy.url, computer) as client:
            busy = [one for one in client.computer().partitions if one.software_release]
        if len(busy) != partitions:
            sys.exit(f"{computer} has {len(busy)} busy partitions at slapproxy, not {partitions}")


def _print_answers(name: str, answers: list[Answered], often: float) -> None:
    waits = sorted(wait * 1e3 for one in answers for wait in one.waits)
    rates = [one.rate for one in answers]
    each = statistics.median(one.cpu for one in answers)
    row(
        name,
        middle(rates),
        shown(each * 1e3),
        shown(waits[len(waits) // 2]),
        shown(waits[len(waits) * 99 // 100]),
        shown(statistics.median(rates) / often),
        shown(1 / each / often),
    )
