"""Services across three nodes, as ``partitiond demo --nodes 3`` shows them, in both families; its text is this test's log."""

import importlib.util
import subprocess
import sys

import pytest
from nodes_world import World
from test_nodes_rebuild import lost_and_rebuilt

from partitiond.cli_parser import WRONG_USE
from partitiond.demo import scenario as demo_scenario
from partitiond.demo.scenario import Scenario
from partitiond.errors import PartitiondError

NO_MESH = importlib.util.find_spec("partitiond.config_mesh") is None


MESH = pytest.mark.skipif(NO_MESH, reason="there is no [tinc] yet")


@pytest.mark.parametrize(
    ("nodes", "mesh"),
    [
        pytest.param(3, False, id="IPv6"),
        pytest.param(3, True, id="IPv4 over tinc", marks=MESH),
        # both services on one node
        pytest.param(2, False, id="IPv6, two nodes", marks=pytest.mark.full),
    ],
)
def test_services_across_nodes(nodes, mesh, capsys):
    play = Scenario(nodes, mesh=mesh, world_class=World)
    with capsys.disabled():
        print()
        try:
            play.play()
            for node in play.world.nodes:
                node.settled()
            if (nodes, mesh) == (3, False):
                lost_and_rebuilt(play.world, capsys, "B")
            play.clear_up()
        except PartitiondError as error:
            pytest.fail(f"[{error.code}] {error}\n{play.logs()}")
        finally:
            play.close()


def demo(*words):
    command = [sys.executable, "-P", "-m", "partitiond", "demo", *words]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "words", [["--nodes", "0"], ["--nodes", "10"], ["--nodes", "two"], ["--mesh"]], ids=" ".join
)
def test_wrong_numbers_of_nodes_are_wrong_use(words):
    done = demo(*words)
    assert done.returncode == WRONG_USE, done.stderr
    assert "next: " in done.stderr


def test_a_program_that_is_missing_is_told_with_its_package(monkeypatch):
    monkeypatch.setitem(demo_scenario._PROGRAMS, "/usr/sbin/mariadbd-of-nobody", "mariadb-server-core")
    monkeypatch.setitem(demo_scenario._MESH_PROGRAMS, "/usr/sbin/tincd-of-nobody", "tinc")
    with pytest.raises(PartitiondError) as said:
        demo_scenario.check_programs(mesh=True)
    assert said.value.code == "demo.needs"
    assert "/usr/sbin/mariadbd-of-nobody" in str(said.value)
    assert said.value.hint.endswith("mariadb-server-core tinc")
    with pytest.raises(PartitiondError) as said:
        demo_scenario.check_programs(mesh=False)
    assert said.value.hint.endswith("mariadb-server-core")
