"""qembed: quantize an embedding model to AWQ INT4, serve it through vLLM, and measure what INT4 costs."""

from importlib.metadata import version

__version__ = version("qembed")
