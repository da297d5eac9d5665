import pytest

from slap_client.errors import SlapError
from slap_client.master_url import parse_master_url


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/"),
        ("http://127.0.0.1:5000/", "http://127.0.0.1:5000/"),
        (" https://slap.example \n", "https://slap.example/"),
        ("https://slap.example/erp5/slap", "https://slap.example/erp5/slap/"),
        ("https://slap.example//", "https://slap.example/"),
        ("http://[2001:db8::1]:5000/", "http://[2001:db8::1]:5000/"),
        ("http://2001:db8::1/", "http://[2001:db8::1]/"),
        ("http://2001:db8::1:5000/", "http://[2001:db8::1:5000]/"),  # could be both: an address
        ("http://2001:db8:0:0:0:0:0:1:5000/p", "http://[2001:db8:0:0:0:0:0:1]:5000/p/"),
        ("http://::1", "http://[::1]/"),
        ("https://me:secret@slap.example/x", "https://slap.example/x/"),
        ("https://me:p@ss@2001:db8::1/", "https://[2001:db8::1]/"),
    ],
)
def test_urls_that_configurations_have(text, base):
    url = parse_master_url(text)
    assert url.base == base
    assert url.endpoint("useComputer") == f"{base}useComputer"
    assert "secret" not in repr(url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "slap.example",
        "slap.example:443/",
        "ftp://slap.example/",
        "file:///etc/passwd",
        "http://",
        "http:///path",
        "http://:5000/",
        "http://slap.example:port/",
        "http://slap.example:0/",
        "http://slap.example:99999/",
        "http://[2001:db8::1/",
        "http://[nonsense]/",
        "http://slap.example/a b",
        "http://slap.example/\nx",
        "http://slap.example/?a=1",
        "http://slap.example/#a",
        "http://me:secret@slap\u2100.example/",
    ],
)
def test_what_is_no_url_of_a_master(text):
    with pytest.raises(SlapError) as caught:
        parse_master_url(text)
    assert caught.value.code == "slap.value"
    assert "master_url" in caught.value.hint
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("http://localhost:5000/", True),
        ("http://LocalHost/", True),
        ("http://a.localhost/", True),
        ("http://127.8.9.1/", True),
        ("http://[::1]/", True),
        ("http://::1/", True),
        ("http://10.0.0.1/", False),
        ("http://[2001:db8::1]/", False),
        ("http://localhost.example/", False),
    ],
)
def test_the_loopback_is_known(text, loopback):
    assert parse_master_url(text).loopback is loopback


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("http://a/", ""),
        ("http://me:secret@a/", "Basic bWU6c2VjcmV0"),
        ("http://me@a/", "Basic bWU6"),
        ("http://me:s%40cret@a/", "Basic bWU6c0BjcmV0"),
    ],
)
def test_credentials_become_a_header(text, header):
    assert parse_master_url(text).authorization == header
