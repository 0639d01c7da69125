"""What workloads share: limits, and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmcache_cli.errors import UsageFault

TOKENS_MAX = 1 << 29
"""Of all texts held at one time: about 3 GB."""

REQUESTS_MAX = 1_000_000
DOCUMENT_TOKENS_MAX = 10_000_000


def check_size(num_tokens: int, num_requests: int, what_to_lower: str) -> None:
    """Refuse what would not fit in memory.

    Raises:
        UsageFault: too much.
    """
    if num_tokens > TOKENS_MAX:
        raise UsageFault(f"{num_tokens} tokens of text are more than a run makes ({TOKENS_MAX}): {what_to_lower}")
    if num_requests > REQUESTS_MAX:
        raise UsageFault(f"{num_requests} requests are more than a run sends ({REQUESTS_MAX}): {what_to_lower}")


def user(content: str) -> Sequence[Mapping[str, str]]:
    """A chat of one message."""
    return ({"role": "user", "content": content},)
