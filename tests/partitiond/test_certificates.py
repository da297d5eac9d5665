"""The pairs that the master gives for instances: both files or none, whatever the master answers and whenever somebody dies."""

import os
import stat
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from killed_calls import CALLS, cut_short

from partitiond import certificate_expiry, certificates, pair_files
from partitiond.certificate_lane import CertificateLane
from partitiond.errors import PartitiondError
from partitiond.state import InstanceState
from slap_client.documents import CertificatePair
from slap_client.errors import SlapError
from stunnel_mgr.identity import load_identity, make_identity


def given(days=365, name="COMP-1-slappart0"):
    made = make_identity(name, lifetime=timedelta(days=days), now=datetime.now(UTC) - timedelta(hours=1))
    return CertificatePair(made.certificate_pem.decode(), made.key_pem.decode())


def ended():
    made = make_identity("x", lifetime=timedelta(days=2), now=datetime.now(UTC) - timedelta(days=9))
    return CertificatePair(made.certificate_pem.decode(), made.key_pem.decode())


class Scene:
    def __init__(self, tmp_path):
        self.repository = tmp_path / "pki"
        self.config = SimpleNamespace(
            certificate_repository=self.repository, state_dir=tmp_path, cert_file=None, key_file=None
        )
        self.partition = SimpleNamespace(id="slappart0", uid=5000, gid=5000)
        self.answer = given()
        self.asked = 0
        self.state = InstanceState("slappart0", life="started", instance_guid="SOFTINST-1")
        self.due = []
        self.events = []
        self.converged = []
        self.context = SimpleNamespace(
            config=self.config,
            client=SimpleNamespace(partition_certificate=self._ask),
            store=SimpleNamespace(
                instance=lambda _name: self.state,
                readable=lambda: ({"slappart0": self.state}, {}),
                make_due=self.due.append,
            ),
            applying=threading.RLock(),
            stop=threading.Event(),
            node_in_force=SimpleNamespace(partitions=(self.partition,)),
            events=SimpleNamespace(
                record=lambda event, message, **more: self.events.append((event, message, more))
            ),
            wake_instances=lambda: None,
        )

    def _ask(self, name):
        assert name == "slappart0"
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def fetch(self):
        return certificates.fetch(self.context, self.partition)

    def files(self):
        """(certificate, key) as software reads them."""
        return CertificatePair(
            *((self.repository / f"slappart0.{kind}").read_text() for kind in ("crt", "key"))
        )


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_a_pair_is_written_once_and_belongs_to_the_user(scene):
    assert scene.fetch()
    assert scene.files() == scene.answer
    for kind in ("key", "crt"):
        found = (scene.repository / f"slappart0.{kind}").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (5000, 5000, 0o400)
    assert stat.S_IMODE(scene.repository.stat().st_mode) == 0o711
    before = sorted((path, path.lstat().st_ctime_ns) for path in scene.repository.rglob("*"))
    assert not scene.fetch()
    assert before == sorted((path, path.lstat().st_ctime_ns) for path in scene.repository.rglob("*"))
    scene.answer = given()
    assert scene.fetch()
    assert scene.files() == scene.answer
    # nothing of the one before is left
    assert len([path for path in scene.repository.iterdir() if path.is_dir() and not path.is_symlink()]) == 1
    certificates.remove(scene.context, scene.partition)
    assert list(scene.repository.iterdir()) == []


def test_its_user_can_read_it(scene):
    scene.fetch()
    scene.repository.parent.chmod(0o755)
    for parent in scene.repository.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(5000)
        os.setuid(5000)
        try:
            os._exit(0 if scene.files() == scene.answer else 1)
        except OSError:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _bad(kind):
    good, other = given(), given()
    return {
        "another's key": CertificatePair(good.certificate, other.key),
        "no PEM": CertificatePair("certificate", "key"),
        "swapped": CertificatePair(good.key, good.certificate),
        "cut off": CertificatePair(good.certificate[:200], good.key),
        "ended": ended(),
        "empty": CertificatePair("", ""),
        "away": SlapError("slap.unreachable", "no connection", retryable=True),
        "404": SlapError("slap.not_found", "the master answered 404"),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["another's key", "no PEM", "swapped", "cut off", "ended", "empty", "away", "404"]
)
def test_a_bad_answer_leaves_the_good_pair(scene, kind, caplog):
    scene.fetch()
    before = scene.answer
    scene.answer = _bad(kind)
    assert not scene.fetch()
    assert scene.files() == before
    assert "keeps its present pair" in caplog.text


@pytest.mark.parametrize("kind", ["another's key", "no PEM", "swapped", "cut off", "away", "404"])
def test_a_bad_answer_is_an_error_where_there_is_no_good_pair(scene, kind):
    scene.answer = _bad(kind)
    with pytest.raises((PartitiondError, SlapError)) as caught:
        scene.fetch()
    assert caught.value.code in ("certificate.refused", "slap.unreachable", "slap.not_found")
    assert not scene.repository.exists() or list(scene.repository.iterdir()) == []


def test_the_pair_of_another_instance_is_no_good_pair(scene):
    scene.fetch()
    scene.state = replace(scene.state, instance_guid="SOFTINST-2")
    scene.answer = _bad("away")
    with pytest.raises(SlapError):
        scene.fetch()


def test_empty_files_as_slapgrid_leaves_them(scene):
    scene.answer = CertificatePair("", "")
    scene.fetch()
    assert scene.files() == scene.answer
    assert not scene.fetch()
    with pytest.raises(PartitiondError, match="gave no pair"):
        certificates.read_pair(scene.config, scene.partition)
    # and then a real master
    scene.answer = given()
    assert scene.fetch()
    assert scene.files() == scene.answer


def test_tunnels_are_given_the_pair_that_is_in_force(scene):
    scene.fetch()
    first = certificates.read_pair(scene.config, scene.partition)
    assert (first.certificate.decode(), first.key.decode()) == (scene.answer.certificate, scene.answer.key)
    scene.answer = given()
    scene.fetch()
    second = certificates.read_pair(scene.config, scene.partition)
    assert second.files != first.files
    assert second.certificate.decode() == scene.answer.certificate


def test_a_purge_leaves_the_next_user_of_the_number_no_key(scene):
    scene.config.partition_base = "slappart"
    certificates.purge(scene.config)  # there is no directory yet
    scene.fetch()
    # of a node that had more partitions, by slapos.core; what is nobody's of ours stays
    for name in ("slappart7.key", "slappart7.crt", "slappart7.pem", "slappartner.key", "node.key"):
        (scene.repository / name).write_text("x")
    certificates.purge(scene.config)
    assert {one.name for one in scene.repository.iterdir()} == {
        "slappart7.pem",
        "slappartner.key",
        "node.key",
    }
    scene.config.certificate_repository = None
    certificates.purge(scene.config)


def test_what_the_user_did_to_its_files_is_undone(scene):
    scene.fetch()
    (scene.repository / "slappart0.key").write_text("mine")
    scene.fetch()
    assert scene.files() == scene.answer


def pair_of(content):
    return pair_files.Found(content.key.encode(), content.certificate.encode(), b"{}")


@pytest.mark.parametrize("start", ["nothing", "plain", "half", "linked"])
def test_killed_anywhere_the_two_match(scene, monkeypatch, start):
    """Whatever call into the kernel is the last one: the old pair or the new one, and the next time the new one."""
    old, new = given(), given()
    where = certificates.place(scene.config, scene.partition)
    after = 0
    while True:
        prepare(scene, where, start, old)
        done = cut_short(
            monkeypatch, after, lambda: pair_files.write(where, pair_of(new)), (*CALLS, "fchmod")
        )
        names = [scene.repository / f"slappart0.{kind}" for kind in ("crt", "key")]
        there = [path.exists() for path in names]
        if all(there):
            assert scene.files() in (old, new), after
            load_identity(names[0].read_bytes(), names[1].read_bytes())
        elif start != "half":
            assert (start, there) == ("nothing", [False, False]), after
        pair_files.write(where, pair_of(new))
        assert scene.files() == new
        clean(scene, where)
        if done:
            break
        after += 1
    assert after > 10


def prepare(scene, where, start, old):
    scene.repository.mkdir()
    if start in ("plain", "half"):
        (scene.repository / "slappart0.key").write_text(old.key)
    if start == "plain":
        (scene.repository / "slappart0.crt").write_text(old.certificate)
    if start == "linked":
        pair_files.write(where, pair_of(old))


def clean(scene, where):
    assert len([path for path in scene.repository.iterdir() if not path.is_symlink() and path.is_dir()]) == 1
    pair_files.remove(where)
    for path in scene.repository.iterdir():  # temporary files of the killed one, which recovery removes
        assert path.name.endswith(".partitiond"), path
        path.unlink()
    scene.repository.rmdir()


# --- renewal


@pytest.fixture
def lane(scene, monkeypatch):
    monkeypatch.setattr(
        "partitiond.certificate_lane.converge.apply",
        lambda _context, only: scene.converged.append(sorted(only)),
    )
    return CertificateLane(spread=0.0)


def test_a_pair_that_does_not_end_soon_is_not_asked_for(scene, lane):
    scene.fetch()
    lane.run(scene.context)
    assert scene.asked == 1
    assert scene.events == []


def test_a_pair_that_ends_soon_is_renewed_and_followed(scene, lane):
    scene.answer = given(days=20)
    scene.fetch()
    lane.run(scene.context)
    assert (scene.asked, scene.due) == (2, [])  # the master has no other yet
    lane.run(scene.context)
    assert scene.asked == 2  # once a day
    lane._due["slappart0"] -= 2 * 86400
    scene.answer = given()
    result = lane.run(scene.context)
    assert result.done == ["slappart0: its certificate is renewed"]
    assert scene.files() == scene.answer
    assert (scene.due, scene.converged) == (["slappart0"], [["slappart0"]])
    assert [event for event, _, _ in scene.events] == ["certificate.renewed"]
    lane._due["slappart0"] = 0
    assert lane.run(scene.context).done == []
    assert scene.asked == 3


def test_the_master_is_away_at_the_time(scene, lane, tmp_path):
    scene.answer = ended()
    scene.fetch()
    scene.answer = _bad("away")
    result = lane.run(scene.context)
    assert [name for name, _ in result.failures] == ["slappart0"]
    ((event, message, more),) = scene.events
    assert (event, more["partition"]) == ("certificate.expiring", "slappart0")
    assert "has ended on" in message
    assert more["hint"] in message
    # told once, also by the next daemon
    CertificateLane(spread=9e9).run(scene.context)
    assert len(scene.events) == 1


def test_the_node_s_own_certificate_is_told_of_in_stages(scene, lane, tmp_path):
    told = []
    for days in (40, 29, 25, 6, 5, 0.5, -1):
        made = make_identity(
            "COMP-1",
            now=datetime.now(UTC) + timedelta(days=days) - timedelta(days=60),
            lifetime=timedelta(days=60),
        )
        scene.config.cert_file = tmp_path / "certificate"
        scene.config.cert_file.write_bytes(made.certificate_pem)
        found = certificate_expiry.near(certificate_expiry.dates(scene.config, ()), datetime.now(UTC))
        told.append([one.days for one in found])
    assert told == [[], [30], [30], [7], [7], [1], [0]]
    (case,) = certificate_expiry.open_cases(scene.config, ())
    assert "the node's certificate has ended" in case
    assert "partitiond register" in case
    for _ in range(2):
        lane.run(scene.context)
    assert [event for event, _, _ in scene.events] == ["certificate.expiring"]
