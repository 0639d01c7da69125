"""Stock vLLM with tiers below L1: what was computed once is found after restarts and on other servers, and right."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Plain, expected_hit, prompt, wait_for
from engine import Engine, Server, free_port


def tier_objects(server: Server) -> int:
    (adapter,) = server.status()["storage_manager"]["l2_adapters"]
    return int(adapter["stored_object_count"] or 0)


def is_ready(server: Server, num_attached: int) -> bool:
    status = server.status()
    (adapter,) = status["storage_manager"]["l2_adapters"]
    return bool(adapter["is_healthy"]) and bool(status["attached_processes"] == num_attached)


def test_after_a_restart_of_the_server_the_prompt_comes_from_disk(
    tiny: Path, logs: Path, tmp_path: Path, plain: Plain
) -> None:
    options = ["--l2-path", str(tmp_path / "l2"), "--l2-size-gb", "1"]
    with (
        Server(logs, 0.5, *options) as server,
        Engine(tiny, logs, server.port, enable_prefix_caching=False) as engine,
    ):
        entries = [prompt(900, 1500), prompt(901, 2100)]
        expected = plain.tokens(entries)
        assert [engine.generate([entry])["tokens"][0] for entry in entries] == expected
        num_chunks = sum(len(entry) // 256 for entry in entries)
        server.stop()
        server.start()
        wait_for(lambda: is_ready(server, 2), "the engine attaches again")
        assert server.status()["storage_manager"]["l1_manager"]["total_object_count"] == 0
        wait_for(lambda: tier_objects(server) == num_chunks, "the folder has been looked through")
        for entry, tokens in zip(entries, expected, strict=True):
            warm = engine.generate([entry])
            assert (warm["cached"], warm["tokens"]) == ([expected_hit(len(entry))], [tokens])
        assert server.counter("lmcache_mp_quarantined_chunks_total") == 0

        server.stop()
        for path in (tmp_path / "l2").rglob("*"):
            if path.is_file() and path.stat().st_size > 4096:
                data = bytearray(path.read_bytes())
                data[5000] ^= 1
                path.write_bytes(data)
        server.start()
        wait_for(lambda: is_ready(server, 2), "the engine attaches again")
        rotten = engine.generate([entries[0]])
        assert (rotten["cached"], rotten["tokens"]) == ([0], [expected[0]])


def test_a_clean_stop_with_l1_persist_loses_nothing_for_an_engine_that_stays_attached(
    tiny: Path, logs: Path, plain: Plain
) -> None:
    entry = prompt(905, 1300)
    expected = plain.tokens([entry])
    with (
        Server(logs, 0.25, "--l1-persist") as server,
        Engine(tiny, logs, server.port, enable_prefix_caching=False) as engine,
    ):
        assert engine.generate([entry])["tokens"] == expected
        server.stop()
        server.start()
        wait_for(lambda: server.status()["attached_processes"] == 2, "the engine attaches again")
        warm = engine.generate([entry])
        assert (warm["cached"], warm["tokens"]) == ([expected_hit(1300)], expected)
        server.kill()
        server.start()
        wait_for(lambda: server.status()["attached_processes"] == 2, "the engine attaches again")
        again = engine.generate([entry])
        assert (again["cached"], again["tokens"]) == ([expected_hit(1300)], expected)
        server.stop()
        for name in ("pool", "records"):
            Path(f"/dev/shm/lmcache-{os.geteuid()}/{server.port}/{name}").unlink()


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    assert program, "redis-server is missing: run scripts/apt-packages"
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield port, process
        finally:
            process.kill()


@pytest.mark.parametrize("is_stopped", [False, True], ids=["answers", "stopped"])
def test_an_engine_on_another_server_hits_what_the_first_one_computed(
    tiny: Path, logs: Path, tmp_path: Path, plain: Plain, is_stopped: bool
) -> None:
    entry = prompt(910, 1700)
    expected = plain.tokens([entry])
    with redis_server(tmp_path) as (port, redis):
        option = ["--l2-adapter", f'{{"type": "redis", "host": "127.0.0.1", "port": {port}}}']
        with (
            Server(logs, 0.25, *option) as first,
            Engine(tiny, logs, first.port, enable_prefix_caching=False) as engine,
        ):
            wait_for(lambda: is_ready(first, 2), "the tier is in use")
            assert engine.generate([entry])["tokens"] == expected
            wait_for(lambda: tier_objects(first) >= 1700 // 256, "the chunks are in redis")
        with (
            Server(logs, 0.25, *option) as second,
            Engine(tiny, logs, second.port, enable_prefix_caching=False) as engine,
        ):
            wait_for(lambda: is_ready(second, 2), "the tier is in use")
            if is_stopped:
                redis.send_signal(signal.SIGSTOP)
            answer = engine.generate([entry])
            assert answer["tokens"] == expected
            assert answer["cached"] == [0 if is_stopped else expected_hit(1700)]
            redis.send_signal(signal.SIGCONT)
