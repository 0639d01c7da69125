"""The core's own weight: what the books explain is no burden, what they do not is one, once."""

from __future__ import annotations

from lmcache.server.scale import UNEXPLAINED_BYTES_MAX, Scale


def test_what_nobody_explains_is_noticed_once() -> None:
    scale = Scale()
    assert not scale.is_heavy(0, 0)
    burden = bytearray(b"x") * (UNEXPLAINED_BYTES_MAX + (8 << 20))
    assert scale.is_heavy(0, 0)
    assert not scale.is_heavy(0, 0)
    scale.close()
    del burden


def test_entries_explain_memory() -> None:
    scale = Scale()
    assert not scale.is_heavy(0, 0)
    burden = bytearray(b"x") * (UNEXPLAINED_BYTES_MAX + (8 << 20))
    assert not scale.is_heavy(len(burden) // 1024, 0)
    scale.close()
    del burden


def test_what_connections_have_left_is_accounted_for() -> None:
    scale = Scale()
    assert not scale.is_heavy(0, 0)
    burden = bytearray(b"x") * (UNEXPLAINED_BYTES_MAX + (8 << 20))
    assert not scale.is_heavy(0, len(burden))
    scale.close()
    del burden
