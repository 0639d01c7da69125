"""Hugging Face transformers with its KV cache kept by an LMCache server: the same long prompt, asked twice.

    lmcache server &
    python generate.py MODEL_FOLDER

Without a server it works all the same, and reuses nothing. MODEL_FOLDER is any causal language model of transformers;
`python ../vllm_cpu/models.py small-llama FOLDER` makes a small random one.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcache.connectors.transformers import KVCacheSession

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.encode("\n".join(f"Line {n}: the square of {n} is {n * n}." for n in range(250)))
with KVCacheSession(model, "tcp://127.0.0.1:5555") as session:
    for _ in range(2):
        began = time.perf_counter()
        cache, num_tokens = session.load(prompt)
        output = model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=8, do_sample=False)[0]
        print(f"{time.perf_counter() - began:.2f} s, {num_tokens} of {len(prompt)} tokens reused")
        session.store(output.tolist(), cache)
