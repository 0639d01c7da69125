"""A name that vLLM's module of the connector's name imports for its built-in class, which ours replaces."""

from __future__ import annotations


class RequestAllocationRecord:
    """Block allocation of one request, in vLLM's built-in class."""
