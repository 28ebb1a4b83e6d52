"""Repairing libraries that handle quantised layers without calling hqq first, whatever is imported first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# A library -> the function, as "module:name", that makes it work with our layers. Both are names: nothing is imported
# here that the caller does not use.
_REPAIRS = {"peft": "hqq.integrations.peft:install"}


def before_layer() -> None:
    """Repair the libraries that are imported, and the others when they will be; HQQLinear calls it for each layer."""
    for library, repair in _REPAIRS.items():
        spec = getattr(sys.modules.get(library), "__spec__", None)
        if spec is not None and not getattr(spec, "_initializing", False):
            _call(repair)
        elif not any(isinstance(finder, _Watch) and finder.library == library for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(library, repair))


def _call(repair: str) -> None:
    module, _, name = repair.partition(":")
    getattr(import_module(module), name)()


class _Watch(MetaPathFinder):
    """Finds nothing itself: has the loader that another finder gives for `library` call `repair` when it is done."""

    def __init__(self, library: str, repair: str) -> None:
        self.library, self.repair = library, repair

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec)
        return spec

    def _extend(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def execute_and_repair(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _call(self.repair)

        # On this one loader only, which was made for this import.
        loader.exec_module = execute_and_repair  # type: ignore[method-assign]
