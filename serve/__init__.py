"""`qembed serve`: an OpenAI-compatible embedding server on vLLM, with a gate in front of it (gate/)."""
