"""The choice of dtype and INT4 kernel by CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.embed import engine
from qembed.vectors import sources
from qembed.vllm import kernels, machine
from qembed.vllm.devices import Target
from qembed.vllm.kernels import Choice, Cpu, choose, this_cpu
from qembed.vllm.settings import ServerSettings

AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512_vnni"
ZEN5 = f"{AVX512} avx_vnni avx512_bf16"
AMX = f"{ZEN5} amx_tile amx_int8 amx_bf16"


def cpu(flags: str, *, compiled: bool = True, disabled: str = "") -> Cpu:
    return Cpu(frozenset(flags.split()), compiled, frozenset(disabled.split(",")))


def dtype_and_kernel(choice: Choice) -> tuple[str, str | None]:
    return choice.dtype, choice.kernel


@pytest.mark.parametrize(
    ("flags", "compiled", "expected"),
    [
        (AVX2, True, ("float32", "qembed")),
        (AVX512, True, ("float32", "qembed")),
        (ZEN5, True, ("bfloat16", "qembed")),
        (AMX, True, ("bfloat16", "qembed")),
        (AVX2, False, ("float32", "qembed-torch")),
        (AVX512, False, ("float32", "qembed-torch")),
        (ZEN5, False, ("bfloat16", "vllm")),
        (AMX, False, ("bfloat16", "vllm")),
        ("avx512f avx512_bf16", True, ("bfloat16", "vllm")),
        ("fp asimd bf16 i8mm", False, ("float32", "qembed-torch")),
        ("", True, ("float32", "qembed-torch")),
    ],
)
def test_int4_uses_the_fastest_dtype_and_kernel_of_the_cpu(flags: str, compiled: bool, expected: tuple[str, str]) -> None:
    assert dtype_and_kernel(choose(cpu(flags, compiled=compiled), int4=True)) == expected


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (AVX2, "float32"),
        (AVX512, "float32"),
        (ZEN5, "bfloat16"),
        (AMX, "bfloat16"),
        ("asimd bf16", "bfloat16"),
        ("", "float32"),
    ],
)
def test_without_int4_bfloat16_needs_cpu_instructions(flags: str, dtype: str) -> None:
    assert dtype_and_kernel(choose(cpu(flags), int4=False)) == (dtype, None)


@pytest.mark.parametrize(
    ("flags", "dtype", "kernel"),
    [
        (AMX, "float32", "qembed"),
        (AMX, "bfloat16", "qembed"),
        (AMX, "float16", "qembed"),
        (ZEN5, "bfloat16", "qembed"),
        (AVX512, "bfloat16", "qembed"),
        (AVX2, "bfloat16", "qembed"),
    ],
)
def test_with_a_given_dtype_only_the_kernel_is_chosen(flags: str, dtype: str, kernel: str) -> None:
    assert dtype_and_kernel(choose(cpu(flags), int4=True, dtype=dtype)) == (dtype, kernel)
    assert dtype_and_kernel(choose(cpu(flags), int4=False, dtype=dtype)) == (dtype, None)


def test_a_disabled_kernel_is_not_chosen() -> None:
    without_plugin = cpu(AMX, disabled=f"Other,{kernels.PLUGIN_KERNEL}")
    without_stock = cpu(AMX, disabled=f"Other,{kernels.STOCK_KERNEL}")
    assert dtype_and_kernel(choose(without_stock, int4=True)) == ("bfloat16", "qembed")
    assert dtype_and_kernel(choose(cpu(AVX512, disabled=kernels.STOCK_KERNEL), int4=True)) == ("float32", "qembed")
    assert dtype_and_kernel(choose(without_plugin, int4=True)) == ("bfloat16", "vllm")
    assert dtype_and_kernel(choose(cpu(ZEN5, disabled=kernels.PLUGIN_KERNEL), int4=True)) == ("bfloat16", "vllm")


def test_the_reason_names_the_deciding_fact() -> None:
    assert "AMX" in choose(cpu(AMX), int4=True).reason
    assert "AVX-512" in choose(cpu(AVX2), int4=True).reason
    assert "missing" in choose(cpu(ZEN5, compiled=False), int4=True).reason
    assert "missing" in choose(cpu(AVX2, compiled=False), int4=True).reason
    assert kernels.DISABLED_KERNELS in choose(cpu(AMX, disabled=kernels.STOCK_KERNEL), int4=True).reason


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (f"processor: 0\nflags\t\t: {ZEN5}\n", set(ZEN5.split())),
        ("Features\t: fp asimd bf16 sve\n", {"fp", "asimd", "bf16", "sve"}),
        (f"flags\t\t: {AVX2}\nbugs\t: avx512_bf16_lookalike\n", set(AVX2.split())),
        ("", set()),
    ],
)
def test_instruction_sets_are_read_from_cpuinfo(tmp_path: Path, text: str, flags: set[str]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert this_cpu(path, {}).flags == flags


def test_torchs_capability_limit_is_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags: {AMX}\n")
    assert this_cpu(path, {kernels.CAPABILITY_LIMIT: "avx2"}).flags == set(AVX2.split())
    assert this_cpu(path, {kernels.CAPABILITY_LIMIT: "avx512"}).flags == set(AMX.split())


def test_without_cpuinfo_there_are_no_instruction_sets(tmp_path: Path) -> None:
    assert this_cpu(tmp_path / "nothing", {}).flags == set()
    assert "no vector instructions" in this_cpu(tmp_path / "nothing", {}).shown


def test_disabled_kernels_are_read_from_the_environment(tmp_path: Path) -> None:
    assert {"A", "B"} <= this_cpu(tmp_path / "nothing", {kernels.DISABLED_KERNELS: "A,B"}).disabled


@pytest.mark.parametrize(("flags", "expected"), [(AMX, ("bfloat16", "qembed")), (AVX512, ("float32", "qembed"))])
def test_serve_embed_and_eval_make_and_report_the_same_choice(
    int4: Checkpoint, monkeypatch: pytest.MonkeyPatch, flags: str, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(kernels, "this_cpu", lambda: cpu(flags))
    monkeypatch.setattr(machine, "target", lambda: Target("cpu", "CPU", 2**40, 2**40))
    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "check_vllm", lambda: None)
    monkeypatch.setattr(sources, "has_vllm", lambda: True)
    choice = choose(cpu(flags), int4=True)
    for_scripts, for_people = (
        CliRunner().invoke(group, ["serve", "--plan", "--model", str(int4.folder), *options]) for options in (["--json"], [])
    )
    plan = json.loads(for_scripts.output)
    assert (plan["dtype"], plan["kernel"], plan["kernel_reason"]) == (*expected, choice.reason)
    assert f"{choice.title}: {choice.reason}" in for_people.output
    assert engine.plan_launch(ServerSettings(int4)).choice == choice
    assert sources.vllm(int4).identity["dtype"] == choice.title
