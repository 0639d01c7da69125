"""What an engine gets from a running server, and what it cannot do to another engine."""

from __future__ import annotations

import grp
import json
import os
import signal
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from textwrap import dedent

import pytest
from server_running import EXTENT_BYTES, WAIT_S, Engines, Server, eventually, key, running

from lmcache.errors import PeerRefused
from lmcache.keys import extend, pack_tokens, request_namespace
from lmcache.wire import messages as m
from lmcache.wire.client import Client


def test_what_was_committed_is_found_by_the_very_next_lookup_of_anyone(shared: Server, engines: Engines) -> None:
    writer, reader = engines(shared), engines(shared)
    names: list[object] = [("read your writes", i) for i in range(8)]
    assert writer.lookup(names).num_chunks == 0
    assert writer.store(names) == 8
    for engine in (writer, reader):
        found = engine.lookup([*names, "never stored"])
        assert found.num_chunks == 8
        assert engine.verified(found, names) == [True] * 8
        assert isinstance(engine.call(m.Release(0, lease=found.lease)), m.Done)


def test_chunks_of_two_ranks_become_visible_when_both_have_committed(shared: Server, engines: Engines) -> None:
    ranks = [engines(shared, rank=rank, world_size=2) for rank in range(2)]
    names: list[object] = [("two ranks", i) for i in range(3)]
    ranks[0].store(names)
    assert ranks[1].lookup(names).num_chunks == 0
    ranks[1].store(names)
    found = ranks[0].lookup(names)
    assert found.num_chunks == 3
    assert len(found.offsets) == 3 * 2 * 8


def test_a_lookup_counts_its_tokens_once_and_a_repetition_not(own: Server, engines: Engines) -> None:
    engine = engines(own)
    assert own.metric("lookup_requested_tokens_total") == 0
    assert own.metric("lookup_hit_tokens_total") == 0
    engine.store(["a", "b"])
    keys = key("a") + key("b") + key("c")
    engine.call(m.Lookup(0, keys=keys, lease=False))
    engine.call(m.Lookup(0, keys=keys, lease=False, counted=False))
    assert own.metric("lookup_requested_tokens_total") == 3 * 256
    assert own.metric("lookup_hit_tokens_total") == 2 * 256


def test_the_status_describes_the_registered_engine(own: Server, engines: Engines) -> None:
    engine = engines(own)
    instance = own.status()["cache_context_meta"][str(engine.attachment.reply.instance)]
    assert (instance["model_name"], instance["engine"], instance["world_size"]) == ("tiny", "mock 1", 1)
    assert instance["kv_cache_layout"]["kernel_groups"][0]["hidden_dim_size"] == 4 * 8
    assert instance["kv_cache_layout"]["cache_size_per_token"] == EXTENT_BYTES // 256
    assert own.status()["registered_gpu_ids"] == [0]


def test_a_stranger_can_neither_release_nor_commit_nor_abort_what_is_anothers(shared: Server, engines: Engines) -> None:
    owner, stranger = engines(shared), engines(shared)
    owner.store(["mine"])
    lease = owner.lookup(["mine"]).lease
    ticket = owner.reserve(["mine too"]).ticket
    requests: list[m.Request] = [
        m.Release(0, lease=lease),
        m.Commit(0, ticket=ticket, checksums=b"\0" * 8),
        m.Abort(0, ticket=ticket),
    ]
    for request in requests:
        with pytest.raises(PeerRefused) as caught:
            stranger.call(request)
        assert caught.value.code == m.REFUSED_OWNER
    assert isinstance(owner.call(m.Release(0, lease=lease)), m.Done)
    assert isinstance(owner.call(m.Abort(0, ticket=ticket)), m.Done)


def test_a_question_that_nobody_waits_for_leaves_no_lease_though_its_answer_is_never_read(
    own: Server, engines: Engines
) -> None:
    engine, other = engines(own), engines(own)
    engine.store(["unread"])

    def leased() -> float:
        other.call(m.Ping(0))
        return own.metric("l1_memory_leased_bytes")

    unread = engine.client.send(m.Lookup(0, keys=key("unread")))
    eventually(lambda: leased() > 0)
    other.call(m.Release(0, question=unread))
    assert leased() > 0
    engine.client.send(m.Release(0, question=unread))
    eventually(lambda: leased() == 0)
    assert isinstance(engine.call(m.Release(0, question=unread)), m.Done)


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_connection_that_is_bound_to_no_process_may_only_ping_and_ask_where_to_attach(
    shared: Server, way: str
) -> None:
    with Client(shared.way(way)) as client:
        welcome = client.call(m.Hello(0, version=m.WIRE_VERSION), WAIT_S)
        assert isinstance(welcome, m.Welcome)
        assert welcome.attach_path == shared.attach_path
        assert isinstance(client.call(m.Ping(0), WAIT_S), m.Pong)
        for request in (m.Lookup(0, keys=key("x")), m.Reserve(0, keys=key("x")), m.Bye(0)):
            with pytest.raises(PeerRefused) as caught:
                client.call(request, WAIT_S)
            assert caught.value.code == m.REFUSED_UNKNOWN
        with pytest.raises(PeerRefused) as caught:
            client.call(m.Hello(0, version=m.WIRE_VERSION, token=b"guess" * 3 + b"!"), WAIT_S)
        assert caught.value.code == m.REFUSED_UNKNOWN
        with pytest.raises(PeerRefused) as caught:
            client.call(m.Hello(0, version=m.WIRE_VERSION + 1), WAIT_S)
        assert caught.value.code == m.REFUSED_VERSION


def test_an_engine_may_ask_neither_for_the_snapshot_nor_for_a_clear(shared: Server, engines: Engines) -> None:
    engine = engines(shared)
    for request in (m.Snapshot(0), m.Clear(0)):
        with pytest.raises(PeerRefused) as caught:
            engine.call(request)
        assert caught.value.code == m.REFUSED_OWNER


def test_requests_that_contradict_themselves_are_refused_with_a_rule(shared: Server, engines: Engines) -> None:
    engine, fresh = engines(shared), engines(shared, register=False)
    granted = engine.reserve(["contradiction"])
    cases: list[tuple[m.Request, str]] = [
        (m.Lookup(0, keys=b"short"), m.REFUSED_INVALID),
        (m.Lookup(0, keys=b""), m.REFUSED_INVALID),
        (m.Lookup(0, keys=b"k" * 32 * (m.KEYS_MAX + 1)), m.REFUSED_INVALID),
        (m.Lookup(0, keys=b"k" * 32, first_chunk=-1), m.REFUSED_INVALID),
        (m.Release(0, lease=1, failed=b"x"), m.REFUSED_INVALID),
        (m.Commit(0, ticket=granted.ticket, checksums=b"\0" * 16), m.REFUSED_INVALID),
        (m.Register(0, "cook", "m", "e", 0, 1, 4096), m.REFUSED_INVALID),
        (m.Register(0, "worker", "m", "e", 2, 2, 4096), m.REFUSED_INVALID),
        (m.Register(0, "worker", "m", "e", 0, 1, 1 << 40), m.REFUSED_LAYOUT),
    ]
    for request, code in cases:
        with pytest.raises(PeerRefused) as caught:
            engine.call(request)
        assert caught.value.code == code, request
    with pytest.raises(PeerRefused, match="only a registered worker"):
        fresh.reserve(["x"])
    assert isinstance(engine.call(m.Abort(0, ticket=granted.ticket)), m.Done)


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_second_connection_with_the_same_token_takes_over_from_the_first(
    shared: Server, engines: Engines, way: str
) -> None:
    engine = engines(shared)
    with Client(shared.way(way)) as other:
        other.call(m.Hello(0, version=m.WIRE_VERSION, token=engine.attachment.reply.token), WAIT_S)
        other.call(m.Lookup(0, keys=key("x")), WAIT_S)
        with pytest.raises(PeerRefused) as caught:
            engine.lookup(["x"])
        assert caught.value.code == m.REFUSED_UNKNOWN
    assert isinstance(engine.hello(engine.attachment.reply.token), m.Welcome)
    engine.lookup(["x"])


def test_a_new_registration_replaces_the_one_before_and_what_it_held(own: Server, engines: Engines) -> None:
    engine = engines(own)
    ticket = engine.reserve(["x"]).ticket
    engine.call(m.Register(0, "worker", "other", "mock 2", 0, 1, 2 * EXTENT_BYTES))
    with pytest.raises(PeerRefused):
        engine.call(m.Commit(0, ticket=ticket, checksums=b"\0" * 8))
    metas = list(own.status()["cache_context_meta"].values())
    assert [meta["model_name"] for meta in metas] == ["other"]


def test_after_bye_nothing_is_held_and_nothing_more_is_answered(own: Server, engines: Engines) -> None:
    engine = engines(own)
    engine.store(["x"])
    engine.lookup(["x"])
    engine.call(m.Bye(0))
    assert own.status()["active_sessions"] == 0
    with pytest.raises(PeerRefused):
        engine.lookup(["x"])


HOLDER = dedent("""
    import sys, time
    sys.path.insert(0, sys.argv[1])
    from server_running import Engine, Server
    server = Server.__new__(Server)
    server.attach_path = sys.argv[2]
    engine = Engine(server)
    engine.store(["held"])
    engine.lookup(["held"])
    engine.reserve(["half written"])
    print("holding", flush=True)
    time.sleep(600)
""")


def holder(server: Server, *prefix: str, **options: object) -> subprocess.Popen[bytes]:
    """Another process that holds a lease and a reservation."""
    command = [*prefix, sys.executable, "-c", HOLDER, str(Path(__file__).parent), server.attach_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
    assert process.stdout.readline() == b"holding\n"
    return process  # type: ignore[no-any-return]


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(WAIT_S)
    assert process.stdout is not None
    process.stdout.close()


def test_a_killed_engine_leaves_no_lease_no_reservation_and_no_half_written_chunk(
    own: Server, engines: Engines
) -> None:
    process = holder(own)
    assert own.status()["active_sessions"] == 2
    process.send_signal(signal.SIGKILL)
    end(process)
    eventually(lambda: own.status()["active_sessions"] == 0 and own.status()["attached_processes"] == 0)
    found = engines(own).lookup(["held", "half written"])
    assert found.num_chunks == 1
    assert own.l1()["memory_used_bytes"] == EXTENT_BYTES


def test_an_engine_in_another_pid_namespace_attaches_and_its_end_is_seen(own: Server, engines: Engines) -> None:
    unshare = ["unshare", "-p", "-f", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a PID namespace")
    process = holder(own, *unshare)
    assert own.status()["active_sessions"] == 2
    end(process)
    eventually(lambda: own.status()["active_sessions"] == 0)
    assert engines(own).lookup(["held"]).num_chunks == 1


def as_nobody(server: Server, *groups: int) -> subprocess.CompletedProcess[str]:
    """Try to attach as another user."""
    program = dedent("""
        import os, sys
        from lmcache.wire import messages as m
        from lmcache.wire.attach import attach
        from lmcache.errors import AttachError
        import lmcache.wire.client
        os.setgroups([int(word) for word in sys.argv[2:]])
        os.setgid(65534)
        os.setuid(65534)
        try:
            given = attach(sys.argv[1], m.Attach(version=m.WIRE_VERSION, pid=1, name="nobody", want_pool=True), 30.0)
        except AttachError as error:
            sys.exit(str(error))
        with lmcache.wire.client.Client(given.reply.endpoint) as client:
            client.call(m.Hello(0, version=m.WIRE_VERSION, token=given.reply.token), 30.0)
    """)
    command = [sys.executable, "-c", program, server.attach_path, *map(str, groups)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_attaches_only_as_a_member_of_the_attach_group(own: Server) -> None:
    refused = as_nobody(own)
    assert refused.returncode == 1
    assert "--attach-group" in refused.stderr
    group = next(item for item in grp.getgrall() if item.gr_gid not in (0, 65534))
    with tempfile.TemporaryDirectory(prefix="lmcache-test-") as folder:
        os.chmod(folder, 0o755)
        with running(folder, "--attach-group", group.gr_name) as server:
            assert as_nobody(server, group.gr_gid).returncode == 0
            assert as_nobody(server).returncode == 1


def test_an_engine_that_becomes_another_keeps_its_leases_and_is_known_by_its_new_namespace(
    own: Server, engines: Engines
) -> None:
    worker, scheduler = engines(own), engines(own, register=False)
    first, second = (sha256(name).digest() for name in (b"before", b"after"))
    for digest in (first, second):
        scheduler.call(m.Register(0, "scheduler", "tiny", "mock 1", 0, 1, 0, namespace=digest))
        chunk = extend(request_namespace(digest, "", {}, 256), pack_tokens([7] * 256), 256)[0]
        granted = worker.call(m.Reserve(0, keys=chunk))
        worker.call(m.Commit(0, ticket=granted.ticket, checksums=bytes(8)))
        found = scheduler.call(m.Lookup(0, keys=chunk))
        answer = own.ask("/cache/lookup", json.dumps({"token_ids": [7] * 256}).encode())[1]
        assert [model["held_tokens"] for model in answer["models"]] == [256]
        if digest == first:
            lease = found.lease
    assert isinstance(scheduler.call(m.Release(0, lease=lease)), m.Done)
