"""What `qembed quantize` prints at the end of a run."""

from __future__ import annotations

import shlex
from typing import Any

from qembed.text.display import counted


def show(result: dict[str, Any]) -> None:
    """Print the result of a run: output error by kind of layer; sizes, calibration and fidelity; and what to run next."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    losses = Table(title="Relative output error by kind of layer (root mean square)")
    losses.add_column("layer")
    losses.add_column("error", justify="right")
    for name, error in result["error"].items():
        losses.add_row(name, f"{error:.2%}")
    table = Table(title=f"{result['model']} → {result['output']}", show_header=False)
    before, after = result["bytes"]["before"], result["bytes"]["after"]
    table.add_row("tensors before", f"{before / 1e6:,.1f} MB")
    table.add_row("tensors after", f"{after / 1e6:,.1f} MB  ({after / before:.0%})")
    table.add_row("  linear layers", f"{result['bytes']['linears']['after'] / 1e6:,.1f} MB, "
                  f"before {result['bytes']['linears']['before'] / 1e6:,.1f} MB")  # fmt: skip
    if (error := result["token_table"]["relative_error"]) is not None:
        size = result["bytes"]["token_table"]
        table.add_row("  token table", f"{size['after'] / 1e6:,.1f} MB, before {size['before'] / 1e6:,.1f} MB")
        table.add_row("relative error of the token table", f"{error:.2%}")
    calibration = result["calibration"]
    cut = f", {calibration['cut']} cut at {calibration['max_tokens']}" if calibration["cut"] else ""
    cut += f", {calibration['shortened']} shortened" if calibration["shortened"] else ""
    kind = "pair" if result["task"] == "rerank" else "text"
    table.add_row("calibration", f"{counted(calibration['texts'], kind)}, {counted(calibration['tokens'], 'token')}{cut}")
    fidelity = result["fidelity"]
    cosines = f"mean {fidelity['mean_cosine']:.4f}, minimum {fidelity['min_cosine']:.4f}"
    if result["task"] == "rerank":
        differences = f"mean {fidelity['mean_score_difference']:.4f}, maximum {fidelity['max_score_difference']:.4f}"
        table.add_row(f"difference of scores to the source, {fidelity['texts']} held-out pairs", differences)
        if (tau := fidelity["kendall_tau"]) is not None:
            table.add_row("order of a query's documents, Kendall's τ", f"{tau:.4f}")
    else:
        table.add_row(f"cosine to the source, {fidelity['texts']} held-out texts", cosines)
    if (float16 := result["float16"])["overflows"]:
        table.add_row("not in float16", "\n".join(float16["overflows"]))
    elif float16["scaled"]:
        table.add_row("scaled to keep within float16", "\n".join(f"{name} ÷ {by:g}" for name, by in float16["scaled"].items()))
    table.add_row("time", f"{result['seconds']:.0f} s")
    if result["error"]:
        console.print(losses)
    console.print(table)
    folder = shlex.quote(result["output"])
    console.print(f"next: qembed serve --int4 --model {folder}", highlight=False, markup=False, soft_wrap=True)
    what = "--task rerank" if result["task"] == "rerank" else "--baseline fp16"
    console.print(f"      qembed eval {what} --model {folder}", highlight=False, markup=False, soft_wrap=True)
