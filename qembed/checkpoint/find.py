"""From the name of a model to its checkpoint: a folder, a hub id, the sample, or what `quantize` made here."""

from __future__ import annotations

import os
from pathlib import Path

from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.files import check_folder
from qembed.errors import BadInput

DEFAULT_MODEL = "Qwen/Qwen3-Embedding-0.6B"
SAMPLE = "sample"
INT4_SUFFIX = "-AWQ-INT4"
A_MODEL = f"a model is a folder, a hub id such as {DEFAULT_MODEL}, or '{SAMPLE}'"
HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "merges.txt", "1_Pooling/*", "LICENSE*", "README.md")


def find(model: str, *, download: bool = True, check: bool = True) -> Checkpoint:
    """The checkpoint that `model` names: `sample`, a folder, or a hub id (downloaded once, into the hub's own cache).

    Without `download` a hub id is looked up in that cache alone. `check`: whether all files that a library may read must be
    regular ones of the checkpoint's own (`files.check_folder`).

    Raises:
        BadInput: no such folder, not a checkpoint, a hub id that cannot be had, or a file that must not be read.
    """
    if model == SAMPLE:
        from qembed.sample import FOLDER

        return Checkpoint(SAMPLE, FOLDER)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve().name, folder, check)
    if folder.is_file():
        raise BadInput(f"{model}: a file; name the folder that holds the checkpoint")
    if _is_path(model) or "/" not in model:
        raise BadInput(f"{model}: no such folder; {A_MODEL}")
    return _checked(model, _download(model, local=not download), check)


def _is_path(model: str) -> bool:
    """Whether `model` can only be a path: a hub id is a name, or two with a slash between."""
    return model.count("/") > 1 or model.startswith((".", "/", "~"))


def short_name(model: str) -> str:
    """The last part of a hub id or folder: `Qwen/Qwen3-Embedding-0.6B` → `Qwen3-Embedding-0.6B`."""
    folder = Path(model).expanduser()
    return folder.resolve().name if model != SAMPLE and folder.is_dir() else model.split("/")[-1]


def default_output(model: str) -> Path:
    """Where `qembed quantize --model MODEL` writes by default, in the working directory."""
    return Path(short_name(model) + INT4_SUFFIX)


def find_int4(model: str | None) -> Checkpoint:
    """The INT4 checkpoint meant by `model`: such a folder itself, or what `quantize` made of that model in this directory.

    With `model` None: what `quantize` made of the default model, or else the only INT4 folder of this directory.

    Raises:
        BadInput: there is none, or more than one could be meant.
    """
    if model is not None and Path(model).expanduser().is_dir():
        checkpoint = find(model)
        if checkpoint.is_int4:
            return checkpoint
        if short_name(model).endswith(INT4_SUFFIX):
            raise BadInput(
                f"{model}: not an AWQ INT4 checkpoint, though it is called one; serve it with --fp16, or quantize it"
            )
    elif model is not None and model != SAMPLE and (_is_path(model) or model.endswith(INT4_SUFFIX)):
        raise BadInput(f"{model}: no such folder; {A_MODEL}")
    output = default_output(model or DEFAULT_MODEL)
    if output.is_dir():
        checkpoint = find(str(output))
        if checkpoint.is_int4:
            return checkpoint
        raise BadInput(f"{output}: not an AWQ INT4 checkpoint")
    if model is not None:
        if "/" not in model and model != SAMPLE and not Path(model).is_dir():
            raise BadInput(f"{model}: no such folder; {A_MODEL}")
        raise BadInput(f"no INT4 checkpoint of {model} at ./{output}; run: qembed quantize --model {model}")
    named = sorted(path.parent for path in Path().glob(f"*{INT4_SUFFIX}/config.json"))
    here = [folder for folder in named if find(str(folder)).is_int4]
    if named and not here:
        raise BadInput(f"{named[0]}: not an AWQ INT4 checkpoint, though it is called one; run: qembed quantize")
    if len(here) == 1:
        return find(str(here[0]))
    if here:
        raise BadInput(f"several INT4 checkpoints here: {', '.join(map(str, here))}; choose one with --model")
    raise BadInput(f"no INT4 checkpoint at ./{output}; run: qembed quantize, or name a folder with --model")


def find_served(int4: bool, model: str | None) -> Checkpoint:
    """What `--int4 --model MODEL` means, as `find_int4` does; without `int4` the original that such a checkpoint was made from.

    Raises:
        BadInput: there is none, or more than one could be meant.
    """
    if int4:
        return find_int4(model)
    checkpoint = find(model) if model else _made_here() or find(DEFAULT_MODEL)
    return find(source_of(checkpoint)) if checkpoint.is_int4 else checkpoint


def _made_here() -> Checkpoint | None:
    try:
        return find_int4(None)
    except BadInput:
        return None


def source_of(checkpoint: Checkpoint) -> str:
    """The model that an INT4 checkpoint was made from, as `find` takes it. A folder is noted relative to the checkpoint's own.

    Raises:
        BadInput: the checkpoint does not say, because `qembed quantize` did not make it.
    """
    noted = checkpoint.manifest.get("source")
    source = noted if isinstance(noted, dict) else {}
    if isinstance(folder := source.get("folder"), str):
        return os.path.normpath(checkpoint.folder.resolve() / folder)
    if isinstance(model := source.get("model"), str):
        return model
    raise BadInput(f"{checkpoint.folder}: {MANIFEST} does not name the source model; name it with --baseline-model or --model")


def _checked(name: str, folder: Path, check: bool) -> Checkpoint:
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder}: not a checkpoint: config.json is missing")
    if check:
        check_folder(folder)
    return Checkpoint(name, folder)


def _download(model: str, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hint = f"name a folder that holds it (--model FOLDER), or try the embedded sample (--model {SAMPLE})"
    try:
        return Path(
            snapshot_download(model, allow_patterns=list(HUB_FILES), token=os.environ.get("HF_TOKEN"), local_files_only=local)
        )
    except HFValidationError as error:
        raise BadInput(f"{model}: no such folder, and not a hub id") from error
    except GatedRepoError as error:
        raise BadInput(f"{model}: the hub wants you to accept its terms first; set HF_TOKEN, or {hint}") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"{model}: no such folder, and no such model on the hub; {hint}") from error
    except LocalEntryNotFoundError as error:
        raise BadInput(f"{model}: the hub cannot be reached and the model is not in its cache; {hint}") from error
    except (HfHubHTTPError, OSError) as error:
        raise BadInput(f"{model}: the download failed ({type(error).__name__}); try again, or {hint}") from error
