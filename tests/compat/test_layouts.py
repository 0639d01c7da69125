"""A registered model, as each generation words it.

Early releases list only engines whose GPU memory they share. So the status document is a live one, and only the part
that a registered engine adds to it comes from ``documents/layouts.json``: the field names and types are those of the
release, the values are ours. A small HTTP server of ours answers with the two together.
"""

from __future__ import annotations

import json
from pathlib import Path

from serving import json_answer, serve
from worlds import UpstreamServer, ours

LAYOUTS = json.loads(Path(__file__).with_name("documents").joinpath("layouts.json").read_text())
MODEL = "meta-llama/Llama-3.1-70B-Instruct"


def test_describe_reads_the_layout_of_every_generation(upstream: UpstreamServer) -> None:
    prefix = "" if upstream.get("/status")[0] == 200 else "/api"
    document = upstream.get(f"{prefix}/status")[1]
    recorded = LAYOUTS[upstream.release]
    assert document[recorded["map"]] == {}, "the live document has the map, and nobody in it"
    entry = {"model_name": MODEL, "world_size": 2, "kv_cache_layout": recorded["kv_cache_layout"]}
    document[recorded["map"]] = {"0": entry, "1": entry}
    document["registered_gpu_ids"] = [0, 1]
    answers = {f"{prefix}/status": json_answer(document), f"{prefix}/healthcheck": json_answer({"status": "healthy"})}
    with serve(answers) as server:
        metrics = ours("describe", "kvcache", "--url", server.url, "--format", "json").metrics()
        shown = ours("describe", "kvcache", "--url", server.url).out
    (model,) = metrics["models"]
    expected = {
        "model": MODEL,
        "world_size": 2,
        "gpu_ids": "0, 1" if recorded["map"] == "gpu_context_meta" else None,  # later ones name no devices
        "attention_backend": "vLLM non-MLA flash attention",
        "gpu_kv_shape": "NL x [2, NB, BS, NH, HS]",
        "gpu_kv_concrete_shape": "80 x [2, 2048, 16, 2, 128]",
        "num_layers": 80,
        "block_size": 16,
        "dtype": "torch.bfloat16",
        "is_mla": False,
        "num_blocks": 2048,
    }
    assert {key: model.get(key) for key in expected} == expected
    if "hidden_dim_sizes" in recorded["kv_cache_layout"]:
        assert model["hidden_dim_size"] == 256
    assert f"Model: {MODEL}" in shown
