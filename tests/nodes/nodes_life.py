"""The node of ``tests/lifecycle`` for tests of this directory that need one node and its master alone."""

import importlib.util
import sys
from pathlib import Path

LIFECYCLE = Path(__file__).resolve().parents[1] / "lifecycle"
if str(LIFECYCLE) not in sys.path:
    sys.path.append(str(LIFECYCLE))


def _fixtures():
    # by its path: another conftest is the one that is imported by that name here
    spec = importlib.util.spec_from_file_location("life_fixtures", LIFECYCLE / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_found = _fixtures()
make_node, no_leaks = _found.make_node, _found.no_leaks
