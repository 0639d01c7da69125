"""Plant a bug: change the source text of one module when it is imported.

As a plugin (``python -m pytest -p tests.sim.planted``) it plants what the variable ``SIM_MUTATION`` names.
"""

# ruff: noqa: ARG002 - signatures are those of what is stood in for
from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .mutations import BY_NAME, Mutation


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, mutation: Mutation, path: str) -> None:
        super().__init__(mutation.module, path)
        self._mutation = mutation

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        """The changed text, compiled; never from a cache of byte code."""
        return compile(changed(self._mutation, Path(self.path).read_text()), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module of the mutation, with another loader."""
        if fullname != self._mutation.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        return importlib.util.spec_from_file_location(
            fullname, spec.origin, loader=_Loader(self._mutation, spec.origin)
        )


def changed(mutation: Mutation, source: str) -> str:
    """The source with the bug in it.

    Raises:
        LookupError: what is to be replaced is not there exactly once.
    """
    if source.count(mutation.original) != 1:
        raise LookupError(f"{mutation.name}: {source.count(mutation.original)} places in {mutation.module}")
    return source.replace(mutation.original, mutation.replaced)


def plant(name: str) -> None:
    """Plant a bug in this process. Its module must not have been imported yet."""
    mutation = BY_NAME[name]
    assert mutation.module not in sys.modules, f"{mutation.module} is imported already"
    sys.meta_path.insert(0, _Finder(mutation))


if "SIM_MUTATION" in os.environ:
    plant(os.environ["SIM_MUTATION"])
