"""A wheel, installed away from the checkout, quantizes the bundled sample."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICK = ("--scales", "none", "--rounding", "rtn", "--calibration-texts", "64", "--max-tokens", "64")


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel of this checkout in `folder`; returns its path."""
    # A copy, because setuptools adds the files that an earlier build left in build/lib.
    tree = folder / "tree"
    parts = [path.name for path in (ROOT / "qembed").iterdir() if path.is_symlink()]
    for name in ("qembed", *parts):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, tree]
    subprocess.run(build, check=True, capture_output=True, timeout=600, env={**os.environ, **environment})
    (wheel,) = folder.glob("qembed_int4-*.whl")
    return wheel


def kernels(wheel: Path) -> list[str]:
    """The compiled kernels in a wheel."""
    return [name for name in zipfile.ZipFile(wheel).namelist() if "/_int4_kernel." in name]


def test_without_a_compiler_the_wheel_has_no_kernel(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CC="/no/compiler", CXX="/no/compiler")
    assert kernels(wheel) == []


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    if shutil.which("g++"):
        assert len(kernels(wheel)) == 1
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=600)
    # PYTHONPATH comes before the editable install that the tests run from.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    code = (
        "import qembed, qembed.quantize, qembed.serve.vllm_plugin, qembed.eval as e; from importlib.util import find_spec; "
        "print(qembed.__file__, e.__file__, getattr(find_spec('qembed.serve.vllm_plugin._int4_kernel'), 'origin', e.__file__))"
    )
    paths = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.split()
    assert all(path.startswith(str(tmp_path / "site")) for path in paths)
    assert not (tmp_path / "site" / "quantize").exists()
    assert not (tmp_path / "site" / "eval").exists()
    for name in ("report/page.html.j2", "data/sts.csv", "data/retrieval/qrels/test.tsv"):
        assert (tmp_path / "site" / "qembed" / "eval" / name).exists()
    for name in ("search/page.html.j2", "report/style.css.j2", "report/table.html.j2"):
        assert (tmp_path / "site" / "qembed" / name).exists()
    code = "from qembed.installation import how_to_install, version; print(version(), how_to_install('docs'))"
    hint = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert re.match(r"\d+\.\d+\.\d+ pip install .*'pypdf>=", hint.stdout)
    run = "import sys; from qembed.cli import main; sys.argv[0] = 'qembed'; main()"
    result = subprocess.run(
        [sys.executable, "-c", run, "quantize", "--model", "sample", "--json", *QUICK],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert json.loads(result.stdout)["fidelity"]["mean_cosine"] > 0.9
    assert (tmp_path / "sample-AWQ-INT4" / "model.safetensors").exists()
