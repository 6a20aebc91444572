"""qembed: quantize an embedding model to AWQ INT4, serve it through vLLM, and measure what INT4 costs."""


def __getattr__(name: str) -> str:
    """`qembed.__version__`, looked up only when it is asked for."""
    if name == "__version__":
        from qembed.installation import version

        return version()
    raise AttributeError(name)
