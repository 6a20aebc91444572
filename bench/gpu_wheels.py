"""vLLM for a GPU machine that nothing reaches: packed into parts that travel with the working tree, a part a trip.

On a machine with a network, from the wheels of vLLM and of what the GPU machine lacks (`deps/*.whl`, `vllm/part-*` and
`vllm/name`):

    python bench/gpu_wheels.py pack WHEELS     parts in build/gpu/outgoing, each small enough to travel with the tree
    python bench/gpu_wheels.py sizes           the bytes of each trip
    python bench/gpu_wheels.py rehearse DIR    make every trip to the folder DIR instead, and install there

On the GPU machine, after each trip, and then once:

    python bench/gpu_wheels.py receive         takes the parts that came; installs when all are there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTGOING, RECEIVED, WHEELS, SITE = (Path("build", "gpu", name) for name in ("outgoing", "received", "wheels", "site"))
LIMIT = 64 * 2**20
"""Bytes that may travel at once: the working tree and what is sent along."""
MARGIN = 2**20
MANIFEST = "parts.json"
LEFT_OUT = (
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/_qutlass_C.abi3.so",
    "vllm/_flashmla_C.abi3.so",
    "vllm/_flashmla_extension_C.abi3.so",
)
"""Members of vLLM's wheel for other cards and models: more than half of it. A Hopper card uses FlashAttention 3, not 2."""


def tree(root: Path = ROOT) -> dict[str, int]:
    """Bytes of each file that travels with the working tree: what git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, check=True
    ).stdout
    files = [
        name for name in listed.decode().split("\0") if name and (root / name).is_file() and not (root / name).is_symlink()
    ]
    return {name: (root / name).stat().st_size for name in files}


def cut(data: BytesIO | Iterable[bytes], size: int, folder: Path) -> list[dict[str, object]]:
    """Write `data` as part-00, part-01, … of at most `size` bytes into `folder`; their names, sizes and SHA-256.

    Raises:
        ValueError: `size` is not positive: the tree alone reaches the limit.
    """
    if size < 1:
        raise ValueError("the working tree alone is over the limit: nothing can travel with it")
    parts: list[dict[str, object]] = []
    rest = b""
    for chunk in [*data, None]:
        rest += chunk or b""
        while len(rest) >= size or (chunk is None and rest):
            piece, rest = rest[:size], rest[size:]
            name = f"part-{len(parts):02d}"
            (folder / name).write_bytes(piece)
            parts.append({"name": name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})
    return parts


def slim(wheel: Path, output: Path, left_out: Sequence[str] = LEFT_OUT) -> list[str]:
    """Copy `wheel` to `output` without the members `left_out`, nor the lines of RECORD about them; what was left out."""
    removed = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            if member.filename in left_out:
                removed.append(member.filename)
                continue
            data = source.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines()
                data = "\n".join(line for line in lines if line.split(",")[0] not in left_out).encode() + b"\n"
            target.writestr(member, data, zipfile.ZIP_DEFLATED)
    return removed


def pack(wheels: Path, everything: bool, limit: int = LIMIT, root: Path = ROOT) -> list[dict[str, object]]:
    """Pack the wheels of the folder `wheels` into parts in OUTGOING; returns its manifest."""
    outgoing = root / OUTGOING
    shutil.rmtree(outgoing, ignore_errors=True)
    outgoing.mkdir(parents=True)
    whole = outgoing / (wheels / "vllm" / "name").read_text().strip()
    with whole.open("wb") as file:
        for part in sorted((wheels / "vllm").glob("part-*")):
            file.write(part.read_bytes())
    packed = [*sorted((wheels / "deps").glob("*.whl")), whole]
    if not everything:
        (outgoing / "slim").mkdir()
        packed[-1] = outgoing / "slim" / whole.name
        print(f"left out of {whole.name}: {', '.join(slim(whole, packed[-1]))}")
    archive = outgoing / "wheels.tar"
    with tarfile.open(archive, "w") as tar:
        for wheel in packed:
            tar.add(wheel, wheel.name)
    with archive.open("rb") as data:
        parts = cut(iter(lambda: data.read(2**20), b""), limit - MARGIN - sum(tree(root).values()), outgoing)
    archive.unlink()
    whole.unlink()
    shutil.rmtree(outgoing / "slim", ignore_errors=True)
    (outgoing / MANIFEST).write_text(json.dumps(parts, indent=1))
    return parts


def trips(root: Path = ROOT) -> Iterator[tuple[list[str], int]]:
    """For each trip: the paths that are sent along, and the bytes that travel, those of the tree included."""
    files = sum(tree(root).values())
    manifest = root / OUTGOING / MANIFEST
    for part in json.loads(manifest.read_text()):
        paths = [str(OUTGOING / MANIFEST), str(OUTGOING / part["name"])]
        yield paths, files + sum((root / path).stat().st_size for path in paths)


def receive(root: Path = ROOT) -> list[str]:
    """Check the parts that came, and keep them; returns the names of those still missing.

    Raises:
        ValueError: a part is damaged.
    """
    received = root / RECEIVED
    received.mkdir(parents=True, exist_ok=True)
    missing = []
    for part in json.loads((root / OUTGOING / MANIFEST).read_text()):
        incoming, target = root / OUTGOING / part["name"], received / part["name"]
        if incoming.exists():
            if hashlib.sha256(incoming.read_bytes()).hexdigest() != part["sha256"]:
                raise ValueError(f"{part['name']} is damaged: send it again")
            incoming.replace(target)
        if not target.exists():
            missing.append(str(part["name"]))
    return missing


def unpack(root: Path = ROOT) -> list[Path]:
    """The wheels in the received parts, written to WHEELS; the parts are removed."""
    folder, archive = root / WHEELS, root / RECEIVED / "wheels.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with archive.open("wb") as file:
        for part in sorted((root / RECEIVED).glob("part-*")):
            file.write(part.read_bytes())
            part.unlink()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return sorted(folder.glob("*.whl"))


def install(wheels: Sequence[Path], python: str, root: Path = ROOT) -> None:
    """Install `wheels` into SITE for `python`, and make qembed's plugin known there, without a network and without a build."""
    site = root / SITE
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, *map(str, wheels)], check=True)
    register(site, root)


def register(site: Path, root: Path = ROOT) -> None:
    """Write the metadata by which vLLM finds qembed's plugin; the package itself is the working tree, on PYTHONPATH."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    folder = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(groups))


def rehearse(target: Path, python: str, root: Path = ROOT, limit: int = LIMIT) -> None:
    """Make every trip to the folder `target`: copy what travels, then receive it there; install after the last.

    Raises:
        ValueError: a trip is over `limit`, or parts are missing after the last.
    """
    missing = [MANIFEST]
    for number, (paths, size) in enumerate(trips(root), start=1):
        if size > limit:
            raise ValueError(f"trip {number}: {size:,} bytes are more than {limit:,}")
        for name in [*tree(root), *paths]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)
        for link in (path for path in root.joinpath("qembed").iterdir() if path.is_symlink()):
            there = target / "qembed" / link.name
            if not there.is_symlink():
                there.symlink_to(link.readlink())
        missing = receive(target)
        print(f"trip {number}: {size:,} bytes, {len(missing)} parts missing", flush=True)
    if missing:
        raise ValueError(f"after the last trip {', '.join(missing)} missing")
    install(unpack(target), python, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring; 1 if a trip is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "sizes", "rehearse", "receive"))
    parser.add_argument("folder", nargs="?", type=Path, help="of the wheels, or of the rehearsal")
    parser.add_argument("--everything", action="store_true", help="keep what other cards and models need")
    parser.add_argument("--python", default=sys.executable, help="the Python to install for [default: this one]")
    options = parser.parse_args(arguments)
    if options.command in ("pack", "rehearse") and options.folder is None:
        parser.error(f"{options.command}: name a folder")
    if options.command == "pack":
        pack(options.folder, options.everything)
    if options.command in ("pack", "sizes"):
        too_large = False
        for number, (paths, size) in enumerate(trips(), start=1):
            too_large |= size > LIMIT
            print(f"trip {number}: {size:>12,} bytes of {LIMIT:,}  {' '.join(paths)}")
        return int(too_large)
    if options.command == "rehearse":
        rehearse(options.folder, options.python)
    elif missing := receive():
        print(f"still missing: {', '.join(missing)}")
    else:
        install(unpack(), options.python)
        print(f"installed in {SITE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
