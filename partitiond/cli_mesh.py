"""The verbs ``mesh export``, ``import``, ``remove`` and ``status``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond.errors import PartitiondError, WrongUseError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from netplan.tinc import HostBlock
    from partitiond.context import Context

    Say = Callable[[str, dict[str, Any], Callable[[dict[str, Any]], str]], None]

_OK, _DEGRADED = 0, 3


def add(mesh: argparse.ArgumentParser, common: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Add the verbs and their options; ``kind`` is the class of the parsers."""
    verbs = mesh.add_subparsers(dest="mesh_verb", metavar="VERB", parser_class=kind)
    verbs.add_parser("export", help="this node's host block, for others to import", parents=[common])
    text = "take host blocks of other nodes in, all or none, and apply"
    taking = verbs.add_parser("import", help=text, description=text, parents=[common])
    taking.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="what partitiond mesh export printed elsewhere [-, standard input]",
    )
    taking.add_argument(
        "--replace", action="store_true", help="also another key or range for a name that is known"
    )
    text = "take host blocks of other nodes away, and apply"
    removing = verbs.add_parser("remove", help=text, description=text, parents=[common])
    removing.add_argument("names", metavar="NAME", nargs="+")
    verbs.add_parser(
        "status", help="this node, tincd, and each peer: reachable, by whom, how fast", parents=[common]
    )


def run(
    options: argparse.Namespace,
    reading: Callable[[], Context],
    changing: Callable[[dict[str, Any]], dict[str, Any]],
    say: Say,
) -> int:
    """Run one verb: ``reading`` gives the node to look at, ``changing`` has a change done, ``say`` prints a result."""
    from partitiond import mesh_status, mesh_verbs, present_mesh  # noqa: PLC0415 - only what a verb needs is imported

    name = options.mesh_verb
    if name is None:
        hint = "export, import, remove, status"
        raise WrongUseError("cli.usage", "name a verb", resource="partitiond mesh", hint=hint)
    if name == "export":
        say("mesh-export", mesh_verbs.export(reading()), lambda value: str(value["block"]).rstrip("\n"))
        return _OK
    if name == "status":
        say("mesh-status", mesh_status.status(reading()), present_mesh.status)
        return _OK
    if name == "import":
        mesh_verbs.keys_of(reading().config)
        value = changing({"action": "import", "blocks": _blocks(options.files), "replace": options.replace})
    else:
        value = changing({"action": "remove", "names": list(options.names)})
    say(f"mesh-{name}", value, present_mesh.changed)
    applied = value["applied"]
    return _DEGRADED if applied["failures"] or applied["left"] or applied["refused"] else _OK


def _blocks(names: list[str]) -> str:
    """The blocks of all files as one text, each with its name. Raises NetplanError, PartitiondError."""
    from netplan import tinc  # noqa: PLC0415 - as above

    found: list[HostBlock] = []
    for name in names or ["-"]:
        try:
            if name == "-":
                content = sys.stdin.buffer.read(tinc.MOST_INPUT + 1)
            else:
                with Path(name).open("rb") as stream:
                    content = stream.read(tinc.MOST_INPUT + 1)
        except OSError as error:
            raise PartitiondError(
                "mesh.unreadable",
                f"cannot be read: {error.strerror}",
                resource=name,
                hint="name another file",
            ) from error
        # a host file of tinc 1.0 bears its node's name
        found += tinc.parse(content, file_name="" if name == "-" else Path(name).name)
    return "".join(tinc.render(one, named=True) for one in found)
