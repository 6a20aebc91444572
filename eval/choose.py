"""Turns the command's options into sides, texts, tasks and cache. Queries running servers, but starts nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qembed import rerank
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find, find_int4, source_of
from qembed.errors import BadInput
from qembed.eval import texts
from qembed.eval.evaluation import Reader, SelfScoring
from qembed.eval.readers import beir, builtin, squad, tables
from qembed.eval.tasks import Task, classification, mteb, retrieval, sts
from qembed.eval.tasks import speed as speeds
from qembed.eval.tasks.retrieval import Collection
from qembed.eval.texts import Data
from qembed.files import sha256
from qembed.text.prompts import default_prompts, is_qwen3_embedding
from qembed.text.rows.options import RowOptions
from qembed.text.rows.options import parse as parse_row_options
from qembed.text.rows.reader import FORMATS
from qembed.vectors import matching, sources, vector_files
from qembed.vectors.cache import default_folder
from qembed.vectors.sources import Side
from qembed.vllm import api_keys

if TYPE_CHECKING:
    from rich.console import Console

Options = Mapping[str, Any]
ALL = ("retrieval", "classification", "sts")
TASKS = (*ALL, "speed")
MTEB = "mteb:"
CLASHES = (
    ("url", "engine", "--engine says how to start the INT4 side, --url that it is running: leave one out"),
    ("url", "vectors", "--url and --vectors both name the INT4 side: leave one out"),
    ("vectors", "engine", "--vectors are already computed: leave --engine out"),
    ("baseline_url", "baseline_model", "--baseline-url names a running server; leave --baseline-model out"),
    ("baseline_url", "baseline_engine", "--baseline-url names a running server; leave --baseline-engine out"),
    ("baseline_url", "baseline_vectors", "--baseline-url and --baseline-vectors both name the baseline: leave one out"),
    ("baseline_vectors", "baseline_model", "--baseline-vectors are already computed; leave --baseline-model out"),
    ("baseline_vectors", "baseline_engine", "--baseline-vectors are already computed; leave --baseline-engine out"),
)


def check(options: Options) -> None:
    """Refuse contradictory options.

    Raises:
        BadInput: options contradict each other.
    """
    for first, second, line in CLASHES:
        if options[first] and options[second]:
            raise BadInput(line)
    row_options(options)
    names_server = options["url"] or options["baseline_url"] or "://" in (options["rerank"] or "")
    if options["api_key_file"] and not names_server:
        raise BadInput("--api-key-file is for running servers: name one with --url, --baseline-url or --rerank")


def data(options: Options) -> Data:
    """The texts: the user's, or the built-in ones; row numbers if both sides are files of vectors."""
    if options["data"] is None and options["vectors"] and options["baseline_vectors"]:
        files = [vector_files.read(options[name]) for name in ("vectors", "baseline_vectors")]
        path = Path(options["vectors"])
        return Data(path, sha256(path), matching.texts_of(*files))
    if options["data"] is None:
        if option := next((name for name in ("text_column", "id_column") if options[name]), None):
            raise BadInput(f"--{option.replace('_', '-')} applies to --data")
        return texts.read(texts.HELDOUT)
    stored = bool(options["vectors"] or options["baseline_vectors"])
    columns = options["text_column"], options["id_column"]
    return texts.read(options["data"], row_options(options), *columns, note, leave_out=stored)


def row_options(options: Options) -> RowOptions:
    """How --data, --classification and --sts are to be read.

    Raises:
        BadInput: an option has an invalid value, or none of these files is of a kind that it applies to.
    """
    parsed = parse_row_options(options["delimiter"], options["encoding"], options["no_header"])
    paths = [tables.path_of(str(options[name])) for name in ("data", "classification", "sts") if options[name]]
    # A folder of labelled texts may hold any kind.
    parsed.check({"csv" if path.is_dir() else FORMATS.get(path.suffix.lower(), "") for path in paths})
    return parsed


def note(line: str) -> None:
    """Print what a reader decided about a file."""
    click.echo(line, err=True)


def cache_folder(options: Options, progress: Console) -> Path | None:
    """The folder for cached vectors; None if caching is off, or the default folder is not writable."""
    if options["no_cache"] or options["cache"]:
        return None if options["no_cache"] else Path(options["cache"])
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # without a home folder, a RuntimeError
        note = f"vectors are not cached: the cache folder cannot be written ({error}); name another with --cache"
        progress.print(note, markup=False, soft_wrap=True)
        return None


def sides(options: Options, explicit: AbstractSet[str]) -> tuple[Side, Side, Reader]:
    """Candidate, baseline, and the reader of texts. `explicit` are the options that stand on the command line."""

    @cache
    def int4() -> Checkpoint:
        return find_int4(options["model"])

    known: Checkpoint | None = None
    if options["vectors"]:
        candidate = sources.vectors(vector_files.read(options["vectors"]))
    elif options["url"]:
        candidate = sources.server(options["url"], api_keys.first(options["api_key_file"]))
        if "model" in explicit:
            candidate = replace(candidate, size=sources.size(int4()))
    else:
        known = int4()
        through_vllm = options["engine"] == "vllm" if options["engine"] else sources.has_vllm()
        candidate = sources.vllm(known) if through_vllm else sources.transformers(known)
    if options["baseline_vectors"]:
        baseline = sources.vectors(vector_files.read(options["baseline_vectors"]))
    elif options["baseline_url"]:
        baseline = sources.server(options["baseline_url"], api_keys.first(options["api_key_file"]))
    else:
        original = find(options["baseline_model"] or source_of(int4()))
        if original.is_int4:
            raise BadInput(f"{original.folder}: an INT4 checkpoint; the baseline is the original that it was made from")
        exact = options["baseline"] == "fp32"
        if options["baseline_engine"] == "vllm":
            baseline = sources.vllm(original, "float32" if exact else "original")
        else:
            baseline = sources.transformers(original, exact=exact)
        known = known or original
    if known is None and "model" in explicit:
        known = int4()
    if known is None:
        names = [str(side.identity["model"]) for side in (candidate, baseline) if "model" in side.identity]
        if names and not is_qwen3_embedding(*names):
            note(f"the prompts of {names[0]} are not known here: queries get none; name its folder with --model")
        return candidate, baseline, Reader(default_prompts(*names), None)
    if (query_note := known.embedder.query_note) is not None:
        note(f"{known.folder}: {query_note}")
    return candidate, baseline, Reader(known.prompts, known.tokenizer(), known.embedder.document_prompt)


def card_folder(options: Options, explicit: AbstractSet[str]) -> Path | None:
    """The folder of the INT4 checkpoint whose model card can take the numbers; None if only a server or a file is known.

    Raises:
        BadInput: --card is given and there is no such folder.
    """
    known = not (options["url"] or options["vectors"]) or "model" in explicit
    if known:
        return find_int4(options["model"]).folder
    if options["card"]:
        raise BadInput("--card: name the checkpoint whose card it is with --model")
    return None


def tasks(options: Options, folder: Path | None, progress: Console) -> tuple[list[Task], list[SelfScoring], bool]:
    """The tasks with their data, read and checked; the tasks that compute vectors themselves; and whether to measure speed.

    Raises:
        BadInput: unknown task, invalid data, or a side has stored vectors, which do not cover a task's texts.
        MissingExtra: a package that a task needs is not installed.
    """
    names = _names(options)
    if names and (options["vectors"] or options["baseline_vectors"]):
        raise BadInput(f"--task {names[0]}: tasks embed texts of their own, for which a file has no vectors; name a model")
    instruction = options["instruction"]
    chosen_tasks: list[Task] = []
    if "retrieval" in names:
        retrieval.check_faiss()
        chosen_tasks.append(_retrieval(options, folder, progress))
    if "classification" in names:
        classification.check_package(options["classifier"])
        argument = options["classification"]
        labelled = (
            tables.labelled(argument, instruction, row_options(options), note)
            if argument
            else builtin.classification(instruction)
        )
        chosen_tasks.append(classification.task(labelled, options["classifier"]))
    if "sts" in names:
        argument = options["sts"]
        pairs = tables.pairs(argument, instruction, row_options(options), note) if argument else builtin.sts(instruction)
        chosen_tasks.append(sts.task(pairs))
    scored = [mteb.task(name.removeprefix(MTEB)) for name in names if name.startswith(MTEB)]
    return chosen_tasks, scored, "speed" in names


def speed(options: Options, candidate: Side, baseline: Side) -> tuple[Side, Side, list[speeds.RequestShape], list[str]]:
    """What `--task speed` measures: both sides (through one engine unless the user chose otherwise), and request shapes with
    notes.

    Raises:
        BadInput: batch sizes or lengths are not numbers, or too long for the models.
    """
    batches, lengths = (_numbers(options, name) for name in ("speed_batches", "speed_lengths"))
    engines = [side.identity["engine"] for side in (candidate, baseline)]
    if engines[0] != "transformers" == engines[1] and not options["baseline_engine"] and sources.has_vllm():
        original = options["baseline_model"] or source_of(find_int4(options["model"]))
        baseline = sources.vllm(find(original), "float32" if options["baseline"] == "fp32" else "auto")
    limit = min((side.limit for side in (candidate, baseline) if side.limit is not None), default=None)
    return candidate, baseline, *speeds.shapes(batches, lengths, limit)


def _numbers(options: Options, name: str) -> list[int]:
    value = str(options[name])
    cells = [cell.strip() for cell in value.split(",")]
    if not all(cell.isdecimal() and 0 < int(cell) <= 100_000 for cell in cells):
        raise BadInput(f"--{name.replace('_', '-')} {value}: not whole numbers from 1, separated by commas")
    return [int(cell) for cell in cells]


def _names(options: Options) -> list[str]:
    """The requested tasks, by name or by their data, in the order of TASKS."""
    requested = list(options["task"])
    for name in requested:
        if name not in (*TASKS, "all") and not (name.startswith(MTEB) and len(name) > len(MTEB)):
            raise BadInput(f"--task {name}: none of {', '.join(TASKS)}, all, {MTEB}NAME")
    requested += [name for name in ALL if options[name]]
    if options["rerank"]:
        requested.append("retrieval")
    if options["max_task_drop"] is not None and not set(requested) - {"speed"}:
        requested.append("all")  # otherwise the threshold would be met without a measurement
    distinct = {*requested, *(ALL if "all" in requested else ())}
    return [name for name in TASKS if name in distinct] + sorted(name for name in distinct if name.startswith(MTEB))


def _retrieval(options: Options, folder: Path | None, progress: Console) -> Task:
    read = collection(options)
    if not options["rerank"]:
        return retrieval.task(read)
    model = options["rerank"]
    if "://" in model:
        reranker = rerank.through_server(model, api_keys.first(options["api_key_file"]))
    else:
        reranker = rerank.through_transformers(find(model))
    scoring = rerank.scoring(reranker, options["instruction"], folder, progress)
    return retrieval.task(read, scoring, reranker.name)


def collection(options: Options) -> Collection:
    """The queries and passages of --retrieval, or the built-in ones.

    Raises:
        BadInput: they cannot be read.
    """
    paths = [Path(path) for path in options["retrieval"]]
    instruction = options["instruction"]
    return _collection(paths, instruction) if paths else builtin.retrieval(instruction)


def _collection(paths: list[Path], instruction: str | None) -> Collection:
    """Retrieval data: a folder in BEIR's layout, or SQuAD JSON (files, or a folder of them)."""
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
    if len(paths) == 1 and paths[0].is_dir():
        if beir.is_here(paths[0]):
            return beir.read(paths[0], instruction)
        paths = sorted(paths[0].glob("*.json")) or paths
    if any(path.suffix.lower() != ".json" for path in paths):
        raise BadInput(f"{paths[0]}: neither BEIR's folder (corpus.jsonl, queries.jsonl, qrels/test.tsv) nor SQuAD's .json")
    return squad.read(paths, instruction)
