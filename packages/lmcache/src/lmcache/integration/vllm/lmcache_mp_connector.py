"""The class that vLLM prefers over its own one of the same name."""

from __future__ import annotations

from lmcache.connectors.vllm.connector import LMCacheMPConnector

__all__ = ["LMCacheMPConnector"]
