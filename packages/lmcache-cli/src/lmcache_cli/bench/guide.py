"""The guided setup: one question after another, on any terminal. Enter takes the default, `<` goes one step back.

It works by lines, not by keys, so no terminal is too narrow or too simple for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lmcache_cli import api
from lmcache_cli.bench import config
from lmcache_cli.bench.base import Option
from lmcache_cli.bench.workloads import WORKLOADS
from lmcache_cli.errors import Interrupted, UsageFault

BACK = "<"
NONE = "none"
EXPORT_NAME = "bench_config.json"
WIDTH_MAX = 80
LABEL_WIDTH = 34

Ask = Callable[[str], "str | None"]
Say = Callable[[str], None]


class Action(Enum):
    """How the guide ends."""

    START = "start"
    EXPORT = "export"
    QUIT = "quit"


@dataclass(frozen=True)
class Answers:
    """What the guide found out.

    Attributes:
        values: by key, as ``config.resolve`` returns them, with those that were given before.
        export_path: of EXPORT.
    """

    action: Action
    values: Mapping[str, Any]
    export_path: str | None = None


class _Back(Exception):
    """`<` was typed."""


class Guide:
    """One conversation.

    Args:
        given: what is settled already, by key; it is not asked.
        ask: shows a prompt and returns what is typed, without the line's end; None at the end of input.
        say: shows a line.
        width: columns of the terminal.
    """

    def __init__(self, given: Mapping[str, Any], ask: Ask, say: Say, width: int) -> None:
        self._given = given
        self._ask = ask
        self._say = say
        self._width = min(width, WIDTH_MAX)
        self._answers: dict[str, Any] = {}
        self._choices: dict[str, int] = {}

    def run(self) -> Answers:
        """Ask until it is complete.

        Raises:
            Interrupted: the input came to its end.
        """
        self._paragraph("Benchmark of a serving engine, step by step.")
        self._paragraph(f"Enter takes the value in brackets, {BACK} goes one step back, ctrl-C leaves.")
        position, steps = 0, self._steps()
        while True:
            try:
                ended = steps[position]()
            except _Back:
                position = max(position - 1, 0)
                steps = self._steps()
                if position == 0:
                    self._paragraph("This is the first question.") if len(steps) == 1 else None
                continue
            if ended is not None:
                return ended
            steps = self._steps()
            position += 1

    @property
    def _values(self) -> dict[str, Any]:
        return {**self._answers, **self._given}

    def _steps(self) -> list[Callable[[], Answers | None]]:
        """All that has to be asked, as far as the answers so far tell; what was asked before stays in its place."""
        steps: list[Callable[[], Answers | None]] = []
        values = self._values
        if config.ENGINE_URL.key not in self._given:
            steps.append(lambda: self._question(config.ENGINE_URL, f"http://localhost:{api.ENGINE_PORT}"))
        if config.WORKLOAD.key not in self._given:
            steps.append(self._workload)
        name = values.get(config.WORKLOAD.key)
        if name is None:
            return steps
        if config.LMCACHE_URL.key not in self._given:
            steps.append(self._server)
        knows = config.LMCACHE_URL.key in values or config.TOKENS_PER_GB.key in self._given
        if config.needs_tokens_per_gb(name) and not knows:
            steps.append(self._tokens_per_gb)
        steps += self._gated("General settings", self._general(name))
        steps += self._gated(f"Settings of {name}", WORKLOADS[name].options)
        steps.append(self._end)
        return steps

    def _general(self, name: str) -> list[Option]:
        options = [config.MODEL, config.SEED, config.IGNORE_EOS, config.NO_WARMUP, config.MAX_DURATION]
        return [config.VOLUME, *options] if config.needs_tokens_per_gb(name) else options

    def _gated(self, title: str, options: Sequence[Option]) -> list[Callable[[], Answers | None]]:
        """One step that offers to leave the defaults, and, where that is declined, one for each setting."""
        left = [option for option in options if option.key not in self._given]
        if not left:
            return []
        steps: list[Callable[[], Answers | None]] = [lambda: self._gate(title, left)]
        if self._choices.get(title) == 1:
            steps += [lambda option=option: self._question(option, option.default) for option in left]  # type: ignore[misc]
        return steps

    def _gate(self, title: str, options: Sequence[Option]) -> None:
        defaults = [f"{option.label}: {self._shown(option, option.default)}" for option in options]
        self._choices[title] = self._choice(title, ["use the defaults", "set each"], 0, defaults)
        if self._choices[title] == 0:
            for option in options:
                self._answers.pop(option.key, None)

    def _workload(self) -> None:
        names = list(WORKLOADS)
        known = self._answers.get(config.WORKLOAD.key, names[0])
        chosen = self._choice("Workload", [f"{n}: {WORKLOADS[n].summary}" for n in names], names.index(known))
        self._answers[config.WORKLOAD.key] = names[chosen]

    def _server(self) -> None:
        self._paragraph(
            "An LMCache server says how many tokens fit into a GB, and how many it found: name it, or say none."
        )
        default = self._answers.get(config.LMCACHE_URL.key, NONE)
        while True:
            text = self._line(f"{config.LMCACHE_URL.label} (or {NONE}) [{default}]: ") or default
            if text == NONE:
                self._answers.pop(config.LMCACHE_URL.key, None)
                return
            if self._take(config.LMCACHE_URL, text):
                self._answers.pop(config.TOKENS_PER_GB.key, None)
                return

    def _tokens_per_gb(self) -> None:
        self._paragraph(
            "Without a server it has to be known. vLLM logs both numbers when it starts: 'GPU KV cache size' in "
            "tokens, divided by 'Available KV cache memory' in GiB."
        )
        self._question(config.TOKENS_PER_GB, None)

    def _question(self, option: Option, default: Any) -> None:
        if option.choices:
            at = option.choices.index(self._answers.get(option.key, default))
            self._answers[option.key] = option.choices[self._choice(option.label, option.choices, at)]
            return
        default = self._answers.get(option.key, default)
        bracket = f" [{self._shown(option, default)}]" if default is not None or option in _OPTIONAL else ""
        while True:
            text = self._line(f"{option.label}{bracket}: ")
            if not text and default is not None:
                self._answers[option.key] = default
                return
            if not text and option in _OPTIONAL:
                return
            if self._take(option, text):
                return

    def _take(self, option: Option, text: str) -> bool:
        """Keep what was typed, or say what is wrong with it."""
        try:
            self._answers[option.key] = _yes_or_no(text) if option.kind is bool else config.read(option, text)
        except (ValueError, UsageFault) as error:
            self._paragraph(f"  {error}." if text else "  This one has no default.")
            return False
        return True

    def _end(self) -> Answers | None:
        self._summary()
        labels = ["start the benchmark", "export the settings to a file", "quit"]
        action = list(Action)[self._choice("What now", labels, 0)]
        if action is Action.QUIT:
            return Answers(action, self._values)
        try:
            values = config.resolve(self._given, self._answers)
            config.build(values)
        except UsageFault as error:
            self._paragraph(f"  {error}.")
            raise _Back from error
        if action is Action.START:
            return Answers(action, values)
        path = self._line(f"File [{EXPORT_NAME}]: ") or EXPORT_NAME
        return Answers(action, values, path)

    def _summary(self) -> None:
        values = self._values
        name = values[config.WORKLOAD.key]
        self._say("")
        self._say(f"-- {name} ".ljust(self._width - 1, "-"))
        shown = [config.ENGINE_URL, config.LMCACHE_URL]
        if config.needs_tokens_per_gb(name):
            shown.append(config.TOKENS_PER_GB)
        shown += [*self._general(name), *WORKLOADS[name].options]
        shown += [o for o in config.GENERAL if o.key in self._given and o not in (*shown, config.WORKLOAD)]
        for option in shown:
            value = values.get(option.key, option.default)
            label = f"{option.label}:".ljust(LABEL_WIDTH)
            self._say(f"{label} {self._shown(option, value)}")

    def _shown(self, option: Option, value: Any) -> str:
        if value is None:
            return _OPTIONAL.get(option, "ask the server" if option is config.TOKENS_PER_GB else "none")
        if option.kind is bool:
            return "yes" if value else "no"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def _choice(self, title: str, labels: Sequence[str], default: int, details: Sequence[str] = ()) -> int:
        """Index of one of ``labels``; ``details`` are shown below the title."""
        self._say("")
        self._say(f"{title}:")
        for detail in details:
            self._paragraph(f"    {detail}")
        for number, label in enumerate(labels, 1):
            self._paragraph(f"  {number}) {label}")
        names = [label.partition(":")[0] for label in labels]
        while True:
            text = self._line(f"Number [{default + 1}]: ")
            if not text:
                return default
            if text in names:
                return names.index(text)
            if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= len(labels):
                return int(text) - 1
            self._paragraph(f"  expected a number from 1 to {len(labels)}.")

    def _line(self, prompt: str) -> str:
        text = self._ask(prompt)
        if text is None:
            raise Interrupted("the setup was left; nothing was run or written")
        text = text.strip()
        if text == BACK:
            raise _Back
        return text

    def _paragraph(self, text: str) -> None:
        indent = " " * (len(text) - len(text.lstrip()))
        for line in textwrap.wrap(
            text.strip(), self._width - 1, initial_indent=indent, subsequent_indent=indent + "  "
        ):
            self._say(line)


_OPTIONAL = {config.MODEL: "the first one it serves", config.MAX_DURATION: "none"}
"""Settings that may stay without a value, and what that means."""


def _yes_or_no(text: str) -> bool:
    if text.lower() in ("y", "yes", "n", "no"):
        return text.lower()[0] == "y"
    raise ValueError("expected yes or no")
