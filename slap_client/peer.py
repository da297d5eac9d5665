"""What certificate a server shows: asked for once, after it was not trusted, so that the error can say so.

Nothing is sent but the handshake, and nothing that is learnt here is believed.
"""

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

import urllib3
from requests.utils import select_proxy

from slap_client.deadline import TLSConnection, deadline
from slap_client.master_url import MasterUrl

if TYPE_CHECKING:
    from ssl import SSLSocket

_SECONDS = 10.0


def shown_by(url: MasterUrl, proxies: Mapping[str, str], cert: tuple[str, str] | None) -> bytes | None:
    """Return the certificate (DER) that the master shows, by the same way as requests take; None if it can not be had."""
    # TLS before 1.3 ends with an error, and without a word of the certificate, where the server wants one of ours;
    # to show ours gives nothing away, as its signature is good for this handshake alone (RFC 5246, 7.4.8).
    for pair in (None, cert):
        try:
            with deadline(_SECONDS):
                connection = _connection(url, proxies, pair)
                if connection is None:
                    return None
                try:
                    connection.connect()
                    return cast("SSLSocket", connection.sock).getpeercert(binary_form=True)
                finally:
                    connection.close()
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            continue
    return None


def _connection(
    url: MasterUrl, proxies: Mapping[str, str], cert: tuple[str, str] | None
) -> TLSConnection | None:
    """A connection that verifies nothing, not yet made; None for proxies that are no plain HTTP."""
    master = urlsplit(url.base)
    host, port = master.hostname or "", master.port or 443
    certificate, key = cert or (None, None)
    proxy = select_proxy(url.base, proxies)
    if not proxy:
        return TLSConnection(
            host, port, timeout=_SECONDS, cert_reqs="CERT_NONE", cert_file=certificate, key_file=key
        )
    way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if way.scheme != "http" or not way.hostname:
        return None
    connection = TLSConnection(
        way.hostname,
        way.port or 80,
        timeout=_SECONDS,
        cert_reqs="CERT_NONE",
        cert_file=certificate,
        key_file=key,
    )
    credentials = f"{unquote(way.username or '')}:{unquote(way.password or '')}".encode()
    headers = (
        {"Proxy-Authorization": f"Basic {base64.b64encode(credentials).decode()}"} if way.username else {}
    )
    connection.set_tunnel(host, port, headers, scheme="http")
    return connection
