"""Product search in two steps: find the nearest 50 of 120 products by their vectors, then sort them by a reranker.

    qembed quantize --model sample
    python examples/product_search.py                                  # embeds with its own engine
    python examples/product_search.py --url http://127.0.0.1:8000      # or with `qembed serve --int4 --model sample`
    python examples/product_search.py --rerank Qwen/Qwen3-Reranker-0.6B

A Qwen3-Reranker reads query and product together. None is as small as the sample, so without --rerank the example trains
LightGBM's LambdaMART (Burges 2010), whose features are the cosine and the words and parts of words that query and product
share. Each query is ranked by a model trained on other queries (5 folds). Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightgbm import LGBMRanker
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score
from sklearn.model_selection import GroupKFold

DATA = Path(__file__).parent / "data"
CANDIDATES = 50
FOLDS = 5
SHOWN = ("rip my CDs", "cash register for a café", "OCR for scanned documents")


def qembed(*arguments: object, stdin: str | None = None) -> str:
    """Run a qembed command; returns its standard output."""
    command = list(map(str, (Path(sys.executable).with_name("qembed"), *arguments)))
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True).stdout


def retrieve(work: Path, queries: list[dict[str, Any]], options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """The nearest CANDIDATES products of each query, best first; sorted by --rerank's model if given."""
    products, index = work / "products.parquet", work / "products.faiss"
    source = ["--url", options.url] if options.url else ["--model", options.model]
    qembed("embed", DATA / "products.jsonl", "-o", products, "--keep", "name", "--keep", "text", *source)
    qembed("index", products, "-o", index, "--force")
    server = ["--url", options.url] if options.url else []
    reranking = ["--rerank", options.rerank, "--candidates", CANDIDATES] if options.rerank else []
    lines = "\n".join(query["text"] for query in queries)
    output = qembed("search", "-", "--index", index, "-k", CANDIDATES, "--json", *server, *reranking, stdin=lines)
    return [answer["hits"] for answer in json.loads(output)["queries"]]


def rerank(queries: list[dict[str, Any]], hits: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Sort the hits of each query by LambdaMART."""
    pairs = [(query, hit) for query, query_hits in zip(queries, hits, strict=True) for hit in query_hits]
    questions, texts = [query["text"] for query, _ in pairs], [hit["columns"]["text"] for _, hit in pairs]
    features = [np.array([hit["score"] for _, hit in pairs])]
    for settings in ({"analyzer": "word", "stop_words": "english"}, {"analyzer": "char_wb", "ngram_range": (3, 5)}):
        words = TfidfVectorizer(sublinear_tf=True, **settings).fit(texts)
        features.append(np.asarray(words.transform(questions).multiply(words.transform(texts)).sum(axis=1)).ravel())
    table = np.column_stack(features)
    grades = np.array([query["relevant"].get(hit["id"], 0) for query, hit in pairs])
    group = np.repeat(np.arange(len(queries)), [len(query_hits) for query_hits in hits])
    scores = np.empty(len(pairs))
    for train, test in GroupKFold(FOLDS).split(table, grades, group):
        model = LGBMRanker(n_estimators=60, num_leaves=7, min_child_samples=10, random_state=0, deterministic=True, verbose=-1)
        model.fit(table[train], grades[train], group=np.unique(group[train], return_counts=True)[1])
        scores[test] = model.predict(table[test])
    # Break ties by the cosine.
    scores += 1e-6 * features[0]
    return [
        [query_hits[place] for place in np.argsort(-scores[group == number], kind="stable")]
        for number, query_hits in enumerate(hits)
    ]


def evaluate(queries: list[dict[str, Any]], hits: list[list[dict[str, Any]]]) -> tuple[float, float, float]:
    """nDCG@10, and the shares of queries whose best product is first, and among the candidates."""
    gains, first, among = [], [], []
    for query, query_hits in zip(queries, hits, strict=True):
        ids = [hit["id"] for hit in query_hits]
        missed = [grade for product, grade in query["relevant"].items() if product not in ids]
        truth = [query["relevant"].get(product, 0) for product in ids] + missed
        gains.append(ndcg_score([truth], [-np.arange(len(truth))], k=10))
        best = max(query["relevant"], key=query["relevant"].get)
        first.append(ids[0] == best)
        among.append(best in ids)
    return float(np.mean(gains)), float(np.mean(first)), float(np.mean(among))


def main() -> None:
    """Retrieve, rerank, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample", help="model to embed with (its INT4 checkpoint from qembed quantize)")
    parser.add_argument("--url", help="a running server to embed with instead")
    parser.add_argument("--rerank", help="a Qwen3-Reranker: hub id, folder, or URL of a vLLM server")
    options = parser.parse_args()
    queries = [json.loads(line) for line in (DATA / "product_queries.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as work:
        hits = retrieve(Path(work), queries, options)
    by_vectors = [sorted(query_hits, key=lambda hit: -hit["score"]) for query_hits in hits]
    in_order = hits if options.rerank else rerank(queries, hits)

    print(f"{len(queries)} queries, {CANDIDATES} of 120 products retrieved for each\n")
    print(f"{'':24} nDCG@10  best product first  among the {CANDIDATES}")
    for name, query_hits in (("vectors alone", by_vectors), (f"reranked by {options.rerank or 'LambdaMART'}", in_order)):
        gain, first, among = evaluate(queries, query_hits)
        print(f"{name:24} {gain:7.3f}  {first:18.0%}  {among:12.0%}")
    for number, query in enumerate(queries):
        if query["text"] in SHOWN:
            print(f"\n{query['text']}")
            for name, query_hits in (("vectors", by_vectors), ("reranked", in_order)):
                print(f"  {name:9}" + " · ".join(hit["columns"]["name"] for hit in query_hits[number][:4]))


if __name__ == "__main__":
    main()
