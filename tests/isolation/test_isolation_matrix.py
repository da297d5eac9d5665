"""The isolation matrix: eight partition users and an ordinary user × every resource of every other, and of the node.

Printed as a table at the end of the run.  Once with everything in force: no breach, and whatever is one's own or public works.
Once with the walls switched off: every attempt gets through for somebody, so each of them can fail.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import isolation_walls as walls
import pytest
from isolation_addresses import Rounds
from isolation_cells import Matrix, first_of_each
from isolation_guests import Guests
from isolation_node import COUNT, standing_ground, standing_scene
from isolation_working import Working

# without its programs at the cgroup, another's address is refused when it is used, not when it is bound
in_force = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)

# what is stopped also when all is switched off, so that nothing shows how it would be
KERNELS_OWN = {
    "sent by the wire": "IPv4",  # a source that is the node's own IPv4 is a martian (net/ipv4/fib_frontend.c)
    "packets from the tun": "IPv4",
    "frames for another": "for its guest",  # a bridge has learned where that is
    "session keyring": "search",  # not to be switched off: whatever we start has one that gives nothing
}


class Summary:
    """Prints the tables at the end of the run."""

    def __init__(self):
        self.matrices = []

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("isolation matrix")
        for matrix in self.matrices:
            for line in matrix.lines():
                terminalreporter.line(line)
            terminalreporter.line("")


@pytest.fixture(scope="module")
def summary(request):
    made = Summary()
    request.config.pluginmanager.register(made, "isolation-matrix")
    return made


@pytest.fixture
def ground(tmp_path):
    with standing_ground(tmp_path) as made:
        yield made


@pytest.fixture
def make_scene(ground, node_config, command):
    return lambda **how: standing_scene(ground, node_config(COUNT, interface="eth0"), command, **how)


def run(scene, title, summary, *, whole=False):
    matrix = Matrix(title, (*scene.attackers, "root", "wire"))
    summary.matrices.append(matrix)
    told = walls.lay_out(scene)
    if scene.enforced:
        matrix.cells += scene.cells([*walls.own_processes(scene), *walls.own_shared(scene, told)])
    for jobs in (walls.directories, walls.files, walls.kept, walls.sockets, walls.devices):
        matrix.cells += scene.cells(list(jobs(scene)))
    matrix.cells += scene.cells(list(walls.shared(scene, told)))
    for jobs in (walls.namespaces, walls.privileges, walls.processes):
        matrix.cells += scene.cells(list(jobs(scene)))
    walls.take_up(scene)
    network(matrix, scene, whole=whole)
    return matrix


def network(matrix, scene, *, whole=False):
    """What passes the packet filter, or does not."""
    rounds = Rounds(scene, whole=whole)
    rounds.open()
    matrix.cells += Working(rounds).cells()
    for take in (
        rounds.listening,
        rounds.everywhere,
        rounds.squatting,
        rounds.sending,
        rounds.nobodys,
        rounds.common,
    ):
        matrix.cells += take()
    # last, for where nothing is in force they lead the wire astray
    matrix.cells += [*rounds.private(), *rounds.from_wire(), *Guests(rounds).cells()]
    rounds.close()


def no_breach(matrix, *, but=()):
    wrong = [one for one in (*matrix.breaches, *matrix.broken, *matrix.slow) if one.kind not in but]
    if wrong:
        counts, *_ = matrix.lines()
        pytest.fail(f"{counts}\n{first_of_each(wrong)}")


@in_force
def test_nobody_gets_at_what_is_another_s(make_scene, summary):
    with make_scene(enforced=True) as scene:
        matrix = run(scene, "in force", summary)
        scene.verb("sync", "usage")
        used = {one["id"]: one["denied_packets"] for one in scene.verb("usage")["partitions"]}
    no_breach(matrix)
    assert len(used) == COUNT
    assert all(used.values()), f"refusals are counted for those who tried: {used}"


@in_force
@pytest.mark.full
def test_every_destination_and_client(make_scene, summary):
    """Nothing takes turns; and connections are begun by SYN cookies, which no socket answers."""
    cookies = Path("/proc/sys/net/ipv4/tcp_syncookies")
    before = cookies.read_text()
    cookies.write_text("2")
    try:
        with make_scene(enforced=True) as scene:
            matrix = run(scene, "in force, every destination, SYN cookies", summary, whole=True)
    finally:
        cookies.write_text(before)
    no_breach(matrix)


@in_force
@pytest.mark.skipif(find_spec("iptc") is None, reason="python-iptables is not installed")
def test_legacy_hosts_stop_the_same_but_for_what_guests_send(make_scene, summary):
    """The open case ``tap-guard`` (netplan/legacy_cases.py); nothing else that is about the network."""
    with make_scene(enforced=True, backend="iptables") as scene:
        matrix = Matrix("in force, network, iptables", (*scene.attackers, "root", "wire"))
        summary.matrices.append(matrix)
        network(matrix, scene)
    guests = ("frames from the tap", "packets from the tun")
    no_breach(matrix, but=guests)
    assert {one.kind for one in matrix.breaches} == set(guests)


def test_each_attempt_gets_through_where_nothing_stops_it(make_scene, summary):
    with make_scene(enforced=False) as scene:
        matrix = run(scene, "switched off", summary)
    idle = [
        one
        for one in matrix.idle()
        if not one.kind.startswith("source: ") and KERNELS_OWN.get(one.kind, "\0") not in one.what
    ]
    assert not idle, f"these prove nothing:\n{first_of_each(idle)}"
    for kind, (breaches, cells) in matrix.shares().items():
        judged = not kind.startswith("source: ") and kind not in KERNELS_OWN
        assert not judged or breaches * 10 >= cells, f"{kind}: {breaches} of {cells}"
    assert len(matrix.breaches) > 10000
