"""What travels to a GPU machine without a network, where there is none: parts, trips, and what vLLM imports there."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def wheels(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("gpu_wheels")


def test_a_missing_package_is_named_by_the_trial_of_imports(
    tmp_path: Path, bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import json\nimport left_out_package\n")
    (tmp_path / "broken.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    errors = bench("gpu_imports").failures(["json", "half_installed", "broken"])
    assert errors == {
        "half_installed": "left_out_package",
        "broken": "OSError: libcudart.so.13: cannot open shared object file",
    }


def test_packages_that_neither_torch_nor_transformers_needs_are_named(
    tmp_path: Path, bench: Callable[[str], ModuleType]
) -> None:
    needs = {
        "torch": ["sympy", 'numpy; extra == "optional"', "toolkit[runtime]"], "transformers": ["Some_Name>=1"], "sympy": [],
        "some-name": [], "numpy": [], "toolkit": ['lib; extra == "runtime"', 'other; extra == "else"'], "lib": [], "other": [],
        "pip": [], "psutil": [],
    }  # fmt: skip
    for name, requirements in needs.items():
        folder = tmp_path / f"{name.replace('-', '_')}-1.dist-info"
        folder.mkdir()
        lines = [f"Requires-Dist: {requirement}\n" for requirement in requirements]
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{''.join(lines)}")
    imports = bench("gpu_imports")
    assert imports.extra_packages([str(tmp_path)]) == ["numpy", "other", "psutil"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_stand_in_of_the_driver_can_be_loaded(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    import ctypes

    bench("gpu_imports").write_driver(tmp_path)
    assert ctypes.CDLL(str(tmp_path / "libcuda.so.1")).cuGetErrorString() != 0


@pytest.mark.parametrize("size", [1, 7, 100, 101])
def test_parts_are_cut_to_size_and_joined_again(tmp_path: Path, wheels: ModuleType, size: int) -> None:
    data = bytes(range(100))
    parts = wheels.cut([data[:13], data[13:50], data[50:]], size, tmp_path)
    assert [part["bytes"] for part in parts] == [size] * (100 // size) + [100 % size] * bool(100 % size)
    assert b"".join((tmp_path / part["name"]).read_bytes() for part in parts) == data


def test_a_tree_that_fills_the_limit_leaves_no_room(tmp_path: Path, wheels: ModuleType) -> None:
    with pytest.raises(ValueError, match="limit"):
        wheels.cut([b"data"], 0, tmp_path)


def repository(folder: Path, tree_bytes: int) -> None:
    """A repository with a file of so many bytes, an ignored one, and wheels as they are fetched."""
    folder.mkdir()
    (folder / "qembed").mkdir()
    (folder / "file").write_bytes(b"x" * tree_bytes)
    (folder / ".gitignore").write_text("build/\nignored\n")
    (folder / "ignored").write_bytes(b"x" * 10**6)
    shutil.copyfile(BENCH.parent / "pyproject.toml", folder / "pyproject.toml")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def wheel_folder(folder: Path) -> None:
    (folder / "deps").mkdir(parents=True)
    (folder / "vllm").mkdir()
    make_wheel(folder / "deps" / "small-1-py3-none-any.whl", {"small.py": b"value = 1\n"})
    whole = folder / "vllm-1-py3-none-any.whl"
    members = {"vllm/__init__.py": b"", "vllm/_moe_C_stable_libtorch.abi3.so": bytes(range(256)) * 40}
    make_wheel(whole, members)
    data = whole.read_bytes()
    for number, begin in enumerate(range(0, len(data), 2000)):
        (folder / "vllm" / f"part-{number:02d}").write_bytes(data[begin : begin + 2000])
    (folder / "vllm" / "name").write_text(f"{whole.name}\n")


def make_wheel(path: Path, members: Mapping[str, bytes]) -> None:
    name = path.name.split("-")[0]
    info = f"{name}-1.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        for file, data in files.items():
            wheel.writestr(file, data)


def test_every_trip_is_within_the_limit_and_the_other_side_gets_the_wheels(tmp_path: Path, wheels: ModuleType) -> None:
    here, there, tree_bytes = tmp_path / "here", tmp_path / "there", 20_000
    repository(here, tree_bytes)
    wheel_folder(tmp_path / "wheels")
    parts = wheels.pack(tmp_path / "wheels", everything=True, limit=wheels.MARGIN + 30_000, root=here)
    sizes = [size for _, size in wheels.trips(here)]
    assert len(parts) > 1
    assert all(tree_bytes < size <= wheels.MARGIN + 30_000 for size in sizes)  # what git ignores does not travel
    wheels.rehearse(there, sys.executable, root=here)
    assert (there / "build" / "gpu" / "site" / "small.py").read_text() == "value = 1\n"
    assert not (there / "ignored").exists()
    points = importlib.metadata.distributions(path=[str(there / "build" / "gpu" / "site")])
    names = {point.value for distribution in points for point in distribution.entry_points if "vllm" in point.group}
    assert names == {"qembed.serve.vllm_plugin:register"}


def test_a_trip_over_the_limit_is_refused(tmp_path: Path, wheels: ModuleType) -> None:
    here = tmp_path / "here"
    repository(here, 20_000)
    wheel_folder(tmp_path / "wheels")
    wheels.pack(tmp_path / "wheels", everything=True, root=here)
    with pytest.raises(ValueError, match="trip 1"):
        wheels.rehearse(tmp_path / "there", sys.executable, root=here, limit=20_000)


def test_a_damaged_part_is_noticed_and_missing_ones_are_named(tmp_path: Path, wheels: ModuleType) -> None:
    here = tmp_path / "here"
    repository(here, 20_000)
    wheel_folder(tmp_path / "wheels")
    wheels.pack(tmp_path / "wheels", everything=True, limit=wheels.MARGIN + 30_000, root=here)
    second = here / wheels.OUTGOING / "part-01"
    data = second.read_bytes()
    second.unlink()
    assert wheels.receive(here) == ["part-01"]
    second.write_bytes(b"y" + data[1:])
    with pytest.raises(ValueError, match="part-01 is damaged"):
        wheels.receive(here)
    second.write_bytes(data)
    assert wheels.receive(here) == []


def test_members_left_out_of_a_wheel_leave_its_record_too(tmp_path: Path, wheels: ModuleType) -> None:
    wheel_folder(tmp_path / "wheels")
    output = tmp_path / "slim.whl"
    assert wheels.slim(tmp_path / "wheels" / "vllm-1-py3-none-any.whl", output) == ["vllm/_moe_C_stable_libtorch.abi3.so"]
    with zipfile.ZipFile(output) as wheel:
        assert "vllm/__init__.py" in wheel.namelist()
        assert not any("_moe_C" in line for line in [*wheel.namelist(), wheel.read("vllm-1.dist-info/RECORD").decode()])
