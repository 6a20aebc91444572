"""`qembed quantize --verify` survives damage of every file it reads, and names it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qembed.checkpoint import model_card
from qembed.cli import group
from qembed.quantize.manifest import sealed
from tests.checkpoints import write_checkpoint

from .conftest import contents, quantize

pytestmark = pytest.mark.slow

COMPANIONS: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True, "include_prompt": True},
    "config_sentence_transformers.json": {"prompts": {"query": "Instruct: x\nQuery:"}, "default_prompt_name": None},
    "tokenizer_config.json": {"eos_token": "<|endoftext|>", "model_max_length": 128},
    "generation_config.json": {"eos_token_id": 256, "do_sample": True},
}
MANY = 60
"""Values of one JSON file that are damaged; a tokenizer has hundreds of the same kind."""
REPLACEMENTS: tuple[Any, ...] = (None, True, 7, -1, 0.5, 10**9, 10**30, "x", "", [], {}, [[{}]], float("nan"))


def verify(folder: Path) -> Result:
    return CliRunner().invoke(group, ["quantize", "--verify", str(folder), "--device", "cpu"])


def assert_named(result: Result, *words: str) -> None:
    """Assert that a problem is reported, in a line with `words`, and not as a fault of qembed's."""
    assert result.exit_code in (1, 2), result.output
    assert "unexpected" not in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert any(all(word in line for word in words) for line in result.output.splitlines()), result.output


def paths_of(value: Any, start: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of each value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*start, key)
        yield from paths_of(inner, (*start, key))


def edited(value: Any, path: tuple[str | int, ...], edit: Callable[[Any, Any], None]) -> Any:
    """A copy of `value` in which `edit` has got the container of `path` and its last key."""
    result = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    edit(inner, path[-1])
    return result


def damaged_values(value: Any) -> Iterator[Any]:
    """`value` with one of its parts removed or replaced by a value of another type or size."""
    paths = list(paths_of(value))
    for path in paths[:: max(1, len(paths) // MANY)]:
        yield edited(value, path, lambda container, key: container.pop(key))
        for replacement in REPLACEMENTS:
            changed = edited(value, path, lambda container, key, new=replacement: container.__setitem__(key, new))
            if json.dumps(changed) != json.dumps(value):
                yield changed


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint whose source is still there, with all files that a hub's checkpoint has."""
    folder = tmp_path_factory.mktemp("damage")
    # Two layers would double the time of each of several thousand calls.
    source = write_checkpoint(folder / "tiny", "qwen3", num_hidden_layers=1).folder
    for name, value in COMPANIONS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps(value))
    result = quantize("--model", source, "--output", folder / "out")
    assert result.exit_code == 0, result.output
    assert verify(folder / "out").exit_code == 0
    return folder / "out"


@pytest.fixture
def checkpoint(intact: Path) -> Iterator[Path]:
    """A copy of `intact` beside it, so that the path to its source holds."""
    folder = intact.with_name("copy")
    shutil.copytree(intact, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["qembed.json", "config.json", "tokenizer.json", *COMPANIONS])
def test_each_json_value_removed_or_changed(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    for value in damaged_values(json.loads(path.read_text())):
        path.write_text(json.dumps(value))
        assert_named(verify(checkpoint), name)


def test_config_values_whose_hash_was_recorded(checkpoint: Path) -> None:
    """No number in config.json makes --verify loop or allocate, even where the manifest agrees with the file."""
    path, manifest = checkpoint / "config.json", json.loads((checkpoint / "qembed.json").read_text())
    config = json.loads(path.read_text())
    for name in ("num_hidden_layers", "hidden_size", "head_dim", "num_attention_heads", "vocab_size", "intermediate_size"):
        for value in (10**9, 10**30, -1, "2", None):
            path.write_text(json.dumps({**config, name: value}))
            manifest["files"]["config.json"] = contents(checkpoint)["config.json"]
            (checkpoint / "qembed.json").write_text(json.dumps(sealed(manifest)))
            assert_named(verify(checkpoint))


def test_each_value_of_the_safetensors_header(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for value in damaged_values(header):
        text = json.dumps(value).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        assert_named(verify(checkpoint), "model.safetensors")
    for size in (0, 1, length - 1, length + 8, 10**15, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        assert_named(verify(checkpoint), "model.safetensors")


def test_each_value_of_the_index(checkpoint: Path) -> None:
    """An index that nobody listed redirects tensors; one that was listed may be damaged like any other file."""
    names = [name for name in json.loads(_header(checkpoint / "model.safetensors")) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_named(verify(checkpoint), path.name, "not part of the checkpoint")
    manifest = json.loads((checkpoint / "qembed.json").read_text())
    manifest["files"][path.name] = contents(checkpoint)[path.name]
    (checkpoint / "qembed.json").write_text(json.dumps(sealed(manifest)))
    assert verify(checkpoint).exit_code == 0
    for value in damaged_values(index):
        path.write_text(json.dumps(value))
        assert_named(verify(checkpoint), path.name)


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def test_files_truncated_emptied_replaced_or_missing(checkpoint: Path, intact: Path) -> None:
    names = sorted(str(path.relative_to(intact)) for path in intact.rglob("*") if path.is_file())
    assert {"README.md", "model.safetensors", *COMPANIONS} < set(names)
    for name in names:
        path, data = checkpoint / name, (intact / name).read_bytes()
        for content in (
            data[: len(data) // 2],
            data.rstrip()[:-1],
            b"",
            b"\xff\xfe" + data[2:],
            b"[" * 100_000,
            b"null",
            b"\0" * 64,
        ):
            path.write_bytes(content)
            assert_named(verify(checkpoint), path.name)
        path.unlink()
        assert_named(verify(checkpoint), path.name)
        path.mkdir()
        assert_named(verify(checkpoint), path.name)
        path.rmdir()
        os.mkfifo(path)
        assert_named(verify(checkpoint), path.name)
        path.unlink()
        path.write_bytes(data)
    assert verify(checkpoint).exit_code == 0


def test_names_in_the_manifest_never_lead_outside_the_folder(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "qembed.json").read_text())
    for name in ("../tiny/config.json", "/etc/hostname", "", "a\0b", "x" * 300, "1_Pooling/../../tiny/config.json"):
        changed = {**manifest, "files": {**manifest["files"], name: "0" * 64}}
        (checkpoint / "qembed.json").write_text(json.dumps(sealed(changed)))
        assert_named(verify(checkpoint))


def test_unlisted_files_are_named(checkpoint: Path) -> None:
    (checkpoint / ".gitattributes").write_bytes(b"")
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "x.json").write_text("{}")
    result = verify(checkpoint)
    assert result.exit_code == 0
    assert ".gitattributes: not part of the checkpoint" in result.stdout
    assert ".cache" not in result.stdout
    for name in ("added_tokens.json", "pytorch_model.bin", "modeling.py", "2_Normalize/config.json", "notes.pdf", "LICENSE-2"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"{}")
        result = verify(checkpoint)
        assert_named(result, name, "not part of the checkpoint")
        assert result.exit_code == 1
        (checkpoint / name).unlink()
    (checkpoint / "more").symlink_to("/etc")
    assert_named(verify(checkpoint), "more", "not part of the checkpoint")


def test_a_file_dropped_from_the_manifest_is_unlisted(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "qembed.json").read_text())
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        others = {other: digest for other, digest in manifest["files"].items() if other != name}
        (checkpoint / "qembed.json").write_text(json.dumps(sealed({**manifest, "files": others})))
        assert_named(verify(checkpoint), name, "not part of the checkpoint")


def test_links_out_of_the_folder_whose_hash_was_recorded(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint / "tokenizer.json", tmp_path / "elsewhere")
    (checkpoint / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    assert_named(verify(checkpoint), "tokenizer.json", "leads out of its folder")


@pytest.mark.parametrize(
    ("section", "name", "values"),
    [
        ("calibration", "texts", ["x", 10**9, -1, None, True, [1]]),
        ("calibration", "max_tokens", ["x", 10**9, 0]),
        ("fidelity", "texts", ["x", 10**9, 0, 6000]),
        ("fidelity", "min_cosine", ["x", float("nan"), 2, 10**400]),
        ("settings", "seed", ["x", 10**30, 0.5, {}]),
    ],
)
def test_numbers_of_the_manifest_that_no_run_writes(checkpoint: Path, section: str, name: str, values: list[Any]) -> None:
    manifest = json.loads((checkpoint / "qembed.json").read_text())
    for value in values:
        changed = {**manifest, section: {**manifest[section], name: value}}
        (checkpoint / "qembed.json").write_text(json.dumps(sealed(changed)))
        result = verify(checkpoint)
        assert_named(result, "qembed.json", section)
        assert result.exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e300}},
        {"max_position_embeddings": 10**18},
        {"layer_types": ["x"] * 3},
        {"sliding_window": -5, "use_sliding_window": True, "layer_types": ["sliding_attention"]},
        {"torch_dtype": "os.system"},
    ],
)
def test_settings_of_the_config_whose_hash_was_recorded(checkpoint: Path, change: dict[str, Any]) -> None:
    path, manifest = checkpoint / "config.json", json.loads((checkpoint / "qembed.json").read_text())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    manifest["files"]["config.json"] = contents(checkpoint)["config.json"]
    (checkpoint / "qembed.json").write_text(json.dumps(sealed(manifest)))
    result = verify(checkpoint)
    assert_named(result)
    assert result.exit_code == 1


def test_the_card_that_eval_writes_still_verifies(checkpoint: Path) -> None:
    path = checkpoint / "README.md"
    card = path.read_text()
    path.write_text(model_card.with_section(card, "Cosine: mean 0.99"))
    assert path.read_text() != card
    assert verify(checkpoint).exit_code == 0
    path.write_text(path.read_text().replace("AWQ INT4", "FP16", 1))
    assert_named(verify(checkpoint), "README.md", "changed")
