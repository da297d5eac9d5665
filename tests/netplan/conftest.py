"""A network of its own for each test."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import netplan_scene
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


@pytest.fixture(params=["nftables", "iptables"])
def backend(request, monkeypatch) -> str:
    """Each in turn: what the packet filter is made of, here and in the scene."""
    return _use(monkeypatch, request.param)


@pytest.fixture
def legacy(node, monkeypatch) -> Node:
    """The node, and its packet filter is made of iptables."""
    _use(monkeypatch, "iptables")
    return node


def _use(monkeypatch, backend: str) -> str:
    if backend == "iptables" and find_spec("iptc") is None:
        pytest.skip("python-iptables is not installed: tools/environment --with iptables")
    monkeypatch.setattr(netplan_scene, "backend", backend)
    return backend
