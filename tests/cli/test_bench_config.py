"""Settings of a benchmark: the command line over the file over the defaults, and what contradicts itself."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_cli.bench import config, config_file
from lmcache_cli.bench.workloads import WORKLOADS
from lmcache_cli.errors import UsageFault

URL = {"engine_url": "http://localhost:8000"}


def settled(given_: dict[str, Any], filed: dict[str, Any] | None = None) -> config.Config:
    values = config.resolve({**URL, **given_}, filed or {})
    assert config.missing(values) == []
    return config.build(values)


def file_of(tmp_path: Path, content: object) -> str:
    path = tmp_path / "bench.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_flag_wins_over_the_file_even_where_it_equals_the_default() -> None:
    filed = {"workload": "long-doc-qa", "kv_cache_volume": 50.0, "tokens_per_gb_kvcache": 10}
    assert settled({}, filed).kv_cache_volume == 50.0
    assert settled({"kv_cache_volume": 100.0}, filed).kv_cache_volume == 100.0


def test_every_default_of_every_workload_is_a_value_that_its_option_can_have() -> None:
    for workload in WORKLOADS.values():
        for option in workload.options:
            assert config.check(option, option.default) == option.default


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_exported_file_replays_as_the_same_settings(name: str, tmp_path: Path) -> None:
    first = settled({"workload": name, "tokens_per_gb_kvcache": 100, "model": "m", "seed": 9, "max_duration": 3.5})
    path = str(tmp_path / "out.json")
    config_file.Export(path).write(first)
    assert "engine_url" not in json.loads(Path(path).read_text())
    filed, unused = config_file.read(path)
    assert unused == []
    assert settled({}, filed) == first


def test_a_file_that_upstream_exported_replays_here(tmp_path: Path) -> None:
    upstream = {
        "model": "m",
        "workload": "random-prefill",
        "kv_cache_volume": 50.0,
        "tokens_per_gb_kvcache": 6553,
        "ignore_eos": True,
        "no_warmup": False,
        "rp_request_length": 100,
        "rp_num_requests": 3,
        "rag_dataset": None,
    }
    filed, unused = config_file.read(file_of(tmp_path, upstream))
    assert unused == ["rag_dataset"]
    settings = settled({}, filed)
    assert (settings.model, settings.ignore_eos, settings.settings["rp_num_requests"]) == ("m", True, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "it is not JSON (line 1"),
        ('{"seed": NaN}', "NaN is not a number"),
        ({"rp_num_request": 3}, "there is no setting 'rp_num_request' (did you mean 'rp_num_requests'?)"),
        ({"rp_num_requests": "3"}, "'rp_num_requests': expected a whole number from 1 to 4096"),
        ({"seed": True}, "'seed': expected a whole number"),
        ({"ignore_eos": 1}, "'ignore_eos': expected true or false"),
        ({"kv_cache_volume": -5}, "'kv_cache_volume': expected a number above 0"),
        ({"workload": "nope"}, "'workload': expected one of long-doc-qa"),
        ({"engine_url": "http://[::1"}, "'engine_url': 'http://[::1' is not an address"),
        ({"version": 2}, "version 1 is understood, and it has 2"),
        ({"concurrency": 1, "request_rate": 1}, "exclude each other"),
    ],
)
def test_a_file_that_says_something_wrong_is_refused_in_one_sentence(
    content: object, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageFault) as caught:
        config_file.read(file_of(tmp_path, content))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"workload": "random-prefill", "ldqa_document_length": 4}, "--ldqa-document-length belongs to the workload"),
        ({"workload": "random-prefill", "concurrency": 2, "request_rate": 3.0}, "exclude each other"),
        ({"workload": "long-doc-qa", "concurrency": 2, "ldqa_num_inflight_requests": 2}, "exclude each other"),
        ({"workload": "multi-round-chat", "request_rate": 2.0, "mrc_qps": 2.0}, "exclude each other"),
        ({"workload": "random-prefill", "concurrency": 2, "arrival": "burst"}, "--arrival has no meaning"),
        ({"workload": "random-prefill", "rp_num_requests": 0}, "expected a whole number from 1 to 4096"),
        ({"workload": "random-prefill", "kv_cache_volume": float("nan")}, "expected a number above 0"),
        ({"workload": "random-prefill", "goodput": "ttft"}, "--goodput"),
    ],
)
def test_flags_that_cannot_go_together_are_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageFault, match=said):
        config.resolve({**URL, **given_}, {})


def test_arrival_without_an_open_loop_is_refused() -> None:
    with pytest.raises(UsageFault, match="--arrival needs --request-rate"):
        settled({"workload": "random-prefill", "arrival": "burst"})


def test_a_flag_replaces_the_pace_that_the_file_sets() -> None:
    filed = {"workload": "random-prefill", "request_rate": 3.0, "arrival": "burst"}
    closed = settled({"concurrency": 2}, filed)
    workload = closed.kind(closed.settings, 1, None)
    assert config.pacing(closed, workload).concurrency == 2
    assert config.pacing(closed, workload).rate_per_s is None
    filed = {"workload": "long-doc-qa", "concurrency": 7, "tokens_per_gb_kvcache": 10}
    own = settled({"ldqa_num_inflight_requests": 2}, filed)
    assert config.pacing(own, own.kind(own.settings, 1, 1)).concurrency == 2


def test_tokens_per_gb_are_asked_for_only_where_a_workload_uses_them() -> None:
    asked = {name for name in WORKLOADS if config.missing(config.resolve({**URL, "workload": name}, {}))}
    assert asked == {"long-doc-qa", "multi-round-chat", "prefix-suffix-tuner"}
    assert not config.missing(config.resolve({**URL, "workload": "long-doc-qa", "lmcache_url": "http://h:1"}, {}))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3))
def test_no_json_value_of_any_setting_does_more_than_be_refused(value: object) -> None:
    for option in config.OPTIONS.values():
        checked: object = None
        with contextlib.suppress(ValueError, UsageFault):
            checked = config.check(option, value)
        assert checked is None or isinstance(checked, option.kind)
