"""What a run is told: every setting once, as a flag, a key of the configuration file and a question of the guide.

The command line wins over the file, the file over the defaults. Which of them a value came from matters only here: a
flag that stands against another flag is an error, a flag that stands against the file replaces what the file says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcache_cli import urls
from lmcache_cli.bench.base import Option, Pacing, Workload
from lmcache_cli.bench.summary import parse_goodput
from lmcache_cli.bench.workloads import WORKLOADS
from lmcache_cli.errors import UsageFault

ARRIVALS = ("poisson", "constant", "burst")
SECONDS_MAX = 86400.0
DEFAULT_ARRIVAL = "poisson"  # of --request-rate

ENGINE_URL = Option("engine_url", str, None, "Engine URL")
WORKLOAD = Option("workload", str, None, "Workload", choices=tuple(WORKLOADS))
LMCACHE_URL = Option("lmcache_url", str, None, "LMCache server URL")
MODEL = Option("model", str, None, "Model name")
VOLUME = Option("kv_cache_volume", float, 100.0, "KV cache volume (GB)", minimum=0, maximum=1e6, is_open=True)
TOKENS_PER_GB = Option("tokens_per_gb_kvcache", int, None, "Tokens per GB of KV cache", minimum=1, maximum=10**9)
SEED = Option("seed", int, 42, "Seed of all random texts and orders", minimum=0, maximum=2**63 - 1)
IGNORE_EOS = Option("ignore_eos", bool, False, "Generate on after the end of text")
NO_WARMUP = Option("no_warmup", bool, False, "Skip the warm-up")
CONCURRENCY = Option("concurrency", int, None, "Requests in flight", minimum=1, maximum=4096)
REQUEST_RATE = Option("request_rate", float, None, "Requests per second", minimum=0, maximum=1e5, is_open=True)
ARRIVAL = Option("arrival", str, None, "Arrival of requests", choices=ARRIVALS)
MAX_DURATION = Option(
    "max_duration", float, None, "Longest time to send (s)", minimum=0, maximum=SECONDS_MAX, is_open=True
)
TIMEOUT = Option(
    "timeout", float, 600.0, "Longest silence of a request (s)", minimum=0, maximum=SECONDS_MAX, is_open=True
)
RETRIES = Option("retries", int, 0, "Retries of a request", minimum=0, maximum=100)
GOODPUT = Option("goodput", str, None, "Limits that a good request keeps (ms)")

GENERAL = (
    *(ENGINE_URL, WORKLOAD, LMCACHE_URL, MODEL, VOLUME, TOKENS_PER_GB, SEED, IGNORE_EOS, NO_WARMUP),
    *(CONCURRENCY, REQUEST_RATE, ARRIVAL, MAX_DURATION, TIMEOUT, RETRIES, GOODPUT),
)

_NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Config:
    """Everything that decides what is sent and how, apart from keys, headers and trust.

    Attributes:
        settings: of the workload, complete, by key.
        kv_cache_volume: GB of 2**30 bytes.
        arrival: None leaves it to the workload's own pacing.
        max_duration: seconds; ``timeout`` likewise.
        goodput: as it was typed; see ``summary.parse_goodput``.
    """

    engine_url: str
    workload: str
    settings: Mapping[str, Any]
    lmcache_url: str | None = None
    model: str | None = None
    kv_cache_volume: float = VOLUME.default
    tokens_per_gb_kvcache: int | None = None
    seed: int = SEED.default
    ignore_eos: bool = False
    no_warmup: bool = False
    concurrency: int | None = None
    request_rate: float | None = None
    arrival: str | None = None
    max_duration: float | None = None
    timeout: float = TIMEOUT.default
    retries: int = RETRIES.default
    goodput: str | None = None

    @property
    def kind(self) -> type[Workload]:
        """The class of the workload."""
        return WORKLOADS[self.workload]

    @property
    def goodput_ms(self) -> dict[str, float] | None:
        """Limits by metric; None without any."""
        return None if self.goodput is None else parse_goodput(self.goodput)

    def as_file(self) -> dict[str, Any]:
        """As the configuration file has it: flat, with what is not set left out."""
        general = {option.key: getattr(self, option.key) for option in GENERAL}
        return {key: value for key, value in {**general, **self.settings}.items() if value is not None}


def check(option: Option, value: object) -> Any:
    """``value`` as the option's own type.

    Raises:
        ValueError: it is not one that the option can have; the text goes on from "expected".
    """
    if option in (ENGINE_URL, LMCACHE_URL):
        return urls.base_url(value) if isinstance(value, str) else _refuse("an address")
    if option.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**63 else math.inf
    if not isinstance(value, option.kind) or (isinstance(value, bool) and option.kind is not bool):
        wanted = _expected(option) if option.kind in _NUMBERS else "text" if option.kind is str else "true or false"
        return _refuse(wanted)
    if option.choices and value not in option.choices:
        return _refuse(f"one of {', '.join(option.choices)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_within(option, value):
        return _refuse(_expected(option))
    if option is GOODPUT:
        parse_goodput(str(value))
    elif isinstance(value, str) and not (value and value.isprintable()):
        return _refuse("text on one line")
    return value


def read(option: Option, text: str) -> Any:
    """What somebody typed, as ``check`` returns it.

    Raises:
        ValueError: as ``check``.
    """
    if option.kind in _NUMBERS:
        try:
            return check(option, option.kind(text))
        except ValueError:
            return _refuse(_expected(option))
    return check(option, text)


def resolve(given: Mapping[str, Any], filed: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are set, by key: ``given`` on the command line over ``filed``; checked against each other.

    Raises:
        UsageFault: flags contradict each other, or belong to another workload than the chosen one.
    """
    for key, value in given.items():
        try:
            check(OPTIONS[key], value)
        except ValueError as error:
            raise UsageFault(f"{OPTIONS[key].flag}: {error}") from error
    if "concurrency" in given and "request_rate" in given:
        raise UsageFault("--concurrency and --request-rate exclude each other: a closed loop or an open one")
    values = {**filed, **given}
    workload = WORKLOADS.get(values.get("workload", ""))
    if workload is not None:
        values = _of_workload(workload, given, values)
    if "concurrency" in given or ("request_rate" in filed and "request_rate" not in values):
        values.pop("request_rate", None)
        if "arrival" not in given:
            values.pop("arrival", None)
    if "request_rate" in given:
        values.pop("concurrency", None)
    if "concurrency" in values and "arrival" in values:
        raise UsageFault("--arrival has no meaning with --concurrency: a closed loop sends when an answer has ended")
    return values


def missing(values: Mapping[str, Any]) -> list[str]:
    """The flags without which there can be no run."""
    flags = [option.flag for option in (ENGINE_URL, WORKLOAD) if option.key not in values]
    if "workload" in values and needs_tokens_per_gb(values["workload"]) and not knows_tokens_per_gb(values):
        flags.append(f"{TOKENS_PER_GB.flag} (or {LMCACHE_URL.flag})")
    return flags


def needs_tokens_per_gb(workload: str) -> bool:
    """Whether the amount that this workload sends follows from GB of cache."""
    return WORKLOADS[workload].uses_volume


def knows_tokens_per_gb(values: Mapping[str, Any]) -> bool:
    """Whether it was given, or can be asked."""
    return TOKENS_PER_GB.key in values or LMCACHE_URL.key in values


def volume_tokens(settings: Config) -> int | None:
    """Tokens of the cache that the workload is to fill; None where it goes by no volume."""
    key = settings.kind.volume_key
    if key is None:
        return None
    gb = settings.settings.get(key, settings.kv_cache_volume)
    return int(gb * (settings.tokens_per_gb_kvcache or 0))


def build(values: Mapping[str, Any]) -> Config:
    """The configuration, with the defaults filled in; ``missing`` must be empty."""
    workload = WORKLOADS[values["workload"]]
    settings = {option.key: values.get(option.key, option.default) for option in workload.options}
    config = Config(**{option.key: values[option.key] for option in GENERAL if option.key in values}, settings=settings)
    pacing(config, workload(settings, config.seed, volume_tokens(config)))  # contradictions: at once
    return config


def pacing(config: Config, workload: Workload) -> Pacing:
    """How it is paced: as the workload says, unless flags say otherwise.

    Raises:
        UsageFault: `--arrival` with a closed loop.
    """
    own = workload.pacing()
    limits = [limit for limit in (own.duration_s, config.max_duration) if limit is not None]
    paced = replace(own, duration_s=min(limits, default=None))
    if config.concurrency is not None:
        return replace(paced, concurrency=config.concurrency, rate_per_s=None)
    if config.request_rate is not None:
        paced = replace(paced, concurrency=None, rate_per_s=config.request_rate, arrival=DEFAULT_ARRIVAL)
    if config.arrival is not None and paced.rate_per_s is None:
        raise UsageFault(f"--arrival needs --request-rate: {config.workload} sends when an answer has ended")
    return paced if config.arrival is None else replace(paced, arrival=config.arrival)


def _of_workload(workload: type[Workload], given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without what belongs to other workloads, and without what a flag replaces."""
    own = {option.key for option in workload.options}
    for key in given:
        owner = OWNERS.get(key)
        if owner is not None and key not in own:
            raise UsageFault(f"{OPTIONS[key].flag} belongs to the workload {owner}, not to {workload.name}")
    values = {key: value for key, value in values.items() if key in own or key not in OWNERS}
    against = [key for key in workload.pacing_keys if key in given]
    for option in (CONCURRENCY, REQUEST_RATE):
        if against and option.key in given:
            raise UsageFault(f"{option.flag} and {OPTIONS[against[0]].flag} exclude each other")
        if against:
            values.pop(option.key, None)
    return values


def _is_within(option: Option, value: float) -> bool:
    low = -math.inf if option.minimum is None else option.minimum
    high = math.inf if option.maximum is None else option.maximum
    if not math.isfinite(value):
        return False
    return low < value < high if option.is_open else low <= value <= high


def _expected(option: Option) -> str:
    kind = _NUMBERS[option.kind]
    low, high = option.minimum, option.maximum
    if low is None and high is None:
        return kind
    if low is not None and high is not None and not option.is_open:
        return f"{kind} from {_plain(low)} to {_plain(high)}"
    least = "" if low is None else f"{' above' if option.is_open else ' of at least'} {_plain(low)}"
    most = "" if high is None else f"{' below' if option.is_open else ' of at most'} {_plain(high)}"
    return f"{kind}{least}{' and' if least and most else ''}{most}"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _refuse(wanted: str) -> Any:
    raise ValueError(f"expected {wanted}")


def _owners(workloads: Sequence[type[Workload]]) -> dict[str, str]:
    return {option.key: workload.name for workload in workloads for option in workload.options}


OWNERS = _owners(tuple(WORKLOADS.values()))
"""The workload that a key belongs to."""

OPTIONS: dict[str, Option] = {
    option.key: option for option in (*GENERAL, *(o for workload in WORKLOADS.values() for o in workload.options))
}
"""Every setting, by key."""
