"""The steps of a plan, as data: :mod:`netplan.plan` makes them, :mod:`netplan.apply` runs them."""

from dataclasses import dataclass
from typing import Literal

from netplan.errors import NetplanError
from netplan.model import Address, Backend, Moving, Route, Rule
from netplan.sysctls import Sysctl

Action = Literal["create", "change", "remove"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One step of a plan.  The strings are for people; subclasses carry what :mod:`netplan.apply` needs."""

    id: str
    action: Action
    partition: str | None = None
    before: str | None = None
    after: str | None = None
    reason: str

    @property
    def resource(self) -> str:
        """The kind of thing: what stands before the first slash of the id."""
        return self.id.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedOperation(Operation):
    """Something that must not be done; it stays in the plan until a person resolves it."""

    error: NetplanError


@dataclass(frozen=True, slots=True, kw_only=True)
class SysctlOperation(Operation):
    """A kernel setting to be ``value``.

    ``note``: a note in our table comes first or, with ``action`` remove, goes at last; else the packet
    filter's own transaction sees to it, or nothing is noted.  ``noted_in`` are the backends that have it, or are to
    have it.
    """

    setting: Sysctl
    value: str
    note: bool
    noted_in: tuple[Backend, ...] = ("nftables",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeOperation(Operation):
    """A bridge to be made as link number ``index``, with the IPv6 and IPv4 settings of ``like``; or set up,
    or removed.
    """

    name: str
    index: int = 0
    mac: str | None = None
    alias: str | None = None
    like: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortOperation(Operation):
    """An interface to be put into a bridge (``master`` not 0) or taken out, and what moves along to link
    ``target``.

    ``names`` are those of the link that it comes from and of the target; ``protocol`` marks moved addresses.
    ``leads``: it is the first port of a bridge of ours, which is to carry frames as large as the port does.
    """

    name: str
    master: int
    alias: str
    target: int
    names: tuple[str, str] = ("", "")
    moving: tuple[Moving, ...] = ()
    protocol: int = 0
    leads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TapOperation(Operation):
    """A tap (or ``tun``) to be made (or given to ``owner``, when not None), and then set up; or removed.

    ``anew``: where somebody holds it, it is removed and made again, which all settings are given for.
    ``forwards``: what the bridge forwards from its port (:data:`netplan.model.GUARDED_PORT`).  ``without_ipv6``: IPv6 is
    switched off on it before it is up.
    """

    name: str
    tun: bool = False
    owner: int | None = None
    alias: str | None = None
    mac: str | None = None
    master: int | None = None
    up: bool = False
    group: int | None = None
    forwards: int | None = None
    anew: bool = False
    without_ipv6: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressOperation(Operation):
    """Addresses to take away first, then the one to set (None: none), on the link called ``on`` if that is
    only made by this plan.
    """

    delete: tuple[Address, ...] = ()
    add: Address | None = None
    on: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOperation(Operation):
    """A route to take away first, then the one to set (None: none), over the link called ``on`` if that is
    only made by this plan.
    """

    delete: Route | None = None
    add: Route | None = None
    on: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleOperation(Operation):
    """Routing rules to make, then rules to take away, in this order."""

    add: tuple[Rule, ...] = ()
    delete: tuple[Rule, ...] = ()
