"""The ports of tunnels, kept out of what outgoing connections get: one part of the plan, for the whole node.

A tunnel's port that a client happened to get is one that stunnel cannot listen on, and a stunnel that is given a taken port
drops all its others (facts of stunnel 5.68, see partitiond.tunnels). Promises: no tenant, nor all of them together, leave the
node without ports for its connections, and what is dealt out is dealt fairly; what the operator or others reserved stays, see
:mod:`netplan.reserved_ports`; a pass without change reads two small files.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from netplan import reserved_ports
from netplan.reserved_ports import NONE, Ports, Record, Reserved
from partitiond import files
from partitiond.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.operation import Action
    from partitiond.tunnel_declarations import PartitionTunnels
    from stunnel_mgr.model import Tunnel

logger = logging.getLogger(__name__)

_RECORD = "reserved-ports.json"
_DAMAGED = Record("", NONE, settled=False)  # of no place: nothing is ours by it
_MOST_NAMED = 5
_MOST_TEXT = 200


@dataclass(frozen=True, slots=True)
class ReservationOperation(Operation):
    """Have just these of the tunnels' ports reserved by us, but for those that others have reserved."""

    wanted: Ports


@dataclass(frozen=True, slots=True)
class Observed:
    """What is reserved (None where the kernel cannot), and which ports outgoing connections get."""

    reserved: Reserved | None
    ephemeral: range = range(0)


@dataclass(frozen=True, slots=True)
class Dealt:
    """The ports to be reserved, and the tunnels for whose ports there was no room."""

    ports: Ports = NONE
    left_out: tuple[Tunnel, ...] = ()


def observe(config: Config) -> Observed:
    """Look at the kernel's settings. Raises OSError."""
    reserved = reserved_ports.observe(_load(config))
    return Observed(None) if reserved is None else Observed(reserved, reserved_ports.ephemeral())


def deal(seen: Observed, declared: Iterable[PartitionTunnels]) -> Dealt:
    """Deal out what may be reserved: the first tunnel of each partition, then the second of each.

    Half of the ports that outgoing connections get stay theirs, whatever tenants declare. A port that they never get, or that
    others have reserved, costs nothing.
    """
    if seen.reserved is None:
        return Dealt()
    others, ephemeral = seen.reserved.others, seen.ephemeral
    room = (len(ephemeral) - sum(1 for port in others if port in ephemeral)) // 2
    ports: set[int] = set()
    left_out = []
    for row in zip_longest(*(one.tunnels for one in declared if one.tunnels)):
        for tunnel in filter(None, row):
            port = tunnel.listen_port
            if port in ports or port in others or port not in ephemeral:
                ports.add(port)
            elif room > 0:
                room -= 1
                ports.add(port)
            else:
                left_out.append(tunnel)
    return Dealt(frozenset(ports), tuple(left_out))


def open_cases(dealt: Dealt) -> list[str]:
    """What ``status`` says of the tunnels that were left out."""
    if not dealt.left_out:
        return []
    named = ", ".join(f"{one.name} ({one.listen_port})" for one in dealt.left_out[:_MOST_NAMED])
    if len(dealt.left_out) > _MOST_NAMED:
        named += f" and {len(dealt.left_out) - _MOST_NAMED} other tunnels"
    text = (
        f"outgoing connections may take the port of {named}: half of net.ipv4.ip_local_port_range is reserved for tunnels"
        " already; a port outside of that range needs no room"
    )
    return [text]


def plan(seen: Observed, dealt: Dealt) -> tuple[ReservationOperation, ...]:
    """Compare what is reserved with what shall be."""
    reserved = seen.reserved
    if reserved is None or reserved.is_right(dealt.ports):
        return ()
    ours = dealt.ports - reserved.others
    action: Action = "remove" if not ours else "change" if reserved.ours else "create"
    if ours - reserved.ours:
        reason = "tunnels listen there, and outgoing connections could take these ports"
    elif reserved.ours - ours:
        reason = "no tunnel listens there any more"
    else:
        reason = "the record of which are ours is not of this boot, or damaged"
    return (
        ReservationOperation(
            id="ports/reserved",
            resource="ports",
            action=action,
            partition=None,
            before=_text(reserved.ports),
            after=_text(reserved.others | ours),
            reason=reason,
            wanted=dealt.ports,
        ),
    )


def _text(ports: Ports) -> str:
    text = reserved_ports.render(ports)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}… ({len(ports)} ports)"


def apply(config: Config, wanted: Ports) -> None:
    """Reserve them. Raises NetplanError ``network.sysctl``, OSError."""
    reserved_ports.apply(wanted, _load(config), lambda record: _save(config, record))


def remove(config: Config) -> None:
    """Take back what we reserved. Raises as :func:`apply` does."""
    apply(config, NONE)


def _path(config: Config) -> Path:
    return config.state_dir / _RECORD


def _load(config: Config) -> Record | None:
    path = _path(config)
    try:
        return Record.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning(
            "%s is damaged (%s): the ports that were reserved for tunnels until now stay so until a reboot",
            path,
            error,
        )
        return _DAMAGED


def _save(config: Config, record: Record | None) -> None:
    path = _path(config)
    if record is None:
        files.remove_path(path)
    else:
        files.write_path(path, record.encode(), mode=0o600)
