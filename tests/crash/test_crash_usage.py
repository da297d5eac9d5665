"""Usage files, with whoever takes them killed at every step: each counts once, none is lost, what is bad stays out."""

import os
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from crash_machine import in_child
from crash_points import Points

from accounting import Ledger
from partitiond import refused_usage, usage_intake

UID, GUID = 65501, "SOFTINST-1"
GOOD = {f"good-{number}": number + 1 for number in range(3)}


def usage(quantity, reference=""):
    return (
        "<consumption><movement><resource>cpu</resource><title>t</title>"
        f"<reference>{reference}</reference><quantity>{quantity}</quantity><price>0</price><VAT/></movement></consumption>"
    )


class Scene:
    """A partition's directory with good and bad files, a state directory and a ledger."""

    def __init__(self, root):
        self.root = root
        self.place = root / "slappart0" / "var" / "xml_report"
        self.place.mkdir(parents=True)
        (root / "state").mkdir()
        self.ledger_path = root / "state" / "ledger.sqlite"
        Ledger(self.ledger_path).close()
        for name, quantity in GOOD.items():
            self.put(name, usage(quantity))
        self.put("foreign", usage(100, "SOFTINST-2"))
        self.put("no-xml", "<")
        os.mkfifo(self.place / "fifo")

    def put(self, name, text):
        (self.place / name).write_text(text)
        os.chown(self.place / name, UID, UID)

    def take(self, ledger):
        partition = SimpleNamespace(id="slappart0", user="slapuser0", uid=UID, path=self.root / "slappart0")
        config = SimpleNamespace(state_dir=self.root / "state")
        taker = usage_intake._Taker(config, ledger, partition, GUID, frozenset({"cpu"}), 1000.0, anyhow=True)
        return usage_intake._take(taker)

    def counted(self):
        with Ledger(self.ledger_path) as ledger:
            assert ledger.intake_left() == {}
            return sorted(int(one.quantity) for taken in ledger.intake_waiting() for one in taken.movements)

    def reasons(self):
        return len(list(refused_usage.directory(self.root / "state", "slappart0").glob("*.json")))


def taker(scene, at=None):
    """Take the files in a process that dies at a point: also before and after each commit of the ledger."""
    with Ledger(scene.ledger_path) as ledger:
        points = Points(at)
        for name in ("take_in", "removed"):
            _watch(ledger, name, points)
        scene.take(ledger)
        points.end()
        return points.labels


def _watch(ledger, name, points):
    method = getattr(ledger, name)

    def watched(*arguments):
        points.reach(name)
        answer = method(*arguments)
        points.reach(f"{name} done")
        return answer

    setattr(ledger, name, watched)


def test_killed_at_every_step_each_file_counts_once(tmp_path):
    whole = Scene(tmp_path / "whole")
    _, labels = in_child(lambda: taker(whole))
    assert whole.counted() == [1, 2, 3]
    assert [label for label in labels if label == "take_in"] == ["take_in"] * 3
    on_the_disk_before_it_counts(labels)
    print(f"{len(labels)} points")
    for at in range(len(labels)):
        scene = Scene(tmp_path / str(at))
        code, _ = in_child(lambda scene=scene, at=at: taker(scene, at))
        assert code == -9, labels[at]
        with Ledger(scene.ledger_path) as ledger:
            scene.take(ledger)
        assert scene.counted() == [1, 2, 3], labels[at]
        assert sorted(scene.place.iterdir()) == [], labels[at]
        assert 3 <= scene.reasons() <= 6, labels[at]


def on_the_disk_before_it_counts(labels):
    """All names of ours before the first row, all removals before the mark."""
    renames = [
        place for place, label in enumerate(labels) if label.startswith("os.rename") and ".taking" in label
    ]
    fsyncs = [place for place, label in enumerate(labels) if label.startswith("fsync")]
    removals = [place for place, label in enumerate(labels) if label.startswith("os.remove")]
    assert renames, labels
    assert any(max(renames) < place < labels.index("take_in") for place in fsyncs), labels
    assert any(max(removals) < place < labels.index("removed") for place in fsyncs), labels


def test_a_file_like_one_that_was_removed_before_the_mark_counts(tmp_path):
    """The kernel gives a new file the number of the one before: it is told by the row's mark alone."""
    scene = Scene(tmp_path / "scene")
    _, labels = in_child(lambda: taker(Scene(tmp_path / "whole")))
    code, _ = in_child(lambda: taker(scene, labels.index("removed")))
    assert code == -9
    for name, quantity in GOOD.items():
        scene.put(name, usage(quantity))
    with Ledger(scene.ledger_path) as ledger:
        scene.take(ledger)
    assert scene.counted() == [1, 1, 2, 2, 3, 3]


def test_a_ledger_that_cannot_take_it_loses_nothing(tmp_path):
    scene = Scene(tmp_path / "scene")
    with Ledger(scene.ledger_path) as ledger:
        (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        scene.put("large", usage_of_many(900))
        with pytest.raises(Exception, match="full"):
            scene.take(ledger)
        ledger._connection.execute("PRAGMA max_page_count = 1073741823")
        scene.take(ledger)
    assert sum(scene.counted()) == 1 + 2 + 3 + 900
    assert sorted(scene.place.iterdir()) == []


def usage_of_many(count):
    one = usage(1).removeprefix("<consumption>").removesuffix("</consumption>")
    many = (one.replace("<title>t", f"<title>{number:0>100}") for number in range(count))
    return f"<consumption>{''.join(many)}</consumption>"


def test_one_who_puts_files_under_the_same_name_all_the_time_loses_none(tmp_path):
    scene = Scene(tmp_path / "scene")
    over, made = threading.Event(), []

    def write():
        while not over.is_set() or not made:
            number = 10 + len(made)
            (scene.root / "new").write_text(usage(number))
            os.chown(scene.root / "new", UID, UID)
            if not (scene.place / "same").exists():  # else the tenant itself throws one away
                (scene.root / "new").rename(scene.place / "same")
                made.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with Ledger(scene.ledger_path) as ledger:
            deadline = time.monotonic() + 20
            while len(made) < 30 and time.monotonic() < deadline:
                scene.take(ledger)
    finally:
        over.set()
        thread.join()
    with suppress(FileNotFoundError):
        (scene.root / "new").unlink()
    with Ledger(scene.ledger_path) as ledger:
        scene.take(ledger)
    assert scene.counted() == [1, 2, 3, *made]
    assert len(made) >= 30
