"""The complete state of a machine as text by name: two machines are the same when their texts are.

Read with as little of the product's own eyes as can be: netlink messages are compared attribute by attribute, whatever they
mean, less the few that the kernel changes by itself; nft is asked for its whole ruleset. So a new kind of link, route or rule
is seen without a word here.
"""

import ctypes
import hashlib
import os
import re
import socket
import stat
import struct
from base64 import b64encode
from pathlib import Path

from crash_machine import BASE, reap_orphans

from netplan.netlink import NETLINK_ROUTE, NLA_TYPE_MASK, NetlinkSocket

# include/uapi/linux/if_link.h; what is left out changes by itself, or is the number of an index
_LINK_INDEX = {5: "link", 10: "master"}
_LINK_NAME, _LINK_INFO = 3, 18
_LINK_OMITTED = frozenset(
    # 7 and 23 statistics, 14 map, 16 operational state, 26 settings per family (see sysctl), 33 carrier, 35 47 48 its changes
    (7, 14, 16, 23, 26, 33, 35, 47, 48)
)
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND = 1, 2, 4
_BRIDGE_OMITTED = frozenset(
    (10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 48)
)  # root, identity, path, timers, how many neighbours were learned (IFLA_BR_*)
_KEPT_FLAGS = ~(0x40 | 0x10000 | 0x20000)  # IFF_RUNNING, LOWER_UP, DORMANT follow the carrier
_ROUTE_OMITTED = frozenset((12,))  # RTA_CACHEINFO
_ROUTE_OIF, _ROUTE_CLONED, _ROUTE_STATE = 4, 0x200, 0x1 | 0x10  # RTNH_F_DEAD, RTNH_F_LINKDOWN
_ADDRESS_CACHE = 6
_LINK_LOCAL = (b"\xfe\x80", b"\xff\x00")  # the kernel makes these when a carrier comes
# settings of the network as a whole, and of each link, that somebody who makes networks may have changed
_SYSCTLS = (
    *("ipv4/ip_forward", "ipv4/ip_nonlocal_bind", "ipv4/ip_local_reserved_ports"),
    *("ipv6/ip_nonlocal_bind", "ipv6/bindv6only"),
)
_LINK_SYSCTLS = (
    *(f"ipv4/conf/{{}}/{name}" for name in ("forwarding", "proxy_arp", "rp_filter", "accept_local")),
    *(
        f"ipv6/conf/{{}}/{name}"
        for name in ("forwarding", "proxy_ndp", "accept_ra", "accept_dad", "disable_ipv6", "addr_gen_mode")
    ),
)


def capture():
    """Return the state of the machine that this process is in."""
    found = {}
    for part in (_links, _addresses, _routes, _rules, _proxies, _ruleset, _sysctls, _users, _files, _others):
        found |= part()
    return found


def identities():
    """The fingerprint of each partition's tunnel identity that is there."""
    return {path.parent.name: _fingerprint(path) for path in BASE.glob("state/tunnels/*/certificate.pem")}


# --- the network -----------------------------------------------------------------------------------------------------


def _dump(kind, payload):
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        return sock.dump(kind, payload)


def _attributes(data, start, end):
    found = {}
    while start + 4 <= end:
        length, kind = struct.unpack_from("=HH", data, start)
        found[kind & NLA_TYPE_MASK] = data[start + 4 : start + length]
        start += (max(length, 4) + 3) & ~3
    return found


def _text(attributes, omitted=frozenset(), **named):
    shown = {str(kind): value.hex() for kind, value in attributes.items() if kind not in omitted}
    return " ".join(f"{key}={value}" for key, value in sorted((shown | named).items()))


def _names():
    return dict(socket.if_nameindex()) | {0: "none"}


def _number(value):
    return int.from_bytes(value, "little")


def _links():
    names, found = _names(), {}
    for _, data, start, end in _dump(18, struct.pack("=BxHiII", 0, 0, 0, 0, 0)):
        _, kind, _, flags, _ = struct.unpack_from("=BxHiII", data, start)
        have = _attributes(data, start + 16, end)
        name = have[_LINK_NAME].rstrip(b"\0").decode()
        named = {
            word: names.get(_number(have.pop(place)), "?")
            for place, word in _LINK_INDEX.items()
            if place in have
        }
        info = _link_info(have.pop(_LINK_INFO, b""))
        found[f"link {name}"] = (
            f"type={kind} flags={flags & _KEPT_FLAGS:#x} {info} {_text(have, _LINK_OMITTED, **named)}"
        )
    return found


def _link_info(info):
    have = _attributes(info, 0, len(info))
    kind = have.get(_INFO_KIND, b"").rstrip(b"\0")
    data = have.get(_INFO_DATA, b"")
    omitted = _BRIDGE_OMITTED if kind == b"bridge" else ()
    slave = have.get(_INFO_SLAVE_KIND, b"").rstrip(b"\0")
    return (
        f"kind={kind.decode()} port={slave.decode()} data[{_text(_attributes(data, 0, len(data)), omitted)}]"
    )


def _addresses():
    names, found = _names(), {}
    for _, data, start, end in _dump(22, bytes(8)):
        family, length, flags, scope, link = struct.unpack_from("=BBBBI", data, start)
        have = _attributes(data, start + 8, end)
        packed = have.get(2) or have.get(1, b"")
        if packed[:2] in _LINK_LOCAL and family == socket.AF_INET6:
            continue
        cache = have.pop(_ADDRESS_CACHE, b"")[:8].hex()  # preferred and valid lifetime
        name = f"address {socket.inet_ntop(family, packed)}/{length} on {names.get(link)}"
        found[name] = f"flags={flags} scope={scope} lifetimes={cache} {_text(have)}"
    return found


def _routes():
    names, found = _names(), {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for _, data, start, end in _dump(26, struct.pack("=B11x", family)):
            header = struct.unpack_from("=BBBBBBBBI", data, start)
            have = _attributes(data, start + 12, end)
            destination = have.get(1, b"")
            if header[8] & _ROUTE_CLONED or (
                family == socket.AF_INET6 and destination[:2] in _LINK_LOCAL and header[5] == 2
            ):
                continue
            have = {kind: value for kind, value in have.items() if kind not in _ROUTE_OMITTED}
            out = names.get(_number(have.pop(_ROUTE_OIF, b"")))
            text = _text(have, flags=hex(header[8] & ~_ROUTE_STATE), dev=out)
            found[f"route {header[:8]} {text}"] = ""
    return found


def _rules():
    found = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for _, data, start, end in _dump(34, struct.pack("=B11x", family)):
            header = struct.unpack_from("=BBBBBBBBI", data, start)
            found[f"rule {header} {_text(_attributes(data, start + 12, end))}"] = ""
    return found


def _proxies():
    names, found = _names(), {}
    for family in (socket.AF_INET, socket.AF_INET6):
        # struct ndmsg with NTF_PROXY: a dump of what is answered for
        for _, data, start, end in _dump(30, struct.pack("=B3xiHBB", family, 0, 0, 0x08, 0)):
            link = struct.unpack_from("=B3xiHBB", data, start)[1]
            have = _attributes(data, start + 12, end)
            found[f"proxy {have.get(1, b'').hex()} on {names.get(link)}"] = ""
    return found


def _ruleset():
    """All tables; counters' values and what is noted of handles and generations are left out.

    The objects of a table are sorted: the kernel lists them by when they were made, which says nothing.
    """
    library = ctypes.CDLL("libnftables.so.1")
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    context = ctypes.c_void_p(library.nft_ctx_new(0))
    try:
        library.nft_ctx_buffer_output(context)
        if library.nft_run_cmd_from_buffer(context, b"list ruleset"):
            raise OSError("nft does not list its ruleset")
        text = (library.nft_ctx_get_output_buffer(context) or b"").decode()
    finally:
        library.nft_ctx_free(context)
    text = re.sub(r"packets \d+ bytes \d+", "packets N bytes N", text)
    text = re.sub(r'comment "((?!wanted|structure).*) \S+"', r'comment "\1 …"', text)
    tables = re.findall(r"^(table [^\n]*) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return {f"nft {name}": _sorted(re.sub(r",\s+", ",\n", body)) for name, body in tables}


def _sorted(body):
    """The objects of a table by kind and name, each whole: the rules of a chain stay in their order."""
    return "".join(sorted(re.findall(r"^\t\S.*?^\t\}\n", body, re.MULTILINE | re.DOTALL)))


def _sysctls():
    found = {}
    links = ("all", "default", *_names().values())
    of_links = (name.format(link) for name in _LINK_SYSCTLS for link in links)
    for name in (*_SYSCTLS, *(f"bridge/{name}" for name in _listing("/proc/sys/net/bridge")), *of_links):
        try:
            descriptor = os.open(f"/proc/sys/net/{name}", os.O_RDONLY)
        except FileNotFoundError:
            continue
        found[f"sysctl net/{name}"] = os.read(descriptor, 4096).decode()
        os.close(descriptor)
    return found


def _listing(path):
    try:
        return os.listdir(path)  # noqa: PTH208 - names suffice
    except FileNotFoundError:
        return []


# --- users, files, processes -----------------------------------------------------------------------------------------


def _users():
    found = {}
    for name in ("passwd", "group", "shadow", "gshadow"):
        for line in Path("/etc", name).read_text(errors="surrogateescape").splitlines():
            found[f"{name} line {line}"] = ""
    return found


def _files():
    """Names, modes, owners and contents (of logs, pid files and notes of pids none) below the roots, and the names in /etc."""
    tokens = _certificates()
    namespaces = Path("/proc/self/ns/mnt").stat().st_dev
    found = {f"file /etc/{name}": "" for name in _listing("/etc")}
    for directory, below, names in os.walk(BASE):
        for name in (*below, *names):
            # how far a log was read, what happened, and what was used, which is tested in tests/accounting: they are
            # there when somebody was looked for, when something failed, and when counters went
            if name in ("sessions.json", "events.jsonl") or name.startswith("ledger."):
                continue
            path = Path(directory, name)
            about = os.lstat(path)
            text = f"{stat.filemode(about.st_mode)} {about.st_uid}:{about.st_gid}"
            if stat.S_ISREG(about.st_mode) and about.st_dev == namespaces:
                text += " a namespace"
            elif stat.S_ISREG(about.st_mode) and not name.endswith((".log", ".pid")) and not _is_note(path):
                text += f" {_content(path, tokens)}"
            elif stat.S_ISLNK(about.st_mode):
                text += f" → {path.readlink()}"
            found[f"file {path}"] = text
    device = os.lstat("/dev/net/tun")
    return found | {"file /dev/net/tun": f"{stat.filemode(device.st_mode)}"}


def _is_note(path):
    """Whether supervisord's processes have written there who they are."""
    return path.parent == BASE / "run" / "supervisor" / "processes"


def _certificates():
    """Identities are random: in contents they stand as a word."""
    tokens = {}
    for path in BASE.glob("state/tunnels/*/certificate.pem"):
        der = _der(path)
        tokens[b64encode(der)] = f"<certificate of {path.parent.name}>".encode()
        tokens[_fingerprint(path).encode()] = f"<fingerprint of {path.parent.name}>".encode()
    for path in BASE.glob("state/tunnels/*/stunnel.conf"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest().encode()
        tokens[digest] = f"<hash of the configuration of {path.parent.name}>".encode()
    return tokens


def _der(path):
    import ssl

    try:
        return ssl.PEM_cert_to_DER_cert(path.read_text())
    except ValueError:
        return b"damaged " + path.read_bytes()


def _fingerprint(path):
    return "sha256:" + hashlib.sha256(_der(path)).hexdigest()


def _content(path, tokens):
    if path.name == "lock":
        return "names its last holder"
    if path.name in ("certificate.pem", "key.pem"):
        return pair(path.parent)
    content = path.read_bytes()
    if b"sha256:" in content or b"certificate" in content:
        for value, word in tokens.items():
            content = content.replace(value, word)
    return content.decode(errors="backslashreplace")


def pair(directory):
    """Whether the key in a directory is that of the certificate, in words."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate((directory / "certificate.pem").read_bytes())
        key = load_pem_private_key((directory / "key.pem").read_bytes(), None)
    except (OSError, ValueError) as error:
        return f"no pair: {error}"
    return "a pair" if certificate.public_key() == key.public_key() else "key and certificate of two pairs"


def _others():
    """Processes beside this one, and mounts."""
    reap_orphans()
    found = {
        f"mount {line.split(' ')[4]}": "" for line in Path("/proc/self/mountinfo").read_text().splitlines()
    }
    for name in filter(str.isdigit, _listing("/proc")):
        if int(name) != os.getpid():
            try:
                command = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            key = f"process {command}"
            found[key] = str(int(found.get(key, "0")) + 1)
    return found


def difference(wanted, found):
    """Say how ``found`` differs from ``wanted``, one line each."""
    lines = [f"missing: {name}  {wanted[name]}" for name in sorted(wanted.keys() - found.keys())]
    lines += [f"left over: {name}  {found[name]}" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            before, now = wanted[name].splitlines(), found[name].splitlines()
            more = [f"-{line}" for line in before if line not in now]
            more += [f"+{line}" for line in now if line not in before]
            lines.append(f"other: {name}\n    " + "\n    ".join(more or ["in another order"]))
    return lines
