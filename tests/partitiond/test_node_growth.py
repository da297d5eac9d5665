"""A partition more in a node that runs: what is looked at, and how often."""

import pytest

from partitiond import converge, identities, lanes, reload, verbs
from partitiond.context import Context
from slap_client.errors import SlapError
from slap_client.marshal import loads


@pytest.fixture
def node(bridge, node_config):
    return node_config(3)


def grown(context, node, amount):
    """Let the context take up a larger node, as the daemon does."""
    node.write(slapformat={"partition_amount": amount})
    with context.applying:
        return verbs.apply(context, [], first=reload.reload(context))


def counted(monkeypatch):
    """The looks at the node, and of whom the files were looked at in each."""
    looks, looked_at = [], []
    observe, files = converge.observe, identities.observe

    def counting(context, **how):
        looks.append(None)
        return observe(context, **how)

    def noting(config, partitions):
        looked_at.append([item.id for item in partitions])
        return files(config, partitions)

    monkeypatch.setattr(converge, "observe", counting)
    monkeypatch.setattr(identities, "observe", noting)
    return looks, looked_at


def test_a_partition_more_takes_one_look_before_and_one_after(node, monkeypatch):
    context = Context.of(node.load())
    verbs.apply(context, [])
    looks, looked_at = counted(monkeypatch)
    outcome = grown(context, node, 4)
    assert (outcome["failures"], outcome["left"]) == ([], [])
    assert len(looks) == 2
    assert looked_at == [["slappart3"], ["slappart3"]]
    assert verbs.plan(context)["operations"] == []


def test_with_another_setting_the_files_of_all_are_looked_at(node, monkeypatch):
    context = Context.of(node.load())
    verbs.apply(context, [])
    _, looked_at = counted(monkeypatch)
    node.write(partitiond={"log_dir": str(node.root / "other-log")})
    outcome = grown(context, node, 4)
    assert (outcome["failures"], outcome["left"]) == ([], [])
    # also afterwards: the new directory of logs is everybody's
    assert looked_at == [["slappart0", "slappart1", "slappart2", "slappart3"]] * 2
    assert verbs.plan(context)["operations"] == []


def test_so_they_are_when_the_last_look_was_long_ago(node, monkeypatch):
    context = Context.of(node.load())
    verbs.apply(context, [])
    _, looked_at = counted(monkeypatch)
    monkeypatch.setattr(converge, "_RECENT_SECONDS", 0.0)
    (node.instance / "slappart0").chmod(0o700)
    assert grown(context, node, 4)["left"] == []
    assert looked_at[0] == ["slappart0", "slappart1", "slappart2", "slappart3"]
    assert verbs.plan(context)["operations"] == []


def test_what_a_partition_with_a_tunnel_has_is_looked_at_again(node, monkeypatch):
    context = Context.of(node.load())
    verbs.apply(context, [])
    directory = node.instance / "slappart1" / "etc" / "tunnel"
    directory.mkdir(parents=True)
    (directory / "bad.cfg").write_text("[tunnel]\nmode = neither\n")
    verbs.apply(context, [])
    looks, looked_at = counted(monkeypatch)
    outcome = grown(context, node, 4)
    assert [one["name"] for one in outcome["refused"]] == ["slappart1/bad"]
    assert len(looks) == 2
    assert looked_at == [["slappart1", "slappart3"]] * 2


def test_what_changes_meanwhile_is_found_by_the_next_look(node, monkeypatch):
    context = Context.of(node.load())
    verbs.apply(context, [])
    make = identities.make

    def made_while_somebody_else_is_at_it(config, partition, slot):
        (node.instance / "slappart0").chmod(0o700)
        make(config, partition, slot)

    monkeypatch.setattr(identities, "make", made_while_somebody_else_is_at_it)
    outcome = grown(context, node, 4)
    assert (outcome["failures"], outcome["left"]) == ([], [])
    assert [one["id"] for one in verbs.plan(context)["operations"]] == [f"directory{node.instance}/slappart0"]


def test_the_master_is_told_of_what_is_in_force(node, monkeypatch):
    """Not of what the last look was for, when that was taken back."""
    told = []
    context = Context.of(node.load())
    monkeypatch.setattr(
        type(context.client), "post_capacity", lambda _, document: told.append(loads(document))
    )

    def unknown(_client):
        raise SlapError("slap.not_found", "no such computer", status=404)

    monkeypatch.setattr(type(context.client), "computer", unknown)
    verbs.apply(context, [])
    before = context.config
    node.write(slapformat={"partition_amount": 5})
    context.adopt(node.load())
    converge.observe(context)
    context.adopt(before)
    lanes.capacity(context)
    assert len(told[0]["partition_list"]) == 3
    lanes.capacity(context)
    assert told[1] == told[0]
    context.client.close()
