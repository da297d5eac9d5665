"""What a partition's stunnel was last told to load, and whom it allowed since: a file beside its configuration.

Promises: while a change is being carried out, the file says so and names all who were allowed before or are to be, so that
whatever cuts the change short, the next one still knows whose sessions are to end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from partitiond import files
from stunnel_mgr.subjects import subject_of_pem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from stunnel_mgr.model import Endpoint, Refused, Tunnel

FILE = "loaded.json"


@dataclass(frozen=True, slots=True)
class Allowed:
    """Where a service listens, or did, and whom it allows, or did: subjects as stunnel logs them, by fingerprint."""

    listens: frozenset[Endpoint]
    subjects: Mapping[str, str]

    def __or__(self, other: Allowed) -> Allowed:
        """Both."""
        return Allowed(self.listens | other.listens, {**self.subjects, **other.subjects})


@dataclass(frozen=True, slots=True)
class Loaded:
    """A hash of the configuration that stunnel has confirmed, None while that is open; and who is allowed, by service."""

    configuration: str | None = None
    services: Mapping[str, Allowed] = field(default_factory=dict)

    def agrees_with(self, active: Iterable[Tunnel], refused: Iterable[Refused]) -> bool:
        """Whether just those are remembered who are allowed: also of a tunnel that stunnel is not given for now, as its port
        is taken, and whose sessions go on. Of a refused one nobody knows.
        """
        unknown = {one.short_name for one in refused}
        wanted = {one.short_name: {pin.fingerprint for pin in one.pins} for one in active}
        found = {
            name: set(one.subjects)
            for name, one in self.services.items()
            if name in wanted or name not in unknown
        }
        return found == wanted

    def opened(self, services: Mapping[str, Allowed]) -> Loaded:
        """What is to be remembered while a change to other services is under way."""
        both = {
            name: allowed | services[name] if name in services else allowed
            for name, allowed in self.services.items()
        }
        return Loaded(None, {**services, **both})

    def closed(self, configuration: str) -> Loaded:
        """What is to be remembered when the change is complete."""
        return replace(self, configuration=configuration)


def allowed_by(tunnels: Iterable[Tunnel]) -> dict[str, Allowed]:
    """Whom some tunnels allow, by service. Raises TunnelError."""
    return {
        tunnel.short_name: Allowed(
            frozenset((tunnel.listen,)), {pin.fingerprint: subject_of_pem(pin.pem) for pin in tunnel.pins}
        )
        for tunnel in tunnels
    }


def read(directory: Path) -> Loaded:
    """Read it back; what is missing or damaged says nothing: the next change begins anew."""
    try:
        return _decode(json.loads((directory / FILE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Loaded()


def write(directory: Path, loaded: Loaded) -> None:
    """Write it, whole or not at all. Raises OSError."""
    content = json.dumps(_encode(loaded), sort_keys=True).encode() + b"\n"
    files.write_path(directory / FILE, content, mode=0o600)


def _encode(loaded: Loaded) -> dict[str, Any]:
    return {
        "configuration": loaded.configuration,
        "services": {
            name: {
                "listens": sorted([str(host), port] for host, port in allowed.listens),
                "subjects": dict(allowed.subjects),
            }
            for name, allowed in loaded.services.items()
        },
    }


def _decode(value: Any) -> Loaded:
    configuration = value["configuration"]
    services = {
        str(name): Allowed(
            frozenset((ip_address(host), int(port)) for host, port in allowed["listens"]),
            {str(key): str(subject) for key, subject in allowed["subjects"].items()},
        )
        for name, allowed in value["services"].items()
    }
    return Loaded(None if configuration is None else str(configuration), services)
