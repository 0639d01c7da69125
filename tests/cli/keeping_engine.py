"""An engine and a cache server that do what they are told, right or wrong: two real HTTP servers over one cache.

The answer to a prompt is a hash of it, so that it never changes; a habit of ``Habits`` makes the cache lie, leak, lose
or be felt. Tokens are numbers, a word is the token of its hash. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

CHUNK = 4
MODEL = "keeping"
CHUNK_GB = 1 / 1024
TIE = 0.02
"""Log probability between the two tokens of a tie."""


@dataclass(frozen=True)
class Habits:
    """What is done otherwise than it should be; the default keeps every promise.

    Attributes:
        bad_chunk: an answer that uses this cached chunk is another one; ``bad_salt``: only under the n-th salt seen.
        shifts_logprobs: the first token's log probabilities are off by so much when served from the cache.
        ties: a cached answer takes the other side of a tie at its second token, or (unlike) of no tie.
        is_random, drift: each computed answer differs; by so much in the first token's log probabilities.
        has_own_cache: the engine serves from a cache of its own, which lies above the server's and forgets at a reset.
        own_tokens: of these, so many only, and the rest comes from the server.
        can_reset: whether there is /reset_prefix_cache.
        has_usage, has_metrics, has_logprobs: whether the engine tells cached tokens, counts hits, knows logprobs.
        ignores_salt, looks_alike: everybody hits; whoever has the salt in other case does, in look-ups.
        stores, loads: whether prompts are stored, and used.
        quarantines: each cached request loses a chunk to the check, and is computed.
        tiers: names by chunk, the last for all others.
        fails_after: HTTP 500 from so many completions on.
        prefill_s, is_felt: seconds for each token computed; whether another's stored prompt costs none either.
        ignores_limits, evicts_others, has_quota: of tenants with a limit; whether limits can be set.
        others_ask: each request is counted as two, as if another client's had come in between.
    """

    bad_chunk: int | None = None
    bad_salt: int | None = None
    shifts_logprobs: float = 0.0
    ties: str | None = None
    is_random: bool = False
    drift: float = 0.0
    has_own_cache: bool = False
    own_tokens: int | None = None
    can_reset: bool = False
    has_usage: bool = True
    has_metrics: bool = True
    has_logprobs: bool = True
    ignores_salt: bool = False
    looks_alike: bool = False
    stores: bool = True
    loads: bool = True
    quarantines: bool = False
    tiers: Sequence[str] = ("l1",)
    fails_after: int | None = None
    prefill_s: float = 0.0
    is_felt: bool = False
    ignores_limits: bool = False
    evicts_others: bool = False
    has_quota: bool = True
    others_ask: bool = False
    max_model_len: int | None = 1 << 14


@dataclass
class Keeping:
    """Both servers, and what they were asked: (method, path, headers, body)."""

    habits: Habits
    engine_url: str = ""
    server_url: str = ""
    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    asked_server: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    held: dict[str, dict[tuple[int, ...], None]] = field(default_factory=dict)
    own: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)
    limits: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    salts: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of either side."""
        self.counts[name] = self.counts.get(name, 0) + by

    @property
    def prompts(self) -> list[Any]:
        """Bodies of the completions."""
        return [body for _, path, _, body in self.asked if path == "/v1/completions"]

    # --- the cache

    def prefix(self, tokens: Sequence[int], salt: str) -> int:
        """Chunks that are held without a gap."""
        salts = list(self.held) if self.habits.ignores_salt else [salt]
        number = 0
        for end in range(CHUNK, len(tokens) + 1, CHUNK):
            if not any(tuple(tokens[:end]) in self.held.get(each, {}) for each in salts):
                break
            number += 1
        return number

    def store(self, tokens: Sequence[int], salt: str) -> None:
        """Keep each chunk, as far as the salt's limit lets it."""
        for end in range(CHUNK, len(tokens) + 1, CHUNK):
            mine = self.held.setdefault(salt, {})
            mine[tuple(tokens[:end])] = None
            if salt in self.limits:
                if self.habits.evicts_others:
                    for other, chunks in self.held.items():
                        if other != salt:
                            chunks.clear()
                while not self.habits.ignores_limits and len(mine) * CHUNK_GB > self.limits[salt]:
                    del mine[next(iter(mine))]

    # --- the engine

    def complete(self, body: Mapping[str, Any]) -> tuple[int, Any]:
        """POST /v1/completions."""
        habits, tokens, salt = self.habits, body["prompt"], body.get("cache_salt") or ""
        if body.get("logprobs") and not habits.has_logprobs:
            return 400, {"error": {"message": "logprobs = 5 is not supported by this engine"}}
        self.count("completions")
        if habits.fails_after is not None and self.counts["completions"] > habits.fails_after:
            return 500, {"error": {"message": "out of order"}}
        if salt not in self.salts:
            self.salts.append(salt)
        chunks = self.prefix(tokens, salt)
        others = any(tuple(tokens[: len(tokens) // CHUNK * CHUNK]) in held for held in self.held.values())
        self.count("lookups", 2 if habits.others_ask else 1)
        self.count("lookup_hit_tokens", chunks * CHUNK)
        self.count("retrieves", bool(chunks))
        external = min(chunks * CHUNK, len(tokens) - 1) if habits.loads else 0
        own = 0
        if habits.has_own_cache and (salt, tuple(tokens)) in self.own:
            own = min(habits.own_tokens or external, external)
        external -= own
        if habits.quarantines and external:
            self.count("quarantined_chunks")
        if habits.others_ask:
            self.count("external", CHUNK)
            self.count("own", CHUNK)
        self.count("external", external)
        self.count("own", own)
        self.own.add((salt, tuple(tokens)))
        if habits.stores:
            self.store(tokens, salt)
        cached = external + own
        felt = len(tokens) if habits.is_felt and others else cached
        time.sleep(habits.prefill_s * (len(tokens) - felt))
        return 200, self.answer(body, cached, self.salts.index(salt))

    def answer(self, body: Mapping[str, Any], cached: int, salt_number: int) -> Any:
        """The completion."""
        habits, tokens = self.habits, body["prompt"]
        seed: list[Any] = [tokens, secrets.token_hex(8) if habits.is_random else ""]
        if habits.bad_chunk is not None and habits.bad_salt in (None, salt_number):
            seed.append(-(-cached // CHUNK) > habits.bad_chunk)
        digest = hashlib.sha256(repr(seed[:2] if seed[2:] != [True] else seed).encode()).digest()
        names = [f"token_id:{digest[i % 32]}" for i in range(body["max_tokens"])]
        shift = (habits.shifts_logprobs if cached else 0.0) + habits.drift * self.counts["completions"]
        top = [{name: -1.0 - shift, "token_id:-1": -2.0 - shift} for name in names]
        if habits.ties is not None and len(names) > 1:
            gap = TIE if habits.ties == "tie" else 3.0
            sides = ("token_id:a", "token_id:b") if not cached else ("token_id:b", "token_id:a")
            names[1] = sides[0]
            top[1] = {sides[0]: -1.0, sides[1]: -1.0 - gap}
        usage: dict[str, Any] = {"prompt_tokens": len(tokens), "completion_tokens": len(names)}
        if habits.has_usage:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        logprobs = {"tokens": names, "top_logprobs": top} if body.get("logprobs") else None
        text = " ".join(names)
        return {"choices": [{"index": 0, "text": text, "logprobs": logprobs}], "usage": usage}

    def engine(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """One request to the engine."""
        if (method, path) == ("GET", "/v1/models"):
            return 200, {"data": [{"id": MODEL, "max_model_len": self.habits.max_model_len}]}
        if (method, path) == ("POST", "/tokenize"):
            words = body["prompt"].split()
            ids = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:3], "big") for word in words]
            return 200, {"count": len(ids), "max_model_len": self.habits.max_model_len, "tokens": ids}
        if (method, path) == ("POST", "/v1/completions"):
            return self.complete(body)
        if (method, path) == ("POST", "/reset_prefix_cache") and self.habits.can_reset:
            self.own.clear()
            return 200, {"success": True}
        if (method, path) == ("GET", "/metrics") and self.habits.has_metrics:
            names = {"vllm:prefix_cache_hits_total": "own", "vllm:external_prefix_cache_hits_total": "external"}
            return 200, "".join(f'{name}{{engine="0"}} {self.counts.get(key, 0)}\n' for name, key in names.items())
        return 404, {"detail": "Not Found"}

    # --- the cache server

    def server(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """One request to the cache server."""
        if (method, path) == ("POST", "/cache/lookup"):
            return 200, self.look_up(body["token_ids"], body["cache_salt"])
        if (method, path) == ("GET", "/metrics"):
            names = ("lookups", "lookup_hit_tokens", "retrieves", "quarantined_chunks")
            return 200, "".join(f"lmcache_mp_{name}_total {self.counts.get(name, 0)}\n" for name in names)
        if path.startswith("/quota/"):
            return self.quota(method, unquote(path.removeprefix("/quota/")), body)
        return 404, {"detail": "Not Found"}

    def look_up(self, tokens: Sequence[int], salt: str) -> Any:
        """POST /cache/lookup."""
        if self.habits.looks_alike:
            salt = next((each for each in self.held if each.lower() == salt.lower()), salt)
        held, tiers = self.prefix(tokens, salt), self.habits.tiers
        chunks = [
            {
                "index": index,
                "first_token": index * CHUNK,
                "num_tokens": CHUNK,
                "tier": tiers[min(index, len(tiers) - 1)] if index < held else None,
            }
            for index in range(len(tokens) // CHUNK)
        ]
        models = [{"model_name": MODEL, "held_tokens": held * CHUNK, "chunks": chunks}]
        return {"chunk_size": CHUNK, "num_tokens": len(tokens), "models": models if self.salts else []}

    def quota(self, method: str, salt: str, body: Any) -> tuple[int, Any]:
        """GET, PUT, DELETE /quota/{salt}."""
        if method == "GET":
            used = len(self.held.get(salt, {})) * CHUNK_GB
            limit = self.limits.get(salt)
            return 200, {
                "cache_salt": salt,
                "limit_gb": limit or 0.0,
                "current_usage_gb": used,
                "exists": limit is not None,
            }
        if not self.habits.has_quota:
            return 403, {"error": "this needs the role admin"}
        if method == "PUT":
            self.limits[salt] = body["limit_gb"]
            return 200, {"cache_salt": salt, "limit_gb": body["limit_gb"], "status": "ok"}
        return 200, {"cache_salt": salt, "status": "removed" if self.limits.pop(salt, None) else "not_found"}


@contextmanager
def keeping(habits: Habits | None = None) -> Iterator[Keeping]:
    """Both servers, on free ports of the loopback."""
    state = Keeping(habits or Habits())
    servers, threads = [], []
    for side in ("engine", "server"):
        httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        httpd.daemon_threads = True
        httpd.lmcache_test = (state, side)  # type: ignore[attr-defined]
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append(httpd)
        threads.append(thread)
    state.engine_url, state.server_url = (f"http://127.0.0.1:{httpd.server_address[1]}" for httpd in servers)
    try:
        yield state
    finally:
        for httpd, thread in zip(servers, threads, strict=True):
            httpd.shutdown()
            thread.join(timeout=10)
            httpd.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write for head and body

    def _handle(self) -> None:
        state: Keeping
        state, side = self.server.lmcache_test  # type: ignore[attr-defined]
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        with state.lock:
            (state.asked if side == "engine" else state.asked_server).append((self.command, self.path, headers, body))
            status, document = getattr(state, side)(self.command, self.path, body)
        data = (document if isinstance(document, str) else json.dumps(document)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: stderr belongs to the command under test."""
