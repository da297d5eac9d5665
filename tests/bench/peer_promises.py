"""slapgrid's own check of promises (slapos.core 1.26), partition by partition as a pass of it does: the peer of the figures.

slapos.core 1.26.1 wants ``importlib.resources.files`` of Python 3.12; an older one is lent that by ``tests/peer``.
"""

import json
import logging
import sys
import time
import types

if __name__ == "__main__":
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
