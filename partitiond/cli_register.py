"""The verb ``register``: its options, where the token comes from, and what is said."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond.errors import PartitiondError, WrongUseError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_LONGEST = 4096


def add_options(register: argparse.ArgumentParser) -> None:
    """Add the options of ``register``; those of slapos.core's ``node register`` have their names."""
    register.add_argument(
        "title", metavar="TITLE", nargs="?", help="the node's title at the master [host name]"
    )
    register.add_argument(
        "--token", metavar="T", help="the panel's token; other users see it in ps, unlike with --token-file"
    )
    register.add_argument(
        "--token-file",
        metavar="FILE",
        help="where the token stands, - for standard input; else it is asked for",
    )
    register.add_argument("--master-url", metavar="URL", help="the master [https://slap.vifib.com]")
    register.add_argument("--master-url-web", metavar="URL", help="its panel [https://panel.rapid.space]")
    register.add_argument(
        "--master-ca-file", metavar="FILE", help="authorities that signed the master's certificates"
    )
    register.add_argument(
        "--master-fingerprint", metavar="F", help="sha256:… of the panel's certificate instead"
    )
    new = register.add_argument_group("for a configuration that is not there yet")
    new.add_argument(
        "--interface-name", metavar="IF", help="interface of the node [that of the default route]"
    )
    new.add_argument("--ipv6-interface", metavar="IF", help="interface with the IPv6 of the node, if another")
    new.add_argument("--partition-number", type=int, metavar="N", help="number of partitions [10]")
    new.add_argument("--ipv4-local-network", metavar="NET", help="private IPv4 of partitions [10.0.0.0/16]")
    new.add_argument("-t", "--create-tap", action="store_true", help="a tap for each partition")
    register.add_argument(
        "-n", "--dry-run", action="store_true", help="say what would be done; the master is not asked"
    )
    register.add_argument("--force", action="store_true", help="also where the node has a pair that is valid")


def run(
    options: argparse.Namespace, say: Callable[[str, dict[str, Any], Callable[[dict[str, Any]], str]], None]
) -> int:
    """Run the verb; ``say`` prints a result."""
    from partitiond import registration, registration_config  # noqa: PLC0415 - only what a verb needs is imported

    if os.geteuid() != 0:
        raise PartitiondError(
            "cli.root", "this verb needs root", resource="register", hint="run it with sudo"
        )
    wish = registration_config.Wish(
        cfg=Path(options.cfg),
        title=options.title or socket.gethostname(),
        web_url=options.master_url_web or registration_config.WEB_URL,
        master_url=options.master_url,
        ca_file=os.path.realpath(options.master_ca_file) if options.master_ca_file else None,
        fingerprint=options.master_fingerprint or "",
        interface=options.interface_name,
        partitions=options.partition_number,
        ipv4_network=options.ipv4_local_network,
        ipv6_interface=options.ipv6_interface,
        create_tap=options.create_tap,
        force=options.force,
        dry_run=options.dry_run,
    )
    say("register", registration.run(wish, lambda: _token(options)), _text)
    return 0


def _token(options: argparse.Namespace) -> str:
    """The token, without what surrounds it."""
    if options.token:
        return str(options.token).strip()
    if options.token_file not in (None, "-"):
        with Path(options.token_file).open(encoding="ascii", errors="replace") as file:
            found = file.read(_LONGEST).strip()
    elif options.token_file is None and sys.stdin.isatty():
        found = getpass.getpass("token of the panel: ").strip()
    else:
        found = sys.stdin.readline(_LONGEST).strip()
    if not found:
        raise WrongUseError(
            "register.token",
            "there is no token",
            resource="register",
            hint="name it by --token or --token-file; the master's panel gives one",
        )
    return found


def _text(value: dict[str, Any]) -> str:
    lines = [*value["steps"]]
    if value["computer_id"]:
        lines.append(
            f"this node is {value['computer_id']}; its certificate ends on {value['not_after'][:10]}"
        )
    return "\n".join([*lines, *(f"next: {one}" for one in value["next"])])
