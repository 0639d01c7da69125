"""The scripted engine's own side: the process that ``scripted_engine.ScriptedEngine`` starts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scripted_engine import MODEL, Asked, Behaviour, Script

TEMPLATE_TOKENS = 4  # that a chat template would add to each message
BLOCK_TOKENS = 16  # what the pretended prefix cache holds


def num_tokens(body: Mapping[str, Any]) -> list[str]:
    """The prompt's tokens, the template's included, as they are counted for usage and `/tokenize`."""
    if "messages" not in body:
        return str(body.get("prompt", "")).split()
    tokens = []
    for message in body["messages"]:
        tokens += ["<template>"] * TEMPLATE_TOKENS + str(message["content"]).split()
    return tokens


class _Engine:
    """The process's side."""

    def __init__(self) -> None:
        self.script = Script()
        self._forget()

    def _forget(self) -> None:
        self.asked: list[Asked] = []
        self.paths: list[str] = []
        self.in_flight = self.in_flight_max = 0
        self._blocks: set[int] = set()
        self._num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self._num_connections += 1
        number = self._num_connections
        try:
            while await self._serve_one(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        """Answer one request; whether the connection goes on."""
        method, path, headers, content = await _read_request(reader)
        self.paths.append(f"{method} {path}")
        if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            behaviours = self.script.behaviours
            behaviour = behaviours[min(len(self.asked), len(behaviours) - 1)]
            asked = Asked(path, headers, json.loads(content), number, time.perf_counter())
            self.asked.append(asked)
            self.in_flight += 1
            self.in_flight_max = max(self.in_flight_max, self.in_flight)
            try:
                await self._generate(reader, writer, behaviour, asked)
            except ConnectionError:
                asked.is_cut = True
            finally:
                self.in_flight -= 1
            if behaviour.framing == "close" or behaviour.raw is not None or writer.is_closing():
                return False
        else:
            status, document = self._look_up(method, path, content)
            body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
            kind = "text/plain" if isinstance(document, str) else "application/json"
            writer.write(_head(status, "", kind, [f"Content-Length: {len(body)}"]) + body)
            await writer.drain()
        return headers.get("connection", "").lower() != "close"

    def _look_up(self, method: str, path: str, content: bytes) -> tuple[int, Any]:
        script = self.script
        if (method, path) == ("GET", "/health"):
            return (200 if script.is_healthy else 503), ""
        if (method, path) == ("GET", "/v1/models"):
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in script.models]}
        if (method, path) == ("GET", "/version") and script.version:
            return 200, {"version": script.version}
        if (method, path) == ("GET", "/metrics"):
            return 200, f"# TYPE scripted:requests counter\nscripted:requests_total {len(self.asked)}\n"
        if (method, path) == ("POST", "/tokenize") and script.tokenize:
            words = num_tokens(json.loads(content))
            return 200, {"count": len(words), "max_model_len": 1 << 20, "tokens": list(range(len(words)))}
        return 404, {"detail": "Not Found"}

    async def _generate(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, behaviour: Behaviour, asked: Asked
    ) -> None:
        if behaviour.head_s:
            await asyncio.sleep(behaviour.head_s)
        if behaviour.raw is not None:
            writer.write(behaviour.raw.encode("latin-1"))
            await writer.drain()
            return
        if behaviour.body is not None:
            body = behaviour.body.encode()
            lines = [f"Content-Length: {len(body)}"]
            writer.write(_head(behaviour.status, behaviour.reason, behaviour.content_type, lines) + body)
            await writer.drain()
            return
        if behaviour.hang_after == -1:
            await _hang(reader)
        if behaviour.die_after == -1:
            _reset(writer)
            return
        await _Stream(reader, writer, behaviour, asked, self._usage(behaviour, asked)).run()

    def _usage(self, behaviour: Behaviour, asked: Asked) -> dict[str, Any]:
        words = num_tokens(asked.body)
        cached = behaviour.cached_tokens
        if cached == "prefix":
            cached = 0
            digest = 0
            for end in range(BLOCK_TOKENS, len(words) + 1, BLOCK_TOKENS):
                digest = hash((digest, *words[end - BLOCK_TOKENS : end]))
                if digest in self._blocks and cached == end - BLOCK_TOKENS:
                    cached = end
                self._blocks.add(digest)
        num_output = len(behaviour.texts) * behaviour.repeat
        usage: dict[str, Any] = {
            "prompt_tokens": len(words) if behaviour.prompt_tokens is None else behaviour.prompt_tokens,
            "completion_tokens": num_output if behaviour.output_tokens is None else behaviour.output_tokens,
        }
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        if cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        return usage

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of the test itself."""
        try:
            _, path, _, content = await _read_request(reader)
            if path == "/script":
                document = json.loads(content)
                behaviours = tuple(Behaviour(**item) for item in document.pop("behaviours"))
                self.script = Script(behaviours=behaviours, **document)
                self._forget()
            body = json.dumps(
                {
                    "asked": [dataclasses.asdict(item) for item in self.asked] if path == "/asked" else [],
                    "paths": self.paths,
                    "in_flight_max": self.in_flight_max,
                }
            ).encode()
            writer.write(_head(200, "", "application/json", [f"Content-Length: {len(body)}"]) + body)
            await writer.drain()
        finally:
            writer.close()


class _Stream:
    """One answer as a stream of events."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        behaviour: Behaviour,
        asked: Asked,
        usage: Mapping[str, Any],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._behaviour = behaviour
        self._asked = asked
        self._usage = usage
        self._is_chat = asked.path == "/v1/chat/completions"
        self._is_held = behaviour.framing == "length"
        self._held = b""

    async def run(self) -> None:
        """Write it all."""
        behaviour, asked = self._behaviour, self._asked
        if not self._is_held:
            lines = ["Transfer-Encoding: chunked"] if behaviour.framing == "chunked" else ["Connection: close"]
            asked.head_s = time.perf_counter()
            self._writer.write(_head(200, "", "text/event-stream", lines))
        if self._is_chat:
            self._write(self._event({"role": "assistant", "content": ""}))
        cached = self._usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        first_s = behaviour.first_s + behaviour.prefill_s_per_token * (self._usage["prompt_tokens"] - cached)
        start_s = time.perf_counter() + first_s
        if behaviour.in_step:
            start_s = math.ceil(start_s / behaviour.gap_s) * behaviour.gap_s
        if not await self._texts(start_s):
            return
        await self._end()

    async def _texts(self, start_s: float) -> bool:
        """The texts on their schedule; False where the script says that nothing follows."""
        behaviour = self._behaviour
        texts = [text for _ in range(behaviour.repeat) for text in behaviour.texts]
        pending = []
        for index in range(len(texts) + 1):
            if index in (behaviour.hang_after, behaviour.die_after, behaviour.error_after):
                self._write_texts(pending)
                return await self._break_off(index)
            if index == len(texts):
                break
            pending.append(texts[index])
            if len(pending) == behaviour.together or index == len(texts) - 1:
                wait_s = start_s + index * behaviour.gap_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                self._write_texts(pending)
                pending = []
                await self._writer.drain()
        return True

    async def _break_off(self, index: int) -> bool:
        behaviour = self._behaviour
        if index == behaviour.hang_after:
            await self._writer.drain()
            comments = asyncio.create_task(self._comment()) if behaviour.comments_s is not None else None
            try:
                await _hang(self._reader)
            finally:
                if comments is not None:
                    comments.cancel()
        if index == behaviour.die_after:
            await self._writer.drain()
            await asyncio.sleep(0.05)  # a reset drops what the other side has not read yet
            _reset(self._writer)
            return False
        self._write(self._lines({"error": {"message": behaviour.error, "code": 500}}))
        await self._end_body()
        return False

    async def _comment(self) -> None:
        while True:
            self._write(self._frame(b": still here\n\n"))
            await asyncio.sleep(self._behaviour.comments_s or 0)

    def _write_texts(self, texts: Sequence[str | Mapping[str, Any]]) -> None:
        if texts:
            data = b"".join(self._event(text) for text in texts)
            self._asked.text_s += [time.perf_counter()] * len(texts)
            self._write(data)

    async def _end(self) -> None:
        behaviour = self._behaviour
        if behaviour.finish_reason is not None:
            self._write(self._event({}, behaviour.finish_reason))
        if behaviour.usage and self._asked.body.get("stream_options", {}).get("include_usage"):
            self._write(self._lines({"id": "0", "model": MODEL, "choices": [], "usage": dict(self._usage)}))
        if behaviour.done:
            self._asked.done_s = time.perf_counter()
            self._write(self._frame(f"data: [DONE]{behaviour.line_end * 2}".encode()))
        if behaviour.linger_s:
            await self._writer.drain()
            await asyncio.sleep(behaviour.linger_s)
        await self._end_body()

    async def _end_body(self) -> None:
        if self._is_held:
            lines = [f"Content-Length: {len(self._held)}"]
            self._asked.head_s = time.perf_counter()
            self._writer.write(_head(200, "", "text/event-stream", lines) + self._held)
        elif self._behaviour.framing == "chunked":
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def _event(self, text: str | Mapping[str, Any], finish_reason: str | None = None) -> bytes:
        delta = {"content": text} if isinstance(text, str) else dict(text)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if self._is_chat:
            choice["delta"] = delta
        else:
            choice["text"] = "".join(map(str, delta.values()))
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._lines({"id": "0", "object": kind, "created": 0, "model": MODEL, "choices": [choice]})

    def _lines(self, document: Mapping[str, Any]) -> bytes:
        return self._frame(f"data: {json.dumps(document)}{self._behaviour.line_end * 2}".encode())

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self._behaviour.framing == "chunked" else data

    def _write(self, data: bytes) -> None:
        if self._is_held:
            self._held += data
        else:
            self._writer.write(data)


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers by lower-case name, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        if name:
            headers[name.lower()] = value.strip()
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, headers, content


def _head(status: int, reason: str, content_type: str, lines: Sequence[str]) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} {reason}", f"Content-Type: {content_type}", *lines, "", ""]).encode()


async def _hang(reader: asyncio.StreamReader) -> None:
    """Until the client goes away; what it sends meanwhile is dropped."""
    while await reader.read(1 << 16):
        pass
    raise ConnectionResetError


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection as a process that dies does."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _main(host: str, port: int, certificate: str) -> None:
    context = None
    if certificate:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    engine = _Engine()
    server = await asyncio.start_server(engine.serve, host, port, ssl=context, limit=1 << 26, backlog=512)
    control = await asyncio.start_server(engine.control, "127.0.0.1", 0, limit=1 << 26)
    print("ports", *(each.sockets[0].getsockname()[1] for each in (server, control)), flush=True)
    # its standard input ends with the test's process, however that ends
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
