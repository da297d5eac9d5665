"""The supervisord of an unmanaged node, which may be anybody's: slapos.core's StandaloneSlapOS starts its own.

So nothing in it needs our environment but the watchdog, a program like any other, and all that we ask of it are the calls of
supervisord itself.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError
from partitiond.supervision import Supervisor

if TYPE_CHECKING:
    from collections.abc import Collection

    from partitiond.config import Config

WATCHDOG = "watchdog"  # the name that slapos.core gives it


def _watchdog(file: Path) -> str:
    """The command of the watchdog, from where this very copy of ours lies, whatever the environment of supervisord says."""
    root = str(Path(__file__).parents[1])
    program = (
        f"import sys; sys.path.insert(0, {root!r}); from partitiond.unmanaged_watchdog import main; main()"
    )
    return shlex.join((sys.executable, "-I", "-c", program, str(file))).replace("%", "%%")


class UnmanagedSupervisor(Supervisor):
    """Rendered as slapos.core does it; methods as in the base class."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._file = config.file

    def render(self) -> str:
        """Return the text of supervisord.conf."""
        return (
            f"[unix_http_server]\nfile={self.socket}\nchmod=0700\n\n"
            f"[supervisord]\nlogfile={self.log}\npidfile={self.pidfile}\numask=022\nnocleanup=true\n\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\n"
            f"[supervisorctl]\nserverurl=unix://{self.socket}\n\n"
            f"[eventlistener:{WATCHDOG}]\ncommand={_watchdog(self._file)}\n"
            "events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL\n"
            f"stderr_logfile={self.log.with_name('watchdog.log')}\n\n"
            f"[include]\nfiles={self.groups_directory}/*.conf\n"
        )

    def _update(self, only: Collection[str] | None) -> tuple[frozenset[str], frozenset[str]]:  # noqa: ARG002 - nobody waits
        """Make supervisord run what the files say; return the groups that were started (anew), and none that is left."""
        added, changed, removed = self._call("supervisor.reloadConfig")[0]
        for name in (*changed, *removed):
            self.stop_group(name)
            self._call("supervisor.removeProcessGroup", name)
        coming = (*changed, *added)
        for name in coming:
            self._call("supervisor.addProcessGroup", name)
        return frozenset(coming), frozenset()

    def need(self) -> None:
        """Raise PartitiondError ``supervisor.down`` when it does not run, and nobody but its owner may start it."""
        if not self.running():
            raise PartitiondError(
                "supervisor.down",
                "supervisord does not run, and forbid_supervisord_automatic_launch keeps us from starting it",
                resource=str(self.configuration),
                hint=f"start it: supervisord -c {self.configuration}",
                retryable=True,
            )
