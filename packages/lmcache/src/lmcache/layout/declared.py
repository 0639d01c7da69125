"""What an engine says about its KV beside the tensors, and what follows from that alone.

The scheduler's side of a connector names chunks and never sees a tensor, so which form a layer group has must be known
without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmcache.errors import LayoutError
from lmcache.layout.formats import ASCEND, RBLN, SGLANG, TRTLLM, VLLM, backend_words, engine_words
from lmcache.layout.planes import FORM_VERSION
from lmcache.layout.tensors import TensorSpec

CANONICAL, RAW = "canonical", "raw"

KINDS = ("attention", "latent", "indexer", "component", "state", "opaque")

ITEM_BYTES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}
"""Element types of canonical chunks; fp8 also comes as pages of uint8."""

_WHOLE_ELEMENTS = ("none", "per_tensor")
"""Quantisations that leave nothing beside the elements of a token: their scales belong to the whole layer."""

_TRANSPARENT = {
    (VLLM, "cuda"): frozenset(
        (
            "FLASH_ATTN",
            "FLASH_ATTN_DIFFKV",
            "TRITON_ATTN",
            "TRITON_ATTN_DIFFKV",
            "TRITON_FLASH_ATTN",
            "TRITON_FLASHINFER",
            "FLASHINFER",
            "FLEX_ATTENTION",
            "FLASHMLA",
            "FLASHMLA_SPARSE",
            "FLASH_ATTN_MLA",
            "FLASHINFER_MLA",
            "FLASHINFER_MLA_SPARSE",
            "CUTLASS_MLA",
            "TRITON_MLA",
            "TOKENSPEED_MLA",
            "DEEPSEEK_V32_INDEXER",
        )
    ),
    (SGLANG, "cuda"): frozenset(
        ("FA3", "FLASHINFER", "TRITON", "FLASHMLA", "CUTLASS_MLA", "TRTLLM_MHA", "TRTLLM_MLA", "NSA")
    ),
    (TRTLLM, "cuda"): frozenset(("TRTLLM",)),
    (ASCEND, "npu"): frozenset(("ASCEND",)),
    (RBLN, "rbln"): frozenset(("RBLN",)),
}
"""Backends, by (engine, kind of device), whose kernels read a block element by element in the order of its shape."""


def transparent_backends(engine: str, device: str) -> frozenset[str]:
    """Backends of an engine on a kind of device whose kernels read a block element by element; none elsewhere."""
    return _TRANSPARENT.get((engine, device), frozenset())


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Facts of layers that are alike.

    Attributes:
        engine: "vllm", "sglang", "trtllm", "vllm-ascend" or "vllm-rbln".
        attention_backend: the engine's own name of it: "FLASH_ATTN"; "" where it is not known.
        device: "cuda", "cpu", "npu", "rbln".
        kind: "attention", "latent" (MLA: one entry a token), "indexer" (DeepSeek's: values and scales), "component"
            (one part of attention in memory of its own), "state" (recurrent: a block is the state after its last token)
            or "opaque" (anything that the engine itself knows to be packed).
        num_blocks: block ids are 0 to ``num_blocks`` - 1.
        block_tokens: tokens of one block.
        num_heads: KV heads of a layer on this rank.
        head_size: elements of a head of K; for latent attention elements of an entry.
        head_size_v: of V; 0 is the same as K's.
        dtype: of the KV, as torch names it: "bfloat16".
        quantization: "none", "per_tensor", or what the engine calls any other.
        is_dense: whether the engine itself says that a block is K and V of each head and token and nothing else, in
            the order of its shape; None where it says nothing. True counts where the backend is not known, False
            always.
        order: "NHD" or "HND", where the engine says whether a tensor's shape has tokens or heads first; "" if not.
    """

    engine: str
    attention_backend: str
    device: str
    kind: str
    num_blocks: int
    block_tokens: int
    num_heads: int
    head_size: int
    head_size_v: int = 0
    dtype: str
    quantization: str = "none"
    is_dense: bool | None = None
    order: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LayoutError(f"layers of kind {self.kind} are not understood")
        if min(self.num_blocks, self.block_tokens, self.num_heads, self.head_size) < 1 or self.head_size_v < 0:
            raise LayoutError(f"sizes of KV must be positive: {self}")

    @property
    def value_size(self) -> int:
        """Elements of a head of V."""
        return self.head_size_v or self.head_size

    @property
    def form(self) -> str:
        """CANONICAL where the inside of a block is known, else RAW."""
        backends, backend = transparent_backends(self.engine, self.device), self.attention_backend.upper()
        is_read_plainly = backend in backends if backend else bool(backends and self.is_dense)
        is_known = (
            self.kind not in ("state", "opaque")
            and is_read_plainly
            and self.is_dense is not False
            and self.quantization in _WHOLE_ELEMENTS
            and self.dtype in ITEM_BYTES
        )
        return CANONICAL if is_known else RAW

    def identity(self) -> tuple[str | int, ...]:
        """What of this belongs into the namespace of chunks. Equal identities, and equal models, are equal bytes.

        Raw chunks need more, which only the engine's connector knows: version, instruction set, physical order.
        """
        common = (self.form, FORM_VERSION, self.kind, self.dtype, self.quantization)
        sizes = (self.num_heads, self.head_size, self.value_size)
        if self.form == CANONICAL:
            return (*common, *sizes)
        return (*common, *sizes, self.engine, self.attention_backend, self.device, self.block_tokens, self.order)

    def label(self, template: str = "") -> str:
        """Engine and attention in words: "vLLM non-MLA flash attention"."""
        words = "MLA" if self.kind in ("latent", "indexer") else "non-MLA"
        text = template or f"{{engine}} {words} {{backend}}"
        return text.format(engine=engine_words(self.engine), backend=backend_words(self.attention_backend)).strip()


Tensors = Sequence[TensorSpec] | Sequence[Sequence[TensorSpec]]
"""One tensor a layer; or a list of them for K and one for V; or a tuple of them for each layer."""


@dataclass(frozen=True)
class Part:
    """Layers that are alike, and their tensors. A layer group has one part, or several that share its block ids."""

    declared: Declared
    tensors: Tensors
