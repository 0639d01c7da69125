"""Imported by vLLM's module of the connector's name before it finds ours."""

from __future__ import annotations

from typing import Any


def mla_enabled(model_config: Any) -> bool:
    """Whether the model keeps one latent vector a token instead of keys and values."""
    return bool(model_config.use_mla)
