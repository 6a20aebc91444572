"""`qembed eval --task …` from the command line, on the built-in sets and on small files, with fake servers."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qembed.cli import group
from tests.eval.conftest import FakeServer
from tests.eval.readers.test_beir import beir_folder
from tests.eval.readers.test_squad import xquad

pytestmark = pytest.mark.slow

Start = Callable[[], FakeServer]


@pytest.fixture
def few_texts(tmp_path: Path) -> Path:
    """A few texts for fidelity, which is always measured."""
    path = tmp_path / "few.txt"
    path.write_text("one\ntwo\nthree\n")
    return path


def run(candidate: FakeServer, baseline: FakeServer, *more: object) -> Result:
    return CliRunner().invoke(group, ["eval", *map(str, ("--url", candidate.url, "--baseline-url", baseline.url, *more))])


def tasks(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return {task["task"]: task for task in json.loads(result.stdout)["tasks"]}


def metric(task: dict[str, Any], name: str, group: str | None = None) -> dict[str, Any]:
    (match,) = [metric for metric in task["metrics"] if metric["name"] == name and metric["group"] == group]
    return dict(match)


def test_all_tasks_run_on_the_built_in_sets(start_server: Start, few_texts: Path) -> None:
    candidate, baseline = start_server(), start_server()
    candidate.noise = 0.3
    result = run(candidate, baseline, "--task", "all", "--data", few_texts, "--json")
    by_task = tasks(result)
    assert list(by_task) == ["retrieval", "classification", "sts"]
    for task in by_task.values():
        assert task["data"]["name"] == "built-in"
        (main,) = [item for item in task["metrics"] if item["main"]]
        assert main["difference"] == pytest.approx(main["candidate"] - main["baseline"])
        assert main["interval"][0] <= main["difference"] <= main["interval"][1]
    assert metric(by_task["retrieval"], "nDCG@10", "de → zh")["count"] == 16
    assert any(text.startswith("Instruct: ") and text.endswith("my kettle") for text in candidate.inputs)
    table = run(candidate, baseline, "--task", "all", "--data", few_texts)
    for words in ("retrieval: built-in (64 queries, 214 passages)", "FP16", "INT4", "95% interval", "macro-F1", "Spearman"):
        assert words in table.stdout
    tables = table.stdout[table.stdout.index("Cosine by dimension") :]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80


def test_equal_vectors_have_no_difference(start_server: Start, few_texts: Path) -> None:
    by_task = tasks(
        run(start_server(), start_server(), "--task", "all", "--data", few_texts, "--json", "--max-task-drop", "0%")
    )
    assert {item["difference"] for task in by_task.values() for item in task["metrics"]} == {0}


def test_a_drop_beyond_the_threshold_is_exit_code_1_and_too_few_texts_are_5(
    start_server: Start, few_texts: Path, tmp_path: Path
) -> None:
    names = [f"w{row}" for row in range(40)]
    lines = [f"{name},x{name},{row}" for row, name in enumerate(names)]
    (tmp_path / "p.csv").write_text("\n".join(["sentence1,sentence2,score", *lines, ""]))
    candidate, baseline = start_server(), start_server()

    def vectors(order: list[int]) -> dict[str, list[float]]:
        """Vectors whose cosines rise with `order`."""
        cosines = [(place + 1) / 50 for place in order]
        pairs = zip(names, cosines, strict=True)
        return {
            text: vector
            for name, cosine in pairs
            for text, vector in ((name, [1.0, 0.0]), (f"x{name}", [cosine, (1 - cosine**2) ** 0.5]))
        } | {text: [1.0, 0.0] for text in ("one", "two", "three")}

    baseline.vectors_by_text = vectors(list(range(40)))
    candidate.vectors_by_text = vectors([*range(30), *range(39, 29, -1)])
    candidate.dimension = baseline.dimension = 2
    options = ("--sts", tmp_path / "p.csv", "--data", few_texts)

    def gate(drop: str, code: int) -> tuple[dict[str, Any], list[str]]:
        result = run(candidate, baseline, *options, "--json", "--max-task-drop", drop)
        assert result.exit_code == code, result.stderr
        (task,) = json.loads(result.stdout)["gate"]
        return task, [line for line in result.stderr.splitlines() if line.startswith("qembed:")]

    task, (line,) = gate("0.1%", 1)
    assert task["verdict"] == "worse"
    assert "sts (p.csv): Spearman falls by" in line
    assert "more than --max-task-drop 0.1%" in line
    task, lines = gate("20%", 0)
    assert (task["verdict"], lines) == ("not worse", [])
    undecided, (line,) = gate(f"{task['drop']:.3f}", 5)
    assert undecided["verdict"] == "too few texts to tell"
    assert undecided["texts"] == 40
    assert undecided["texts_needed"] > 40
    assert "40 texts cannot tell" in line


def test_a_threshold_for_tasks_runs_them(start_server: Start, few_texts: Path) -> None:
    servers = start_server(), start_server()
    assert list(tasks(run(*servers, "--data", few_texts, "--json", "--max-task-drop", "1%"))) == [
        "retrieval",
        "classification",
        "sts",
    ]
    assert list(tasks(run(*servers, "--data", few_texts, "--json", "--max-task-drop", "1%", "--task", "sts"))) == ["sts"]


def test_each_missed_threshold_is_a_line(start_server: Start, few_texts: Path) -> None:
    candidate, baseline = start_server(), start_server()
    candidate.noise = 1.0
    result = run(candidate, baseline, "--data", few_texts, "--min-cosine", 0.99, "--min-p1", 0.97)
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("qembed:")]
    assert len(lines) == 2
    assert "mean cosine at dimension 64 is" in lines[0]
    assert "below --min-cosine 0.99" in lines[0]
    assert "p1 cosine at dimension 64 is" in lines[1]
    assert "below --min-p1 0.97" in lines[1]


def test_a_users_data_set_selects_the_task(start_server: Start, few_texts: Path, tmp_path: Path) -> None:
    xquad(tmp_path, "en", [("One.", ["1a?"]), ("Two.", ["2a?"])])
    xquad(tmp_path, "de", [("Eins.", ["1a??"]), ("Zwei.", ["2a??"])])
    (tmp_path / "l.csv").write_text("text,label\na,1\nb,2\nc,1\nd,2\n")
    servers = start_server(), start_server()
    by_task = tasks(
        run(*servers, "--data", few_texts, "--json", "--retrieval", tmp_path, "--classification", tmp_path / "l.csv")
    )
    assert list(by_task) == ["retrieval", "classification"]
    assert by_task["retrieval"]["data"]["passages"] == 4
    assert {item["group"] for item in by_task["retrieval"]["metrics"]} == {None, "en → en", "de → de", "en → de", "de → en"}
    folder = beir_folder(tmp_path / "beir")
    by_task = tasks(run(*servers, "--data", few_texts, "--json", "--retrieval", folder, "--instruction", "Find birds"))
    assert by_task["retrieval"]["data"]["name"] == "beir"
    assert "Instruct: Find birds\nQuery:Where do swifts sleep?" in servers[0].inputs


def test_unusable_vectors_of_a_task_fail(start_server: Start, few_texts: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,2\ne,f,3\ng,h,4\n")
    candidate, baseline = start_server(), start_server()
    candidate.vectors_by_text = {"a": [float("nan")] * 64, "b": [0.0] * 64}
    result = run(candidate, baseline, "--data", few_texts, "--sts", tmp_path / "p.csv", "--json")
    assert result.exit_code == 1, result.output
    assert "2 candidate vectors of sts (p.csv) with NaN or infinity, or of zeros alone" in result.stderr
    assert json.loads(result.stdout)["tasks"][0]["metrics"][0]["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "cooking"], "--task cooking: none of retrieval, classification, sts, speed, all, mteb:NAME"),
        (["--task", "mteb:"], "--task mteb:: none of"),
        (["--retrieval", "none"], "none: no such file or folder"),
        (["--classification", "none.csv"], "none.csv: no such file"),
        (["--max-task-drop", "much"], "--max-task-drop much: not a share"),
        (["--max-task-drop", "1"], "--max-task-drop 1: write 1%, or 100%"),
        (["--max-task-drop", "0.5"], "--max-task-drop 0.5: write 0.5%, or 50%"),
        (["--max-task-drop", "101%"], "--max-task-drop 101%: not a share"),
        (["--min-p1", "2"], "--min-p1 2.0: not within"),
        (["--task", "sts", "--vectors", "v.npy"], "--task sts: tasks embed texts of their own"),
        (["--rerank", "none"], "none: no such folder"),
        (["--rerank", "http://127.0.0.1:1"], "http://127.0.0.1:1: nothing answers there"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line_before_anything_runs(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(group, ["eval", *arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_an_unknown_kind_of_folder_is_refused_by_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["eval", "--retrieval", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{tmp_path}: neither BEIR's folder" in result.stderr


@pytest.mark.parametrize(
    ("package", "task"),
    [("faiss", "retrieval"), ("sklearn", "classification"), ("mteb", "mteb:STSBenchmark")],
)
def test_without_an_extra_only_its_task_is_refused(
    start_server: Start, few_texts: Path, monkeypatch: pytest.MonkeyPatch, package: str, task: str
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    servers = start_server(), start_server()
    with_task = run(*servers, "--task", task, "--data", few_texts)
    assert with_task.exit_code == 3
    assert f"pip install '{'mteb' if package == 'mteb' else 'faiss-cpu'}>=" in with_task.stderr.splitlines()[-1]
    assert run(*servers, "--data", few_texts).exit_code == 0
