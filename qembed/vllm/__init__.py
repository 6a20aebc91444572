"""Running vLLM: the memory plan, settings and arguments, and the process under supervision."""
