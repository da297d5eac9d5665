"""How the programs at the cgroup come, change, outlive who loaded them, and go."""

import errno
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from netplan_scene import (
    BASE,
    NOTHING,
    UID,
    as_user,
    ask,
    echoing,
    family_of,
    inside,
    know_each_other,
    leave_for_a_new_one,
    wanted,
)
from pyroute2 import IPRoute

from netplan import bpf_contents, bpf_state, bpf_syscall, cgroup
from netplan.apply import apply
from netplan.bpf_programs import MAPS, OWNERS, REFUSED
from netplan.observe import observe
from netplan.plan import plan

A, B, C, NOBODY = UID, UID + 1, UID + 2, 1234
A6, B6, C6 = "2001:db8:1::2", "2001:db8:1::3", "2001:db8:1::4"
A_RANGE = "2001:db8:1:0:4001::5"
HOOKS = "bpf/cgroup"

pytestmark = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What another test was told of its own namespace and machine is of no use."""
    yield
    bpf_state._refusals.clear()


def hooked(count=2, **more):
    return wanted(count, **{"ranges": True, "cgroup_bpf": True, "local_source_table": True, **more})


def bind(uid, address):
    def work():
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as one:
            one.bind((address, 0))
            return "ok"

    return as_user(uid, work)


def place():
    return bpf_state._place(bpf_state._cookie())


def in_force():
    """Where the pins of the programs in force are."""
    (found,) = [path for path in place().iterdir() if path.name != REFUSED]
    return found


def in_another_process(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- coming, staying, going -------------------------------------------------------------------------------------------


def test_they_outlive_who_loaded_them(node):
    desired = hooked()
    in_another_process(lambda: node.converge(desired))
    assert (bind(B, A6), bind(B, A_RANGE), bind(A, A6)) == ("EPERM", "EPERM", "ok")
    assert node.plan(desired) == {}
    assert bpf_state.read_refusals().counts == {(B, "bind"): 2}
    in_another_process(lambda: node.converge(hooked(3)))
    # what this process remembers is not what is there
    assert list(node.plan(hooked(1))) != []
    node.converge(hooked(1))
    assert (bind(B, A6), bind(A, B6)) == ("EPERM", "ok")


def test_they_act_in_their_own_namespace_alone(node):
    node.converge(hooked())
    other = leave_for_a_new_one()
    try:
        with inside(other), IPRoute() as ipr:
            ipr.link("set", index=1, state="up")
            for address in (A6, B6):
                ipr.addr("add", index=1, address=address, prefixlen=128, flags=2)
            assert bind(B, A6) == "ok"
            with echoing(A, A6, socket.SOCK_DGRAM) as port:
                assert as_user(B, lambda: ask(A6, port, socket.SOCK_DGRAM)) == A6
            assert bpf_state.read_refusals().counts == {}
            assert bpf_state.observe_hooks(wanted=False).leftover == ()
        with inside(node.own):
            assert bind(B, A6) == "EPERM"
    finally:
        with inside(node.own):
            node.converge(NOTHING)
        os.close(other)


def test_two_nodes_of_one_machine_do_not_meet(node):
    node.converge(hooked())
    other = leave_for_a_new_one()
    try:
        with inside(other):
            contents = bpf_contents.contents(hooked(1))
            bpf_state.load_hooks(contents, bpf_state.observe_hooks(wanted=True))
            assert bind(B, A6) == "EPERM"
            assert bpf_state.read_refusals().counts == {(B, "bind"): 1}
            bpf_state.remove_hooks()
        with inside(node.own):
            assert bpf_state.read_refusals().counts == {}
            assert bind(A, B6) == "EPERM"
            assert node.plan(hooked()) == {}
    finally:
        os.close(other)


@pytest.mark.parametrize("off", [NOTHING, hooked(ownership=False), hooked(cgroup_bpf=False)])
def test_they_go(node, off):
    node.converge(hooked())
    assert bind(B, A6) == "EPERM"
    node.converge(off)
    assert not (cgroup.BPFFS / "partitiond").exists()
    if off is not NOTHING:
        assert bind(B, A6) == "ok"
        node.converge(hooked())
        assert bind(B, A6) == "EPERM"


def test_partitions_come_and_go_by_differences(node, monkeypatch):
    node.converge(hooked(2))
    know_each_other(node)
    changed = []
    update, delete = bpf_syscall.update_all, bpf_syscall.delete_all
    monkeypatch.setattr(
        bpf_syscall, "update_all", lambda one, entries: (changed.append(len(entries)), update(one, entries))
    )
    monkeypatch.setattr(
        bpf_syscall, "delete_all", lambda one, keys: (changed.append(-len(keys)), delete(one, keys))
    )
    before = in_force()
    node.converge(hooked(3))
    assert sum(changed) == sum(map(abs, changed)) == 4  # IPv6, private IPv4, range, source
    assert bind(B, C6) == "EPERM"
    changed.clear()
    node.converge(hooked(2))
    assert sum(changed) == -sum(map(abs, changed)) == -4
    assert in_force() == before
    assert as_user(C, lambda: 0) == "0"
    swapped = hooked(2)
    one, other = swapped.partitions
    changed.clear()
    node.converge(replace(swapped, partitions=(replace(one, uid=B), replace(other, uid=A))))
    assert (bind(A, A6), bind(B, A6), bind(A, B6), bind(B, A_RANGE)) == ("EPERM", "ok", "ok", "ok")


# --- harm -------------------------------------------------------------------------------------------------------------


def _detach():
    with bpf_syscall.pinned(str(in_force() / "bind6")) as link:
        bpf_syscall.detach(link)


def _unlink_link():
    (in_force() / "bind6").unlink()


def _unlink_map():
    (in_force() / OWNERS).unlink()


def _forget():
    with bpf_syscall.pinned(str(in_force() / "note")) as note:
        bpf_syscall.update(note, bytes(4), bytes(16))
    with bpf_syscall.pinned(str(in_force() / OWNERS)) as owners:
        bpf_syscall.delete_all(owners, list(bpf_syscall.entries(owners, MAPS[OWNERS])))


def _remove_all():
    bpf_state.remove_hooks()


def _cut_off():
    found = in_force()
    found.rename(found.with_name(f"making-{found.name}"))


def _another_version():
    in_force().rename(in_force().with_name("0123456789abcdef"))


def _left_over():
    (place() / "making-0123456789abcdef").mkdir()


@pytest.mark.parametrize(
    ("harm", "action"),
    [
        (_detach, "create"),
        (_unlink_link, "create"),
        (_unlink_map, "create"),
        (_forget, "change"),
        (_remove_all, "create"),
        (_cut_off, "create"),
        (_another_version, "create"),
        (_left_over, "change"),
    ],
)
def test_harm_is_seen_and_repaired(node, harm, action):
    desired = hooked()
    node.converge(desired)
    assert bind(B, A6) == "EPERM"
    before = bpf_state.read_refusals().counts
    harm()
    operations = node.converge(desired)
    assert {name: one.action for name, one in operations.items()} == {HOOKS: action}
    assert (bind(B, A6), bind(B, A_RANGE), bind(A, A6)) == ("EPERM", "EPERM", "ok")
    assert len(list(place().iterdir())) == 2
    lost = harm is _remove_all
    assert bpf_state.read_refusals().counts == {(B, "bind"): 2 + (0 if lost else before[B, "bind"])}


def test_a_new_version_is_in_force_before_the_old_one_goes(node, monkeypatch):
    desired = hooked()
    node.converge(desired)
    _another_version()
    seen = []
    detach = bpf_syscall.detach

    def watched(link):
        seen.append(bind(B, A6))
        detach(link)
        seen.append(bind(B, A6))

    monkeypatch.setattr(bpf_syscall, "detach", watched)
    node.converge(desired)
    assert seen == ["EPERM"] * 14


# --- where they cannot be ---------------------------------------------------------------------------------------------


def test_without_a_cgroup_the_routing_table_stands_in(node, monkeypatch):
    desired = hooked()
    monkeypatch.setattr(cgroup, "root", lambda: None)
    operations = node.converge(desired)
    assert HOOKS not in operations
    assert "rule/local-source" in operations
    assert "no cgroup2" in observe(desired).hooks.refused
    know_each_other(node)
    with echoing(B, B6, socket.SOCK_STREAM) as port:
        assert as_user(A, lambda: ask(B6, port, socket.SOCK_STREAM)) == str(BASE.ip)
        monkeypatch.undo()
        assert list(node.converge(desired)) == [HOOKS]
        assert as_user(A, lambda: ask(B6, port, socket.SOCK_STREAM)) == A6
        monkeypatch.setattr(cgroup, "root", lambda: None)
        assert {one.id: one.action for one in node.converge(desired).values()} == {HOOKS: "remove"}
        assert as_user(A, lambda: ask(B6, port, socket.SOCK_STREAM)) == str(BASE.ip)


def test_a_kernel_that_refuses_the_programs(node, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(bpf_syscall, "load_program", refuse)
    desired = hooked()
    assert HOOKS not in node.converge(desired)
    state = observe(desired).hooks
    assert (state.version, state.refused) == ("", "Operation not permitted")
    monkeypatch.undo()
    assert node.plan(desired) == {}  # it is not tried at every look
    bpf_state._refusals.clear()
    assert list(node.converge(desired)) == [HOOKS]


def test_a_container_that_may_not_call_it_at_all(node, monkeypatch):
    monkeypatch.setattr(
        bpf_syscall, "_call", lambda _, attributes: bpf_syscall._Answer(-1, errno.EPERM, attributes)
    )
    desired = hooked()
    assert HOOKS not in node.converge(desired)
    assert observe(desired).hooks.refused == "Operation not permitted"
    assert bpf_state.read_refusals() == ("", {})
    node.converge(NOTHING)


def test_a_failure_while_attaching_is_told_and_keeps_nothing_else_from_being_done(node, monkeypatch):
    desired = hooked()
    seen = observe(desired)
    todo = plan(desired, seen)

    def refuse(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(bpf_syscall, "attach", refuse)
    (failure,) = apply(todo)
    assert (failure.operation.id, failure.error.code) == (HOOKS, "network.bpf")
    assert "Cannot allocate memory" in failure.error.message
    assert node.plan(desired) == {}
    assert "Cannot allocate memory" in observe(desired).hooks.refused
    know_each_other(node)
    with echoing(B, B6, socket.SOCK_STREAM) as port:
        assert as_user(A, lambda: ask(B6, port, socket.SOCK_STREAM)) == str(BASE.ip)
    assert bind(B, A6) == "ok"


def test_a_kernel_without_a_cookie_for_packets(node, monkeypatch):
    """Before Linux 6.15: what comes in is then checked wherever it is, but for private addresses."""
    load = bpf_syscall.load_program
    cookie_call = bpf_state.programs(ingress_everywhere=False)["ingress"].code.instructions[1]
    assert cookie_call.immediate == 122

    def refuse(name, kind, hook, code):
        if kind == bpf_syscall.CGROUP_SKB and int.from_bytes(code[12:16], "little") == 122:
            raise OSError(errno.EINVAL, "program of this type cannot use helper bpf_get_netns_cookie#122")
        return load(name, kind, hook, code)

    monkeypatch.setattr(bpf_syscall, "load_program", refuse)
    desired = hooked()
    node.converge(desired)
    assert observe(desired).hooks.everywhere
    assert bpf_state.read_received() == ("", {})  # it would count in all namespaces
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as wildcard:
        os.seteuid(0)
        wildcard.bind(("::", 0))
        port = wildcard.getsockname()[1]
        assert bind(B, A6) == "EPERM"
        with node.at_neighbour(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (A6, port))
        wildcard.settimeout(2)
        assert wildcard.recv(1) == b"x"  # root's
    with echoing(B, "::", socket.SOCK_DGRAM) as port:
        assert as_user(A, lambda: ask(B6, port, socket.SOCK_DGRAM)) == A6
        with node.at_neighbour():
            assert as_user(0, lambda: ask(A6, port, socket.SOCK_DGRAM, patience=0.3)) == "timeout"
    assert bpf_state.read_refusals().counts[B, "receive"] == 1


def test_the_words_of_the_kernel_are_told(node):
    """Of a program that it refuses."""
    with pytest.raises(OSError, match="R0 !read_ok"):
        bpf_syscall.load_program("wrong", bpf_syscall.CGROUP_SKB, 0, bytes.fromhex("9500000000000000"))


def test_nothing_of_it_is_at_the_machines_own_cgroup():
    """The sandbox has its own, which is all that it sees."""
    assert cgroup.root() == Path("/sys/fs/cgroup")
    assert "0::/\n" in Path("/proc/self/cgroup").read_text()
    assert not (cgroup.root() / "cgroup.controllers").exists() or (cgroup.root() / "cgroup.type").exists()
