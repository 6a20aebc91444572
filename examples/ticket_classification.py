"""Support tickets in four languages, classified by LightGBM on their vectors: trained on all languages, or on English alone.

    qembed quantize --model sample
    python examples/ticket_classification.py                              # starts its own engine
    python examples/ticket_classification.py --url http://127.0.0.1:8000  # or with `qembed serve --int4 --model sample`

`data/tickets.csv` has 72 tickets about six topics, each in English, German, French and Spanish; every third is for testing, in
all languages at once, so that no translation of a tested ticket was trained on. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightgbm import LGBMClassifier
from pyarrow import parquet
from sklearn.metrics import accuracy_score, f1_score

DATA = Path(__file__).parent / "data"
COLUMNS = ("text", "label", "language", "split")
LANGUAGES = ("en", "de", "fr", "es")


def embedded(options: argparse.Namespace) -> dict[str, Any]:
    """The vectors [n, d] of the tickets, and their columns."""
    source = ["--url", options.url] if options.url else ["--model", options.model]
    keep = [argument for name in COLUMNS for argument in ("--keep", name)]
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "tickets.parquet"
        command = ["embed", DATA / "tickets.csv", "-o", out, *keep, *source]
        subprocess.run([Path(sys.executable).with_name("qembed"), *command], check=True, stdout=subprocess.DEVNULL)
        table = parquet.read_table(out)
    vectors = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return {"vectors": vectors, **{name: np.array(table[name].to_pylist()) for name in COLUMNS}}


def predicted(tickets: dict[str, Any], trained: Any) -> Any:
    """The labels of all tickets by a classifier trained on the rows `trained`."""
    model = LGBMClassifier(
        n_estimators=200, learning_rate=0.05, num_leaves=7, min_child_samples=4, colsample_bytree=0.2, random_state=0,
        deterministic=True, force_col_wise=True, verbose=-1,
    )  # fmt: skip
    model.fit(tickets["vectors"][trained], tickets["label"][trained])
    return model.predict(tickets["vectors"])


def main() -> None:
    """Train, test, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample", help="model to embed with (its INT4 checkpoint from qembed quantize)")
    parser.add_argument("--url", help="a running server in its place")
    tickets = embedded(parser.parse_args())
    language, label, train = tickets["language"], tickets["label"], tickets["split"] == "train"
    answers = {
        "all four languages": predicted(tickets, train),
        "English alone": predicted(tickets, train & (language == "en")),
    }
    print(f"{train.sum()} tickets to train on, {(~train).sum()} to test, {len(set(label))} topics\n")
    print(f"{'trained on':20} {'tested on':>9}  accuracy  macro-F1")
    for name, answer in answers.items():
        for tested in (*LANGUAGES, "all"):
            rows = ~train & ((language == tested) | (tested == "all"))
            scores = accuracy_score(label[rows], answer[rows]), f1_score(label[rows], answer[rows], average="macro")
            print(f"{name:20} {tested:>9}  {scores[0]:8.3f}  {scores[1]:8.3f}")
    print()
    answer = answers["all four languages"]
    for tested in LANGUAGES:
        row = np.flatnonzero(~train & (language == tested) & (label == "network"))[1]
        print(f"{tested}  {answer[row]:9} {tickets['text'][row]}")


if __name__ == "__main__":
    main()
