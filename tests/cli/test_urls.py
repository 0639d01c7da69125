"""Which addresses are accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmcache_cli import urls


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8080", "http://localhost:8080"),
        ("localhost", "http://localhost"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://localhost:8080/", "http://localhost:8080"),
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("localhost:8000/v1/", "http://localhost:8000"),
        ("HTTPS://Host.Example/", "https://host.example"),
        ("http://gate.example/cache/v1", "http://gate.example/cache"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("10.0.0.7:8080", "http://10.0.0.7:8080"),
    ],
)
def test_every_spelling_has_one_normal_form(text: str, url: str) -> None:
    assert urls.base_url(text) == url
    assert urls.base_url(url) == url


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "/", "http://", "http:///v1", "ftp://host", "file:///etc/passwd", "foo:bar", "localhost:0"),
        *("localhost:99999", "localhost:", "http://[::1", "::1", "http://a b", "http://host\n.evil", "http://h\\@x"),
        *("http://user:secret@host", "http://host?x=1", "http://host#x", "http://hößt", "http://ho\x00st"),
    ],
)
def test_anything_else_is_one_sentence_and_exit_2(lmcache: Callable[..., Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$"):
        urls.base_url(text)
    ended = lmcache("ping", "kvcache", "--url", text)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.3.2.1", "http://[::1]:80", "http://a.localhost"])
def test_this_machine_is_never_behind_a_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("all_proxy", "http://proxy:3128")
    assert urls.proxy_for(url) is None


def test_other_machines_are_reached_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert urls.proxy_for("http://host") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://secure:1")
    assert urls.proxy_for("http://host") is None
    assert urls.proxy_for("https://host") == "http://secure:1"
    monkeypatch.setenv("all_proxy", "http://any:2")
    assert urls.proxy_for("http://host") == "http://any:2"
    monkeypatch.setenv("no_proxy", "host")
    assert urls.proxy_for("http://host") is None


@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".a", "a" * 64 + ".example"])
def test_a_name_that_no_resolver_takes_is_no_address(host: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        urls.base_url(f"{host}:8080")


def test_a_name_may_end_in_a_dot() -> None:
    assert urls.base_url(f"{'a' * 63}.example.:80") == f"http://{'a' * 63}.example.:80"
