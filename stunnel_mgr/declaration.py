"""From what somebody wrote about a tunnel to a valid ``Tunnel``, or to the reason why not, with its line.

The text comes from a tenant, so each value is checked against a short list of what is allowed and turned into
numbers, addresses and certificates; nothing of it is passed on as text but the tunnel's name, and that one
matches ``TUNNEL_NAME``.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import cast

from .model import (
    MAX_PINS,
    Endpoint,
    IdentitySource,
    IPAddress,
    Mode,
    Pin,
    Tunnel,
    TunnelContext,
    format_endpoint,
)
from .syntax import Entry, FaultError, plain, read_sections, shown

TUNNEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
SUFFIX = ".cfg"

_KEYS: Mapping[str, tuple[str, ...]] = {
    "server": ("mode", "listen", "connect", "allow", "identity"),
    "client": ("mode", "listen", "connect", "peer", "identity"),
}
_FIRST_ORDINARY_PORT = 1024
_LAST_PORT = 65535
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_PIN_FORMS = "cert:<base64 of the DER>, file:<path below the partition>, sha256:<hex>"
_CLIENT_CONNECT = "[IPv6 address]:port or IPv4 address:port"
_BROADCAST = IPv4Address("255.255.255.255")
LOOPBACK = IPv4Address("127.0.0.1")
"""Where an operator's client may listen for all users of the node, written ``listen = 127.0.0.1:port``."""
_FOR_ALL = f"{LOOPBACK}:"


def parse_declaration(text: str, *, name: str, file: str, context: TunnelContext) -> Tunnel:
    """Read the text of one ``etc/tunnel/NAME.cfg``.

    ``name`` is the name of the file, with or without ``.cfg``; ``file`` is how messages call it. Raises
    TunnelError ``tunnel.declaration`` whose message begins with ``file:line: `` and whose ``line`` is that
    line, and nothing else.
    """
    try:
        short_name = _short_name(name)
        sections = read_sections(text)
        for title, section in sections.items():
            if title != "tunnel":
                raise FaultError(section.line, f"section {shown(title)}; allowed: [tunnel] alone")
        if "tunnel" not in sections:
            raise FaultError(None, "the section [tunnel] is missing")
        tunnel = sections["tunnel"]
        return _Reader(short_name, file, context, tunnel.entries, tunnel.line).read()
    except FaultError as fault:
        raise fault.error(name=_full_name(name, context), file=file) from fault


def declare(
    entries: Mapping[str, Entry], *, name: str, file: str, line: int, context: TunnelContext
) -> Tunnel:
    """Make the tunnel of a ``[tunnel NAME]`` section that another reader has split into keys.

    ``entries`` come without ``partition``; ``line`` is the one of the section's header. Such a client may also
    listen on ``LOOPBACK``, for whoever is on the node: what is in a declaration of a tenant's never may. Raises as
    ``parse_declaration`` does.
    """
    try:
        return _Reader(_short_name(name), file, context, entries, line, operator=True).read()
    except FaultError as fault:
        raise fault.error(name=_full_name(name, context), file=file) from fault


def _full_name(name: str, context: TunnelContext) -> str:
    return plain(f"{context.partition}/{name.removesuffix(SUFFIX)}")


def _short_name(name: str) -> str:
    short = name.removesuffix(SUFFIX)
    # A second suffix would make "a.cfg" and "a.cfg.cfg" one name for whoever strips twice.
    if not TUNNEL_NAME.fullmatch(short) or short.endswith(SUFFIX):
        raise FaultError(
            None,
            f"the name {shown(short)}; allowed: up to 63 of A-Z a-z 0-9 _ . -, the first a letter or digit",
        )
    return short


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the keys of one tunnel; a FaultError says what is wrong in which line."""

    short_name: str
    file: str
    context: TunnelContext
    entries: Mapping[str, Entry]
    line: int
    operator: bool = False

    def read(self) -> Tunnel:
        mode = cast("Mode", self.choice("mode", ("server", "client")))
        self.check_keys(mode)
        listen = self.listen(mode)
        connect = self.server_connect() if mode == "server" else self.client_connect()
        if listen == connect:
            raise self.fault("connect", f"{format_endpoint(connect)} is where this tunnel itself listens")
        source = None if mode == "server" else self.source(connect[0])
        key = "allow" if mode == "server" else "peer"
        pins, missing = self.pins(key)
        if mode == "client" and not pins:
            raise self.fault(key, f"no certificate of the server; required, allowed: {_PIN_FORMS}")
        return Tunnel(
            name=f"{self.context.partition}/{self.short_name}",
            short_name=self.short_name,
            partition=self.context.partition,
            mode=mode,
            listen_host=listen[0],
            listen_port=listen[1],
            connect_host=connect[0],
            connect_port=connect[1],
            source_host=source,
            pins=pins,
            identity=cast(
                "IdentitySource", self.choice("identity", ("partition", "master"), default="partition")
            ),
            file=plain(self.file),
            missing=missing,
        )

    def fault(self, key: str, reason: str, *, line: int | None = None, hint: str = "") -> FaultError:
        entry = self.entries.get(key)
        place = line or (entry.line if entry else self.line)
        return FaultError(place, f"{key}: {reason}", hint)

    def check_keys(self, mode: Mode) -> None:
        allowed = _KEYS[mode]
        for key in self.entries:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                hint = f"did you mean {near[0]}?" if near else ""
                raise self.fault(key, f"unknown in a {mode}; allowed: {', '.join(allowed)}", hint=hint)

    def single(self, key: str, allowed: str) -> tuple[int, str]:
        entry = self.entries.get(key)
        if entry is None or not entry.parts:
            raise self.fault(key, f"missing; allowed: {allowed}")
        if len(entry.parts) > 1:
            raise self.fault(
                key, f"goes on with {shown(entry.parts[1][1])}; allowed: one line", line=entry.parts[1][0]
            )
        return entry.parts[0]

    def choice(self, key: str, values: tuple[str, ...], default: str = "") -> str:
        if default and key not in self.entries:
            return default
        line, text = self.single(key, " or ".join(values))
        if text not in values:
            raise self.fault(key, f"{shown(text)}; allowed: {' or '.join(values)}", line=line)
        return text

    def port(self, key: str, line: int, text: str, first: int = 1) -> int:
        allowed = f"a port, {first} to {_LAST_PORT}"
        if not _PORT.fullmatch(text) or int(text) > _LAST_PORT:
            only = "" if text.isdigit() else "; the address is the partition's own and is not chosen here"
            if key == "listen" and self.operator:
                only = f"; or {_FOR_ALL}port, of a client that is for all users of this node"
            raise self.fault(key, f"{shown(text)}; allowed: {allowed}{only}", line=line)
        if int(text) < first:
            reason = "an ordinary user, as who the tunnel runs, cannot listen below 1024"
            raise self.fault(key, f"{shown(text)}; allowed: {allowed}: {reason}", line=line)
        return int(text)

    def listen(self, mode: Mode) -> Endpoint:
        line, text = self.single("listen", f"a port, {_FIRST_ORDINARY_PORT} to {_LAST_PORT}")
        if self.operator and mode == "client" and text.startswith(_FOR_ALL):
            port = text.removeprefix(_FOR_ALL)
            return (LOOPBACK, self.port("listen", line, port, _FIRST_ORDINARY_PORT))
        return (self.listen_host(mode), self.port("listen", line, text, _FIRST_ORDINARY_PORT))

    def listen_host(self, mode: Mode) -> IPAddress:
        if mode == "client":
            return self.context.ipv4
        if self.context.public is None:
            raise self.fault(
                "mode", "this partition has no address that other nodes reach, so it cannot serve"
            )
        return self.context.public

    def server_connect(self) -> Endpoint:
        line, text = self.single("connect", f"a port, 1 to {_LAST_PORT}")
        return (self.context.ipv4, self.port("connect", line, text))

    def client_connect(self) -> Endpoint:
        line, text = self.single("connect", _CLIENT_CONNECT)
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            # The scope of fe80::1%eth0 is free text for ``ipaddress``, and must not get into a configuration
            # file.
            if not colon or "%" in host:
                raise AddressValueError
            address: IPAddress = IPv6Address(host[1:-1]) if bracketed else IPv4Address(host)
        except AddressValueError as error:
            raise self.fault("connect", self.why_no_address(text, host), line=line) from error
        if reason := _unreachable(address):
            raise self.fault("connect", f"{shown(text)} {reason}; allowed: {_CLIENT_CONNECT}", line=line)
        if not _PORT.fullmatch(port) or int(port) > _LAST_PORT:
            raise self.fault("connect", f"port {shown(port)}; allowed: 1 to {_LAST_PORT}", line=line)
        return (address, int(port))

    @staticmethod
    def why_no_address(text: str, host: str) -> str:
        if host.count(":") > 1 and "[" not in host:
            why = "an IPv6 address goes in brackets"
        elif re.search(r"[A-Za-z]", host) and ":" not in host:
            why = "host names are not looked up: what one stands for may change under a running tunnel"
        else:
            why = "this is no address and port"
        return f"{shown(text)}; allowed: {_CLIENT_CONNECT}; {why}"

    def source(self, connect_host: IPAddress) -> IPAddress | None:
        if isinstance(connect_host, IPv4Address):
            vpn = self.context.vpn
            if vpn is not None and connect_host in vpn.network:
                return vpn.ip
            # Without one of its own, the partition goes out through the node's IPv4, as all its other traffic
            # does. That of the VPN is no address of the world beyond it.
            return (
                None if vpn is not None and self.context.ipv4_public == vpn.ip else self.context.ipv4_public
            )
        if self.context.ipv6 is None:
            raise self.fault(
                "connect", f"{connect_host} is IPv6, and this partition has no IPv6 address to come from"
            )
        return self.context.ipv6

    def pins(self, key: str) -> tuple[tuple[Pin, ...], tuple[str, ...]]:
        """The certificates, and the fingerprints of no partition: a peer that was destroyed must not cost the others."""
        entry = self.entries.get(key)
        found: dict[str, Pin] = {}
        missing: dict[str, FaultError] = {}
        read = 0
        for line, text in entry.parts if entry else ():
            try:
                these = self.pin(text)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                fault = self.fault(key, f"{shown(text)}: {reason}", line=line)
                if not _is_unknown(error):
                    raise fault from error
                missing[text] = fault
                continue
            found.update((pin.fingerprint, pin) for pin in these)
            read += len(these)
            if read > MAX_PINS:  # repeated ones as well: they cost as much to read
                raise self.fault(
                    key, f"more than {MAX_PINS} certificates; allowed: at most that many", line=line
                )
        if missing and not found:
            raise next(iter(missing.values()))
        return tuple(found.values()), tuple(missing)

    def pin(self, text: str) -> tuple[Pin, ...]:
        from . import pins  # noqa: PLC0415 (cryptography takes 50 ms; whoever has no pin to read is spared them)

        form, _, rest = text.partition(":")
        if form == "cert":
            return (pins.pin_from_base64(rest),)
        if form == "sha256":
            return pins.pins_from_fingerprint(text, self.context.local_certificates)
        if form == "file":
            _check_path(rest)
            return pins.pins_from_pem(self.context.read_file(rest))
        raise ValueError(f"allowed, one a line: {_PIN_FORMS}")


def _is_unknown(error: Exception) -> bool:
    from . import pins  # noqa: PLC0415 (as above)

    return isinstance(error, pins.UnknownCertificateError)


def _check_path(path: str) -> None:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError("allowed after file: is a path below the partition's directory, without ..")


def _unreachable(address: IPAddress) -> str:
    """Why no server can be at this address; "" if one can."""
    if address.is_unspecified or address.is_multicast or address == _BROADCAST:
        return "is not the address of one host"
    if isinstance(address, IPv6Address):
        if address.is_link_local:
            return "is a link-local address, which means nothing without an interface"
        if address.ipv4_mapped is not None:
            return "is IPv4 written as IPv6; write it as IPv4"
    return ""
