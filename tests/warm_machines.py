"""Machines of ``partitiond.demo`` whose verbs and stock clients are run by ``warm_start``; to import it is enough."""

import warm_start

from partitiond.demo import machine, source
from partitiond.errors import PartitiondError

_started = machine.Machine.run


def _run(self, *command, check=True, said=None, patience=machine.PATIENCE):
    if not warm_start.known(command):
        return _started(self, *command, check=check, said=said, patience=patience)
    self.words()  # it raises where there is no machine
    done = warm_start.run(command, env=source.environment(), said=said, timeout=patience, space=self.pid)
    if check and done.returncode:
        raise PartitiondError(
            "demo.unexpected",
            f"{' '.join(command[:8])} exited {done.returncode}: {(done.stdout + done.stderr)[-3000:]}",
            resource=self.name,
        )
    return done


machine.Machine.run = _run
