"""Objectives: pure functions that turn a packed row into an example.

Importing the package imports all its files, so that every objective is registered.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "tables":  # a command
        importlib.import_module(f"{__name__}.{_module.name}")
