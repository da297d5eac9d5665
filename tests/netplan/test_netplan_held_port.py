"""A port of the loopback at which one user alone may answer, by both backends, with ownership and without."""

import socket
from contextlib import ExitStack

import pytest
from netplan_scene import NOTHING, UID, as_user, connect, opened_by, wanted

from netplan.errors import NetplanError
from netplan.model import HeldPort

pytestmark = pytest.mark.usefixtures("backend")

OWNER, OTHER, NOBODY, ROOT = UID, UID + 1, 1234, 0
LOOPBACK, PORT = "127.0.0.1", 5000
EVERYBODY = {OTHER, ROOT}
BRIEF = 0.2  # what is answered is answered at once, by the kernel itself


def held(**more):
    return wanted(3, held=(HeldPort(PORT, OWNER), HeldPort(PORT + 1, OTHER)), **more)


def answered(uid, address, port=PORT, target=LOOPBACK):
    """Who is answered by a listener of that user; the kernel itself completes handshakes."""
    with ExitStack() as stack:
        with opened_by(uid):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            one = stack.enter_context(socket.socket(family))
        if address == "::":
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((address, port))
        one.listen()
        said = {who: as_user(who, lambda: connect(None, target, port, patience=BRIEF)) for who in EVERYBODY}
    return {who for who, how in said.items() if how == "ok"}


@pytest.mark.parametrize("ownership", [True, False])
def test_nobody_answers_in_anothers_place(node, ownership):
    node.converge(wanted(3, ownership=ownership))
    assert answered(NOBODY, LOOPBACK) == EVERYBODY, "without it, whoever is first"
    node.converge(held(ownership=ownership))
    for uid, address in ((OTHER, LOOPBACK), (NOBODY, LOOPBACK), (NOBODY, "0.0.0.0"), (OTHER, "::")):
        assert not answered(uid, address), f"{uid} at {address}"
    for uid in (OWNER, ROOT):
        assert answered(uid, LOOPBACK) == EVERYBODY
        assert answered(uid, "::1", target="::1") == EVERYBODY
    for address in ("::1", "::"):  # where localhost is looked for first
        assert not answered(OTHER, address, target="::1")
    assert answered(OTHER, LOOPBACK, PORT + 1) == EVERYBODY
    assert not answered(OWNER, LOOPBACK, PORT + 1)


def test_elsewhere_the_number_is_anybodys(node):
    node.converge(held())
    assert answered(NOBODY, "127.0.0.2", target="127.0.0.2") == EVERYBODY
    assert answered(NOBODY, "::1", PORT + 2, "::1") == EVERYBODY
    assert answered(NOBODY, LOOPBACK, PORT + 2) == EVERYBODY


def test_a_port_of_roots(node):
    node.converge(wanted(3, held=(HeldPort(PORT, ROOT),)))
    assert answered(ROOT, LOOPBACK) == EVERYBODY
    assert not answered(OWNER, LOOPBACK)


def test_who_was_there_before_is_not_served_on(node):
    node.converge(wanted(3))
    with ExitStack() as stack:
        with opened_by(NOBODY):
            one = stack.enter_context(socket.create_server((LOOPBACK, PORT)))
        asking = stack.enter_context(socket.create_connection((LOOPBACK, PORT)))
        with opened_by(NOBODY):
            answering = stack.enter_context(one.accept()[0])
        asking.settimeout(BRIEF)
        answering.sendall(b"before")
        assert asking.recv(9) == b"before"
        node.converge(held())
        with pytest.raises(OSError, match=r"reset|Broken pipe|not permitted|timed out"):  # noqa: PT012 - the first may pass
            answering.sendall(b"after")
            asking.recv(9)


def test_the_filter_follows_and_nothing_else(node):
    node.converge(wanted(3))
    assert [one.split("/")[0] for one in node.converge(held())] == ["filter"]
    assert not node.plan(held())
    assert [one.split("/")[0] for one in node.converge(wanted(3))] == ["filter"]
    node.converge(NOTHING)


@pytest.mark.parametrize("port", [0, 65536])
def test_no_port(port):
    with pytest.raises(NetplanError):
        HeldPort(port, OWNER)


def test_one_owner():
    with pytest.raises(NetplanError):
        wanted(3, held=(HeldPort(PORT, OWNER), HeldPort(PORT, OTHER)))
