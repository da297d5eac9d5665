"""How supervisord is spoken to: XML-RPC over its socket, to its own methods and to those of our plug-in in it."""

from __future__ import annotations

import http.client
import logging
import xmlrpc.client
from typing import TYPE_CHECKING, Any
from xml.parsers.expat import ExpatError

from partitiond.errors import PartitiondError
from partitiond.unix_http import UnixConnection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

PLUGIN_VERSION = 2
_ANSWER_SECONDS = 90


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = UnixConnection(self._path, _ANSWER_SECONDS)
        self._connection = (host, connection)  # where the base class finds what it has to close
        return connection


class Link:
    """One supervisord, by its socket.

    Methods raise PartitiondError ``supervisor.down`` when it does not answer and ``supervisor.fault`` when it refuses.
    """

    def __init__(self, socket: Path, log: Path) -> None:
        self.socket = socket
        self.log = log

    def _call_all(self, calls: Sequence[tuple[object, ...]], *, but: str = "\n") -> dict[str, str]:
        """Make several calls at once: each would wait for what supervisord does after the one before, such as 100 forks.

        Return what it refused and why, by the first argument, without what has ``but`` in it; that is in the log, too.
        """
        asked = [{"methodName": method, "params": list(arguments)} for method, *arguments in calls]
        answers = self._call("system.multicall", asked) if asked else []
        # as xmlrpclib has it: a fault is a struct among the values
        refused = {
            str(words[1]): str(answer["faultString"])
            for words, answer in zip(calls, answers, strict=True)
            if isinstance(answer, dict) and "faultString" in answer and but not in str(answer["faultString"])
        }
        for name, why in refused.items():
            logger.warning("%s: supervisord refuses: %s; read %s", name, why, self.log)
        return refused

    def _ask(self, method: str, *arguments: object) -> Any:
        """Call our plug-in; None where supervisord has none: it is of an older version, or of slapos.core."""
        try:
            return self._call(f"partitiond.{method}", *arguments)
        except PartitiondError as error:
            if error.code == "supervisor.fault" and "UNKNOWN_METHOD" in str(error):
                return None
            raise

    def _call(self, method: str, *arguments: object) -> Any:
        transport = _UnixTransport(str(self.socket))
        try:
            with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
                return getattr(proxy, method)(*arguments)
        except xmlrpc.client.Fault as error:
            raise PartitiondError(
                "supervisor.fault",
                f"{method}: {error.faultString}",
                resource=str(arguments[0]) if arguments else "",
                hint=f"read {self.log}",
            ) from error
        except (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError) as error:
            raise PartitiondError(
                "supervisor.down",
                f"supervisord does not answer: {error}",
                resource=str(self.socket),
                hint="run partitiond apply",
                retryable=True,
            ) from error
