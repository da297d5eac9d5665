"""What builds write into their logs, shown while they run: ``partitiond node`` prints it as ``slapos node`` does.

The logs are followed, whoever builds: this process or the daemon.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from typing import TYPE_CHECKING

from partitiond.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

logger = logging.getLogger(__name__)

_PAUSE = 0.1
_PIECE = 1 << 20
# colours and what else steers terminals (ECMA-48, 5.4): some of it was written by tenants
_STEERING = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class LogEcho:
    """Within the block, what is added to the logs of builds below ``log_dir`` goes to standard output."""

    def __init__(self, log_dir: Path, *patterns: str) -> None:
        self._log_dir, self._patterns = log_dir, patterns
        self._done = threading.Event()
        self._sizes = {path: path.stat().st_size for path in self._logs()}
        self._thread = threading.Thread(target=self._follow, name="log-echo")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _logs(self) -> Iterator[Path]:
        for pattern in self._patterns:
            yield from self._log_dir.glob(pattern)

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._done.wait(_PAUSE)  # then once more, for what was written since
            try:
                for path in self._logs():
                    self._show(path)
            except OSError as error:  # who read it has gone, say: the build goes on without a listener
                logger.debug("builds are not shown any more: %s", error)
                return

    def _show(self, path: Path) -> None:
        try:
            with path.open("rb") as stream:
                stream.seek(0, 2)
                # one that is shorter was put aside, and another one begun
                begin = self._sizes.get(path, 0) if stream.tell() >= self._sizes.get(path, 0) else 0
                stream.seek(begin)
                while piece := stream.read(_PIECE):
                    text = _STEERING.sub("", piece.decode("utf-8", "replace"))
                    sys.stdout.write(printable(text.replace("\r\n", "\n").replace("\r", "\n")))
                self._sizes[path] = stream.tell()
        except FileNotFoundError:
            self._sizes.pop(path, None)
        sys.stdout.flush()
