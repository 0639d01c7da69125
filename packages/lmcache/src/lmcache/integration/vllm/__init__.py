"""Import paths that stock vLLM 0.26 to 0.32 looks for."""
