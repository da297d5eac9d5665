"""What lets slapos.core 1.26 run its node commands on Python 3.11, for comparisons with it: this directory on ``PYTHONPATH``.

It asks ``importlib.resources.files`` for what lies beside a module, which knows packages alone before Python 3.12 (see the
library's documentation). Nothing of slapos.core itself is changed.
"""

import importlib
import importlib.resources
import sys

if sys.version_info < (3, 12):
    _of_packages = importlib.resources.files

    def _files(anchor):
        module = importlib.import_module(anchor) if isinstance(anchor, str) else anchor
        if module.__spec__.submodule_search_locations is None:
            return _of_packages(module.__spec__.parent)
        return _of_packages(module)

    importlib.resources.files = _files
