"""slapos.core's ``slapos node format FILE``, run by its own interpreter: the peer of the figures.

Its pauses (2 s after each address) are not waited for but counted: the figure is what its work costs, and what it waits besides
is told. Its questions to three web sites are left out. There is no master: it exits 2, prepared but not posted.
"""

import sys
import time
from pathlib import Path

asked: list[float] = []
pause, end = time.sleep, time.monotonic() + 600


def tentative() -> bool:
    """Whether an address of the bridge cannot be used yet."""
    rows = map(str.split, Path("/proc/net/if_inet6").read_text().splitlines())
    return any(row[5] == "br0" and row[3] == "00" and int(row[4], 16) & 0x40 for row in rows)


def counted(seconds: float) -> None:
    """Stand in for time.sleep: also without a check for duplicates an address is tentative for a moment."""
    asked.append(seconds)
    while tentative() and time.monotonic() < end:
        pause(0.001)


if __name__ == "__main__":
    time.sleep = counted
    sys.argv = ["slapos", "node", "format", "--now", "--cfg", sys.argv[1]]
    import slapos.format

    slapos.format.getPublicIPv4Address = lambda: ""
    from slapos.cli.entry import main

    try:
        status = main()
    finally:
        print("PAUSES", sum(asked))
    sys.exit(status)
