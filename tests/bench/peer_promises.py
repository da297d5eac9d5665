"""slapgrid's own check of promises (slapos.core 1.26), partition by partition as a pass of it does: the peer of the figures.

slapos.core 1.26.1 wants ``importlib.resources.files`` of Python 3.12, which takes modules, too; where this is an older one it
is lent that, and nothing else of it is changed.
"""

import importlib
import importlib.resources
import json
import logging
import sys
import time
import types

_files = importlib.resources.files


def _lenient(name):  # type: ignore[no-untyped-def]
    """As in Python 3.12: of a module that is no package, those of its package."""
    if isinstance(name, str) and not hasattr(importlib.import_module(name), "__path__"):
        name = name.rpartition(".")[0]
    return _files(name)


if __name__ == "__main__":
    if sys.version_info < (3, 12):
        importlib.resources.files = _lenient
    from slapos.grid.promise import PromiseError
    from slapos.grid.slapgrid import Slapgrid

    job = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.ERROR)
    grid = types.SimpleNamespace(
        logger=logging.getLogger("slapgrid"),
        instance_root=job["instance_root"],
        promise_timeout=20,
        computer_id="COMP-1",
    )
    failed = 0
    began = time.monotonic()
    for name in job["partitions"]:
        partition = types.SimpleNamespace(
            partition_id=name,
            server_url="http://127.0.0.1:1/",
            cert_file="",
            key_file="",
            instance_python=job["python"],
        )
        try:
            Slapgrid._checkPromiseList(grid, partition, force=True, check_anomaly=job["anomaly"])
        except PromiseError:
            failed += 1
    print(json.dumps({"seconds": time.monotonic() - began, "failed": failed}))
