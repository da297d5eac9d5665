"""The scenario on three machines that are fresh Debians, provisioned by the script of the virtual ones.

They have to be prepared with a network, which tests have not: ``tests/vagrant/prove prepare SUITE .build/vagrant``.
"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PREPARED = ROOT / ".build" / "vagrant"


@pytest.mark.full
@pytest.mark.parametrize("world", [(), ("--mesh",), ("--systemd",)], ids=["ipv6", "mesh", "systemd"])
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_scenario_on_fresh_machines(suite, world):
    if not (PREPARED / suite / ".prepared").exists():
        pytest.skip(f"not prepared: tests/vagrant/prove prepare {suite} .build/vagrant")
    done = subprocess.run(
        [ROOT / "tests/vagrant/prove", "play", suite, PREPARED, *world],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("All was seen to work.") == 2
