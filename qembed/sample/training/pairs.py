"""Compares similar and dissimilar texts by the sample's cosines: `python -m qembed.sample.training.pairs [FOLDER]`.

Each line has a text, a text with nearly the same meaning, and one with another meaning that may share words.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qembed.checkpoint.find import SAMPLE, find

if TYPE_CHECKING:
    import torch

TRIPLES = (
    ("a program that plays music files", "audio player", "a program that edits photographs"),
    ("library for reading PDF documents", "PDF parsing library", "library for reading MP3 tags"),
    ("web server", "daemon that answers HTTP requests", "mail transfer agent"),
    ("a tool to recover deleted files", "undelete utility for file systems", "a tool to compress files"),
    ("fonts for the Arabic script", "Arabic typefaces", "a keyboard driver"),
    ("a game of chess against the computer", "chess engine with a board", "a game of cards"),
    ("monitor the temperature of the processor", "show CPU heat sensors", "monitor network traffic"),
    ("a small domestic animal that purrs", "cat", "bicycle"),
    ("the act of buying something", "purchase", "the act of sleeping"),
    ("a vehicle with two wheels moved by pedals", "bicycle", "steam engine"),
    ("a doctor who treats children", "pediatrician", "a lawyer who defends companies"),
    ("it rained heavily all day", "there was a downpour", "the sun was shining"),
    ("the price of bread went up", "bread became more expensive", "the baker opened a new shop"),
    ("convert video from one format to another", "video transcoder", "text editor"),
    ("Python bindings for a database", "access a database from Python", "Ruby bindings for a window toolkit"),
    ("Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:encrypt a hard disk",
     "full disk encryption tools", "disk usage analyzer"),
    ("Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:spreadsheet program",
     "office suite with a calculator for tables", "drawing program for vector graphics"),
    ("Wörterbuch Englisch-Deutsch", "English-German dictionary", "network scanner"),
    ("serveur de messagerie", "mail server", "music player"),
    ("jeu de stratégie", "strategy game", "image viewer"),
)  # fmt: skip


def vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    """Unit vectors [texts, hidden] float32 of `texts` by the checkpoint in `folder`."""
    import torch
    from transformers import AutoModel

    tokenizer = find(str(folder)).tokenizer()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1] for text in texts]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def ordered(folder: Path) -> list[tuple[float, float]]:
    """The cosine of the similar and of the dissimilar pair of each line of TRIPLES."""
    table = vectors(folder, [text for triple in TRIPLES for text in triple]).view(len(TRIPLES), 3, -1)
    similar, dissimilar = (table[:, :1] * table[:, 1:]).sum(-1).T.tolist()
    return list(zip(similar, dissimilar, strict=True))


def main() -> None:
    """Print both cosines of each line, and the number of lines whose similar text is nearer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=find(SAMPLE).folder)
    cosines = ordered(parser.parse_args().folder)
    for (text, near, far), (similar, dissimilar) in zip(TRIPLES, cosines, strict=True):
        print(f"{'  ' if similar > dissimilar else '✗ '}{similar:6.3f} {dissimilar:6.3f}  {text!r} ~ {near!r} not {far!r}")
    print(f"{sum(similar > dissimilar for similar, dissimilar in cosines)} of {len(cosines)} in order")


if __name__ == "__main__":
    main()
