"""A client of upstream's server, for upstream.py: run by a Python that has lmcache 0.5.6, never by ours.

It calls upstream's own classes in the order in which upstream's vLLM adapter calls them, and times each call itself, so
that orders and answers, which come and go as lines of JSON on sockets, are not part of any time. Each socket is one
client: a process of its own, forked once the slow imports are done.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from typing import Any

import mixed_load
from mixed_load import tokens_of

TIMEOUT_S = 60.0
CPU_STUB_THREADS = 1
VISIBLE_S = 5.0
"""How long what was acknowledged is looked for."""


def upstream(name: str) -> Any:
    """A module of upstream's package."""
    return importlib.import_module(f"lmcache.{name}")


class Client:
    """One engine: KV memory on the host, registered with the server, and a conversation.

    Blocks 1 to n hold what is stored, n + 1 to 2n take what is retrieved; block 0 is upstream's null block.

    Args:
        args: as parsed below; ``num_tokens`` is the longest prompt.
    """

    def __init__(self, args: argparse.Namespace, index: int) -> None:
        import torch
        import zmq

        contexts = upstream("v1.multiprocess.transfer_context")
        torch.set_num_threads(args.threads)
        self._torch = torch
        self._key = upstream("v1.multiprocess.custom_types").IPCCacheServerKey
        self._number = 0
        self._zmq = zmq.Context()
        factory = upstream("v1.multiprocess.transport.factory").RequestClientFactory
        self._asks = factory.create(args.server, context=self._zmq)
        self.chunk_tokens = int(self._asks.get_chunk_size().result(TIMEOUT_S))
        self._block_tokens = args.block_tokens
        self._model = f"benchmark, {args.token_bytes} B a token"
        self._half = args.num_tokens // args.block_tokens
        self._kv = self._memory(args)
        self._order = random.Random(0).sample(range(1, self._half + 1), self._half)
        mode = "lmcache_driven" if args.mode == "lmcache_driven" else "engine_driven"
        self._copies = contexts.create_transfer_context(
            self._kv, mode=mode, instance_id=os.getpid() * 100 + index, req_client=self._asks
        )
        group = upstream("v1.multiprocess.group_view").EngineGroupInfo(
            engine_group_id=0, layer_indices=tuple(range(args.num_layers)), tokens_per_block=args.block_tokens
        )
        self._copies.register(
            self._kv,
            self._model,
            1,
            self.chunk_tokens // args.block_tokens,
            TIMEOUT_S,
            layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[group],
            engine_type=upstream("utils").EngineType.VLLM,
        )

    def _memory(self, args: argparse.Namespace) -> dict[str, Any]:
        """A tensor a layer, [K|V, block, token, head, element] in 16 bits, every page touched."""
        elements = args.token_bytes // args.num_layers // 2 // 2
        heads = 8 if elements % 64 == 0 else 1
        shape = (2, 2 * self._half + 1, args.block_tokens, heads, elements // heads)
        some = self._torch.randint(-9999, 9999, shape, dtype=self._torch.int16)
        return {f"layer.{layer}": (some + layer).view(self._torch.float16) for layer in range(args.num_layers)}

    # --- what is timed; each returns an answer with "s", seconds

    def noop(self) -> dict[str, Any]:
        """The emptiest request."""
        start = time.perf_counter()
        self._asks.noop().result(TIMEOUT_S)
        return {"s": time.perf_counter() - start}

    def ping(self) -> dict[str, Any]:
        """A request that is handed to one of the server's pools of threads."""
        start = time.perf_counter()
        self._asks.ping(None).result(TIMEOUT_S)
        return {"s": time.perf_counter() - start}

    def lookup(self, seed: int, num_tokens: int, held_tokens: int | None = None) -> dict[str, Any]:
        """From token ids to the number of chunks that are held. Locks are given back, untimed.

        Args:
            held_tokens: the prompt is that of ``seed`` up to here, and another one behind; None: all of it.
        """
        tokens = self._prompt(seed, num_tokens, held_tokens)
        name = self._request()
        seconds, hits = self._look_up(name, tokens)
        self._unlock(name, tokens, hits)
        return {"s": seconds, "hit_chunks": hits, "num_chunks": num_tokens // self.chunk_tokens}

    def store(self, seed: int, num_tokens: int) -> dict[str, Any]:
        """Blocks -> server, until its ack."""
        tokens = tuple(tokens_of(seed, num_tokens))
        self._stamp(seed)
        seconds, ok = self._store(self._request(), tokens)
        return {"s": seconds, "ok": ok}

    def retrieve(self, seed: int, num_tokens: int) -> dict[str, Any]:
        """Server -> blocks. ``s`` begins after the lookup, which takes ``lookup_s``; then the bytes are compared."""
        tokens = tuple(tokens_of(seed, num_tokens))
        self._wipe()
        name = self._request()
        lookup_s, hits = self._look_up(name, tokens)
        if hits * self.chunk_tokens < num_tokens:
            self._unlock(name, tokens, hits)
            return {"s": 0.0, "lookup_s": lookup_s, "ok": False, "hit_chunks": hits, "equal": False}
        seconds, ok = self._retrieve(name, tokens)
        self._asks.end_session(name).result(TIMEOUT_S)
        equal = self._is_equal(seed, num_tokens)
        return {"s": seconds, "lookup_s": lookup_s, "ok": ok, "hit_chunks": hits, "equal": equal}

    def store_visible(self, seed: int, num_tokens: int) -> dict[str, Any]:
        """A store, then lookups until one finds all of it: ``misses`` did not, ``visible_s`` passed from the ack to the
        end of the last of these (0 where there was none; None: given up)."""
        tokens = tuple(tokens_of(seed, num_tokens))
        seconds, ok = self._store(self._request(), tokens)
        acked, missed, misses = time.perf_counter(), time.perf_counter(), 0
        while True:
            name = self._request()
            hits = self._look_up(name, tokens)[1]
            self._unlock(name, tokens, hits)
            if hits * self.chunk_tokens >= num_tokens:
                return {"s": seconds, "ok": ok, "visible_s": missed - acked if misses else 0.0, "misses": misses}
            missed, misses = time.perf_counter(), misses + 1
            if missed - acked > VISIBLE_S:
                return {"s": seconds, "ok": ok, "visible_s": None, "misses": misses}

    def clear(self) -> dict[str, Any]:
        """Empty the server's L1."""
        self._asks.clear(True).result(TIMEOUT_S)
        return {}

    def load_of(self, kind: str, **plan: Any) -> dict[str, Any]:
        """One of the loads of mixed_load.py ("run", "store_on", "look_on") with this client."""
        made: dict[str, Any] = getattr(mixed_load, kind)(self, **plan)
        return made

    # --- what these loads ask for

    def find(self, tokens: list[int]) -> tuple[float, int, Any]:
        """Seconds, chunks held, and the name of the request that locks them."""
        name = self._request()
        seconds, hits = self._look_up(name, tuple(tokens))
        return seconds, hits, name

    def let_go(self, tokens: list[int], num_chunks: int, pin: Any) -> None:
        """Give the locks back."""
        self._unlock(pin, tuple(tokens), num_chunks)

    def load(self, tokens: list[int], pin: Any) -> tuple[float, bool]:
        """Seconds, and what the answer says; nothing is compared."""
        seconds, ok = self._retrieve(pin, tuple(tokens))
        self._asks.end_session(pin).result(TIMEOUT_S)
        return seconds, ok

    def keep(self, tokens: list[int]) -> tuple[float, bool]:
        """Seconds until the ack of a store, and what it said."""
        return self._store(self._request(), tuple(tokens))

    # --- parts

    def _prompt(self, seed: int, num_tokens: int, held_tokens: int | None) -> tuple[int, ...]:
        tokens = tuple(tokens_of(seed, num_tokens))
        if held_tokens is None:
            return tokens
        return (*tokens[:held_tokens], *((token + 1) % 128_000 for token in tokens[held_tokens:]))

    def _request(self) -> str:
        self._number += 1
        return f"{os.getpid()}-{self._number}"

    def _named(self, name: str, tokens: tuple[int, ...], worker: int | None, end: int | None = None) -> Any:
        return self._key(
            model_name=self._model,
            world_size=1,
            worker_id=worker,
            token_ids=tokens,
            start=0,
            end=len(tokens) if end is None else end,
            request_id=name,
            num_kv_readers=1,
        )

    def _look_up(self, name: str, tokens: tuple[int, ...]) -> tuple[float, int]:
        start = time.perf_counter()
        self._asks.lookup(self._named(name, tokens, None), 1).result(TIMEOUT_S)
        hits = self._asks.wait_prefetch_status(name, TIMEOUT_S).result(TIMEOUT_S)
        return time.perf_counter() - start, int(hits or 0)

    def _unlock(self, name: str, tokens: tuple[int, ...], hits: int) -> None:
        if hits:
            locked = self._named(name, tokens, None, hits * self.chunk_tokens)
            self._asks.free_lookup_locks(locked, 1).result(TIMEOUT_S)
        self._asks.end_session(name).result(TIMEOUT_S)

    def _blocks(self, num_tokens: int, behind: int = 0) -> list[list[int]]:
        return [[block + behind for block in self._order[: num_tokens // self._block_tokens]]]

    def _store(self, name: str, tokens: tuple[int, ...]) -> tuple[float, bool]:
        per_chunk = self.chunk_tokens // self._block_tokens
        start = time.perf_counter()
        key, blocks = self._named(name, tokens, 0), self._blocks(len(tokens))
        event = self._copies.create_recorded_event()
        ok = self._copies.submit_store(name, key, self._kv, blocks, event, per_chunk).result(TIMEOUT_S)
        seconds = time.perf_counter() - start
        self._asks.end_session(name).result(TIMEOUT_S)
        return seconds, bool(ok)

    def _retrieve(self, name: str, tokens: tuple[int, ...]) -> tuple[float, bool]:
        per_chunk = self.chunk_tokens // self._block_tokens
        start = time.perf_counter()
        key, blocks = self._named(name, tokens, 0), self._blocks(len(tokens), self._half)
        event = self._copies.create_recorded_event()
        ok = self._copies.submit_retrieve(name, key, self._kv, blocks, event, per_chunk).result(TIMEOUT_S)
        return time.perf_counter() - start, bool(ok)

    def _bytes(self, layer: Any) -> Any:
        return layer.view(self._torch.int16).view(2, layer.shape[1], -1)

    def _stamp(self, seed: int) -> None:
        """Make the content of this seed another one: a number at the head of K and V of every block of every layer."""
        for layer in self._kv.values():
            self._bytes(layer)[:, 1 : self._half + 1, 0] = seed % 30_000

    def _wipe(self) -> None:
        for layer in self._kv.values():
            self._bytes(layer)[:, self._half + 1 :] = 0

    def _is_equal(self, seed: int, num_tokens: int) -> bool:
        """Whether every byte that was retrieved is that of the content of this seed."""
        self._stamp(seed)
        wanted = self._torch.tensor(self._blocks(num_tokens)[0])
        return all(
            bool((self._bytes(layer)[:, wanted] == self._bytes(layer)[:, wanted + self._half]).all())
            for layer in self._kv.values()
        )

    def close(self) -> None:
        """Detach, and free the shared memory."""
        ended = self._copies.unregister()
        if ended is not None:
            ended.result(TIMEOUT_S)
        self._copies.close()
        self._asks.close()
        self._zmq.term()


def serve(args: argparse.Namespace, index: int, line: socket.socket) -> None:
    """Answer orders until the other end closes."""
    client = Client(args, index)
    orders = line.makefile("rw")
    print(json.dumps({"chunk_tokens": client.chunk_tokens}), file=orders, flush=True)
    for text in orders:
        order = json.loads(text)
        try:
            answer = getattr(client, order.pop("do"))(**order)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=orders, flush=True)
    client.close()


def main() -> int:
    """One process a socket; ends when all of them have ended."""
    parser = argparse.ArgumentParser(description="A client of upstream's server, for upstream.py.")
    parser.add_argument("--server", required=True)
    parser.add_argument("--mode", required=True, choices=("lmcache_driven", "shm", "pickle"))
    for name in ("num-layers", "token-bytes", "block-tokens", "num-tokens", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--fds", type=int, nargs="+", required=True)
    args = parser.parse_args()
    importlib.import_module("torch")
    for name in ("v1.multiprocess.transfer_context", "v1.multiprocess.transport.factory", "utils"):
        upstream(name)
    assert threading.active_count() == CPU_STUB_THREADS, "a fork would lose threads"
    gc.freeze()  # or each fork would copy what the collector touches
    lines = [socket.socket(fileno=fd) for fd in args.fds]
    children = []
    for index, line in enumerate(lines):
        child = os.fork()
        if child == 0:
            for other in lines:
                if other is not line:
                    other.close()
            serve(args, index, line)
            atexit._run_exitfuncs()
            os._exit(0)  # taking all of torch apart would cost each of them most of a second
        children.append(child)
    for line in lines:
        line.close()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the children end with their sockets
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
