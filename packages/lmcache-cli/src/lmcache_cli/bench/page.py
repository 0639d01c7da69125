"""`report.html`: one file that needs nothing else, with the tables of a summary; plots where plotly is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lmcache_cli.bench import plots
from lmcache_cli.bench.base import Outcome
from lmcache_cli.bench.report import report
from lmcache_cli.render import Entry, Report

Tile = tuple[str, str, str]  # name, value, unit

_NO_PLOTS = (
    "This page has no plots, since the plotting library was not there when it was made: install plotly beside lmcache "
    "(it is the extra `report` of the wheel), and the page of the next run has them."
)
_STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --text: #1c2230; --faint: #667085; --line: #e3e6eb;
  --bad: #c62828; --note: #8a5a00; --note-page: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --text: #e6e9ef; --faint: #98a2b3;
  --line: #303745; --bad: #ff7b72; --note: #f2c66d; --note-page: #2d2614; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --text: #000; --faint: #555; --line: #ccc;
  --bad: #b00; --note: #630; --note-page: #fff; } .card { break-inside: avoid; }
  body > main { padding: 0; } }
.paper main { width: 700px; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 15px; margin: 0 0 8px; }
.faint { color: var(--faint); overflow-wrap: anywhere; }
.grid { display: grid; gap: 14px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(max(140px, 22%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0;
  overflow-x: auto; }
.wide { grid-column: 1 / -1; }
.plot { height: 320px; }
.wide .plot { height: 360px; }
.tile b { display: block; font-size: 25px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile small { font-size: 14px; font-weight: normal; color: var(--faint); }
.note { background: var(--note-page); border-left: 4px solid var(--note); border-radius: 6px; padding: 8px 14px;
  margin: 14px 0 0; overflow-wrap: anywhere; }
.bad { border-color: var(--bad); }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 4px 0; border-top: 1px solid var(--line); text-align: left; font-weight: normal;
  vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { color: var(--faint); padding-right: 12px; }
td { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
.columns th, .columns td { text-align: right; padding: 4px 0 4px 12px; }
pre { margin: 10px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
summary { cursor: pointer; font-weight: 600; }
"""
_SCRIPT = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll(".plot")];
  const look = () => {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
      automargin: true };
    return { text: colour("--text"), faint: colour("--faint"), card: colour("--card"), axis };
  };
  const draw = () => places.forEach((place, i) => {
    const { text, faint, card, axis } = look();
    const given = figures[i].layout;
    const size = { width: place.clientWidth, height: place.clientHeight };
    const layout = { ...given, ...size, xaxis: { ...axis, ...given.xaxis }, yaxis: { ...axis, ...given.yaxis },
      paper_bgcolor: card, plot_bgcolor: card, font: { color: faint, size: 13 }, hovermode: "closest",
      hoverlabel: { align: "left" }, margin: { l: 52, r: 12, t: 8, b: 44 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: text } } };
    Plotly.react(place, figures[i].data, layout, { displaylogo: false, displayModeBar: false });
  });
  const paper = (isOn) => { document.body.classList.toggle("paper", isOn); draw(); };
  draw();
  addEventListener("resize", draw);
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
})();
"""


def run_page(summary: Mapping[str, Any], warmup: Sequence[Outcome], outcomes: Sequence[Outcome]) -> str:
    """The page of one run."""
    num = summary["num_requests"]
    tiles: list[Tile] = [
        ("Requests", f"{num['ok']}", f"ok, {num['failed']} failed"),
        ("Duration", _number(summary["duration_s"]), "s"),
        ("Requests", _number(summary["throughput"]["requests_per_s"]), "per s"),
        ("Output", _number(summary["throughput"]["output_tokens_per_s"]), "tokens/s"),
        ("TTFT, p50", _number(summary["ttft_ms"]["p50"]), "ms"),
        ("TTFT, p99", _number(summary["ttft_ms"]["p99"]), "ms"),
        ("TPOT, p50", _number(summary["tpot_ms"]["p50"]), "ms"),
    ]
    if summary["cache"]["share"] is not None:
        tiles.append(("Cached", f"{summary['cache']['share']:.1%}", "of input"))
    printed = report(summary)
    subtitle = " · ".join(str(summary[key]) for key in ("workload", "model", "started_at"))
    details = {key: summary[key] for key in ("config", "plan", "versions", "host")}
    body = [
        _tiles(tiles),
        *(_note(note["message"]) for note in summary["notes"]),
        *([_note(printed.failure.message, bad=True)] if printed.failure else []),
        _PLOTS,
        _tables(printed),
        _details("Configuration, versions and host", details),
    ]
    return _page(f"Engine benchmark: {summary['workload']}", subtitle, body, plots.run_figures(warmup, outcomes))


def sweep_page(summary: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The page of a sweep; ``rows`` are its table under the headings ``columns``."""
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = _card("Points, latencies in ms", f"<table class='columns'><tr>{head}</tr>{lines}</table>", wide=True)
    body = [
        *(_note(note["message"]) for note in summary["notes"]),
        _PLOTS,
        f"<div class='grid'>{table}</div>",
        _details("Runs", {str(point["value"]): point["run"] for point in summary["points"]}),
    ]
    subtitle = " · ".join(str(summary[key]) for key in ("workload", "model"))
    figures = plots.sweep_figures(columns[0], summary["points"])
    return _page(f"Engine benchmark sweep: {summary['workload']}", subtitle, body, figures)


_PLOTS = "\0plots\0"  # where they stand in a body


def _page(title: str, subtitle: str, body: Sequence[str], figures: Sequence[plots.Figure]) -> str:
    library = plots.library()
    scripts = ""
    drawn = _note(_NO_PLOTS) if library is None else ""
    if library is not None and figures:
        cards = "".join(_card(f["title"], "<div class='plot'></div>", wide=f["wide"]) for f in figures)
        drawn = f"<div class='grid plots'>{cards}</div>"
        scripts = (
            f"<script type='application/json' id='figures'>{_json(figures)}</script>\n"
            f"<script>{library}</script>\n<script>{_SCRIPT}</script>\n"
        )
    content = "\n".join(drawn if part is _PLOTS else part for part in body)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        # nothing is fetched, whatever the page holds
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data: blob:\">\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<div class='faint'>{escape(subtitle)}</div>\n{content}\n</main>\n{scripts}"
        "</body>\n</html>\n"
    )


def _tables(printed: Report) -> str:
    """The sections that are printed, each as a card."""
    cards = []
    for section in printed.sections:
        shown = [entry for entry in section.entries if entry.label is not None]
        if shown and section.list_name != "notes":  # those stand above
            rows = "".join(
                f"<tr><th scope='row'>{escape(entry.label or '')}</th><td>{escape(_value(entry))}</td></tr>"
                for entry in shown
            )
            cards.append(_card(section.label or "", f"<table>{rows}</table>"))
    return f"<div class='grid'>{''.join(cards)}</div>"


def _value(entry: Entry) -> str:
    if entry.text is not None:
        return entry.text
    value = entry.value
    return (
        "N/A"
        if value is None
        else f"{value:,.2f}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value)
    )


def _tiles(tiles: Sequence[Tile]) -> str:
    cards = "".join(
        f"<div class='card tile'><span class='faint'>{escape(name)}</span>"
        f"<b>{escape(value)} <small>{escape(unit)}</small></b></div>"
        for name, value, unit in tiles
    )
    return f"<div class='grid tiles'>{cards}</div>"


def _card(title: str, content: str, *, wide: bool = False) -> str:
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<section class='card{' wide' if wide else ''}'>{heading}{content}</section>"


def _note(text: str, *, bad: bool = False) -> str:
    return f"<p class='note{' bad' if bad else ''}'>{escape(text[:1].upper() + text[1:].rstrip('.'))}.</p>"


def _details(title: str, content: Mapping[str, Any]) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    folded = f"<details class='card'><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
    return f"<div class='grid'>{folded}</div>"


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _number(value: float | None) -> str:
    if value is None:
        return "N/A"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
