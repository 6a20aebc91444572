"""FP16 checkpoint in, AWQ INT4 checkpoint out. Knows nothing of vLLM."""
