"""What may stand behind ``partitiond node``: the verbs of ``slapos node`` with their options, for existing scripts.

Options that say the same as a key of the configuration stand in for it; those that steer parts of slapgrid that partitiond
does not have are taken and told of.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from partitiond.config_reader import COMMAND_LINE

if TYPE_CHECKING:
    from collections.abc import Callable

    Add = Callable[[str, str], argparse.ArgumentParser]

# by option: the section and the key that it stands in for
_GRID = {
    "--instance-root": ("slapos", "instance_root"),
    "--software-root": ("slapos", "software_root"),
    "--master-url": ("slapos", "master_url"),
    "--computer-id": ("slapos", "computer_id"),
    "--key_file": ("slapos", "key_file"),
    "--cert_file": ("slapos", "cert_file"),
    "--master_ca_file": ("slapos", "master_ca_file"),
    "--certificate_repository_path": ("slapos", "certificate_repository_path"),
    "--maximum-periodicity": ("slapos", "maximum_periodicity"),
    "--promise-timeout": ("slapos", "promise_timeout"),
    "--partition-timeout": ("slapos", "partition_timeout"),
}
_FORMAT = {
    "--computer_xml": ("slapformat", "computer_xml"),
    "--computer_json": ("slapformat", "computer_json"),
    "--input_definition_file": ("slapformat", "input_definition_file"),
    "--output_definition_file": ("slapformat", "output_definition_file"),
    "--alter_user": ("slapformat", "alter_user"),
    "--alter_network": ("slapformat", "alter_network"),
}
_SHORT = {"--computer_xml": "-x", "--input_definition_file": "-i", "--output_definition_file": "-o"}
# what slapgrid would do with them has no counterpart here
_IDLE = {
    "--supervisord-socket": "it lies in instance_root",
    "--supervisord-configuration-path": "it lies in instance_root",
    "--buildout": "releases bring their own buildout",
    "--signature_private_key_file": "it is a key of [networkcache]",
    "--pidfile": "a lock of the kernel keeps two passes apart",
}
CONTROL = ("supervisorctl", "start", "stop", "restart", "tail")
_OWNS_NOTHING = "only on a node with alter_user and alter_network = false"
ELSEWHERE = {
    "bang": "partitiond sync instances --force configures all instances again",
    "boot": "the daemon does all of it when it starts: systemctl enable partitiond, or partitiond run",
    "prune": "parts that are shared are not removed; a release goes when the master destroys it",
    "register": "partitiond register --token TOKEN",
}


def add(
    node: argparse.ArgumentParser,
    common: argparse.ArgumentParser,
    parser_class: type[argparse.ArgumentParser],
) -> None:
    """Add the verbs to the parser of ``node``; ``common`` are the options of all of partitiond's verbs."""
    verbs = node.add_subparsers(dest="node_verb", metavar="VERB", parser_class=parser_class)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        made.add_argument("--debug", action="store_const", const=2, dest="verbose", default=argparse.SUPPRESS)
        made.add_argument("--log-file", "--logfile", metavar="FILE", dest="log_file", help="log there, too")
        return made

    _add_format(verb("format", "make the node, and tell the master of it"))
    _add_software(verb("software", "build and remove software releases"))
    _add_instance(verb("instance", "configure, start and stop instances"))
    _add_grid(verb("report", "tell the master what was used, and finish what is to be destroyed"))
    promise = verb("promise", f"check what instances promise ({_OWNS_NOTHING})")
    _add_grid(promise)
    promise.add_argument("--only-cp", "--only", dest="only", metavar="ID,…")
    verb("collect", "one pass of the meters")
    supervisord = verb("supervisord", f"start supervisord where it does not run ({_OWNS_NOTHING})")
    supervisord.add_argument("-n", "--nodaemon", action="store_true", help="in the foreground")
    for name, text in (
        ("status", "what supervisord says of processes"),
        *((name, f"supervisorctl {name}" if name != "supervisorctl" else name) for name in CONTROL),
    ):
        verb(name, text).add_argument("words", nargs=argparse.REMAINDER, metavar="PATTERN")
    for name, text in ELSEWHERE.items():
        verb(name, text).add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _stand_ins(parser: argparse.ArgumentParser, keys: dict[str, tuple[str, str]]) -> None:
    for option, (section, key) in keys.items():
        names = (_SHORT[option], option) if option in _SHORT else (option,)
        parser.add_argument(*names, dest=f"{section}.{key}", metavar="VALUE", help=f"in place of {key}")


def _add_format(verb: argparse.ArgumentParser) -> None:
    _stand_ins(verb, _FORMAT)
    verb.add_argument("--now", action="store_true", help="without a random delay of up to an hour")
    verb.add_argument("-n", "--dry_run", "--dry-run", action="store_true", help="show what would be done")
    verb.add_argument("--local", action="store_true", help="make it, and do not tell the master")


def _add_grid(verb: argparse.ArgumentParser) -> None:
    _stand_ins(verb, _GRID)
    for option, reason in _IDLE.items():
        verb.add_argument(option, dest=f"idle.{option}", metavar="VALUE", help=f"not acted on: {reason}")
    verb.add_argument("--now", action="store_true", help="without the delay of --maximal_delay")
    verb.add_argument("--maximal_delay", type=int, default=0, metavar="S", help="begin at random in so long")


def _add_passes(verb: argparse.ArgumentParser) -> None:
    _add_grid(verb)
    verb.add_argument(
        "--buildout-debug",
        action="store_const",
        const="yes",
        dest="idle.--buildout-debug",
        help="not acted on: builds have no terminal",
    )
    verb.add_argument("--force", action="store_true", help="also what is not due")


def _add_software(verb: argparse.ArgumentParser) -> None:
    _add_passes(verb)
    verb.add_argument(
        "--garbage-collect", action="store_true", help="remove releases that the master does not list"
    )
    only = verb.add_mutually_exclusive_group()
    only.add_argument("--all", action="store_true", dest="force", help="the same as --force")
    only.add_argument("--only-sr", "--only", dest="only", metavar="URL,…", help="only these, even if built")


def _add_instance(verb: argparse.ArgumentParser) -> None:
    _add_passes(verb)
    only = verb.add_mutually_exclusive_group()
    only.add_argument("--all", action="store_true", dest="force", help="the same as --force")
    only.add_argument("--only-cp", "--only", dest="only", metavar="ID,…", help="only these partitions")


def overrides(options: argparse.Namespace) -> dict[tuple[str, str], str]:
    """What the options say in place of the configuration, by section and key."""
    found = {}
    for name, value in vars(options).items():
        section, _, key = name.partition(".")
        if section in ("slapos", "slapformat") and key and value is not None:
            found[section, key] = str(value)
    return found


def blame(problems: str) -> str | None:
    """The problems of a configuration, with options in place of keys, if all of them are those of options."""
    lines = problems.splitlines()
    if not lines or not all(line.startswith(f"{COMMAND_LINE}: ") for line in lines):
        return None
    names = {key: option for option, (_, key) in (_GRID | _FORMAT).items()}
    said = [line.removeprefix(f"{COMMAND_LINE}: ").partition(" ") for line in lines]
    return "\n".join(f"{names.get(key, key)} {rest}" for key, _, rest in said)


def idle(options: argparse.Namespace) -> dict[str, str]:
    """The options that were given and change nothing, with the reason."""
    given = {name.removeprefix("idle.") for name, value in vars(options).items() if value and "idle." in name}
    reasons = {**_IDLE, "--buildout-debug": "builds have no terminal"}
    return {name: reasons[name] for name in sorted(given)}


def named(options: argparse.Namespace) -> frozenset[str]:
    """What ``--only`` names."""
    return frozenset(word.strip() for word in (options.only or "").split(",") if word.strip())
