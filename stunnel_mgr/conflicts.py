"""Which declarations make no tunnel: those with a fault, and those that want what another tunnel has."""

from collections.abc import Iterable

from .declaration import SUFFIX
from .errors import TunnelError
from .model import Endpoint, Refused, Tunnel, format_endpoint
from .syntax import plain


def refusal(error: TunnelError, *, name: str, partition: str, file: str) -> Refused:
    """Turn the error about a declaration into data; the reason goes without the place, which has fields of
    its own.
    """
    file = plain(file)
    place = file if error.line is None else f"{file}:{error.line}"
    public = plain(f"{partition}/{name.removesuffix(SUFFIX)}")
    return Refused(public, partition, file, error.line, error.message.removeprefix(f"{place}: "))


def resolve_conflicts(tunnels: Iterable[Tunnel]) -> tuple[tuple[Tunnel, ...], tuple[Refused, ...]]:
    """Let each name and each listening address and port belong to one tunnel: the first one by name.

    Of two with one name the one given first stays, so an operator's ``[tunnel NAME]`` goes before what
    tenants wrote. One port taken twice would close *all* listeners of that stunnel (5.68, measured), hence
    this is decided before. A tunnel without a pin claims its port as well: otherwise allowing somebody could
    knock another tunnel out.
    """
    names: dict[str, Tunnel] = {}
    listeners: dict[Endpoint, Tunnel] = {}
    refused = []
    for tunnel in sorted(tunnels, key=lambda tunnel: tunnel.name):
        if other := names.get(tunnel.name):
            reason = f"{other.file or 'another place'} declares a tunnel of this name already"
        elif other := listeners.get(tunnel.listen):
            reason = f"{other.name} listens on {format_endpoint(tunnel.listen)} already"
        else:
            names[tunnel.name] = listeners[tunnel.listen] = tunnel
            continue
        refused.append(Refused(tunnel.name, tunnel.partition, tunnel.file, None, reason))
    return tuple(names.values()), tuple(refused)
