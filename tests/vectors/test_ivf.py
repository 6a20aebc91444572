"""IVF-Flat: eval and search share the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qembed.eval.tasks import retrieval
from qembed.search import build, corpus
from tests.search.conftest import clustered, write


def test_eval_and_search_find_the_same_clusters(tmp_path: Path) -> None:
    import faiss

    vectors = clustered(6000)
    source = corpus.read(write(tmp_path / "v.parquet", vectors))
    searched, _ = build.build(source, build.IndexSettings("ivf-flat"), np.array([0]), lambda *_: None)
    blocks = np.concatenate(list(corpus.vectors(source)))  # unit vectors in float32, as in search
    evaluated = retrieval.ivf_index(blocks)
    assert searched.nlist == evaluated.nlist > 100
    centres = [faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist) for index in (searched, evaluated)]
    np.testing.assert_array_equal(*centres)
