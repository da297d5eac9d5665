"""What is answered at the kernel's very word, before anybody looks at the node: taps that are no longer held.

Promises: a guarded tap is down while a table of the packet filter is gone, and from when its holder gave it another MAC until
the converge lane sets it up again, which it does ever more seldom for who goes on.  Nothing else is touched.

Who may attach to a tap may also give its host's end any MAC, by SIOCSIFHWADDR on its descriptor (drivers/net/tun.c,
__tun_chr_ioctl), without a privilege and without a frame that a filter could see.  A bridge takes the MAC of a port for one of
its own, and sends what is for it to that port: with the router's, all of the node's traffic.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from netplan.apply import block_taps
from partitiond.errors import FAMILY, sentence

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from netplan.model import Link, TapSpec
    from partitiond.context import Context

logger = logging.getLogger(__name__)


class Reflexes:
    """Those of one node; called by the thread that listens to the kernel.

    Nothing is done while the node is being changed: then it is our own work, and whoever does it looks again.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def __call__(self, *, exposed: bool, links: Mapping[str, Link] | None) -> None:
        """``exposed``: a table of the packet filter is gone; ``links``: all there are, when a tap changed."""
        applying = self._context.applying
        if not applying.acquire(blocking=False):
            return
        try:
            if exposed:
                self._block(
                    self._guarded(), "a table of the packet filter is gone: %d taps are down until it is back"
                )
            if links is not None:
                stolen = [
                    tap
                    for tap in self._guarded()
                    if tap.bridge and _has_foreign_mac(tap, links.get(tap.name))
                ]
                self._block(
                    stolen,
                    "%d taps were given another MAC by who holds them: it is set back, and they are down",
                )
        except FAMILY as error:
            logger.warning("taps are not blocked: %s", sentence(error))
        finally:
            applying.release()

    def _guarded(self) -> list[TapSpec]:
        node = self._context.node
        taps = [item.network.tap for item in node.partitions] if node else []
        return [tap for tap in taps if tap and tap.guard]

    @staticmethod
    def _block(taps: Iterable[TapSpec], message: str) -> None:
        macs = {tap.name: tap.mac if tap.bridge else None for tap in taps}
        if macs:
            block_taps(macs)
            logger.warning(message, len(macs))


def _has_foreign_mac(tap: TapSpec, link: Link | None) -> bool:
    return link is not None and link.tap and bool(link.master) and link.mac != tap.mac
