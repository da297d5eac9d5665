"""Nodes with traffic, and the tables of what was sent and what was counted, printed at the end of the run."""

import contextlib

import pytest
from network_scene import standing_wire
from traffic_scene import Scene

_TABLES = pytest.StashKey[dict]()


@pytest.fixture
def table(request):
    """Print lines under a title at the end of the run."""
    tables = request.config.stash.setdefault(_TABLES, {})
    return lambda title, lines: tables.setdefault(title, []).extend(lines)


def pytest_terminal_summary(terminalreporter, config):
    for title, lines in config.stash.get(_TABLES, {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="module")
def make_scene(standing_node, command):
    """Make a node with so many partitions, those of ``routable`` with routable IPv4; the rest are keys of [partitiond]."""

    @contextlib.contextmanager
    def standing(count, routable, **keys):
        with standing_wire() as wire, standing_node(partitions=count, interface="eth0") as node:
            node.write(
                slapformat={"create_tap": "true"},
                partitiond={"bridge": "br0", "bridge_ports": "eth0", "meter_interval": 1, **keys},
                routable_ipv4={f"slappart{n}": f"203.0.113.{10 + n}/24 via 203.0.113.1" for n in routable},
            )
            made = Scene(wire, node, command)
            try:
                yield made.up()
            finally:
                made.down()

    return standing
