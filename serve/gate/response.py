"""vLLM's answer → the client's: every vector looked at, none with NaN or infinity passed on. Functions of data."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from qembed.serve.gate.errors import Refused


def read(raw: bytes) -> tuple[dict[str, Any], list[int]]:
    """vLLM's answer `raw`, with float32 vectors in base64, and the places in its "data" of those that are not finite."""
    import numpy as np

    said = json.loads(raw)
    bad = []
    for place, item in enumerate(said["data"]):
        vector = np.frombuffer(base64.b64decode(item["embedding"]), dtype=np.float32)
        if not vector.size or not np.isfinite(vector).all():
            bad.append(place)
    return said, bad


def mend(said: dict[str, Any], places: Sequence[int], again: dict[str, Any], still: Sequence[int]) -> list[int]:
    """Put the vectors of `again` in the `places` of `said`, but for those that are `still` not finite; the places of these."""
    for at, place in enumerate(places):
        if at not in still:
            said["data"][place]["embedding"] = again["data"][at]["embedding"]
    return [places[at] for at in still]


def write(said: dict[str, Any], encoding: str) -> bytes:
    """The client's answer, with vectors in `encoding`: "base64", as they are, or "float"."""
    import numpy as np

    if encoding == "float":
        for item in said["data"]:
            item["embedding"] = np.frombuffer(base64.b64decode(item["embedding"]), dtype=np.float32).tolist()
    return json.dumps(said, separators=(",", ":")).encode()


def refused(place: int) -> Refused:
    """What is answered in place of a vector that stays infinite or NaN."""
    return Refused(500, f"the vector of input[{place}] holds NaN or infinity; it is not passed on", "nonfinite", "input")
