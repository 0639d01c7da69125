"""uvicorn, idle when nobody asks, and gone within a second when it is told to stop."""

from __future__ import annotations

import asyncio
import ssl
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from lmcache.server.http.patience import PatientProtocol


class QuietServer(uvicorn.Server):
    """Waits for the order to stop instead of looking ten times a second whether there is one."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def main_loop(self) -> None:
        """Called by ``serve``."""
        await self._stopping.wait()

    def stop(self) -> None:
        """End within a second."""
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._stopping.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and SIGINT."""
        super().handle_exit(sig, frame)
        self.stop()


class _Config(uvicorn.Config):
    """uvicorn's settings with a TLS context of ours: its own allows ciphers that the system's default does not."""

    def __init__(self, app: FastAPI, tls: ssl.SSLContext | None, **settings: Any) -> None:
        super().__init__(app, **settings)
        self._tls = tls

    def load(self) -> None:
        """Called by ``serve``."""
        super().load()
        self.ssl = self._tls


def build_server(app: FastAPI, tls: ssl.SSLContext | None = None) -> QuietServer:
    """One worker that is idle when nobody asks, and stops within a second."""
    return QuietServer(
        _Config(
            app,
            tls,
            loop="asyncio",
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # where a request comes from is what the kernel says
            server_header=False,
            date_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            limit_concurrency=1024,
        )
    )
