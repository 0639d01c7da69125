"""OpenAI's shapes, read strictly and written exactly: a field that would change the answer and is not understood is
refused, never ignored."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.engine.logprobs import CHAT_TOP_MAX, COMPLETION_TOP_MAX, Score, chat_block, completion_block
from lmcache.engine.models import Served, Tokenizer
from lmcache.engine.runner import Ask

BODY_BYTES_MAX = 16 << 20
STOPS_MAX = 16
_TEXT_MAX = 256
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "prompt_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
}
"""Fields that ask for what this engine cannot do, and the values of each that ask for nothing."""


class Rejected(Exception):
    """A request that cannot be served: the status and the one sentence of its answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    @property
    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {404: "NotFoundError", 413: "RequestTooLarge", 503: "ServiceUnavailableError"}
        kind = kinds.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}


@dataclass(frozen=True)
class Wanted:
    """A request as understood. ``names_ids``: tokens are named by their ids and not by their text."""

    ask: Ask
    model: str
    is_chat: bool
    stream: bool
    with_usage: bool
    names_ids: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Rejected: it is none.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Rejected("the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise Rejected("the body must be a JSON object")
    return document


def parse_completion(document: Mapping[str, Any], served: Served, max_model_len: int, is_chat: bool) -> Wanted:
    """What a body of /v1/completions or /v1/chat/completions asks for.

    Raises:
        Rejected: it cannot be served as asked.
    """
    check_model(document, served)
    for name, harmless in _NEUTRAL.items():
        if document.get(name) is not None and document[name] not in harmless:
            raise Rejected(f"{name} = {_short(document[name])} is not supported by this engine")
    tokens = _tokens(document, served, is_chat)
    if not tokens:
        raise Rejected("the prompt is empty")
    options = document.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Rejected("stream_options must be an object")
    max_tokens = _max_tokens(document, is_chat, max_model_len - len(tokens))
    if len(tokens) + max_tokens > max_model_len:
        raise Rejected(
            f"the longest sequence has {max_model_len} tokens; {len(tokens)} of the prompt and {max_tokens} to "
            "generate are more"
        )
    salt = document.get("cache_salt") or ""
    if not isinstance(salt, str) or len(salt) > _TEXT_MAX:
        raise Rejected(f"cache_salt must be a string of at most {_TEXT_MAX} letters")
    ask = Ask(
        tokens,
        max_tokens,
        _number(document, "temperature", 1.0, 0.0, 100.0),
        _integer(document, "seed", None, 0, (1 << 63) - 1),
        _stops(document),
        _flag(document, "ignore_eos"),
        salt,
        _num_top(document, is_chat),
    )
    return Wanted(
        ask,
        served.name,
        is_chat,
        _flag(document, "stream"),
        _flag(options, "include_usage"),
        _flag(document, "return_tokens_as_token_ids"),
    )


def parse_tokenize(document: Mapping[str, Any], served: Served) -> list[int]:
    """The token ids that a body of /tokenize asks for."""
    check_model(document, served)
    return _tokens(document, served, is_chat="messages" in document)


def check_model(document: Mapping[str, Any], served: Served) -> None:
    """Raises Rejected where the request names another model."""
    name = document.get("model")
    if name is not None and name != served.name:
        raise Rejected(f"the model {_short(name)} does not exist here, only {served.name!r}", 404)


def _tokens(document: Mapping[str, Any], served: Served, is_chat: bool) -> list[int]:
    if is_chat:
        return served.tokenizer.chat(_messages(document))
    prompt = document.get("prompt")
    if isinstance(prompt, str):
        return served.tokenizer.encode(prompt, document.get("add_special_tokens") is not False)
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        if any(not 0 <= token < served.vocabulary for token in prompt):
            raise Rejected(f"token ids are 0 to {served.vocabulary - 1}")
        return prompt
    raise Rejected("prompt must be a string or a list of token ids (one prompt a request)")


def _messages(document: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Rejected("messages must be a list of at least one message")
    read = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise Rejected("each message is an object with role and content")
        read.append({"role": role, "content": _content(message.get("content"))})
    return read


def _content(content: object) -> str:
    """Text of a message: a string, or a list of parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise Rejected("the content of a message must be text")


def _max_tokens(document: Mapping[str, Any], is_chat: bool, room: int) -> int:
    """OpenAI's defaults: 16 for a completion, whatever fits for a chat."""
    default = max(room, 1) if is_chat else min(16, max(room, 1))
    name = "max_completion_tokens" if is_chat and document.get("max_completion_tokens") is not None else "max_tokens"
    value = _integer(document, name, default, 1, 1 << 31)
    assert value is not None
    return value


def _stops(document: Mapping[str, Any]) -> tuple[str, ...]:
    stops = document.get("stop")
    stops = [stops] if isinstance(stops, str) else stops or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and 0 < len(stop) <= _TEXT_MAX for stop in stops):
        raise Rejected(f"stop must be a string or a list of strings, of at most {_TEXT_MAX} letters each")
    if len(stops) > STOPS_MAX:
        raise Rejected(f"at most {STOPS_MAX} stop strings")
    return tuple(stops)


def _num_top(document: Mapping[str, Any], is_chat: bool) -> int | None:
    """Likeliest tokens to tell of beside the chosen one: a number of a completion, a flag and a number of a chat."""
    if not is_chat:
        if document.get("top_logprobs"):
            raise Rejected("top_logprobs is of a chat: a completion names the number in logprobs")
        if document.get("logprobs") is False:
            return None
        return _integer(document, "logprobs", None, 0, COMPLETION_TOP_MAX)
    num_top = _integer(document, "top_logprobs", 0, 0, CHAT_TOP_MAX)
    if _flag(document, "logprobs"):
        return num_top
    if num_top:
        raise Rejected("top_logprobs needs logprobs to be true")
    return None


def _flag(document: Mapping[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise Rejected(f"{name} must be true or false")
    return bool(value)


def _integer(document: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = document.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise Rejected(f"{name} must be a whole number from {low} to {high}")
    return value


def _number(document: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = document.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise Rejected(f"{name} must be a number from {low:g} to {high:g}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Writer:
    """The documents that answer one request; ``tokenizer`` names its tokens."""

    def __init__(self, wanted: Wanted, request_id: str, tokenizer: Tokenizer) -> None:
        self._wanted = wanted
        self._tokenizer = tokenizer
        kind = "chat.completion" if wanted.is_chat else "text_completion"
        prefix = "chatcmpl" if wanted.is_chat else "cmpl"
        streamed = ".chunk" if wanted.is_chat and wanted.stream else ""
        self._head = {
            "id": f"{prefix}-{request_id}",
            "object": f"{kind}{streamed}",
            "created": int(time.time()),
            "model": wanted.model,
        }

    def piece(
        self, text: str, scores: Sequence[Score] = (), *, first: bool = False, reason: str | None = None
    ) -> dict[str, Any]:
        """One event of a stream; ``scores`` of the tokens that came since the event before."""
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(scores), "finish_reason": reason}
        if self._wanted.is_chat:
            delta = {"role": "assistant"} if first else {}
            choice["delta"] = {**delta, "content": text} if text or first else delta
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice]}

    def whole(
        self, texts: Sequence[str], scores: Sequence[Score], reason: str, usage: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(scores), "finish_reason": reason}
        if self._wanted.is_chat:
            choice["message"] = {"role": "assistant", "content": "".join(texts)}
        else:
            choice["text"] = "".join(texts)
        return {**self._head, "choices": [choice], "usage": usage}

    def last(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The event that carries the usage."""
        return {**self._head, "choices": [], "usage": usage}

    def usage(self, output_tokens: int, cached_tokens: int) -> dict[str, Any]:
        """Tokens as counted."""
        prompt_tokens = len(self._wanted.ask.token_ids)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def _logprobs(self, scores: Sequence[Score]) -> dict[str, Any] | None:
        if not scores:
            return None
        block = chat_block if self._wanted.is_chat else completion_block
        return block(scores, self._tokenizer.spell, self._wanted.names_ids)
