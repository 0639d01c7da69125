"""Documents that servers answer, for tests to serve."""

from __future__ import annotations

from typing import Any

_GROUP = {
    "kernel_group_idx": 0,
    "num_layers": 80,
    "num_blocks": 2048,
    "tokens_per_block": 128,
    "num_heads": 8,
    "head_size": 128,
    "hidden_dim_size": 1024,
    "dtype": "torch.float16",
    "is_mla": False,
    "attention_backend": "vLLM non-MLA flash attention",
    "engine_kv_shape": "NL x [2, NB, BS, NH, HS]",
    "engine_kv_concrete_shape": "80 x [2, 2048, 128, 8, 128]",
}

MODEL = "meta-llama/Llama-3.1-70B-Instruct"

STATUS: dict[str, Any] = {
    "is_healthy": True,
    "engine_type": "BlendEngine",
    "chunk_size": 256,
    "active_sessions": 3,
    "something_of_tomorrow": {"a": [1]},
    "storage_manager": {
        "is_healthy": True,
        "l1_manager": {
            "total_object_count": 1024,
            "memory_used_bytes": int(42.3 * 2**30),
            "memory_total_bytes": 60 * 2**30,
            "memory_usage_ratio": 0.705,
        },
        "l1_eviction_controller": {"eviction_policy": "LRU"},
        "l2_adapters": [
            {
                "is_healthy": True,
                "type": "NixlStoreL2Adapter",
                "backend": "nixl_rdma",
                "stored_object_count": 512,
                "pool_size": 512,
                "pool_free_slots": 32,
            }
        ],
    },
    "cache_context_meta": {
        f"worker-{rank}": {
            "model_name": MODEL,
            "world_size": 4,
            "rank": rank,
            "device_ids": [rank],
            "kv_cache_layout": {"num_layers": 80, "num_blocks": 2048, "kernel_groups": [_GROUP]},
        }
        for rank in (2, 0, 3, 1)
    },
}

# flat layouts, engine processes by GPU, the policy under another name
FIRST_GENERATION: dict[str, Any] = {
    **{key: STATUS[key] for key in ("is_healthy", "engine_type", "chunk_size", "active_sessions")},
    "storage_manager": {
        "l1_manager": STATUS["storage_manager"]["l1_manager"],
        "eviction_controller": {"eviction_policy": "LRU"},
        "l2_adapters": STATUS["storage_manager"]["l2_adapters"],
    },
    "gpu_context_meta": {
        str(gpu): {
            "model_name": MODEL,
            "world_size": 4,
            "kv_cache_layout": {
                "num_layers": 80,
                "num_blocks": 2048,
                "block_size": 128,
                "hidden_dim_sizes": [1024],
                "dtype": "torch.float16",
                "is_mla": False,
                "attention_backend": "vLLM non-MLA flash attention",
                "gpu_kv_shape": "NL x [2, NB, BS, NH, HS]",
                "gpu_kv_concrete_shape": "80 x [2, 2048, 128, 8, 128]",
            },
        }
        for gpu in range(4)
    },
}
