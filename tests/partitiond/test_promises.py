"""Promises of real partitions, run by their users: what fails is found, told once, and shown; plugins are slapos.core's own."""

import pytest
from promise_scene import PromiseScene


@pytest.fixture(scope="module")
def standing(module_node_config):
    made = PromiseScene(module_node_config)
    yield made
    made.context.meters.close()


@pytest.fixture
def scene(standing):
    """The node, with nothing in its partitions."""
    return standing


def test_a_program_is_its_exit_status_and_what_it_says(scene):
    scene.promise("good", "echo all is well")
    scene.promise("bad", "echo no answer; echo from the port >&2; exit 3")
    assert scene.check() == {"bad": "no answer\nfrom the port"}
    assert scene.result("good")["result"] | {"date": 0} == {
        "type": "Test Result",
        "failed": False,
        "date": 0,
        "message": "all is well",
    }
    assert scene.result("bad")["result"]["failed"]


def test_a_plugin(scene):
    scene.plugin("one.py", "self.logger.info('port %s', self.getConfig('port'))", number=1, port="80")
    scene.plugin("two.py", "self.logger.error('down')", number=1)
    assert scene.check(1) == {"two.py": "down"}
    assert scene.result("one", 1)["result"]["message"] == "port 80"
