"""``limit`` of a real node: who has used up its quota is slowed, its neighbour is not, and everything ends where it should."""

import json
import pwd
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from json_schemas import parsed
from metrics_scene import until
from network_scene import as_user

from netplan.counters import read_counters
from partitiond import converge, lanes
from partitiond.context import Context
from partitiond.state import InstanceState, Store

GUIDS = {"slappart0": "SOFTINST-0", "slappart1": "SOFTINST-1"}
COUNT = 400
# the burst is 128 KiB and a second's worth: 8 kbit/s is a packet a second
MOST = 250
BLAST = """
import json, socket, sys
target, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
    for _ in range(count):
        try:
            one.sendto(bytes(1000), (target, port))
        except PermissionError:
            pass
print(json.dumps("sent"))
"""


class Far:
    """The router, and how much a partition's user gets to it."""

    def __init__(self, bridge):
        self.address = str(bridge.gateway)

    def got(self, user, count=COUNT):
        """Send so many packets as a user, from whatever address it is given; return how many left, neighbour discovery too."""
        before = self._left(user)
        as_user(user, BLAST, self.address, 9, count)
        return self._left(user) - before

    @staticmethod
    def _left(user):
        reading, uid = read_counters(), pwd.getpwnam(user).pw_uid
        partition = user.replace("slapuser", "slappart")
        own = sum(
            one.packets_out for one in reading.traffic if (one.partition, one.scope) == (partition, "remote")
        )
        return own + sum(one.packets_out for one in reading.shared if one.uid == uid)


@pytest.fixture
def far(bridge):
    return Far(bridge)


def remember_instances(node):
    store = Store(node.state)
    for name, guid in GUIDS.items():
        store.save_instance(InstanceState(name, "started", "started", instance_guid=guid))


def events(node):
    lines = (node.log / "events.jsonl").read_text().splitlines()
    return [one["event"] for one in map(json.loads, lines)]


def operations(command, node):
    return parsed(command("plan", "--json", "-c", node.path))["operations"]


def apply(command, node):
    done = command("apply", "--json", "-c", node.path)
    assert done.returncode == 0, done.stderr
    return parsed(done)["done"]


def nft(*words):
    return subprocess.run(["/usr/sbin/nft", *words], check=True, capture_output=True, text=True).stdout


def limits():
    return sorted(
        item["limit"]["name"]
        for item in json.loads(nft("-j", "list", "limits"))["nftables"]
        if "limit" in item
    )


@pytest.fixture
def node(bridge, node_config, command):
    quota = {"slappart0": "100 kB limit 8 kbit/s", "slappart1": "100 GB limit 8 kbit/s"}
    made = node_config(2, interface=bridge.name, quota=quota, partitiond={"meter_interval": 1})
    apply(command, made)
    remember_instances(made)
    apply(command, made)
    return made


@pytest.mark.full
def test_without_a_daemon(node, far, command):
    assert command("sync", "usage", "-c", node.path).returncode == 0
    assert far.got("slapuser0") >= COUNT
    assert operations(command, node) == []
    assert command("sync", "usage", "-c", node.path).returncode == 0
    (only,) = operations(command, node)
    assert only["id"] == "filter/partitiond"
    assert "slappart0 is to be limited to 8000 bit/s each way" in only["reason"]
    assert apply(command, node) == 1
    assert operations(command, node) == []
    assert apply(command, node) == 0
    assert far.got("slapuser0") <= MOST
    assert far.got("slapuser1") >= COUNT
    status = parsed(command("status", "--json", "-c", node.path))
    assert [one["quota"]["state"] for one in status["partitions"]] == ["exceeded", "within"]
    assert [one for one in status["node"]["open_cases"] if "limited to 8000 bit/s each way" in one]
    assert [one for one in events(node) if one.startswith("quota")] == ["quota.exceeded"]
    for damage in (
        "flush map inet partitiond limited_6_out",
        "flush map inet partitiond limited_link_in",
    ):
        nft(*damage.split())
        assert [one["id"] for one in operations(command, node)] == ["filter/partitiond"]
        assert apply(command, node) == 1
        assert operations(command, node) == []
    assert far.got("slapuser0") <= MOST
    node.write(quota={"slappart0": None})
    (only,) = operations(command, node)
    assert "slappart0 is not to be limited any more" in only["reason"]
    apply(command, node)
    assert limits() == []
    assert far.got("slapuser0") >= COUNT
    node.write(quota={"slappart0": "1 B limit 8 kbit/s"})
    apply(command, node)
    assert limits()
    assert command("teardown", "-c", node.path).returncode == 0
    assert "partitiond" not in nft("list", "tables")


def test_the_daemon(node, far, command):
    """It limits at once what it finds, and takes nothing of it for drift; a restart changes and tells nothing."""
    node.write(quota={"slappart0": "100 GB limit 8 kbit/s"})
    said = []

    def daemon():
        return command.start("run", "-c", node.path)

    def end(one):
        one.terminate()
        said.append(one.communicate(timeout=30)[1])
        assert one.returncode == 0, said

    running = daemon()
    try:
        until(
            lambda: running.poll() is not None or (node.state / "quotas.json").exists(),
            "a pass of the meters",
        )
        assert far.got("slapuser0") >= COUNT
        node.write(quota={"slappart0": "100 kB limit 8 kbit/s"})
        apply(command, node)
        until(lambda: limits() and "quota.exceeded" in events(node), "the limit")
        assert limits() == [f"rate/slappart0/{way}/1000" for way in ("in", "out")]
        assert far.got("slapuser0") <= MOST
        assert far.got("slapuser1") >= COUNT
        assert operations(command, node) == []
        end(running)
        assert limits(), "what limits outlives the daemon"
        passes = events(node).count("node.started")
        running = daemon()
        until(lambda: events(node).count("node.started") > passes, "the daemon to be up again")
        assert limits()
        status = parsed(command("status", "--json", "-c", node.path))
        assert status["partitions"][0]["quota"]["state"] == "exceeded"
        node.write(quota={"slappart0": "none"})
        apply(command, node)
        assert limits() == []
        assert far.got("slapuser0") >= COUNT
    finally:
        if running.poll() is None:
            end(running)
    assert [one for one in events(node) if one.startswith("quota")] == ["quota.exceeded"]
    assert not [one for one in events(node) if one.startswith("drift")]
    assert "Traceback" not in "".join(said)


def test_a_new_month(node, far):
    context = Context.of(node.load())
    try:
        context.limits_changed = lambda: converge.apply(context)
        lanes.usage(context)
        assert far.got("slapuser0") >= COUNT
        context.quotas._judged = (0.0, None)
        lanes.usage(context)
        assert limits()
        assert far.got("slapuser0") <= MOST
        lanes.usage(context)
        # by the clock of the meters alone
        later = (datetime.now(UTC).replace(day=1) + timedelta(days=32)).replace(day=1, hour=3).timestamp()
        context.meters.clock = lambda: later
        lanes.usage(context)
        assert limits() == []
        assert far.got("slapuser0") >= COUNT
        assert [one for one in events(node) if one.startswith("quota")] == ["quota.exceeded", "quota.renewed"]
    finally:
        context.meters.close()


def test_what_was_refused_is_not_lost_with_its_counter(node, far):
    """The counter of who can be limited no more goes with the next apply: it takes nothing along, and makes no gap."""
    context = Context.of(node.load())
    try:
        lanes.usage(context)
        far.got("slapuser0")
        context.quotas._judged = (0.0, None)
        lanes.usage(context)
        assert not converge.apply(context).failures
        assert far.got("slapuser0") <= MOST
        lanes.usage(context)
        before = _denied(context)
        assert before >= COUNT - MOST
        node.write(quota={"slappart0": "100 kB"})
        context.adopt(node.load())
        assert not converge.apply(context).failures
        context.quotas._judged = (0.0, None)
        lanes.usage(context)
        assert _denied(context) == before
        with context.meters.ledger().reader() as ledger:
            gaps = ledger.usage(None, None, "slappart0").gaps
        assert gaps == ()
    finally:
        context.meters.close()


def _denied(context):
    with context.meters.ledger().reader() as ledger:
        return sum(one.denied_packets for one in ledger.totals() if one.id == "slappart0")


def test_an_instance_that_comes_after_is_not_limited(node, far):
    context = Context.of(node.load())
    try:
        context.limits_changed = lambda: converge.apply(context)
        lanes.usage(context)
        far.got("slapuser0")
        context.quotas._judged = (0.0, None)
        lanes.usage(context)
        assert limits()
        context.store.save_instance(
            InstanceState("slappart0", "started", "started", instance_guid="SOFTINST-9")
        )
        lanes.usage(context)
        assert limits() == []
        assert context.quotas.standings()["slappart0"].used < 100_000
    finally:
        context.meters.close()
