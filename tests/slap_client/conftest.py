import pytest
from slap_server import running

from slap_client.client import SlapClient


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """What a developer's shell has set must not decide how a test ends."""
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def master():
    with running() as server:
        yield server


@pytest.fixture
def client(master):
    # Closed before the master: its threads wait for kept-alive connections to end.
    with SlapClient(master.url, "COMP-7", timeout=5) as slap:
        yield slap
