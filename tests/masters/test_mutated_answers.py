"""Ten thousand damaged answers over a real socket: no crash, memory within its bound, and the node as it was.

Each goes by the real client through the passes over software and instances: of a node with busy partitions whose state would
be rewritten, and whose programs would be stopped, by whatever took a damaged answer for the master's wish.
"""

import contextlib
import dataclasses
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from master_authority import Authority, server_context
from master_books import Books, Instance, Place, Slave
from master_mutations import Mutation, Mutator, Server, endless, whole
from master_wire import write

from partitiond import converge, instances, lanes, verbs
from partitiond.context import Context
from partitiond.errors import FAMILY
from partitiond.passes import Wish
from partitiond.state import InstanceState, SoftwareState, software_name
from slap_client.client import SlapClient
from slap_client.errors import SlapError
from slap_client.marshal import MAX_BYTES

RELEASE = "https://lab.example/software.cfg?a=1&b=2"
SEED = 20261123
KINDS = {
    "truncated": 2200, "wrong_types": 2200, "duplicates": 1100, "foreign": 900, "noise": 1200, "nested": 600,
    "bombs": 500, "statuses": 500, "redirects": 400, "protocol": 400,
}  # fmt: skip
LANES = ("software", "instances")
MEBI = 1024 * 1024


def books():
    made = Books("COMP-1")
    for number in range(4):
        made.places[f"slappart{number}"] = Place([(f"slaptap{number}", f"10.0.0.{number + 2}")])
    made.software[RELEASE] = "available"
    for number, state in enumerate(("started", "started", "stopped")):
        one = Instance(
            f"SOFTINST-{number}",
            RELEASE,
            f"n° {number}",
            f"slappart{number}",
            state,
            timestamp=1785000000000000 + number,
        )
        one.parameters, one.filter, one.access_status = (
            {"a": "<&>"},
            {"retention_delay": "7"},
            "#access Instance correctly",
        )
        made.instances[one.guid] = one
    made.instances["SOFTINST-0"].slaves = [Slave("SOFTINST-9", "shared", {"k": "v"}, 1785000000000009)]
    return made


GOOD = write(books().computer_document())


class Tally:
    """What became of the mutations, for the end of the run."""

    def __init__(self):
        self.counts, self.sent, self.seconds, self.peaks = Counter(), Counter(), 0.0, {}

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("mutated answers")
        for kind in self.sent:
            ends = {end: count for (of, end), count in sorted(self.counts.items()) if of == kind}
            terminalreporter.line(
                f"{kind:<14}{self.sent[kind]:>6}  " + ", ".join(f"{end} {n}" for end, n in ends.items())
            )
        peaks = ", ".join(f"{name} {size // MEBI} MiB" for name, size in self.peaks.items())
        terminalreporter.line(f"{self.sent.total()} in {self.seconds:.1f} s; memory at most: {peaks}")


@pytest.fixture(scope="module")
def tally(request):
    made = Tally()
    request.config.pluginmanager.register(made, "mutated-answers")
    return made


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


PLACES = [f"slappart{number}" for number in range(4)]
FREE = InstanceState("", wanted="destroyed")


def told(error):
    """Give an error's code; it has all that an error needs."""
    assert error.hint
    assert str(error).isprintable()
    return error.code


def left_out(result):
    """Say how a pass ended that had an answer; nothing may have been done by it."""
    assert result.done == []
    return "some left out" if result.failures else "nothing lost"


class Scene:
    """A node that is as the good answer wants it, and needs nothing."""

    def __init__(self, files, server):
        self.server = server
        files.write(slapos={"master_url": server.url}, partitiond={"address_ownership": "off"})
        self.context = Context.of(files.load())
        files.state.mkdir(mode=0o700)
        store = self.context.store
        for one in books().instances.values():
            store.save_instance(
                InstanceState(
                    one.partition,
                    one.state,
                    wanted=one.state,
                    instance_guid=one.guid,
                    software_release=RELEASE,
                    software_type=one.software_type,
                    timestamp=str(one.timestamp),
                    processed_at=time.time(),
                    retention_days=7.0,
                )
            )
        store.save_software(SoftwareState(RELEASE, available=True))
        done = self.context.config.software_root / software_name(RELEASE) / ".completed"
        done.parent.mkdir(parents=True)
        done.write_text("")
        self.node = converge.observe(self.context).node
        self.server.answer = Mutation("good", whole(GOOD))
        for lane in LANES:
            result = lanes.run(self.context, lane, Wish())
            assert (result.done, result.failures) == ([], [])
        assert server.posts == 0
        self.before = self.look()
        self.plan = verbs.plan(self.context)

    def look(self):
        """All that is remembered of instances and releases."""
        store = self.context.store
        return store.readable()[0], store.softwares()

    def unharmed(self):
        assert self.look() == self.before
        assert verbs.plan(self.context) == self.plan

    def give(self, mutation, lane):
        """One pass with this answer; say how it ended."""
        self.server.answer = mutation
        context = self.context
        known = context.store.readable()[0]
        try:
            if lane == "software" and mutation.kind != "noise":
                return left_out(lanes.software(context))
            document = lanes.ask(context)
        except FAMILY as error:
            return told(error)
        for one in document.partitions:
            if one.partition_id in PLACES:
                assert one.requested_state == known.get(one.partition_id, FREE).wanted
        if mutation.kind == "noise" and changed(document):
            return "another text"
        return left_out(instances.run_pass(context, self.node, document, known=known))

    def close(self):
        self.context.connection.close()
        self.context.meters.close()


GOOD_ENTRIES = {one.partition: one for one in books().instances.values()}


def changed(document):
    """Whether bytes of a text became others: no reader can tell that from another wish; TLS does."""
    for one in document.partitions:
        good = GOOD_ENTRIES.get(one.partition_id)
        now = (one.timestamp, one.software_release, one.software_type, one.instance_guid, one.access_status)
        if good and now != (
            str(good.timestamp),
            good.release,
            good.software_type,
            good.guid,
            good.access_status,
        ):
            return True
    return any(one.url != RELEASE for one in document.software)


@pytest.fixture
def scene(node_config, server):
    made = Scene(node_config(4, interface="lo"), server)
    yield made
    made.close()


@contextlib.contextmanager
def peak():
    """Measure by how much this process grew at most, as the kernel counts it."""
    found = {}
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM from here on
    before = _memory("VmRSS")
    yield found
    found["peak"] = _memory("VmHWM") - before


def _memory(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_ten_thousand(scene, tally):
    mutator = Mutator(GOOD, SEED)
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    mutator._dice.shuffle(kinds)
    began = time.monotonic()
    with peak() as memory:
        for number, kind in enumerate(kinds):
            end = scene.give(mutator.make(kind), LANES[number % 2])
            tally.sent[kind] += 1
            tally.counts[kind, end] += 1
            if number % 1000 == 0:
                scene.unharmed()
    tally.seconds += time.monotonic() - began
    tally.peaks["small ones"] = memory["peak"]
    scene.unharmed()
    assert scene.server.posts == 0, "the master was told something"
    assert memory["peak"] < 64 * MEBI
    # the lanes as a whole, and then the good answer is taken again
    for kind in KINDS:
        scene.server.answer = mutator.make(kind)
        with contextlib.suppress(*FAMILY):
            assert lanes.run(scene.context, "instances", Wish()).done == [] or kind == "noise"
    scene.server.answer = Mutation("good", whole(GOOD))
    assert lanes.run(scene.context, "instances", Wish()).failures == []
    scene.unharmed()


def test_slow_ones(scene, tally):
    with SlapClient(scene.server.url, "COMP-1", timeout=5, time_limit=0.3) as client:
        scene.server.answer = Server.SLOW
        for _ in range(10):
            with pytest.raises(SlapError) as caught:
                client.computer()
            assert caught.value.code == "slap.timeout"
            tally.sent["slow"] += 1
            tally.counts["slow", caught.value.code] += 1
    scene.unharmed()


def _too_large(scene, tally, answer, name):
    scene.server.answer = answer
    with peak() as memory, pytest.raises(SlapError) as caught:
        lanes.run(scene.context, "instances", Wish())
    assert caught.value.code == "slap.garbage"
    tally.sent["too large"] += 1
    tally.counts["too large", caught.value.code] += 1
    tally.peaks[name] = memory["peak"]
    scene.unharmed()
    return memory["peak"]


def test_a_gibibyte(scene, tally):
    """It is cut where the bound is, not read to its end."""
    assert _too_large(scene, tally, endless(1024 * MEBI), "1 GiB") < 1.5 * MAX_BYTES


@pytest.mark.parametrize(
    "value",
    [
        "<dictionary/>",
        *(pytest.param(one, marks=pytest.mark.full) for one in ("<none/>", "<list/>", "<string>ab</string>")),
    ],
)
def test_as_many_values_as_fit(scene, tally, value):
    """The largest answer that is read as a whole, and refused for its number of values or for what it is."""
    count = (MAX_BYTES - 1000) // len(value)
    body = b"<marshal><list>" + value.encode() * count + b"</list></marshal>"
    answer = Mutation("too large", whole(body))
    del body
    assert _too_large(scene, tally, answer, f"{MAX_BYTES // MEBI} MiB of {value}") < 6 * MAX_BYTES


FAULTS = ("plain", "reset", "garbage", "cut", "untrusted", "ended")


@pytest.mark.parametrize("fault", FAULTS)
def test_tls_faults(node_config, tally, tmp_path, fault):
    authority = Authority()
    pair = authority.server("127.0.0.1", days=-1 if fault == "ended" else 30)
    context = server_context(*pair.write(tmp_path, "server"))
    trusted = Authority("another") if fault == "untrusted" else authority
    (tmp_path / "ca.crt").write_text(trusted.certificate)
    plain = fault in ("plain", "reset", "garbage")
    server = Server(None if plain else context)
    files = node_config(1, interface="lo")
    files.write(
        slapos={"master_url": server.url.replace("http:", "https:"), "master_ca_file": tmp_path / "ca.crt"}
    )
    files.state.mkdir(mode=0o700)
    node = Context.of(files.load())
    wires = {
        "plain": whole(GOOD),
        "reset": b"",
        "garbage": b"\x16\x03\x01\xff\xff" + b"\x00" * 300,
        "cut": whole(GOOD)[:-50],
    }
    server.answer = Mutation("tls", wires.get(fault, whole(GOOD)), close=True)
    try:
        if plain:
            server._one = lambda connection: connection.recv(10) and connection.sendall(server.answer.wire)
        for _ in range(3):
            with pytest.raises(SlapError) as caught:
                lanes.run(node, "instances", Wish())
            assert caught.value.code in ("slap.tls", "slap.unreachable")
            assert caught.value.hint
            tally.sent[f"TLS {fault}"] += 1
            tally.counts[f"TLS {fault}", caught.value.code] += 1
        assert node.store.readable()[0] == {}
    finally:
        node.connection.close()
        node.meters.close()
        server.close()


def test_the_mutations_are_the_same_each_time():
    one, two = Mutator(GOOD, 7), Mutator(GOOD, 7)
    for kind in KINDS:
        assert [dataclasses.astuple(one.make(kind)) for _ in range(20)] == [
            dataclasses.astuple(two.make(kind)) for _ in range(20)
        ]
    assert sum(KINDS.values()) == 10_000
