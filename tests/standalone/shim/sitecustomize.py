"""Lets slapos.core 1.26 run on Python 3.11: importlib.resources.files() takes the name of a module from 3.12 on only."""

import importlib
import importlib.resources
import sys

if sys.version_info < (3, 12):
    _files = importlib.resources.files

    def files(package):
        found = importlib.import_module(package) if isinstance(package, str) else package
        return _files(package if hasattr(found, "__path__") else found.__package__)

    importlib.resources.files = files
