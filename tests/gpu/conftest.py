"""Every test of this folder needs a GPU, torch that knows it, and our module built with CUDA."""

from __future__ import annotations

import pytest


def _missing() -> str | None:
    from lmcache.transfer import _native

    try:
        import torch
    except ImportError:
        return "there is no torch here"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    return None if _native.HAS_CUDA else "the native module was built without CUDA: is nvcc in PATH?"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent.name == "gpu"]
    reason = _missing() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
