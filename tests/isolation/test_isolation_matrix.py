"""The isolation matrix: eight partition users and an ordinary user × every resource of every other, and of the node.

Printed as a table at the end of the run.  Once with everything in force: no breach, and whatever is one's own or public works.
Once with the walls switched off: every attempt gets through for somebody, so each of them can fail.
"""

import time

import isolation_walls as walls
import pytest
from isolation_addresses import Rounds
from isolation_cells import Matrix, first_of_each
from isolation_guests import Guests
from isolation_node import COUNT, standing_ground, standing_scene
from isolation_working import Working

# what no product has to stop, so that nothing shows how it would be
KERNELS_OWN = {
    "sent by the wire": "a source that is the node's own IPv4 is a martian (net/ipv4/fib_frontend.c)",
    "packets from the tun": "likewise",
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


def run(scene, title, summary):
    began = time.monotonic()
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
    rounds = Rounds(scene)
    rounds.open()
    if scene.enforced:
        matrix.cells += Working(rounds).cells()
    for take in (rounds.listening, rounds.everywhere, rounds.squatting, rounds.sending, rounds.nobodys):
        matrix.cells += take()
    matrix.cells += [*rounds.private(), *rounds.from_wire(), *Guests(rounds).cells()]
    rounds.close()
    matrix.seconds = time.monotonic() - began
    return matrix


def test_nobody_gets_at_what_is_another_s(make_scene, summary):
    with make_scene(enforced=True) as scene:
        matrix = run(scene, "in force", summary)
    wrong = [*matrix.breaches, *matrix.broken]
    if wrong:
        pytest.fail(
            f"{len(matrix.breaches)} breaches, {len(matrix.broken)} wrongly refused\n{first_of_each(wrong)}"
        )


def test_each_attempt_gets_through_where_nothing_stops_it(make_scene, summary):
    with make_scene(enforced=False) as scene:
        matrix = run(scene, "switched off", summary)
    idle = [
        one
        for one in matrix.idle()
        if not one.kind.startswith("source: ") and not (one.kind in KERNELS_OWN and "IPv4" in one.what)
    ]
    assert not idle, f"these prove nothing:\n{first_of_each(idle)}"
