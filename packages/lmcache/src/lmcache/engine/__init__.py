"""`lmcache engine`: a small serving engine over transformers, to try the cache on where no vLLM is installed."""
