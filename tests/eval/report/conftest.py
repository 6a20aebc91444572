"""A result with every part."""

from __future__ import annotations

from typing import Any

import numpy as np

from qembed.eval import result
from qembed.eval.tasks import Metric, Outcome, Task, speed
from qembed.eval.tasks.speed import RequestShape
from qembed.eval.thresholds import Thresholds, judged, verdict
from qembed.text.texts import Text

HOSTILE = '<script>alert(1)</script> | `x` **b** [a](http://elsewhere.example) "q" & \u202e'


def full(thresholds: Thresholds | None = None, count: int = 60) -> dict[str, Any]:
    """A result with every part and the size of a real one."""
    random = np.random.default_rng(4)
    baseline = random.normal(size=(count, 128)).astype(np.float32)
    candidate = baseline + 0.08 * random.normal(size=baseline.shape).astype(np.float32)
    languages = ("en", "de", "es", "zh", None)
    texts = [
        Text(f"t{row:03}", f"{HOSTILE} {row}", ("query", "document", "code")[row % 3], languages[row % 5])
        for row in range(count)
    ]
    results = result.results(texts, candidate, baseline, [row * 20 + 3 for row in range(count)])
    task = Task("retrieval", {"name": HOSTILE, "sha256": "0", "queries": 64, "passages": 214}, [], lambda *_: Outcome([]))
    metrics = [
        Metric("nDCG@10", 0.71, 0.70, (-0.03, 0.01), 64, mixed=0.705, main=True),
        Metric("IVF vs exact@10", 0.9, 0.91, (-0.01, 0.03), 64),
        *(Metric("nDCG@10", 0.5, 0.5 + 0.01 * place, (-0.02, 0.04), 16, f"{a} → {b}", 0.5) for place, (a, b) in enumerate(
            (a, b) for a in ("de", "en", "es", "zh") for b in ("de", "en", "es", "zh"))),
    ]  # fmt: skip
    tasks = [{**task.record(Outcome(metrics, ["a note"])), "unusable": {"candidate": 0, "baseline": 0}}]
    side = {"engine": "vllm", "version": "0.32.0", "model": "sample-AWQ-INT4", "weights": "awq-int4", "device": "cpu",
            "dtype": "bfloat16", "url": None, "bytes": 5_000_000, "seconds": 1.5, "computed": 60, "from_cache": 0}  # fmt: skip
    other = {**side, "engine": "transformers", "model": "sample", "weights": "float16", "dtype": "float32", "bytes": 20_000_000}
    sides = ("candidate", "baseline")
    speeds = [speed.record(RequestShape(batch, 128), {name: list(random.uniform(0.1, 0.2, 20)) for name in sides})
             for batch in (1, 8, 32)]  # fmt: skip
    thresholds = thresholds or Thresholds()
    return {
        **result.surroundings(),
        "candidate": side,
        "baseline": other,
        "data": {"file": "texts.jsonl", "sha256": "ab" * 32, "texts": count, "limit": 512, "cut": 3, "duplicates": 2},
        "settings": {"baseline": "fp16", "min_cosine": thresholds.min_cosine, "min_p1": thresholds.min_p1,
                     "max_task_drop": thresholds.max_task_drop, "percentiles": "linear", "interval": 0.95, "resamples": 1000},
        "results": results,
        "tasks": tasks,
        "speed": {"candidate": {**side, "memory": 900_000_000}, "baseline": {**other, "memory": 2_000_000_000},
                  "shapes": speeds, "notes": []},
        "gate": [task.record() for task in judged(tasks, thresholds)],
        "verdict": verdict(results, tasks, thresholds),
    }  # fmt: skip
