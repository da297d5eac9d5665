"""``[tinc]``: which part of the mesh is this node's, and every mistake named with its place."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from partitiond import config, last_good
from partitiond.errors import PartitiondError

GOOD = """\
[slapos]
computer_id = COMP-7.a
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance

[slapformat]
interface_name = br0
partition_amount = 500

[tinc]
"""


@pytest.fixture
def load(tmp_path):
    """Read the good text with some lines of ``[tinc]``."""

    def read(*lines, text=GOOD):
        path = tmp_path / "slapos.cfg"
        path.write_text(text + "".join(f"{line}\n" for line in lines))
        return config.load(path)

    return read


def test_no_section_no_mesh(load):
    assert load().mesh is None, "nor one whose keys were all taken out"
    assert load(text=GOOD.removesuffix("[tinc]\n")).mesh is None


def test_what_two_keys_say(load, tmp_path):
    found = load("network = 10.64.0.0/16", "index = 3").mesh
    assert (found.name, found.own) == ("COMP_7_a", IPv4Network("10.64.6.0/23"))
    assert found.address == IPv4Address("10.64.6.1")
    assert found.own_interface() == IPv4Interface("10.64.6.1/16")
    assert (found.interface, found.port, found.directory) == ("sltinc", 655, tmp_path / "tinc")
    assert (found.replaces_ipv6, found.relay) == (None, None)
    spec = found.spec()
    assert (spec.network, spec.own, spec.address) == (found.network, found.own, found.address)


def test_everything_said(load):
    found = load(
        "network = 10.64.0.0/10",
        "range = 10.100.0.0/20",
        "name = paris",
        "port = 1655",
        "cipher = aes-128-cbc",
        "digest = sha512",
        "address = 2001:db8::7 paris.example, 192.0.2.7",
        "connect_to = rome, oslo",
        "interface = mesh0",
        "directory = /etc/opt/mesh",
        "replaces_ipv6 = yes",
        "relay = no",
    ).mesh
    assert found.own == IPv4Network("10.100.0.0/20")
    assert found.addresses == ("2001:db8::7", "paris.example", "192.0.2.7")
    assert found.connect_to == ("rome", "oslo")
    assert (found.replaces_ipv6, found.relay) == (True, False)
    assert (found.name, found.port, found.cipher, found.digest) == ("paris", 1655, "aes-128-cbc", "sha512")


def test_two_indexes_never_share_an_address(load):
    parts = [load("network = 10.64.0.0/20", f"index = {index}").mesh.own for index in range(8)]
    assert sum(one.num_addresses for one in parts) == 2**12
    assert len(set(parts)) == 8
    with pytest.raises(PartitiondError, match="a whole number from 0 to 7"):
        load("network = 10.64.0.0/20", "index = 8")


RIGHT = ("network = 10.64.0.0/16", "index = 3")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("index = 3",), "network is missing; allowed: the IPv4 network of the whole mesh"),
        (("network = 10.64.0.0/16",), "either range or index"),
        ((*RIGHT, "range = 10.64.6.0/23"), "either range or index"),
        (("network = 10.64.0.1/16", "index = 0"), "network = '10.64.0.1/16'"),
        (("network = 2001:db8::/48", "index = 0"), "network = '2001:db8::/48'"),
        (("network = 224.0.0.0/8", "index = 0"), "network = '224.0.0.0/8'"),
        (("network = 0.0.0.0/8", "index = 0"), "network = '0.0.0.0/8'"),
        (("network = 10.0.0.0/7", "index = 0"), "network = '10.0.0.0/7'"),
        (("network = 10.64.0.0/24", "index = 0"), "range instead: 10.64.0.0/24 has no part of /23"),
        (("network = 10.64.0.0/16", "range = 10.65.0.0/23"), "a part of 10.64.0.0/16"),
        (("network = 10.64.0.0/16", "range = 10.64.0.0/24"), "room for 500 partitions"),
        (("network = 10.64.0.0/16", "range = nonsense"), "range = 'nonsense'"),
        (("network = 10.64.0.0/16", "index = -1"), "index = '-1'"),
        (("network = 10.64.0.0/16", "index = many"), "index = 'many'"),
        ((*RIGHT, "name = ../../etc"), "name = '../../etc'; allowed: a name of letters, digits and _"),
        ((*RIGHT, "port = 0"), "port = '0'"),
        ((*RIGHT, "cipher = none"), "cipher = 'none'; allowed: aes-256-cbc"),
        ((*RIGHT, "cipher = aes-256-cb"), "did you mean aes-256-cbc?"),
        ((*RIGHT, "digest = md5"), "digest = 'md5'"),
        ((*RIGHT, "address = 300.1.2.3"), "address = '300.1.2.3'"),
        ((*RIGHT, "address = a b;c"), "address = 'b;c'"),
        ((*RIGHT, "address = fe80::1%eth0"), "address = 'fe80::1%eth0'"),
        ((*RIGHT, "connect_to = a/b"), "connect_to = 'a/b'; allowed: names of other nodes"),
        ((*RIGHT, "connect_to = COMP_7_a"), "names of other nodes"),
        ((*RIGHT, "interface = slaptap3"), "another name: taps and tuns of partitions are called so"),
        ((*RIGHT, "interface = br0"), "a name of its own"),
        ((*RIGHT, "interface = 0a"), "a name of a network interface"),
        ((*RIGHT, "replaces_ipv6 = maybe"), "allowed: auto or yes or no"),
        ((*RIGHT, "relay = on"), "allowed: auto or yes or no"),
        ((*RIGHT, "directory = tinc"), "directory = 'tinc'"),
        ((*RIGHT, "directory = /etc"), "a directory of its own"),
        (("network = 10.0.0.0/12", "index = 0"), "apart from ipv4_local_network, which is 10.0.0.0/16"),
    ],
)
def test_bad_values(load, lines, said):
    with pytest.raises(PartitiondError) as caught:
        load(*lines)
    assert caught.value.code == "config.value"
    assert said in str(caught.value)
    assert "slapos.cfg:" in str(caught.value)


def test_a_computer_id_that_is_no_name_wants_one(load):
    text = GOOD.replace("COMP-7.a", "-")
    assert load(*RIGHT, text=text).mesh.name == "_"


def test_an_unknown_key_is_a_warning_with_a_suggestion(load):
    (warning,) = load(*RIGHT, "conect_to = rome").warnings
    assert warning.endswith("unknown key 'conect_to', did you mean 'connect_to'?")


def test_tincd_and_the_software_have_users_of_their_own(load):
    text = GOOD.replace("partition_amount", "software_user = slapmesh\npartition_amount")
    assert load(text=text).mesh is None
    with pytest.raises(PartitiondError, match="another name: tincd's user is called so"):
        load(*RIGHT, text=text)


def test_a_port_that_any_user_may_take_is_a_warning(load):
    assert not load(*RIGHT, "port = 1023").warnings
    (warning,) = load(*RIGHT, "port = 1655").warnings
    assert "port 1655 can be taken by any user" in warning


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[partitiond]\nipv4_partition_network = 10.64.0.0/16\n", "apart from ipv4_partition_network"),
        ("[routable_ipv4]\nslappart3 = 10.64.1.7/24 via 10.64.1.1\n", "and the mesh"),
    ],
)
def test_networks_that_meet(load, more, said):
    with pytest.raises(PartitiondError, match=said):
        load(*RIGHT, more)


def test_a_configuration_that_is_taken_back_has_its_own_directory(load, tmp_path):
    """The key and the peers lie beside the file, not beside the copy that a trial goes back to."""
    found = load(*RIGHT)
    copy = tmp_path / "state" / "last-good.cfg"
    copy.parent.mkdir()
    last_good.write(copy, found)
    again = last_good.read(copy, found.file)
    assert again.mesh.directory == tmp_path / "tinc"
    assert again == found
