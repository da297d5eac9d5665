"""Members of a mesh as tincd reads them: names, ranges, keys, and the directory of each with the host blocks of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

TINCD = "/usr/sbin/tincd"
INTERFACE = "sltinc"
NETWORK = IPv4Network("10.64.0.0/16")
PORT = 655
_PREFIX = 23


@dataclass(frozen=True)
class Member:
    """A node of the mesh; ``reached`` is its address on the internet below, ``own`` the part of the network that it has."""

    name: str
    reached: str
    own: IPv4Network

    @property
    def address(self) -> IPv4Address:
        """The node's own address of the mesh."""
        return self.own.network_address + 1

    @cached_property
    def key(self) -> rsa.RSAPrivateKey:
        """Made when it is first asked for."""
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def block(self) -> str:
        """The host file that all others have of it."""
        public = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.PKCS1
        )
        return (
            f"Address = {self.reached} {PORT}\nPort = {PORT}\nSubnet = {self.own}\n"
            f"Cipher = aes-256-cbc\nDigest = sha256\n{public.decode()}"
        )

    def private(self) -> bytes:
        """The key as tincd reads it."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )


def member(number: int, reached: str) -> Member:
    """The node that has the so-manieth part of the network."""
    start = int(NETWORK.network_address) + number * 2 ** (32 - _PREFIX)
    return Member(f"node{number}", reached, IPv4Network((start, _PREFIX)))


def write(directory: Path, own: Member, members: list[Member], *, seen_as: Path | None = None) -> None:
    """Write what tincd of one member reads: it connects to all others, and takes for theirs what their blocks say.

    ``seen_as`` is what tincd calls the directory, where that is something else.
    """
    (directory / "hosts").mkdir(parents=True)
    lines = [
        f"Name = {own.name}",
        "Mode = router",
        "DeviceType = tun",
        f"Interface = {INTERFACE}",
        "StrictSubnets = yes",
        f"PrivateKeyFile = {seen_as or directory}/rsa_key.priv",
        *(f"ConnectTo = {one.name}" for one in members if one is not own),
    ]
    (directory / "tinc.conf").write_text("".join(f"{line}\n" for line in lines))
    key = directory / "rsa_key.priv"
    key.touch(mode=0o600)
    key.write_bytes(own.private())
    for one in members:
        (directory / "hosts" / one.name).write_text(one.block())


def command(directory: Path) -> list[str]:
    """Run tincd in the foreground."""
    return [TINCD, "-D", "-c", str(directory), f"--pidfile={directory}/tincd.pid"]


def lines_of_ip(own: Member) -> tuple[str, ...]:
    """What ip(8) is told on a node before tincd starts: the link stays while tincd is away."""
    return (
        f"tuntap add dev {INTERFACE} mode tun",
        f"link set {INTERFACE} up",
        f"address add {own.address}/32 dev {INTERFACE}",
        f"route add {NETWORK} dev {INTERFACE} src {own.address}",
    )
