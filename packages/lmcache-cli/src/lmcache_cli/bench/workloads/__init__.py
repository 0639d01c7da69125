"""The workloads, by the name that `--workload` takes. A new one is a file here and a line below."""

from __future__ import annotations

from lmcache_cli.bench.base import Workload
from lmcache_cli.bench.workloads.long_doc_permutator import LongDocPermutator
from lmcache_cli.bench.workloads.long_doc_qa import LongDocQA
from lmcache_cli.bench.workloads.multi_round_chat import MultiRoundChat
from lmcache_cli.bench.workloads.prefix_suffix_tuner import PrefixSuffixTuner
from lmcache_cli.bench.workloads.random_prefill import RandomPrefill

_ALL: tuple[type[Workload], ...] = (LongDocQA, MultiRoundChat, LongDocPermutator, PrefixSuffixTuner, RandomPrefill)

WORKLOADS: dict[str, type[Workload]] = {workload.name: workload for workload in _ALL}
