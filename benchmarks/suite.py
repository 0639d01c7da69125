"""All benchmarks in one run: ours, upstream's release, vLLM's own paths, bare sockets and memcpy, on one machine.

    python benchmarks/suite.py OUT [--full] [--only NAME ...] [--page FILE]
                                   [--vllm PYTHON] [--upstream PYTHON] [--upstream-thin PYTHON]
    python benchmarks/suite.py OUT --render --page FILE

`./run test -- -s bench` makes the environments and calls this. Each benchmark is a process of its own that leaves
OUT/NAME.json; at the end OUT/suite.txt has all rows, and with --page the tables of FILE are written anew, between its
two marks. Only figures of one run on one machine are put beside each other: where OUT has others, that is refused.

Exit status: 0 all bounds reached, 1 some missed, 2 a benchmark failed or figures do not belong together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from common import Row

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- suite: begin -->", "<!-- suite: end -->"
FAILED = 2
SCRATCH = "SCRATCH"
"""Stands for a folder on this machine's disk."""


@dataclass(frozen=True)
class Part:
    """One benchmark. ``short`` and ``full`` are its options in either form of the suite."""

    name: str
    title: str
    short: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    vllm: bool = False
    takes: tuple[str, ...] = ()  # options that are passed on where this run has them
    limit_s: float = 900.0


PARTS = (
    Part("server_start", "Server start and idle", ("--rounds", "4"), ("--rounds", "9"), takes=("upstream",)),
    Part("round_trip", "Round trip", full=("--rounds", "300"), takes=("upstream",)),
    Part("lookup", "Lookup", full=("--rounds", "40"), takes=("upstream",)),
    Part("index_bytes", "Index", takes=("upstream",)),
    Part("many_clients", "Many clients", full=("--rounds", "9"), takes=("upstream",)),
    Part("verified_copy", "Verified copy", ("--rounds", "5"), ("--rounds", "15")),
    Part("canonical_copy", "Canonical chunks", full=("--rounds", "15")),
    Part("store_retrieve", "Store and retrieve", full=("--rounds", "15"), takes=("upstream",)),
    Part("sustained", "Sustained store into a full L1", full=("--seconds", "60"), takes=("upstream",)),
    Part("cli_startup", "Command line", ("--rounds", "5"), ("--rounds", "15"), takes=("upstream", "upstream-thin")),
    Part("bench_truth", "Times of `bench engine`", ("--rounds", "1"), ("--rounds", "3")),
    Part("tier_file", "File tier", (SCRATCH,), (SCRATCH, "--rounds", "7")),
    Part("tier_redis", "Redis tier", full=("--rounds", "7")),
    Part("tier_object", "Object tier", full=("--rounds", "9")),
    Part("tier_mooncake", "Mooncake tier", full=("--rounds", "9")),
    Part("tier_nixl", "NIXL tier", full=("--rounds", "9")),
    Part("tier_sealed", "Sealed tier", (SCRATCH,), (SCRATCH, "--rounds", "9")),
    Part("adoption", "Adoption of a killed server's L1"),
    Part("cascade", "Through the cascade", ("--folder", SCRATCH), ("--folder", SCRATCH, "--seconds", "60")),
    Part("ttft", "Time to first token", (), ("--prompts", "7"), vllm=True, takes=("upstream",), limit_s=1800),
    Part("no_reuse", "Traffic without reuse", (), ("--pairs", "25"), vllm=True, limit_s=1800),
)


@dataclass
class Outcome:
    """What became of one part."""

    part: Part
    seconds: float = 0.0
    problem: str = ""
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """Its rows, none where it failed."""
        return [Row(**row) for row in self.document.get("rows", [])]


class Mixed(Exception):
    """Figures that do not belong together; one sentence."""


def run_part(part: Part, args: argparse.Namespace, scratch: str, run: str) -> Outcome:
    """Run one benchmark to its end; what it prints goes through."""
    outcome = Outcome(part)
    python = args.vllm if part.vllm else sys.executable
    if python is None:
        outcome.problem = "not run: needs --vllm"
        return outcome
    path = args.out / f"{part.name}.json"
    path.unlink(missing_ok=True)
    command = [python, str(FOLDER / f"{part.name}.py"), "--json", str(path)]
    command += [scratch if word == SCRATCH else word for word in (part.full if args.full else part.short)]
    for name in part.takes:
        value = getattr(args, name.replace("-", "_"))
        command += [f"--{name}", value] if value else []
    print(f"\n=== {part.title} ({part.name})", flush=True)
    start = time.monotonic()
    environment = {**os.environ, common.RUN_VARIABLE: run, "PYTHONUNBUFFERED": "1"}
    try:
        status = subprocess.run(command, env=environment, timeout=part.limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        status = None
    outcome.seconds = time.monotonic() - start
    if status not in (0, 1) or not path.exists():
        outcome.problem = "failed: " + ("it did not end in time" if status is None else f"it ended with {status}")
        return outcome
    outcome.document = json.loads(path.read_text(encoding="utf-8"))
    return outcome


def load(out: Path) -> list[Outcome]:
    """What an earlier call left in a folder."""
    found = []
    for part in PARTS:
        path = out / f"{part.name}.json"
        if path.exists():
            found.append(Outcome(part, document=json.loads(path.read_text(encoding="utf-8"))))
    return found


def check_together(outcomes: list[Outcome]) -> dict[str, Any]:
    """The facts that all documents share.

    Raises:
        Mixed: they are not of one run, one machine and one commit.
    """
    documents = [outcome.document for outcome in outcomes if outcome.document]
    if not documents:
        raise Mixed("there are no figures")
    for what in ("run", "machine", "commit"):
        seen = sorted({str(document[what]) for document in documents})
        if len(seen) > 1:
            raise Mixed(f"figures of different runs are not put beside each other: {what} is {' and '.join(seen)}")
    return documents[0]


def cell(row: Row, name: str) -> str:
    """One figure of a row for a table."""
    return common.text(row.figures[name], row.unit) if name in row.figures else ""


def shown_command(command: str) -> str:
    """A command as a reader would give it: without the file of its figures, and without paths of this machine."""
    words = command.split()
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return " ".join("PATH" if word.startswith("/") else word for word in words)


def table(outcome: Outcome) -> list[str]:
    """A part in Markdown: its command, and a table of its rows."""
    rows = outcome.rows
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    lines = [
        f"### {outcome.part.title}",
        "",
        f"`{shown_command(outcome.document['command'])}`, load {outcome.document['load']}:",
        "",
    ]
    lines += ["| | " + " | ".join(names) + " | judged | bound | |", "|---|" + "---|" * (len(names) + 3)]
    for row in rows:
        judged = "" if row.value is None else f"{row.says}: {common.short(row.value)}"
        bound = "" if row.bound is None else f"{'>=' if row.at_least else '<='} {common.short(row.bound)}"
        verdict = f"**{row.verdict}**" if row.verdict == "missed" else row.verdict
        title = f"{row.name} ({row.note})" if row.note else row.name
        lines.append(
            f"| {title} | " + " | ".join([*(cell(row, name) for name in names), judged, bound, verdict]) + " |"
        )
    return [*lines, ""]


def page(outcomes: list[Outcome], facts: dict[str, Any]) -> str:
    """The tables of all parts, with what was missed in front."""
    judged = [(outcome, row) for outcome in outcomes for row in outcome.rows if row.verdict]
    missed = [f"- {outcome.part.title}: {row.name}" for outcome, row in judged if row.verdict == "missed"]
    lines = [
        f"Run `{facts['run']}` of commit `{facts['commit']}` on {facts['machine']}. Medians, quartiles in parentheses.",
        f"{len(judged) - len(missed)} of {len(judged)} bounds reached. Missed:" if missed else "All bounds reached.",
        *(["", *missed] if missed else []),
        "",
    ]
    for outcome in outcomes:
        lines += table(outcome) if outcome.document else [f"### {outcome.part.title}", "", outcome.problem, ""]
    return "\n".join(lines)


def rewrite(path: Path, text: str) -> None:
    """Put the tables between the two marks of a page.

    Raises:
        Mixed: it has no such marks.
    """
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Mixed(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def summary(outcomes: list[Outcome]) -> str:
    """All rows for a terminal."""
    lines = []
    for outcome in outcomes:
        spent = f" ({outcome.seconds:.0f} s)" if outcome.seconds else ""
        lines.append(f"{outcome.part.title}{spent}{': ' + outcome.problem if outcome.problem else ''}")
        lines += [f"  {row.line()}" for row in outcome.rows]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the figures; made when missing")
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM and this project")
    parser.add_argument("--upstream", metavar="PYTHON", help="of an environment of scripts/peer_env.py")
    parser.add_argument(
        "--upstream-thin", metavar="PYTHON", help="of an environment with upstream's command line alone"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the marks of FILE")
    parser.add_argument("--render", action="store_true", help="run nothing: only show what OUT has")
    args = parser.parse_args()
    if args.page and args.only:
        parser.error("--page is for whole runs: a part alone would stand beside figures of another run")
    return args


def main() -> int:
    """Run or load, show, and write the page."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.render:
        outcomes = load(args.out)
    else:
        wanted = [part for part in PARTS if not args.only or part.name in args.only]
        run = uuid.uuid4().hex[:12]
        with tempfile.TemporaryDirectory(dir=args.out) as scratch:
            outcomes = [run_part(part, args, scratch, run) for part in wanted]
    try:
        facts = check_together(outcomes)
        if args.page:
            rewrite(args.page, page(outcomes, facts))
    except Mixed as error:
        print(f"suite: {error}", file=sys.stderr)
        return FAILED
    text = summary(outcomes)
    (args.out / "suite.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    if any(outcome.problem.startswith("failed") for outcome in outcomes):
        return FAILED
    return os.EX_OK if all(row.reached for outcome in outcomes for row in outcome.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
