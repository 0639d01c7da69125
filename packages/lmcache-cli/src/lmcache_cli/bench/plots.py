"""Figures of a run or of a sweep as plain data for plotly.js, small whatever the size of the run. The only door to
plotly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmcache_cli.bench.base import Outcome
from lmcache_cli.bench.summary import percentile

# readable on white and on black; blue against orange is told apart by nearly everybody
COLD, WARM, FAILED, OTHER = "#3b82f6", "#f59e0b", "#ef4444", "#10b981"

_POINTS_MAX = 400  # of one curve
_BARS_MAX = 3000  # of the timeline
_LABEL_CHARS_MAX = 60

Figure = dict[str, Any]


def library() -> str | None:
    """The source of plotly.js; None where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    source: str = get_plotlyjs()
    return source


def run_figures(warmup: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Figure]:
    """The figures of one run; those that would be empty are left out."""
    ok = [o for o in outcomes if o.failure is None]
    cold, warm = [o for o in ok if o.request.is_first], [o for o in ok if not o.request.is_first]
    firsts = [o for o in warmup if o.failure is None and o.request.is_first]
    ttft = [
        ("cold, warm-up", OTHER, _ttft_ms(firsts)),
        ("cold", COLD, _ttft_ms(cold)),
        ("warm", WARM, _ttft_ms(warm)),
    ]
    e2e = [("cold", COLD, _e2e_ms(cold)), ("warm", WARM, _e2e_ms(warm))]
    figures = [
        _distribution("Time to first token", ttft[1:]),
        _distribution("End-to-end latency", e2e),
        _boxes("Cold against warm: time to first token, quartiles, p1 to p99, and each request", ttft),
        _timeline(outcomes),
    ]
    return [figure for figure in figures if figure["data"]]


def sweep_figures(axis: str, points: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Throughput against latency over the points of a sweep, each `{value, output_tokens_per_s, ttft_ms}`."""
    rows = [p for p in points if p["requests_per_s"] is not None]
    if not rows:
        return []
    names = [f"{axis} {p['value']:g}" for p in rows]
    curve = {
        "type": "scatter",
        "mode": "lines+markers",
        "hovertext": names,
        "hovertemplate": "%{hovertext}<br>%{y:.1f} ms",
    }
    latency = [
        {
            **curve,
            "name": f"TTFT {statistic}",
            "x": [p["requests_per_s"] for p in rows],
            "y": [p["ttft_ms"][statistic] for p in rows],
            "line": {"color": colour},
        }
        for statistic, colour in (("p50", COLD), ("p99", WARM))
    ]
    throughput = {
        **curve,
        "name": "requests/s",
        "x": [p["value"] for p in rows],
        "y": [p["requests_per_s"] for p in rows],
        "hovertemplate": "%{hovertext}<br>%{y:.2f} requests/s",
        "line": {"color": OTHER},
        "showlegend": False,
    }
    return [
        _figure("Time to first token against throughput", latency, "requests per second", "ms", zero="y"),
        _figure("Throughput", [throughput], axis, "requests per second", zero="y"),
    ]


def _ttft_ms(outcomes: Iterable[Outcome]) -> list[float]:
    return sorted(o.ttft_s * 1e3 for o in outcomes if o.ttft_s is not None)


def _e2e_ms(outcomes: Iterable[Outcome]) -> list[float]:
    return sorted(o.e2e_s * 1e3 for o in outcomes)


def _figure(title: str, data: list[dict[str, Any]], x: str, y: str, *, zero: str = "", wide: bool = False) -> Figure:
    axes: dict[str, dict[str, Any]] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for axis in zero:
        axes[f"{axis}axis"]["rangemode"] = "tozero"
    return {"title": title, "data": data, "layout": axes, "wide": wide}


def _distribution(title: str, groups: Sequence[tuple[str, str, list[float]]]) -> Figure:
    """Share of requests that took at most so long, a step line a group."""
    data = []
    for name, colour, ordered in groups:
        if not ordered:
            continue
        # the share at a value is that of all values up to it; a thinned curve goes through points of the whole one
        places = _evenly(len(ordered), _POINTS_MAX)
        data.append(
            {
                "type": "scatter",
                "mode": "lines" if len(ordered) > 1 else "markers",
                "name": f"{name} ({len(ordered)})",
                "x": [_short(ordered[0])] + [_short(ordered[i]) for i in places],
                "y": [0.0] + [round(100 * (i + 1) / len(ordered), 3) for i in places],
                "line": {"color": colour, "shape": "hv", "width": 2.5},
                "marker": {"color": colour},
                "hovertemplate": "%{y:.1f} % within %{x:.1f} ms",
            }
        )
    return _figure(title, data, "ms", "% of requests", zero="xy")


def _boxes(title: str, groups: Sequence[tuple[str, str, list[float]]]) -> Figure:
    """Quartiles, whiskers to p1 and p99, and the values themselves (thinned) beside each box."""
    used = [(name, colour, ordered) for name, colour, ordered in groups if ordered]
    if len(used) < 2:
        return _figure(title, [], "", "")
    data: list[dict[str, Any]] = [
        {
            "type": "box",
            "orientation": "h",
            "name": name,
            "y": [f"{name} ({len(ordered)}) "],
            "x": [[_short(ordered[i]) for i in _evenly(len(ordered), _POINTS_MAX)]],
            "q1": [percentile(ordered, 25)],
            "median": [percentile(ordered, 50)],
            "q3": [percentile(ordered, 75)],
            "lowerfence": [percentile(ordered, 1)],
            "upperfence": [percentile(ordered, 99)],
            "boxpoints": "all",
            "jitter": 0.6,
            "pointpos": -1.4,
            "marker": {"color": colour, "size": 4, "opacity": 0.5},
            "showlegend": False,
        }
        for name, colour, ordered in reversed(used)  # the first at the top
    ]
    return _figure(title, data, "ms", "", zero="x", wide=True)


def _timeline(outcomes: Sequence[Outcome]) -> Figure:
    """A line a request in the order of sending: thin until its first text, thick until its end."""
    rows = sorted(outcomes, key=lambda o: o.sent_s)
    start_s = rows[0].sent_s if rows else 0.0
    shown = [(i, rows[i]) for i in _evenly(len(rows), _BARS_MAX)]
    width = 6.0 if len(shown) <= 60 else 3.0 if len(shown) <= 200 else 1.5
    data = []
    for name, colour, some in (
        ("cold", COLD, [(i, o) for i, o in shown if o.failure is None and o.request.is_first]),
        ("warm", WARM, [(i, o) for i, o in shown if o.failure is None and not o.request.is_first]),
        ("failed or cancelled", FAILED, [(i, o) for i, o in shown if o.failure is not None]),
    ):
        if not some:
            continue
        waiting, writing = _Lines(start_s), _Lines(start_s)
        for row, outcome in some:
            first_s = outcome.text_s[0] if outcome.text_s else outcome.end_s
            waiting.add(row, outcome.sent_s, first_s, _label(outcome))
            writing.add(row, first_s, outcome.end_s, _label(outcome))
        for part, lines, size, is_shown in (("waiting", waiting, width / 3, False), ("writing", writing, width, True)):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name if is_shown else f"{name}, {part}",
                    "legendgroup": name,
                    "showlegend": is_shown,
                    "x": lines.x,
                    "y": lines.y,
                    "hovertext": lines.text,
                    "hovertemplate": "%{hovertext}<br>%{x:.3f} s<extra></extra>",
                    "line": {"color": colour, "width": size},
                    "connectgaps": False,
                }
            )
    title = "Timeline: thin while waiting for the first token, thick while it comes"
    if len(shown) < len(rows):
        title += f" ({len(shown)} of {len(rows)} requests)"
    figure = _figure(title, data, "seconds since the first send", "request", zero="x", wide=True)
    figure["layout"]["yaxis"]["autorange"] = "reversed"
    return figure


class _Lines:
    """Separate horizontal lines as one trace: a gap after each."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self.x: list[float | None] = []
        self.y: list[int | None] = []
        self.text: list[str] = []

    def add(self, row: int, start_s: float, end_s: float, text: str) -> None:
        self.x += [round(start_s - self._start_s, 4), round(end_s - self._start_s, 4), None]
        self.y += [row + 1, row + 1, None]
        self.text += [text, text, ""]


def _label(outcome: Outcome) -> str:
    words = [outcome.request.id[:_LABEL_CHARS_MAX], outcome.request.group[:_LABEL_CHARS_MAX]]
    if outcome.failure is not None:
        words.append(outcome.failure.cause[:_LABEL_CHARS_MAX])
    # plotly reads a little HTML in labels
    return " · ".join(filter(None, words)).replace("&", "&amp;").replace("<", "&lt;")


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _evenly(num: int, num_max: int) -> list[int]:
    """At most ``num_max`` places of ``num``, evenly spread, the first and the last among them."""
    if num <= num_max:
        return list(range(num))
    return [round(i * (num - 1) / (num_max - 1)) for i in range(num_max)]
