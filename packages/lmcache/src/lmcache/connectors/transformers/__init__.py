"""Hugging Face transformers: a model's DynamicCache reuses KV through an LMCache server.

with KVCacheSession(model, "tcp://127.0.0.1:5555") as session:
    cache, num_tokens = session.load(token_ids)
    output = model.generate(torch.tensor([token_ids]), past_key_values=cache)
    session.store(output[0].tolist(), cache)
"""

from lmcache.connectors.transformers.caches import RoomyCache
from lmcache.connectors.transformers.session import KVCacheSession

__all__ = ["KVCacheSession", "RoomyCache"]
