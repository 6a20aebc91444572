"""vLLM in this process, without a server or HTTP, planned like `qembed serve`, with the same kernels and settings.

The engine core runs in this process too (VLLM_ENABLE_V1_MULTIPROCESSING=0). It then starts computing when a whole batch has
been submitted, not when its first text arrives: the same batch always runs in the same steps, and its vectors are the same to
the last bit.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from qembed.embed.spool import Result
from qembed.embed.windows import Item
from qembed.errors import BadInput, QembedError
from qembed.vllm import internals, kernels, log, machine, unused_modules
from qembed.vllm.arguments import engine_arguments, environment, user_arguments
from qembed.vllm.settings import Launch, ServerSettings, check_fits, resolve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOT_FINITE = "its vector holds NaN or infinity"
MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
"""mallopt()'s numbers (malloc.h) of settings that glibc reads from the environment only when a process starts."""
GPU_SEQS, GPU_TOKENS = 256, 8192
"""Texts and tokens computed at once on a GPU: more than a server's defaults, because no client waits for a single text."""
STEPS_PER_BATCH = 4
"""Engine steps per batch. More: the pipeline drains less often. Fewer: less is lost in a crash."""


class EngineFailed(QembedError):
    """vLLM raised an error about a batch; it may still compute others."""


class Engine(Protocol):
    """Turns texts into vectors of `dimensions` numbers; `in_process`: a crash of the engine ends this process."""

    dimensions: int
    in_process: bool

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """Indices of `items` by batch; always the same for the same items."""

    def embed(self, batches: Mapping[int, Sequence[Item]]) -> Iterator[tuple[int, Result]]:
        """Batch numbers with their vectors, as they are finished, and the reasons for texts that have none."""


@dataclass
class InProcess:
    """A vLLM in this process. Vectors have `dimensions` numbers; `_cut` None leaves them whole."""

    launch: Launch
    dimensions: int
    _llm: Any
    _cut: int | None
    in_process: bool = True

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """Longest first: lengths within a batch are similar, and insufficient memory shows at once."""
        sizes = self.launch.sizes
        return sorted_batches(items, STEPS_PER_BATCH * sizes.max_num_seqs, STEPS_PER_BATCH * sizes.max_num_batched_tokens)

    def embed(self, batches: Mapping[int, Sequence[Item]]) -> Iterator[tuple[int, Result]]:
        """One batch after another.

        Raises:
            EngineFailed: vLLM failed.
        """
        import numpy as np

        for number, items in batches.items():
            vectors = self.vectors([list(item.tokens or ()) for item in items])
            reasons = {}
            for place in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
                # NaN in a cache block can spread to another text: computed alone, a text shows whether it is the cause.
                vectors[place] = self.vectors([list(items[place].tokens or ())])[0]
                if not np.isfinite(vectors[place]).all():
                    vectors[place], reasons[int(place)] = 0, NOT_FINITE
            yield number, (vectors, reasons)

    def vectors(self, tokens: Sequence[list[int]]) -> NDArray[np.float32]:
        """The vectors [n, dimensions] of texts, given as token ids, in one vLLM call.

        Raises:
            EngineFailed: vLLM failed.
        """
        import torch
        from vllm import PoolingParams

        try:
            outputs = self._llm.encode(
                [{"prompt_token_ids": ids} for ids in tokens],
                PoolingParams(dimensions=self._cut),
                pooling_task="embed",
                use_tqdm=False,
            )
        except Exception as error:
            with suppress(Exception):  # otherwise the next call would compute these texts too
                internals.abort_unfinished(self._llm)
            raise EngineFailed(f"vLLM failed: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
        vectors: NDArray[np.float32] = torch.stack([output.outputs.data for output in outputs]).float().cpu().numpy()
        return vectors


def sorted_batches(items: Sequence[Item], most_items: int, most_tokens: int) -> list[list[int]]:
    """Indices of `items`, longest first, in batches of at most `most_items` and `most_tokens`; a single item may be longer."""
    batches: list[list[int]] = []
    tokens = 0
    for place in sorted(range(len(items)), key=lambda place: -items[place].length):
        length = items[place].length
        if not batches or len(batches[-1]) == most_items or tokens + length > most_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(place)
        tokens += length
    return batches


def plan_launch(settings: ServerSettings) -> Launch:
    """The launch with its memory plan, before anything is loaded.

    Raises:
        MissingExtra: vLLM is not installed.
        BadInput: the checkpoint cannot run with these settings, or not in the available memory.
    """
    machine.check_vllm()
    machine.check_device()
    target = machine.target()
    if target.kind == "cuda" and settings.memory is None:
        tokens = settings.max_num_batched_tokens or max(GPU_TOKENS, settings.max_num_seqs or 0)
        seqs = settings.max_num_seqs or min(GPU_SEQS, tokens)
        settings = replace(settings, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    has_workers = settings.tensor_parallel_size > 1  # each a process of its own
    launch = resolve(settings, target, kernels.this_cpu(), 0, served=has_workers)
    check_fits(launch)
    return launch


@contextmanager
def opened(launch: Launch, dimensions: int | None, on_stage: Callable[[str], None]) -> Iterator[Engine]:
    """vLLM with the checkpoint loaded, for the duration of the block.

    Output of vLLM and the libraries below it goes into a log, or to stderr with `verbose`.

    Raises:
        QembedError: vLLM does not start.
    """
    on_stage(f"starting vLLM, computing in {launch.choice.title}: {launch.choice.reason}")
    _set_environment(launch)
    with redirect_output(launch.settings.verbose) as log_lines:
        try:
            llm = _load(launch, on_stage)
        except (Exception, SystemExit) as error:
            raise QembedError(f"vLLM did not start: {log.cause(log_lines()) or _cause(error)}") from error
        try:
            yield InProcess(launch, dimensions or launch.width, llm, dimensions)
        finally:
            with suppress(Exception):
                internals.shut_down(llm)
            del llm
            gc.collect()


@contextmanager
def opened_here(settings: ServerSettings, dimensions: int | None) -> Iterator[Engine]:
    """As `opened`, planned on the machine that calls it."""
    with opened(plan_launch(settings), dimensions, lambda _: None) as engine:
        yield engine


def _load(launch: Launch, on_stage: Callable[[str], None]) -> Any:
    arguments = [*engine_arguments(launch), *user_arguments(launch)]
    with unused_modules.hidden(unused_modules.names(arguments, on_cpu=launch.device == "cpu")), _without_gc():
        import torch
        from vllm import LLM  # noqa: F401 - the long import belongs to the stage before

        if launch.settings.threads is not None and launch.settings.tensor_parallel_size == 1:
            torch.set_num_threads(launch.settings.threads)  # OMP_NUM_THREADS alone is capped at the number of cores by MKL
        on_stage("loading the weights")
        return internals.load(arguments)


@contextmanager
def _without_gc() -> Iterator[None]:
    """No garbage collection within the block: a fifth of the time of the imports, whose objects all stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _set_environment(launch: Launch) -> None:
    """Set vLLM's environment variables in this process: vLLM reads os.environ while it is imported and when it starts, so they
    cannot be passed in any other way.
    """
    cores = machine.cores()
    variables = environment(launch, os.environ, cores)
    variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    variables["TOKENIZERS_PARALLELISM"] = "true"  # texts are tokenized here, while the engine computes
    if not launch.settings.verbose:
        variables.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if launch.device == "cpu":
        variables.setdefault("OMP_NUM_THREADS", str(len(cores)))
        with suppress(OSError, AttributeError, ValueError):  # another C library
            for name, number in MALLOPT.items():
                ctypes.CDLL(None).mallopt(number, int(variables[name]))
    os.environ.update(variables)
    for name in set(os.environ) - set(variables):
        del os.environ[name]


@contextmanager
def redirect_output(verbose: bool) -> Iterator[Callable[[], list[str]]]:
    """Redirect stdout and stderr of this process into a file for the duration of the block; yields a function that reads it.

    With `verbose` output goes to stderr instead. Code that must print meanwhile uses a copy of stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    originals = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:

        def log_lines() -> list[str]:
            file.seek(0)
            return file.read().splitlines()

        try:
            os.dup2(2 if verbose else file.fileno(), 1)
            os.dup2(2 if verbose else file.fileno(), 2)
            yield log_lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).fflush(None)  # native code may have buffered output of its own
            for number, original in enumerate(originals, 1):
                os.dup2(original, number)
                os.close(original)


def _cause(error: BaseException) -> str:
    """The message of the first error in a chain."""
    while (before := error.__cause__ or error.__context__) is not None and not isinstance(before, BadInput):
        error = before
    return " ".join(str(error).split())[:300] or type(error).__name__
