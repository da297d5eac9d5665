"""Keys of slapos.core that nothing here reads, said to whoever sets them: none is passed over in silence."""

from __future__ import annotations

import configparser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partitiond.config_reader import Reader

_LOCK = "a lock of the kernel keeps two passes apart, and writes no pid"
# by section and key, why not
KEYS = {
    ("slapos", "buildout_debug"): "builds have no terminal",
    ("slapos", "master_rest_url"): "a node asks its master at master_url alone",
    ("slapos", "pidfile_instance"): _LOCK,
    ("slapos", "pidfile_report"): _LOCK,
    ("slapos", "pidfile_software"): _LOCK,
    ("slapos", "root_check"): "a node that owns users or network is root's",
    ("slapformat", "log_file"): "the log goes to stderr, and so to the journal; node format --log-file FILE",
    ("slapformat", "now"): "node format --now",
    ("slapformat", "output_definition_file"): "no definition is written",
    ("slapformat", "root_check"): "a node that owns users or network is root's",
}
# what is as it would be with them
_AS_IS = {"root_check": True, "buildout_debug": False, "now": False}


def check(reader: Reader, *, managed: bool) -> None:
    """Say of each of them that is set to what is not so anyhow that it is not acted on, and why.

    On a ``managed`` node nobody else starts supervisord: that it must not be ours to start is refused.
    """
    launch = ("slapos", "forbid_supervisord_automatic_launch")
    if managed and reader.truth(*launch, False):
        reader.bad(*launch, reader.raw(*launch), "false (partitiond sees that supervisord runs)")
    for (section, key), reason in KEYS.items():
        value = reader.raw(section, key)
        truth = configparser.ConfigParser.BOOLEAN_STATES.get(value.lower())
        natural = key in _AS_IS and truth == _AS_IS[key]
        if value and not natural and not (key == "root_check" and not managed):
            reader.warnings.append(f"{reader.place(section, key)}: {key} is not acted on: {reason}")
