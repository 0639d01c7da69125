"""A name that vLLM's module of the connector's name imports before it finds ours."""

from __future__ import annotations

import logging


def init_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)
