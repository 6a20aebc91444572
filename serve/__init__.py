"""An OpenAI-compatible embedding server: vLLM, started right."""
