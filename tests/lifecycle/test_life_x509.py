"""A node and its certificates through their life: registered, running, without its files, revoked, ended, registered anew."""

import json
import stat

import pytest
from life_node import COMPUTER
from life_production import ProductionNode

from partitiond import pair_files
from stunnel_mgr.identity import load_identity

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(
        ProductionNode, partitions=2, software_interval=1, instances_interval=1, report_interval=1
    )
    node.tls, node.ssl = node.master, node.base / "ssl"
    own = ("cert_file", "key_file", "certificate_repository_path", "master_url", "computer_id")
    lines = node.configuration.read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(own))
    node.configuration.write_text(text.replace("[slapos]\n", "[slapos]\ncomputer_id = COMP-OTHER\n"))
    yield node
    assert node.master.violations == []


def register(node, *more, expect=0):
    node.tls.tokens.add("token")
    panel = ("--master-url", node.tls.url, "--master-url-web", node.tls.web_url, "--token", "token")
    return node.cli("register", *panel, "my node", *more, expect=expect)


def open_cases(node):
    return node.cli("status").value["node"]["open_cases"]


def unharmed(node, before):
    assert node.tenants() == before
    node.settled()


def test_registered_it_runs_an_instance_with_its_own_pair(node):
    # the configuration says another computer until then
    assert register(node, expect=1).value["error"]["code"] == "register.another_computer"
    assert register(node, "--force").value["computer_id"] == COMPUTER
    hidden = node.ssl.with_name("elsewhere")
    node.ssl.rename(hidden)
    node.start()  # what runs needs no master; it is said
    assert any("partitiond register" in case for case in open_cases(node))
    hidden.rename(node.ssl)
    node.offer()
    node.wait(lambda: not any("cannot be read" in case for case in open_cases(node)), "the case to be closed")
    url = node.release()
    node.tls.supply(url)
    node.tls.want("slappart0", url, parameters={"text": "hello"})
    node.wait_for_state("slappart0", "started")
    item = node.partition("slappart0")
    assert node.page(item) == "hello"
    certificate, key = ((node.ssl / "partition_pki" / f"slappart0.{kind}") for kind in ("crt", "key"))
    load_identity(certificate.read_bytes(), key.read_bytes())
    for path in (certificate, key):
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (item["user"]["uid"], 0o400)
    # as software finds it, and its user can read it, and no other
    told = (node.base / "instance" / "slappart0" / "buildout.cfg").read_text()
    assert f"key-file = {key}" in told
    for name, status in (("slappart0", 0), ("slappart1", 1)):
        reading = node.as_user(node.partition(name), "/usr/bin/cat", str(key))
        reading.communicate(timeout=30)
        assert reading.returncode == status


def test_files_that_vanish_stop_nothing(node):
    before = node.tenants()
    hidden = node.ssl / "key.hidden"
    (node.ssl / "key").rename(hidden)
    said = node.cli("sync", "instances", expect=1)
    assert said.value["error"]["code"] == "slap.tls"
    assert "partitiond register" in said.value["error"]["hint"]
    unharmed(node, before)
    assert node.daemon.poll() is None
    hidden.rename(node.ssl / "key")
    node.cli("sync", "instances")
    unharmed(node, before)


def test_revoked_and_registered_again_it_goes_on(node):
    before = node.tenants()
    node.tls.revoke(COMPUTER)
    error = node.cli("sync", "instances", expect=1).value["error"]
    assert error["code"] == "slap.refused"
    assert "not revoked" in error["hint"] or "partitiond register" in error["hint"]
    unharmed(node, before)
    assert register(node, expect=1).value["error"]["code"] == "register.exists"
    value = register(node, "--force").value
    assert value["config_action"] == "unchanged"
    # the daemon that runs takes the new pair by itself
    node.cli("sync", "instances")
    unharmed(node, before)


def test_a_pair_that_has_ended_is_said_and_starts_all_the_same(node):
    before = node.tenants()
    pair = node.tls.authority.login(COMPUTER, days=-1)
    place = pair_files.Place(node.ssl, "node", "key", "certificate", 0o600, 0o644)
    kept = pair_files.read(place)
    pair_files.write(place, pair_files.Found(pair.key.encode(), pair.certificate.encode()))
    node.terminate()
    node.start()
    error = node.cli("sync", "instances", expect=1).value["error"]
    assert "the node's certificate has ended" in error["message"]
    assert error["hint"] == "get a new pair: partitiond register --force"
    assert any(
        "the node's certificate has ended" in case for case in node.cli("status").value["node"]["open_cases"]
    )

    def told():
        lines = map(json.loads, (node.base / "log" / "events.jsonl").read_text().splitlines())
        return [one for one in lines if one["event"] == "certificate.expiring" and one["partition"] is None]

    node.wait(told, "the event")
    assert "partitiond register" in told()[-1]["hint"]
    unharmed(node, before)
    pair_files.write(place, kept)
    node.cli("sync", "instances")
    (node.base / "plain.pem").write_bytes(b"no PEM")
    (node.base / "plain.pem").replace(node.ssl / "certificate")
    node.terminate()
    node.start()
    assert any(f"{node.ssl}/certificate is no certificate" in case for case in open_cases(node))
    unharmed(node, before)
    pair_files.write(place, kept)
    node.cli("sync", "instances")


def test_destroyed_its_pair_goes(node):
    node.tls.want("slappart0", state="destroyed")
    node.wait_for_state("slappart0", "free")
    assert list((node.ssl / "partition_pki").iterdir()) == []
