"""What a registration makes of ``slapos.cfg``: the text of a new one, or the lines of the pair in one that is there."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import config, config_edit
from partitiond.errors import PartitiondError, WrongUseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from partitiond.config import Config

MASTER_URL = "https://slap.vifib.com"
WEB_URL = "https://panel.rapid.space"

PLACEHOLDER = "COMP-0"
"""A computer that nobody is, while the real one is not known."""

_NEW = """\
# Written by partitiond register. partitiond's own keys go into a section [partitiond].
[slapos]
software_root = /opt/slapgrid
instance_root = /srv/slapgrid

[slapformat]
interface_name = {interface}
ipv4_local_network = {ipv4}
partition_amount = {amount}
create_tap = {tap}
"""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for; None: not said. ``cfg`` is the configuration's file, which need not be there."""

    cfg: Path
    title: str
    web_url: str = WEB_URL
    master_url: str | None = None
    ca_file: str | None = None
    fingerprint: str = ""
    interface: str | None = None
    partitions: int | None = None
    ipv4_network: str | None = None
    ipv6_interface: str | None = None
    create_tap: bool | None = None
    force: bool = False
    dry_run: bool = False


def identity(text: str) -> str:
    """The computer_id of a text that may be no valid configuration."""
    found = re.search(r"^computer_id\s*[=:]\s*([A-Za-z0-9_.-]+)", text, re.MULTILINE)
    return found[1] if found else ""


def render(wish: Wish, before: str | None, ssl: Path, computer: str) -> str:
    """The configuration that is to be written. Pure but for the default interface."""
    own = {
        "computer_id": computer,
        "key_file": str(ssl / "key"),
        "cert_file": str(ssl / "certificate"),
    }
    if before is None:
        master: dict[str, str] = {"master_url": wish.master_url or MASTER_URL}
        if wish.ca_file:
            master["master_ca_file"] = wish.ca_file
        text = _NEW.format(
            interface=wish.interface or default_interface(),
            ipv4=wish.ipv4_network or "10.0.0.0/16",
            amount=10 if wish.partitions is None else wish.partitions,
            tap="true" if wish.create_tap else "false",
        )
        if wish.ipv6_interface:
            text = config_edit.set_keys(text, "slapformat", {"ipv6_interface": wish.ipv6_interface})
        return config_edit.set_keys(
            text, "slapos", {**master, **own, "certificate_repository_path": str(ssl / "partition_pki")}
        )
    if wish.master_url or not re.search(r"^master_url\s*[=:]\s*\S", before, re.MULTILINE):
        own["master_url"] = wish.master_url or MASTER_URL
    if wish.ca_file:
        own["master_ca_file"] = wish.ca_file
    if not re.search(r"^certificate_repository_path\s*[=:]\s*\S", before, re.MULTILINE):
        own["certificate_repository_path"] = str(ssl / "partition_pki")
    return config_edit.set_keys(before, "slapos", own)


def refuse_idle(wish: Wish, found: Config) -> None:
    """Refuse options for a new configuration that say something else than the one that is there.

    Raises WrongUseError ``register.option``.
    """
    wanted = (
        ("--interface-name", wish.interface, "interface_name", found.interface),
        ("--ipv6-interface", wish.ipv6_interface, "ipv6_interface", found.ipv6_interface),
        ("--partition-number", wish.partitions, "partition_amount", found.partition_amount),
        ("--ipv4-local-network", wish.ipv4_network, "ipv4_local_network", found.ipv4_network),
        ("--create-tap", "true" if wish.create_tap else None, "create_tap", str(found.create_tap).lower()),
    )
    for option, value, key, present in wanted:
        if value is not None and str(value) != str(present):
            raise WrongUseError(
                "register.option",
                f"{option} is for a new configuration, and {wish.cfg} is there, with {key} = {present}",
                resource="register",
                hint=f"set {key} in [slapformat] of {wish.cfg}, or leave the option out",
            )


def preview(cfg: Path, text: str) -> Config:
    """Read a text as if it were the file, with its drop-ins. Raises PartitiondError ``config.*`` that name the file."""
    with tempfile.TemporaryDirectory(prefix="partitiond-register-") as directory:
        file = Path(directory, cfg.name)
        file.write_text(text, "utf-8")
        if Path(f"{cfg}.d").is_dir():
            Path(f"{file}.d").symlink_to(f"{cfg}.d")
        try:
            return config.load(file)
        except PartitiondError as error:
            message = str(error).replace(str(file), str(cfg))
            resource = error.resource.replace(str(file), str(cfg))
            raise PartitiondError(error.code, message, resource=resource, hint=error.hint) from error


def default_interface(proc: Path = Path("/proc/self/net")) -> str:
    """The interface of the default route, IPv6 first; ``lo``, as slapos.core has it, where there is none."""
    for row in _rows(proc / "ipv6_route", 10):
        if (row[0], row[1]) == ("0" * 32, "00") and row[-1] != "lo":
            return row[-1]
    for row in _rows(proc / "route", 8):
        if (row[1], row[7]) == ("00000000", "00000000"):
            return row[0]
    return "lo"


def _rows(file: Path, columns: int) -> list[Sequence[str]]:
    """The rows of a table of routes, see proc_net(5) and net/ipv6/route.c (rt6_info_route)."""
    try:
        rows = [line.split() for line in file.read_text("ascii").splitlines()]
    except OSError:
        return []
    return [row for row in rows if len(row) >= columns]
