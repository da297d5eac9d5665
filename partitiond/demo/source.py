"""How the parts of a world are started: by this interpreter, from this source, never outliving whoever made the world."""

from __future__ import annotations

import sys
from pathlib import Path

import partitiond
from partitiond import execute

_HOME = Path(partitiond.__file__).resolve().parent.parent
_INSTALLED = _HOME.is_relative_to(sys.prefix)


def python(module: str) -> list[str]:
    """The words before the arguments of one of our modules; that of a checkout is looked for by PYTHONPATH."""
    return [sys.executable, "-I" if _INSTALLED else "-P", "-m", module]


def environment() -> dict[str, str]:
    """What started programs find in their environment."""
    found = execute.environment("/root", "root")
    return found if _INSTALLED else {**found, "PYTHONPATH": str(_HOME)}


def binds() -> list[tuple[str, str]]:
    """What a sandbox must show besides: the checkout, where this does not run from an installation."""
    return [] if _INSTALLED else [(str(_HOME), str(_HOME))]


def ending_with_us() -> list[str]:
    """The words before a program that the kernel ends when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    return [execute.SETPRIV, "--pdeathsig", "KILL", "--"]
