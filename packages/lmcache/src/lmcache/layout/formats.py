"""Every KV format we know, as data: what an engine registers, in words, and to whom the words belong.

The words of a shape: NL layers, NB blocks, BS tokens a block, NH KV heads, HS elements of a head (of a token's entry in
latent attention), CS elements of K and V of a head side by side, PBS = NB * BS tokens of the whole memory, NP planes
of a layer, 2 K and V, 1 nothing. What stands before the brackets is lists of tensors, outermost first. A format is
one line here: planes, printed shapes and detection follow from its words.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VLLM, SGLANG, TRTLLM, ASCEND, RBLN = "vllm", "sglang", "trtllm", "vllm-ascend", "vllm-rbln"

INDEXER_VALUE_BYTES, INDEXER_SCALE_BYTES = 128, 4
"""A token's entry in DeepSeek's indexer: a block holds the values of all its tokens, then their scales."""


@dataclass(frozen=True)
class Format:
    """One way to keep KV.

    Attributes:
        name: upstream's name of it, or ours where upstream has none.
        number: in upstream's enumeration; -1 where it has none.
        shape: symbolic, as ``lmcache describe`` prints it.
        kind: "attention", "latent" or "indexer".
        label: of engine and attention; ``{backend}`` is the backend in words.
        engines: who registers it.
        backends: attention backends, by the engine's name of them, that settle the choice where sizes do not; none
            where the backend says nothing.
    """

    name: str
    number: int
    shape: str
    kind: str
    label: str
    engines: tuple[str, ...] = (VLLM,)
    backends: tuple[str, ...] = ()

    @functools.cached_property
    def lists(self) -> tuple[str, ...]:
        """Words of the lists around the tensors, outermost first."""
        return tuple(self.shape.partition("[")[0].replace(" x ", " ").split())

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Words of a tensor's dimensions."""
        return tuple(self.shape.partition("[")[2].rstrip("]").split(", "))

    @property
    def order(self) -> str:
        """ "NHD" where tokens come before heads in a tensor's shape, "HND" where after; "" where there is no pair."""
        words = [word for word in self.axes if word in ("BS", "PBS", "NH")]
        if len(words) < 2:
            return ""
        return "HND" if words[0] == "NH" else "NHD"

    def fits(self, shape: Sequence[int], sizes: Mapping[str, int | None]) -> bool:
        """Whether a tensor's shape is this format's, given what is known of its words; None is any size."""
        if len(shape) != len(self.axes):
            return False
        expected = (sizes[word] if word in sizes else int(word) for word in self.axes)
        return all(want is None or want == size for want, size in zip(expected, shape, strict=True))


_FLASH, _INFER = ("FLASH_ATTN", "FLEX_ATTENTION"), ("FLASHINFER",)
_PLAIN, _LATENT = "vLLM non-MLA {backend}", "vLLM MLA {backend}"

FORMATS: tuple[Format, ...] = (
    Format("NB_NL_TWO_BS_NH_HS", 0, "[NB, NL, 2, BS, NH, HS]", "attention", "vLLM cross-layer {backend}"),
    Format("NL_X_TWO_NB_BS_NH_HS", 1, "NL x [2, NB, BS, NH, HS]", "attention", _PLAIN, backends=_FLASH),
    Format("NL_X_NB_TWO_BS_NH_HS", 2, "NL x [NB, 2, BS, NH, HS]", "attention", _PLAIN, backends=_INFER),
    Format("NL_X_NB_BS_HS", 3, "NL x [NB, BS, HS]", "latent", "{engine} MLA {backend}", (VLLM, SGLANG, RBLN)),
    Format("TWO_X_NL_X_NBBS_NH_HS", 4, "2 x NL x [PBS, NH, HS]", "attention", "SGLang MHA {backend}", (SGLANG,)),
    Format("NL_X_NBBS_ONE_HS", 5, "NL x [PBS, 1, HS]", "latent", "SGLang MLA {backend}", (SGLANG,)),
    Format("NL_X_TWO_NB_NH_BS_HS", 6, "NL x [2, NB, NH, BS, HS]", "attention", _PLAIN + " HND", backends=_FLASH),
    Format("NL_X_NB_TWO_NH_BS_HS", 7, "NL x [NB, 2, NH, BS, HS]", "attention", _PLAIN + " HND", backends=_INFER),
    Format(
        "NB_NL_TWO_NH_BS_HS", 8, "[NB, NL, 2, NH, BS, HS]", "attention", "TensorRT-LLM cross-layer HND", (TRTLLM, VLLM)
    ),
    Format("TWO_X_NL_X_NB_BS_NH_HS", 9, "2 x NL x [NB, BS, NH, HS]", "attention", "SGLang MHA {backend}", (SGLANG,)),
    Format("NL_X_NB_NH_BS_TWO_HS", 10, "NL x [NB, NH, BS, 2, HS]", "attention", _PLAIN),
    Format("NL_X_NB_BS_NH_TWO_HS", 11, "NL x [NB, BS, NH, 2, HS]", "attention", _PLAIN),
    Format("NL_X_NB_NH_BS_CS", 12, "NL x [NB, NH, BS, CS]", "attention", _PLAIN),
    Format("NL_X_NB_BS_NH_CS", 13, "NL x [NB, BS, NH, CS]", "attention", _PLAIN),
    Format("NL_X_NB_BSV_BSS", 14, "NL x [NB, BS, 132]", "indexer", "{engine} DSA indexer", (VLLM, SGLANG)),
    Format("NL_X_TWO_NB_NH_ONE_BS_HS", 15, "NL x [2, NB, NH, 1, BS, HS]", "attention", "vLLM-RBLN", (RBLN,)),
    Format("NL_X_TWO_X_NB_BS_NH_HS", 16, "NL x 2 x [NB, BS, NH, HS]", "attention", "vLLM-Ascend", (ASCEND,)),
    Format("NL_X_NP_X_NB_BS_ONE_HS", 17, "NL x NP x [NB, BS, 1, HS]", "latent", "vLLM-Ascend MLA", (ASCEND,)),
    Format("NL_X_NB_BS_NH_HS", 18, "NL x [NB, BS, NH, HS]", "component", "SGLang component {backend}", (SGLANG,)),
    Format("NL_X_NB_ONE_BS_HS", -1, "NL x [NB, 1, BS, HS]", "latent", _LATENT),
    Format("NL_X_NB_ONE_BSV_BSS", -1, "NL x [NB, 1, BS, 132]", "indexer", "vLLM DSA indexer"),
)

_ENGINES = {VLLM: "vLLM", SGLANG: "SGLang", TRTLLM: "TensorRT-LLM", ASCEND: "vLLM-Ascend", RBLN: "vLLM-RBLN"}

_BACKENDS = {
    "FLASH_ATTN": "flash attention",
    "FA3": "flash attention",
    "FLASHINFER": "flashinfer",
    "TRITON_ATTN": "triton attention",
    "TRITON": "triton attention",
    "FLEX_ATTENTION": "flex attention",
    "CPU_ATTN": "CPU attention",
}


def engine_words(engine: str) -> str:
    """An engine's name as people write it: "vLLM" for "vllm"."""
    return _ENGINES.get(engine, engine)


def backend_words(backend: str) -> str:
    """An attention backend in words: "flash attention" for FLASH_ATTN; a name that has none stays."""
    return _BACKENDS.get(backend.upper(), backend)
