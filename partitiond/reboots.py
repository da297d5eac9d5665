"""Reboots of the machine, found by the kernel's boot id: the master is told of each, once it answers.

After one the master does not know what of its wishes still holds (slapos.core's ``node boot`` tells it the same way). The
report waits in the outbox like any other, so it survives daemons that are restarted meanwhile; it is there before the new boot
id is remembered, and a second one takes its place: told exactly once per boot, unless the answer to it gets lost. A full disk
keeps nobody from starting: what cannot be noted is noted later.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import files

if TYPE_CHECKING:
    from partitiond.context import Context

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FILE = "boot.json"


class Reboots:
    """The present boot, noted once in the life of a daemon; where that fails, again with each call until it does not."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waits = self._noted = False
        self._trouble = ""

    def note(self) -> bool:
        """Compare the present boot with the one of the last run, and let the master know; whether it is another. Never raises
        OSError.
        """
        if self._noted:
            return False
        try:
            return self._note()
        except OSError as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                reason = "whether the machine was booted anew is not noted yet, and tried again"
                logger.warning("%s: %s", reason, error.strerror or error)
            return False

    def _note(self) -> bool:
        context = self._context
        file = context.config.state_dir / FILE
        present = BOOT_ID.read_text("ascii").strip()
        known = _known(file)
        another = known is not None and known != present
        if another and not self._waits:
            at = time.strftime(
                "%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))
            )
            context.outbox.put("computer_bang", "", f"Reboot at {at}")
            self._waits = True  # not twice, when only what follows fails
            message = f"the machine was booted anew at {at}; what was started starts again, and the master will be told"
            logger.info("%s", message)
            context.events.record("node.rebooted", message, boot_id=present)
        if known != present:
            files.write_path(file, json.dumps({"boot_id": present}).encode(), mode=0o600)
        self._noted = True
        return another


def _known(file: Path) -> str | None:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return ""  # damaged: told once too often rather than never
    return str(found.get("boot_id")) if isinstance(found, dict) else ""
