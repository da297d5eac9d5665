"""The strict production master of the tests behaves as the facts about the real one say."""

import json
import ssl
import urllib.error
import urllib.parse
import urllib.request

import master_wire
import production_master
import pytest
from master_wire import UnreadableError

RELEASE = "https://lab.example/software.cfg?a=1&b=2"


@pytest.fixture(scope="module")
def standing():
    with production_master.running() as made:
        yield made


@pytest.fixture
def master():
    with production_master.running() as made:
        made.offer("slappart0", "slappart1", "slappart2")
        yield made


class Node:
    """A client of a few lines, so that nothing of the product's is in the way."""

    def __init__(self, master, cert=None):
        self.context = ssl.create_default_context(cafile=master.ca_file)
        # the authority is such as operators make: from Python 3.13 on the default refuses it
        self.context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if cert is not False:
            self.context.load_cert_chain(*(cert or (master.cert_file, master.key_file)))
        self.master = master

    def __call__(self, method, endpoint, headers=None, base=None, **fields):
        data = urllib.parse.urlencode(fields)
        url = (base or self.master.url) + endpoint + (f"?{data}" if method == "GET" and data else "")
        asked = urllib.request.Request(  # noqa: S310 - the loopback
            url, data.encode() if method == "POST" else None, headers or {}, method=method
        )
        try:
            with urllib.request.urlopen(asked, context=self.context, timeout=10) as answer:  # noqa: S310
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers

    def about(self, endpoint, partition, **more):
        return self("POST", endpoint, computer_id="COMP-123", computer_partition_id=partition, **more)[:2]


@pytest.fixture
def node(master):
    return Node(master)


def wishes(node, **headers):
    return node("GET", "getFullComputerInformation", headers, computer_id="COMP-123")


def test_production_form(master, node):
    master.supply(RELEASE)
    made = master.want("slappart1", RELEASE, parameters={"a": "<é&>"}, filter={"retention_delay": "7"})
    master.share("slappart1", "client", k="v")
    master.route("slappart1", "198.51.100.9", "198.51.100.1", "255.255.255.0", "198.51.100.0")
    status, body, headers = wishes(node)
    assert status == 200
    assert headers["ETag"]
    assert "max-age=1" in headers["Cache-Control"]
    text = body.decode("ascii")
    assert "<string>&amp;lt;&#233;&amp;amp;&amp;gt;</string>" in text
    assert f"<string>timestamp</string><int>{made.timestamp}</int>" in text
    assert made.timestamp > 10**15
    assert "<string>route_slaptap1</string><string>198.51.100.9</string><string>198.51.100.1</string>" in text
    assert "<string>slave_reference</string><string>SOFTINST-2</string>" in text
    assert text.count("_instance_guid") == 1
    assert "_access_status" not in text
    assert wishes(node, **{"If-None-Match": headers["ETag"]})[:2] == (304, b"")
    assert node.about("startedComputerPartition", "slappart1") == (200, b"None")
    status, body, _ = wishes(node, **{"If-None-Match": headers["ETag"]})
    assert (status, b"#access Instance correctly started" in body) == (200, True)
    assert master.words("slappart1") == ["started"]
    assert not master.violations


def test_who_is_who(master, node):
    master.want("slappart0", RELEASE)
    master.want("slappart1", RELEASE)
    with pytest.raises(OSError, match=r"certificate required|reset|closed|EOF"):  # TLS 1.3 tells of it late
        wishes(Node(master, cert=False))
    place = {"computer_id": "COMP-123", "computer_partition_id": "slappart0"}
    assert (
        node("GET", "getComputerPartitionCertificate", **{**place, "computer_partition_id": "slappart2"})[0]
        == 404
    )
    found = master_wire.read(node("GET", "getComputerPartitionCertificate", **place)[1].decode())
    tenant = Node(master, cert=master.calls.pairs["SOFTINST-1"].write(master.directory, "tenant"))
    assert found["certificate"] == master.calls.pairs["SOFTINST-1"].certificate
    status, body, _ = wishes(tenant)
    assert (status, body.count(b'class="ComputerPartition"')) == (200, 1)
    assert b"_software_release_list" not in body
    assert tenant.about("softwareInstanceBang", "slappart0", message="m") == (200, b"OK")
    assert tenant.about("softwareInstanceBang", "slappart1", message="m")[0] == 403
    assert len(master.violations) == 1
    master.revoke("COMP-123")
    assert wishes(node)[0] == 401


def test_software_and_destroy_rules(master, node):
    software = {"url": RELEASE, "computer_id": "COMP-123"}
    assert node("POST", "buildingSoftwareRelease", **software)[0] == 404
    master.supply(RELEASE)
    assert node("POST", "buildingSoftwareRelease", **software)[:2] == (200, b"None")
    assert node("POST", "destroyedSoftwareRelease", **software)[0] == 404
    master.supply(RELEASE, "destroyed")
    assert node("POST", "destroyedSoftwareRelease", **software)[0] == 200
    assert master.words(RELEASE) == ["building", "destroyed"]
    assert node.about("startedComputerPartition", "slappart0")[0] == 404
    master.want("slappart0", RELEASE)
    assert node.about("softwareInstanceError", "slappart0", error_log="x" * 200)[0] == 200
    assert master.books.in_partition("slappart0").access_status.endswith("x" * 80)
    assert node.about("destroyedComputerPartition", "slappart0") == (200, b"None")
    assert master.books.in_partition("slappart0") is not None
    master.want("slappart0", state="destroyed")
    assert node.about("destroyedComputerPartition", "slappart0") == (200, b"None")
    assert master.books.in_partition("slappart0") is None
    assert [violation for violation in master.violations if "nobody asked" in violation] == master.violations
    assert len(master.violations) == 2


def test_requests_of_a_recipe(master, node):
    root = master.want("slappart0", RELEASE, title="root")
    pair = master.renew("slappart0")
    tenant = Node(master, cert=pair.write(master.directory, "tenant"))
    fields = {
        "software_release": RELEASE,
        "software_type": "db",
        "partition_reference": "database",
        "partition_parameter_xml": master_wire.write({"size": "1&2"}).decode(),
        "filter_xml": master_wire.write({}).decode(),
        "state": master_wire.write(None).decode(),
        "shared_xml": master_wire.write(False).decode(),
    }
    assert tenant.about("requestComputerPartition", "slappart0", **fields)[0] == 408
    status, body = tenant.about("requestComputerPartition", "slappart0", **fields)
    assert (status, b"slappart1" in body, b"SoftwareInstance" in body) == (200, True, True)
    child = master.books.in_partition("slappart1")
    assert (child.parameters, child.root_title, child.title) == ({"size": "1&2"}, "root", "database")
    before = root.timestamp
    connection = master_wire.write({"url": "http://x/?a&b", "port": 80}).decode()
    told = node.about(
        "setComputerPartitionConnectionXml", "slappart1", connection_xml=connection, slave_reference="None"
    )
    assert told[0] == 200
    assert child.connection == {"url": "http://x/?a&b", "port": "80"}
    assert root.timestamp > before
    fields["shared_xml"] = master_wire.write(True).decode()
    assert (
        tenant.about("requestComputerPartition", "slappart0", **{**fields, "partition_reference": "s"})[0]
        == 200
    )
    assert [one.title for one in child.slaves] == ["s"]
    assert not master.violations


def test_knobs(master, node):
    master.want("slappart0", RELEASE)
    memory = master.snapshot()
    master.cold()
    assert [wishes(node)[0] for _ in range(2)] == [503, 200]
    master.override("startedComputerPartition", 408, times=1)
    assert [node.about("startedComputerPartition", "slappart0")[0] for _ in range(2)] == [408, 200]
    master.want("slappart1", RELEASE)
    master.down()
    with pytest.raises(urllib.error.URLError):
        wishes(node)
    master.up()
    assert wishes(node)[0] == 200
    master.restart(memory)
    assert [wishes(node)[0] for _ in range(2)] == [503, 200]
    assert master.books.in_partition("slappart1") is None
    assert [one.status for one in master.asked] == [503, 200, 408, 200, 200, 503, 200]


def test_capacity(master, node):
    tap = {
        "name": "slaptap7",
        "ipv4_addr": "198.51.100.9",
        "ipv4_gateway": "198.51.100.1",
        "ipv4_netmask": "255.255.255.0",
        "ipv4_network": "198.51.100.0",
    }
    addresses = [
        {"addr": "10.0.0.9", "netmask": "255.255.255.255"},
        {"addr": "2001:db8::9", "netmask": "ffff::"},
    ]
    one = {"reference": "slappart7", "address_list": addresses, "tap": tap}
    told = {"reference": "COMP-123", "address": "2001:db8::1", "netmask": "ffff::", "partition_list": [one]}
    master.want("slappart1", RELEASE)

    def post(value):
        text = master_wire.write(value).decode()
        return node("POST", "loadComputerConfigurationFromXML", xml=text)[:2]

    assert post(told) == (200, b"Content properly posted.")
    assert sorted(master.books.places) == ["slappart1", "slappart7"]
    assert master.books.places["slappart7"].full_ip_list[0][:2] == ("route_slaptap7", "198.51.100.9")
    assert post({**told, "reference": "COMP-9"})[0] == 404
    assert post({**told, "partition_list": [{**one, "tap": {}}]})[0] == 404
    assert node("POST", "loadComputerConfigurationFromXML", xml="<marshal>")[0] == 404
    assert len(master.violations) == 3, master.violations


def test_usage_is_judged(master, node):
    assert node("POST", "useComputer", computer_id="COMP-123", use_string="<journal/>")[0] == 400
    assert master.calls.usage[0][1][0] == "invalid"


def test_register(standing):
    panel = Node(standing, cert=False)
    standing.tokens = {"one", "two"}

    def ask(token, title):
        headers = {"X-Access-Token": token}
        return panel("POST", "Person_requestComputer", headers, standing.web_url, title=title)[:2]

    assert ask("bad", "node")[0] == 403
    status, body = ask("one", "node")
    assert status == 200
    assert json.loads(body)["reference"] == "COMP-123"
    assert ask("one", "other")[0] == 403
    status, body = ask("two", "node")
    assert (status, b"Certificate still active." in body) == (500, True)
    standing.revoke("COMP-123")
    assert ask("two", "node")[0] == 200
    assert not standing.violations


@pytest.mark.parametrize(
    "text",
    ["<marshal>", "<marshal/>", "<marshal><string>a&lt;b</string></marshal>", "<marshal><bool>2</bool></marshal>",
     "<marshal><dictionary><string>a</string></dictionary></marshal>", "<marshal><set/></marshal>"],
)  # fmt: skip
def test_what_is_no_marshalled_value(text):
    with pytest.raises(UnreadableError):
        master_wire.read(text)
