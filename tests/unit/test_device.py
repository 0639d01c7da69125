"""Which copy engine serves which memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmcache.errors import LayoutError
from lmcache.layout import TensorSpec, make_layout
from lmcache.transfer import device
from lmcache.transfer.device import make_engine
from lmcache.transfer.plan import CopyEngine

LAYOUT = make_layout([TensorSpec("layer", (4, 64), (64, 1), 1, 4096, "uint8")], 4, 16)


def where(kind: str) -> Any:
    """As ``torch.device``."""
    return cast(Any, SimpleNamespace(type=kind, index=None))


def test_memory_of_the_host_needs_no_gpu() -> None:
    engine = make_engine(LAYOUT, where("cpu"))
    assert type(engine) is CopyEngine
    assert engine.mark() is None


def test_a_device_that_nobody_can_copy_is_refused() -> None:
    with pytest.raises(LayoutError, match="copies memory of the host"):
        make_engine(LAYOUT, where("xpu"))


def test_a_gpu_without_a_build_for_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_native", SimpleNamespace(HAS_CUDA=False))
    with pytest.raises(LayoutError, match="install it where nvcc is"):
        make_engine(LAYOUT, where("cuda"))
