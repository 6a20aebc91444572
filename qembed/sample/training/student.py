"""The student: a small Qwen3 in the layout of Qwen/Qwen3-Embedding-0.6B, its tokenizer, and its other files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.text.prompts import DEFAULT_PROMPTS

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3Model

VOCABULARY = 13_824
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 4096,
    "max_window_layers": 6,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with Qwen's normalizer, split pattern and appended `<|endoftext|>`, on `texts`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
            processors.TemplateProcessing(
                single=f"$A {END_OF_TEXT}", pair=f"$A {END_OF_TEXT} $B {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end)]
            ),
        ]
    )
    return tokenizer


def new_model(token_table: torch.Tensor) -> Qwen3Model:
    """A student whose vector of a text is initially the mean of the text's token vectors.

    `token_table` [VOCABULARY, hidden] float32 comes from `distil.bag_of_words`. The first layer's attention is nearly
    uniform and copies its values, so the last token's state is the mean of the text's tokens. Starting from this bag of words
    saves most of the hours that a random start would need.
    """
    import torch
    from transformers import Qwen3Config, Qwen3Model

    model = Qwen3Model(Qwen3Config(**CONFIG)).float()
    hidden, heads, kv_heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    with torch.no_grad():
        model.embed_tokens.weight.copy_(token_table)
        for layer in model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / (2 * len(model.layers)) ** 0.5)
        first = model.layers[0].self_attn
        first.q_norm.weight.fill_(0.1)
        first.v_proj.weight.copy_(torch.eye(hidden))
        identity = torch.eye(hidden).view(hidden, kv_heads, hidden // kv_heads)
        repeat = heads // kv_heads
        first.o_proj.weight.copy_(identity.repeat_interleave(repeat, dim=1).reshape(hidden, -1) / repeat)
    return model


def save(model: Qwen3Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` in Qwen's layout: float16 tensors without a `model.` prefix, tokenizer, and configuration files."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer.model.save(str(folder))
    hidden = CONFIG["hidden_size"]
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
        }
        for token in SPECIAL_TOKENS
    }  # fmt: skip
    _write(folder / "config.json", {**CONFIG, "bos_token_id": end, "eos_token_id": end})
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
    )
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": DEFAULT_PROMPTS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden,
            **{f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes},
            "include_prompt": True,
        },
    )


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
