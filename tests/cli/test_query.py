"""`lmcache query engine`: against engines that stream, and engines that do not keep their word."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, event_stream, json_answer, serve

from lmcache_cli.client import engine as engine_client
from lmcache_cli.measured import Completion

Run = Callable[..., Any]

MODELS = json_answer({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})
USAGE = {"choices": [], "usage": {"prompt_tokens": 618, "completion_tokens": 9}}


def text(piece: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish}]}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


GOOD = event_stream(text(""), text("Hel"), text("lo"), USAGE)


@pytest.fixture
def query(lmcache: Run) -> Run:
    """Query an engine with these answers in JSON; returns how it ended and what was asked."""

    def run(answers: dict[str, Answer], *words: str, prompt: str = "hi") -> Any:
        with serve({"/v1/models": MODELS, **answers}) as server:
            ended = lmcache("query", "engine", "--url", server.url, "--prompt", prompt, "--format", "json", *words)
        return ended, server.asked

    return run


def metrics(ended: Any) -> Any:
    return json.loads(ended.out)["metrics"]


def test_a_streamed_completion_is_measured(query: Run) -> None:
    ended, asked = query({"/v1/completions": GOOD})
    shown = metrics(ended)
    assert (ended.status, ended.err) == (0, "")
    assert (shown["model"], shown["prompt_tokens"], shown["answer"]) == ("first", 618, "Hello")
    latency = shown["latency"]
    assert latency.pop("output_tokens") == 9
    assert 0 < latency["ttft_ms"] <= latency["total_latency_ms"]
    assert set(latency) == {"ttft_ms", "tpot_ms_per_token", "total_latency_ms", "throughput_tokens_per_s"}
    assert [each.path for each in asked] == ["/v1/models", "/v1/completions"]
    assert json.loads(asked[1].body) == {
        "model": "first",
        "prompt": "hi",
        "max_tokens": 128,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_named_model_is_not_looked_up(query: Run) -> None:
    ended, asked = query({"/v1/completions": GOOD}, "--model", "mine", "--max-tokens", "5")
    assert metrics(ended)["model"] == "mine"
    assert [each.path for each in asked] == ["/v1/completions"]
    assert json.loads(asked[0].body)["max_tokens"] == 5


@pytest.mark.parametrize("status", [404, 405])
def test_an_engine_without_completions_is_asked_by_chat(query: Run, status: int) -> None:
    chat = event_stream(delta(role="assistant"), delta(content="yes"), USAGE)
    ended, asked = query({"/v1/completions": Answer(status), "/v1/chat/completions": chat})
    assert ended.status == 0
    assert metrics(ended)["latency"]["output_tokens"] == 9
    assert json.loads(asked[-1].body)["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning"])
def test_the_first_text_may_be_reasoning(query: Run, key: str) -> None:
    chat = event_stream(delta(role="assistant", content=""), delta(**{key: "hm"}), USAGE)
    ended, _ = query({"/v1/chat/completions": chat})
    assert metrics(ended)["latency"]["ttft_ms"] is not None


def test_tokens_are_never_invented(query: Run, lmcache: Run) -> None:
    ended, _ = query({"/v1/completions": event_stream(text("a"), text("b"))})
    shown = metrics(ended)
    assert ended.status == 0
    assert (shown["prompt_tokens"], shown["latency"]["output_tokens"]) == (None, None)
    assert shown["latency"]["tpot_ms_per_token"] is None
    assert shown["latency"]["throughput_tokens_per_s"] is None
    assert shown["latency"]["ttft_ms"] > 0
    with serve({"/v1/completions": event_stream(text("a"))}) as server:
        table = lmcache("query", "engine", "--url", server.url, "--prompt", "x", "--model", "m").out
    assert [line.split()[-1] for line in table.splitlines() if "tokens:" in line] == ["N/A", "N/A"]


def test_cached_tokens_are_reported_when_the_engine_counts_them(query: Run) -> None:
    usage = {"usage": {"prompt_tokens": 6, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}}
    ended, _ = query({"/v1/completions": event_stream(text("a"), usage)})
    assert metrics(ended)["cached_tokens"] == 4
    ended, _ = query({"/v1/completions": GOOD})
    assert metrics(ended)["cached_tokens"] is None


@pytest.mark.parametrize(
    "usage", [{"completion_tokens": "9"}, {"completion_tokens": True}, {"completion_tokens": -1}, 7]
)
def test_a_count_of_the_wrong_type_is_absent(query: Run, usage: Any) -> None:
    ended, _ = query({"/v1/completions": event_stream(text("a"), {"usage": usage})})
    assert (ended.status, metrics(ended)["latency"]["output_tokens"]) == (0, None)


@pytest.mark.parametrize(
    "answer",
    [
        event_stream(text("a"), text("b"), text("c"), done=False),
        event_stream(text("a"), USAGE, done=False),
        Answer(pieces=(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"cho',)),
        Answer(pieces=(b'data: {"choices":[{"text":"a"}]}\n\n',), headers={"Content-Length": "900"}),
    ],
)
def test_a_stream_cut_before_its_end_is_a_failure(query: Run, answer: Answer) -> None:
    ended, _ = query({"/v1/completions": answer})
    document = json.loads(ended.out)
    assert ended.status == 1
    assert document["metrics"]["status"] == "FAIL"
    assert document["metrics"]["latency"]["ttft_ms"] is None
    assert document["error"]["code"] in ("cut_short", "bad_answer")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (json_answer({"choices": []}), "did not answer with a stream of events"),
        (Answer(pieces=(b"data: [1]\n\n",)), "is not a JSON object"),
        (event_stream({"error": {"message": "out of memory", "type": "Internal"}}), "reported an error: out of memory"),
        (json_answer({"error": {"message": "too long", "code": 400}}, 400), "HTTP 400 Bad Request"),
        (json_answer({"object": "error", "message": "bad key"}, 401), "bad key"),
    ],
)
def test_what_the_engine_says_is_passed_on(query: Run, answer: Answer, said: str) -> None:
    ended, _ = query({"/v1/completions": answer})
    assert ended.status == 1
    assert said in ended.err


def test_an_unknown_model_is_named_by_the_engines_own_words(query: Run) -> None:
    missing = json_answer({"error": {"message": "The model `x` does not exist.", "code": 404}}, 404)
    ended, _ = query({"/v1/completions": missing, "/v1/chat/completions": missing}, "--model", "x")
    assert ended.status == 1
    assert "The model `x` does not exist." in ended.err


def test_an_engine_without_models_asks_for_a_name(lmcache: Run) -> None:
    with serve({"/v1/models": json_answer({"data": []})}) as server:
        ended = lmcache("query", "engine", "--url", server.url, "--prompt", "hi")
    assert (ended.status, ended.err) == (1, f"lmcache: {server.url} lists no models; name one with --model\n")


def test_line_separators_inside_json_do_not_split_an_event(query: Run) -> None:
    raw = 'data: {"choices":[{"text":"a\u2028b\u0085"}]}\r\n\r\n: comment\r\ndata:[DONE]\r\n'.encode()
    pieces = tuple(raw[i : i + 1] for i in range(len(raw)))  # every byte its own write
    ended, _ = query({"/v1/completions": Answer(pieces=pieces)})
    assert ended.status == 0


def test_a_stream_that_only_keeps_the_connection_alive_is_given_up(query: Run) -> None:
    pause = threading.Event()
    comments = _Paced(b": still here\n\n", pause, times=40)
    ended, _ = query({"/v1/completions": Answer(pieces=comments)}, "--timeout", "0.2")  # type: ignore[arg-type]
    assert ended.status == 1
    assert json.loads(ended.out)["error"]["code"] == "timeout"


class _Paced:
    """The same piece again and again, with pauses."""

    def __init__(self, piece: bytes, pause: threading.Event, times: int) -> None:
        self._piece, self._pause, self._times = piece, pause, times

    def __iter__(self) -> Any:
        for _ in range(self._times):
            self._pause.wait(0.05)
            yield self._piece


def test_a_line_without_end_is_given_up(query: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "LINE_BYTES_MAX", 1 << 16)
    ended, _ = query({"/v1/completions": Answer(pieces=(b"data: " + b"x" * (1 << 16),) * 4)})
    assert ended.status == 1
    assert "longer than any answer" in ended.err


def test_only_the_engines_own_key_is_sent(query: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TOKEN", "cache-secret")
    _, asked = query({"/v1/completions": GOOD})
    assert all("authorization" not in each.headers for each in asked)
    monkeypatch.setenv("OPENAI_API_KEY", "engine-key")
    _, asked = query({"/v1/completions": GOOD})
    assert [each.headers["authorization"] for each in asked] == ["Bearer engine-key"] * 2
    assert not any("cache-secret" in str(each) for each in asked)


def test_passwords_of_netrc_are_not_sent(query: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    _, asked = query({"/v1/completions": GOOD})
    assert all("authorization" not in each.headers for each in asked)


def test_documents_are_inserted_and_json_in_a_prompt_survives(query: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one {b}", encoding="utf-8")
    (tmp_path / "b.txt").write_text("zwei ü", encoding="utf-8")
    words = ("--documents", f"a={tmp_path / 'a.txt'}", "--documents", f"b={tmp_path / 'b.txt'}")
    _, asked = query({"/v1/completions": GOOD}, *words, prompt='{"k":1} {a}|{b}|{a}')
    assert json.loads(asked[-1].body)["prompt"] == '{"k":1} one {b}|zwei ü|one {b}'


def test_the_bundled_document_is_about_lmcache(query: Run) -> None:
    _, asked = query({"/v1/completions": GOOD}, prompt="{lmcache} Summarize LMCache usage.")
    prompt = json.loads(asked[-1].body)["prompt"]
    assert prompt.endswith("Summarize LMCache usage.")
    assert "LMCache" in prompt
    assert 350 <= len(prompt.split()) <= 500


def test_the_bundled_document_can_be_replaced(query: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    _, asked = query({"/v1/completions": GOOD}, "--documents", f"lmcache={tmp_path / 'mine'}", prompt="{lmcache}!")
    assert json.loads(asked[-1].body)["prompt"] == "mine!"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", "{x}"), "placeholder {x} has no document: add --documents x=PATH"),
        (("--prompt", "{x}", "--documents", "x=/nowhere/at/all"), "cannot read /nowhere"),
        (("--prompt", "{x}", "--documents", "plain.txt"), "expected NAME=PATH"),
        (("--prompt", "{x}", "--documents", "=plain.txt"), "expected NAME=PATH"),
        (("--prompt", "hi", "--documents", "x=y"), "the prompt has no placeholder {x}"),
        (("--prompt", "{x}", "--documents", "x=a", "--documents", "x=b"), "is given twice"),
        (("--prompt", "hi", "--max-tokens", "0"), "--max-tokens"),
        (("--prompt", "hi", "--timeout", "0"), "expected seconds above 0"),
        (("--prompt", "hi", "--timeout", "nan"), "expected seconds above 0"),
        (("--prompt", "hi", "--timeout", "inf"), "expected seconds above 0"),
        ((), "--prompt"),
    ],
)
def test_wrong_usage_is_one_line_and_asks_nobody(lmcache: Run, words: tuple[str, ...], said: str) -> None:
    with serve({"/v1/models": MODELS}) as server:
        ended = lmcache("query", "engine", "--url", server.url, *words)
    assert (ended.status, ended.out, server.asked) == (2, "", [])
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_document_that_is_not_text_is_refused(lmcache: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    ended = lmcache("query", "engine", "--prompt", "{x}", "--documents", f"x={tmp_path / 'x'}")
    assert (ended.status, ended.out) == (2, "")
    assert "is not UTF-8 text" in ended.err


@pytest.mark.parametrize(
    ("tokens", "ttft_s", "last_s", "expected"),
    [
        (9, 0.010, 0.018, (1.0, 1000.0)),
        (2, 0.010, 0.030, (20.0, 50.0)),
        (1, 0.010, 0.010, (None, None)),  # nothing was decoded after the first token
        (0, None, None, (None, None)),
        (9, None, None, (None, None)),
        (9, 0.020, 0.020, (0.0, None)),  # everything came in one piece
        (None, 0.010, 0.020, (None, None)),
    ],
)
def test_time_per_token_divides_by_the_tokens_after_the_first(
    tokens: int | None, ttft_s: float | None, last_s: float | None, expected: tuple[float | None, float | None]
) -> None:
    done = Completion("m", "", None, tokens, None, ttft_s, last_s, 0.05)
    rates = (done.tpot_ms, done.throughput_tokens_per_s)
    assert tuple(rate if rate is None else round(rate, 6) for rate in rates) == expected


def test_a_stream_that_gave_its_finish_reason_may_end_without_done(query: Run) -> None:
    ended, _ = query({"/v1/completions": event_stream(text("a"), text("b", "stop"), USAGE, done=False)})
    assert (ended.status, metrics(ended)["answer"]) == (0, "ab")


def test_reasoning_is_no_part_of_the_answer(query: Run) -> None:
    chat = event_stream(delta(reasoning_content="hm"), delta(content="yes"), USAGE)
    ended, asked = query({"/v1/chat/completions": chat}, "--chat")
    assert metrics(ended)["answer"] == "yes"
    assert [each.path for each in asked] == ["/v1/models", "/v1/chat/completions"]


def test_the_answer_streams_to_the_terminal_before_the_report(lmcache: Run) -> None:
    answers = {"/v1/models": MODELS, "/v1/completions": event_stream(text("Hel\nlo\x1b[2J"), USAGE)}
    with serve(answers) as server:
        words = ("query", "engine", "--url", server.url, "--prompt", "hi")
        shown = lmcache(*words, "--show-answer")
        assert shown.out.startswith("Hel\nlo\\x1b[2J\n================= Query Engine")
        assert json.loads(lmcache(*words, "--show-answer", "--format", "json").out)["metrics"]["answer"]
        assert "Hel" not in lmcache(*words).out


@pytest.mark.parametrize(("given", "sent"), [("@@at", "@at"), ("-", "from stdin ü")])
def test_a_prompt_may_come_from_stdin(query: Run, monkeypatch: pytest.MonkeyPatch, given: str, sent: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("from stdin ü".encode())))
    _, asked = query({"/v1/completions": GOOD}, prompt=given)
    assert json.loads(asked[-1].body)["prompt"] == sent


def test_a_prompt_may_come_from_a_file(query: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("long prompt")
    _, asked = query({"/v1/completions": GOOD}, prompt=f"@{tmp_path / 'p'}")
    assert json.loads(asked[-1].body)["prompt"] == "long prompt"


def test_repeating_shows_the_first_against_the_others(query: Run) -> None:
    ended, asked = query({"/v1/completions": GOOD}, "--repeat", "3")
    shown = metrics(ended)
    assert len([each for each in asked if each.path == "/v1/completions"]) == 3
    assert [run["output_tokens"] for run in shown["runs"]] == [9, 9, 9]
    assert shown["repeat"]["num_runs"] == 3
    assert shown["repeat"]["cold_ttft_ms"] == shown["runs"][0]["ttft_ms"] == shown["latency"]["ttft_ms"]
    others = [run["ttft_ms"] for run in shown["runs"][1:]]
    assert min(others) <= shown["repeat"]["warm_ttft_ms"] <= max(others)


def test_an_engine_that_says_it_has_no_completions_is_asked_by_chat(query: Run) -> None:
    refusal = json_answer({"error": {"message": "The model does not support Completions API", "code": 400}}, 400)
    chat = event_stream(delta(content="yes"), USAGE)
    ended, _asked = query({"/v1/completions": refusal, "/v1/chat/completions": chat})
    assert (ended.status, metrics(ended)["answer"]) == (0, "yes")
    ended, _ = query({"/v1/completions": refusal, "/v1/chat/completions": chat}, "--completions")
    assert ended.status == 1


def test_a_connection_that_breaks_after_the_finish_reason_is_a_failure(query: Run) -> None:
    piece = b"data: " + json.dumps(text("a", "stop")).encode() + b"\n\n"
    ended, _ = query({"/v1/completions": Answer(pieces=(piece,), headers={"Content-Length": "900"})})
    assert (ended.status, json.loads(ended.out)["error"]["code"]) == (1, "cut_short")


def test_runs_before_a_failed_one_are_not_lost(lmcache: Run) -> None:
    with serve({"/v1/models": MODELS, "/v1/completions": GOOD}) as server:

        class Counted(dict[str, Answer]):
            def get(self, path: str, default: Any = None) -> Any:
                num_asked = sum(asked.path == "/v1/completions" for asked in server.asked)
                return json_answer({"detail": "boom"}, 500) if num_asked > 2 else super().get(path, default)

        server.answers = Counted(server.answers)
        words = ("query", "engine", "--url", server.url, "--prompt", "hi", "--repeat", "4", "--format", "json")
        ended = lmcache(*words)
    document = json.loads(ended.out)
    assert (ended.status, document["error"]["code"], document["metrics"]["status"]) == (1, "http_500", "FAIL")
    assert [run["output_tokens"] for run in document["metrics"]["runs"]] == [9, 9]


@pytest.mark.parametrize("words", [("--prompt", "\udcff"), ("--prompt", "a", "--model", "\udcff")])
def test_what_is_not_utf8_is_wrong_usage(lmcache: Run, words: tuple[str, ...]) -> None:
    ended = lmcache("query", "engine", "--url", "127.0.0.1:1", *words)
    assert (ended.status, ended.out, "is not UTF-8 text" in ended.err) == (2, "", True)
