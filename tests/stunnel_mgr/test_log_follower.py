"""A log followed from pass to pass, while supervisord's own handler rotates it."""

import json
import random
from dataclasses import replace

import pytest
from supervisor.loggers import RotatingFileHandler

from stunnel_mgr.errors import TunnelError
from stunnel_mgr.log_follower import LogFollower, Place

LIMIT = 1000


class Log:
    """A log as supervisord writes it, with one old file; remembers all that was ever written."""

    def __init__(self, path):
        self.path = path
        self.older = path.with_name(f"{path.name}.1")
        self.handler = RotatingFileHandler(str(path), "a", LIMIT, 1)
        self.written = b""

    def write(self, data):
        self.written += data
        self.handler.stream.write(data)
        self.handler.stream.flush()
        self.handler.doRollover()

    def rotate(self):
        self.write(b"x" * (LIMIT - self.handler.stream.tell()))
        assert self.path.stat().st_size == 0

    def clear(self):
        """What ``supervisorctl clear`` does."""
        self.handler.remove()
        self.handler.reopen()

    def close(self):
        self.handler.close()


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "stunnel.log")
    yield log
    log.close()


def kept(place):
    """The place as the next pass finds it."""
    return None if place is None else Place.from_json(json.loads(json.dumps(place.to_json())))


def read(log, place, limit=10_000):
    follower = LogFollower(log.path, kept(place))
    data = follower.read(limit)
    return data, follower.lost, follower.place


def test_what_is_added_is_given_once(log):
    log.write(b"one\n")
    assert read(log, None)[:2] == (b"one\n", False)
    _, _, place = read(log, None)
    assert read(log, place) == (b"", False, place)
    log.write(b"two\n")
    data, lost, place = read(log, place, 2)
    assert (data, lost) == (b"tw", False)
    assert read(log, place)[:2] == (b"o\n", False)


def test_without_a_place_all_that_is_kept_is_given(log):
    log.write(b"one")
    log.rotate()
    log.write(b"two")
    assert read(log, None)[:2] == (log.written, False)


def test_a_rotation_loses_nothing(log):
    log.write(b"one")
    _, _, place = read(log, None)
    log.write(b"two")
    log.rotate()
    log.write(b"three")
    data, lost, after = read(log, place)
    assert (data, lost) == (log.written[3:], False)
    assert read(log, after)[:2] == (b"", False)
    middle = read(log, place, 5)[2]
    assert read(log, middle)[:2] == (log.written[8:], False)
    at_its_end = read(log, place, LIMIT - 3)[2]
    assert read(log, at_its_end)[:2] == (b"three", False)


def test_in_the_middle_of_a_rotation(log):
    log.write(b"one")
    _, _, place = read(log, None)
    log.write(b"two")
    log.path.rename(log.older)
    data, lost, place = read(log, place)
    assert (data, lost) == (b"two", False)
    assert LogFollower.at_end(log.path).place == place
    log.path.write_bytes(b"three")
    assert read(log, place)[:2] == (b"three", False)


def test_two_rotations_lose_and_say_so(log):
    log.write(b"one")
    _, _, place = read(log, None)
    log.rotate()
    log.write(b"two")
    log.rotate()
    log.write(b"three")
    data, lost, place = read(log, place)
    assert (data, lost) == (log.written[LIMIT:], True)
    log.write(b"four")
    assert read(log, place)[:2] == (b"four", False)


def test_a_log_that_was_cleared_gives_nothing_twice(log):
    log.write(b"one")
    log.rotate()
    log.write(b"two")
    _, _, place = read(log, None)
    log.clear()
    log.write(b"three")
    assert read(log, place)[:2] == (b"three", True)


def test_a_log_cut_in_place(log):
    log.write(b"one")
    log.rotate()
    log.write(b"two")
    _, _, place = read(log, None)
    log.path.write_bytes(b"2")
    assert read(log, place)[:2] == (b"2", True)


def test_a_number_used_again_is_no_place(log):
    log.write(b"a" * 70)
    _, _, place = read(log, None)
    log.clear()
    log.write(b"b" * 100)
    reused = replace(place, inode=log.path.stat().st_ino)
    assert read(log, reused)[:2] == (b"b" * 100, True)


def test_a_log_that_is_gone_or_not_there_yet(tmp_path):
    path = tmp_path / "log"
    follower = LogFollower.at_end(path)
    assert (follower.read(), follower.lost, follower.place) == (b"", False, None)
    path.write_bytes(b"one")
    assert (follower.read(), follower.lost) == (b"one", False)
    path.unlink()
    assert (follower.read(), follower.lost, follower.place) == (b"", True, None)
    assert (follower.read(), follower.lost) == (b"", False)


def test_from_the_end_on(log):
    log.write(b"one")
    follower = LogFollower.at_end(log.path)
    log.write(b"two")
    log.rotate()
    log.write(b"three")
    assert follower.read() == log.written[3:]


@pytest.mark.parametrize(
    "state",
    [None, {}, [], [1, 2, 3, "", 4, 5], [1, 2, -1, "", 4], [1, 2, 1 << 63, "", 4], [1, 2, 3, 4, 5], ["1", 2, 3, "", 4]],
)  # fmt: skip
def test_a_damaged_place_is_none(state):
    assert Place.from_json(state) is None


def test_an_unreadable_log_keeps_the_place(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one")
    follower = LogFollower.at_end(path)
    place = follower.place
    (tmp_path / "log.1").mkdir()
    for action in (follower.read, lambda: LogFollower.at_end(path)):
        with pytest.raises(TunnelError) as caught:
            action()
        assert (caught.value.code, caught.value.retryable) == ("tunnel.observe", True)
    assert follower.place == place


@pytest.mark.parametrize("seed", range(20))
def test_at_random(log, seed):
    """Whatever the order: nothing comes twice, and what is missing is told of where it is missing."""
    dice = random.Random(seed)  # noqa: S311 (no secret)
    place, at, gaps = None, 0, 0
    for _ in range(300):
        for _ in range(dice.choice((0, 1, 1, 2, 5))):
            log.write(dice.randbytes(dice.randrange(300)))
        data, lost, place = read(log, place, dice.choice((50, 3000)))
        if lost:
            found = log.written.index(data, at)
            assert found > at
            at, gaps = found, gaps + 1
        assert log.written.startswith(data, at)
        at += len(data)
    data, lost, _ = read(log, place)
    assert not lost
    assert log.written[at:] == data
    assert gaps
