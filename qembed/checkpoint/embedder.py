"""What a checkpoint does with a text: one description, from which every command takes it.

sentence-transformers defines these folders: modules.json, 1_Pooling and further modules, sentence_bert_config.json,
config_sentence_transformers.json, beside config.json and tokenizer_config.json. What the description cannot hold is refused
by name, before any work: a setting that is read past would give other vectors without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qembed.checkpoint import transformer_settings
from qembed.checkpoint.files import open_tensors
from qembed.checkpoint.modules import Dense, Modules, Pooling, read_modules
from qembed.checkpoint.prompts import Prompts, read_prompts
from qembed.errors import BadInput
from qembed.text.prompts import is_qwen3_embedding

Attention = Literal["causal", "bidirectional"]
FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
"""Values of model_type whose blocks are known."""
BIDIRECTIONAL = {"qwen3": "Qwen3Model", "qwen2": "Qwen2Model", "llama": "LlamaModel"}
"""Families that vLLM also computes with bidirectional attention, and its name for them."""
ALIASES = {"llama_bidirec": "llama"}
"""Values of model_type of code that is published with a model, and the family whose blocks these are."""
NAMES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral"}
ALWAYS_BIDIRECTIONAL = ("LlamaBidirectionalModel", "VoyageQwen3BidirectionalEmbedModel")
KNOWN_CODE = ("Qwen3BidirectionalModel", *ALWAYS_BIDIRECTIONAL)
"""Model classes of code that is published with a model, and that computes what is computed here without it."""
VOYAGE = "VoyageQwen3BidirectionalEmbedModel"
HEAD = "linear.weight"
"""The tensor of a linear layer within the model, behind its last norm (voyage-4-nano)."""
POOLING_NAMES: dict[str, Pooling] = {"avg": "mean", "last": "last"}
"""Values of `pooling` in the config.json of a LlamaBidirectionalModel."""
SMALLEST = 32
"""The smallest size that vectors are cut to where a model lists no sizes of its own: as Qwen3-Embedding documents it."""


@dataclass(frozen=True)
class Embedder:
    """What a checkpoint does with a text.

    Attributes:
        family: one of FAMILIES, whose blocks it has.
        attention: whether a token attends to those before it, or to all.
        pooling: the state that becomes the vector: the last token's, or the mean of all.
        dense: layers behind the pooling.
        normalized: whether vectors are scaled to unit length.
        hidden_size: numbers of a state.
        sizes: the sizes that vectors may be cut to, ascending, if the model lists them; empty: any from SMALLEST.
        is_matryoshka: whether the model is known to be trained so that vectors can be cut.
        context: longest text in tokens by default, as sentence-transformers cuts it.
        positions: longest text in tokens that the model can compute.
        prompts: texts to put before a text, by name ("query", "document").
        default_prompt: the name of the prompt of texts that no other is asked for; None: none.
        lower_case: whether texts are lower-cased.
        architecture: vLLM's name of the model, where config.json has none that vLLM reads right.
        described: whether the folder has a modules.json.
        has_code: whether config.json names code that comes with the model, which is not run.
    """

    family: str
    attention: Attention
    pooling: Pooling
    dense: tuple[Dense, ...]
    normalized: bool
    hidden_size: int
    sizes: tuple[int, ...]
    is_matryoshka: bool
    context: int
    positions: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    architecture: str | None = None
    described: bool = True
    has_code: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether no token attends to those after it."""
        return self.attention == "causal"

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.dense[-1].outputs if self.dense else self.hidden_size

    @property
    def document_prompt(self) -> str:
        """The prompt of a text that no other is asked for; empty for none."""
        return self.prompts[self.default_prompt] if self.default_prompt is not None else ""

    @property
    def smallest(self) -> int:
        """The smallest size that vectors may be cut to, if the model lists none."""
        return min(SMALLEST, self.width)

    def allows(self, dimensions: int) -> bool:
        """Whether vectors may be cut to this size."""
        return dimensions in self.sizes if self.sizes else self.smallest <= dimensions <= self.width

    @property
    def dimensions(self) -> str:
        """The sizes that vectors may be cut to, in words."""
        return ", ".join(map(str, self.sizes)) if self.sizes else f"{self.smallest} to {self.width}"

    @property
    def default_sizes(self) -> dict[str, Any]:
        """What vLLM needs in its config to cut vectors to the same sizes."""
        return {"is_matryoshka": True, "matryoshka_dimensions": list(self.sizes) or None}

    @property
    def attention_config(self) -> dict[str, Any]:
        """The entries of config.json with which vLLM computes bidirectional attention; empty for causal attention."""
        if self.architecture is None:
            return {}
        head = {"num_labels": self.width} if self.architecture == VOYAGE else {}
        return {"architectures": [self.architecture], "is_causal": False, **head}

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config`, as config.json has it, with the names under which vLLM and transformers read it without other code."""
        if self.architecture is None:
            return dict(config)
        plain = {name: value for name, value in config.items() if name != "auto_map"}
        return {**plain, "model_type": self.family, **self.attention_config}

    def notes(self, *, normalized: bool | None = None) -> Iterator[str]:
        """What a user may not expect of the vectors, in lines; `normalized`: whether they have unit length in the end."""
        if not self.described:
            yield (
                "no modules.json says how a vector is made of the tokens' states: "
                + ("the last token's state" if self.pooling == "last" else "their mean")
                + (", scaled to unit length" if self.normalized else "")
            )
        if self.has_code:
            yield "config.json names code that comes with the model (auto_map); it is not run"
        if not (self.normalized if normalized is None else normalized):
            yield "vectors have no unit length: the model has no Normalize module; --normalize scales them"

    @property
    def query_note(self) -> str | None:
        """A line about queries, if the model defines prompts, but none for them under that name."""
        names = [name for name, prompt in self.prompts.items() if prompt]
        if not names or "query" in names:
            return None
        return f"the model has no prompt named query, so queries get none; its prompts are {', '.join(sorted(names))}"

    @property
    def cut_note(self) -> str | None:
        """A line about vectors that are cut, if the model is not known to be trained for it (Kusupati et al. 2022)."""
        if self.is_matryoshka:
            return None
        return (
            "the model does not say that its vectors were trained to be cut (is_matryoshka in config.json); qembed eval "
            "measures what fewer dimensions cost"
        )


def describe(
    name: str, folder: Path, config: Mapping[str, Any], files: Mapping[str, Path], source: str | None = None
) -> Embedder:
    """The description of the checkpoint `name` in `folder` with its `config` and the `files` of its tensors.

    `source` is the name of the model that it was quantized from.

    Raises:
        BadInput: something in the folder changes the vectors and is not supported, or contradicts something else.
    """
    path = folder / "config.json"
    _check_code(config, path)
    architecture = _architecture(config, path)
    family = _family(config, path)
    hidden_size, positions = (positive(config, key, path) for key in ("hidden_size", "max_position_embeddings"))
    modules = read_modules(folder, hidden_size)
    dense = modules.dense if modules else ()
    head = _head(config, family, hidden_size, files, path)
    if head is None and _code(config) == "Qwen3BidirectionalModel":
        raise BadInput(f"{folder}: the tensor {HEAD} is missing, which a {VOYAGE} has")
    attention = _attention(config, VOYAGE if head else architecture, family, path)
    if head is not None:
        if dense:
            raise BadInput(f"{folder}: both {HEAD} in the model and a Dense module; only one of them is supported")
        dense = (head,)
    width = dense[-1].outputs if dense else hidden_size
    sizes, is_matryoshka = _sizes(config, width, path)
    transformer = transformer_settings.read(folder, positions)
    prompts: Prompts = read_prompts(folder, name, source)
    return Embedder(
        family=family,
        attention=attention,
        pooling=_pooling(modules, config, architecture, attention, path),
        dense=dense,
        normalized=modules.normalized if modules else True,
        hidden_size=hidden_size,
        sizes=sizes,
        is_matryoshka=is_matryoshka or is_qwen3_embedding(name, source),  # its config.json does not say so
        context=transformer.context,
        positions=positions,
        prompts=prompts.texts,
        default_prompt=prompts.default,
        lower_case=transformer.lower_case,
        architecture=VOYAGE if head else BIDIRECTIONAL[family] if attention == "bidirectional" else None,
        described=modules is not None,
        has_code=bool(config.get("auto_map")),
    )


def _check_code(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a model class that comes with the model: `architectures` often says nothing of what it changes, as attention."""
    if (name := _code(config)) is not None and name not in KNOWN_CODE:
        raise BadInput(
            f"{path}: the model comes with code of its own, {name[:80]!r} (auto_map), which is not run; known is what "
            f"{', '.join(KNOWN_CODE)} compute. If it is a plain model, remove auto_map; is_causal false says that attention is "
            "bidirectional"
        )


def _code(config: Mapping[str, Any]) -> str | None:
    """The name of the model class that comes with the model; None if it needs none."""
    code = config.get("auto_map")
    reference = code.get("AutoModel") if isinstance(code, dict) else code
    return None if not reference else str(reference).rpartition(".")[2]


def _architecture(config: Mapping[str, Any], path: Path) -> str | None:
    """The first of `architectures` in config.json; None if it has none."""
    names = config.get("architectures")
    if not names:
        return None
    known = [*ALWAYS_BIDIRECTIONAL, *(name + kind for name in NAMES.values() for kind in ("ForCausalLM", "Model"))]
    if not isinstance(names, list) or names[0] not in known:
        shown = names[0] if isinstance(names, list) else names
        raise BadInput(f"{path}: architecture {str(shown)[:80]!r} is not supported; supported are {', '.join(known)}")
    return str(names[0])


def _family(config: Mapping[str, Any], path: Path) -> str:
    model_type = config.get("model_type")
    family = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else None
    if family not in FAMILIES:
        raise BadInput(
            f"{path.parent}: model_type {str(model_type)[:80]!r} is not supported; supported families are {', '.join(FAMILIES)}"
        )
    return family


def _attention(config: Mapping[str, Any], architecture: str | None, family: str, path: Path) -> Attention:
    is_causal = config.get("is_causal", True)
    if not isinstance(is_causal, bool):
        raise BadInput(f"{path}: is_causal is {str(is_causal)[:60]!r}, neither true nor false")
    if config.get("use_bidirectional_attention") and architecture not in ALWAYS_BIDIRECTIONAL:
        raise BadInput(f"{path}: use_bidirectional_attention is not supported for {family}; is_causal false is")
    model_type = config.get("model_type")
    if is_causal and architecture not in ALWAYS_BIDIRECTIONAL and model_type not in ALIASES:
        return "causal"
    if family not in BIDIRECTIONAL:
        raise BadInput(f"{path}: bidirectional attention is supported for {', '.join(BIDIRECTIONAL)}, not for {family}")
    types = config.get("layer_types") or []
    if config.get("use_sliding_window") or "sliding_attention" in types:
        raise BadInput(f"{path}: bidirectional attention with a sliding window is not supported")
    return "bidirectional"


def _pooling(
    modules: Modules | None, config: Mapping[str, Any], architecture: str | None, attention: Attention, path: Path
) -> Pooling:
    """How the states of the tokens become one; without modules.json as config.json says, or as sentence-transformers does."""
    named = config.get("pooling")
    own = POOLING_NAMES.get(named) if isinstance(named, str) else None
    if architecture == "LlamaBidirectionalModel" or config.get("model_type") in ALIASES:
        if own is None:
            raise BadInput(f"{path}: pooling is {str(named)[:60]!r}; supported are {', '.join(POOLING_NAMES)}")
        if modules is not None and modules.pooling != own:
            raise BadInput(f"{path}: pooling is {named!r}, but 1_Pooling says {modules.pooling!r}")
        return own
    if modules is not None:
        return modules.pooling
    if attention == "bidirectional":
        return own or "mean"
    if architecture is not None and not architecture.endswith("ForCausalLM"):
        raise BadInput(
            f"{path.parent}: no modules.json says how a {architecture} makes a vector of the states of the tokens; add it with "
            "1_Pooling/config.json, as sentence-transformers writes them"
        )
    return "last"


def _head(config: Mapping[str, Any], family: str, hidden_size: int, files: Mapping[str, Path], path: Path) -> Dense | None:
    """The linear layer within the model, which maps each token's state. Behind either pooling it gives the same vector."""
    if HEAD not in files:
        return None
    with open_tensors(files[HEAD], "np") as tensors:
        shape = tensors.get_slice(HEAD).get_shape() if HEAD in tensors.keys() else []  # noqa: SIM118 - a handle is no dict
    if family != "qwen3" or config.get("is_causal") is True or len(shape) != 2 or shape[1] != hidden_size:
        raise BadInput(f"{path.parent}: tensor {HEAD} of shape {shape} is not supported in this architecture")
    if (labels := config.get("num_labels")) not in (None, shape[0]):
        raise BadInput(f"{path}: num_labels is {str(labels)[:60]!r}, but {HEAD} has {shape[0]} rows")
    return Dense(HEAD, hidden_size, shape[0], bias=False, activation="Identity", file=files[HEAD], weight=HEAD)


def _sizes(config: Mapping[str, Any], width: int, path: Path) -> tuple[tuple[int, ...], bool]:
    """The sizes that config.json lists, with the whole width, and whether it says that vectors can be cut."""
    listed = config.get("matryoshka_dimensions")
    if not listed:
        return (), config.get("is_matryoshka") is True
    if not isinstance(listed, list) or not all(type(size) is int and 0 < size <= width for size in listed):
        raise BadInput(f"{path}: matryoshka_dimensions is {str(listed)[:80]}, not a list of sizes up to {width}")
    return tuple(sorted({*listed, width})), True


def positive(config: Mapping[str, Any], key: str, path: Path) -> int:
    """The value of `key` in the `config` of the file `path`.

    Raises:
        BadInput: it is missing, or not a positive integer.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        if key not in config:
            raise BadInput(f"{path}: {key} is missing")
        raise BadInput(f"{path}: {key} is {repr(value)[:60]}, not a positive integer")
    return value
