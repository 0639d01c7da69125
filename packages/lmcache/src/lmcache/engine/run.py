"""Puts an engine together, runs it until a signal, takes it apart again."""

from __future__ import annotations

import asyncio
import logging
import signal
import warnings

from lmcache.connectors.transformers.session import parse_address
from lmcache.engine import models
from lmcache.engine.http import EngineServer, build_app
from lmcache.engine.runner import Runner
from lmcache.errors import ConfigError
from lmcache.server.ports import listen
from lmcache_cli._version import __version__

STOP_S = 10.0
"""How long a step of the model that runs may take when the engine is to stop."""


def serve(folder: str | None, host: str, port: int, address: str | None, max_model_len: int | None) -> None:
    """Run an engine until SIGTERM or SIGINT.

    Args:
        folder: of the model; None = the one that is made on the spot.
        address: of the LMCache server; None = without.
        max_model_len: tokens of the longest sequence; None = what the model takes.

    Raises:
        LMCacheError: it cannot start; one sentence.
    """
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _quieten()
    if address is not None:
        parse_address(address)
    with listen(host, port) as listener:
        served = models.load(folder) if folder is not None else models.builtin()
        longest = max_model_len or served.context_tokens
        if longest > served.context_tokens:
            raise ConfigError(f"--max-model-len {longest}: this model takes at most {served.context_tokens} tokens")
        runner = Runner(served, address, longest)

        async def run() -> None:
            # uvicorn sends a signal that it has handled once more; the second must not skip our own end.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            server = EngineServer(build_app(served, runner, longest, __version__), runner)
            where = f"http://{host}:{listener.getsockname()[1]}"
            kept = f"KV kept at {address}" if address is not None else "KV not kept"
            print(f"lmcache engine {__version__}: {where}, model {served.name}, {longest} tokens, {kept}", flush=True)
            await server.serve(sockets=[listener])

        try:
            asyncio.run(run())
        finally:
            runner.close(STOP_S)


def _quieten() -> None:
    """transformers reports progress and habits of its own on stderr; errors still come as exceptions."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers")
