"""Loads one module from another file: ``LMC_MUTANT=module=path``."""

import importlib.abc
import importlib.util
import os
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, path: str) -> None:
        self._module, self._path = module, path

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != self._module:
            return None
        return importlib.util.spec_from_file_location(name, self._path)


_module, _, _path = os.environ.get("LMC_MUTANT", "").partition("=")
if _path:
    sys.meta_path.insert(0, _Finder(_module, _path))
