"""A network of its own for each test."""

import os
from collections.abc import Iterator

import pytest
from netplan_scene import Node, enter, leave_for_a_new_one, namespace, wire
from pyroute2 import IPRoute

from netplan.bpf_state import remove_hooks


@pytest.fixture
def node() -> Iterator[Node]:
    home = namespace()
    neighbour = own = -1
    try:
        neighbour = leave_for_a_new_one()
        own = leave_for_a_new_one()
        with IPRoute() as ipr:
            yield Node(ipr, own, neighbour, wire(ipr, neighbour))
            enter(own)
            remove_hooks()  # they outlive the namespace, too
    finally:
        enter(home)
        for descriptor in (home, neighbour, own):
            if descriptor >= 0:
                os.close(descriptor)
