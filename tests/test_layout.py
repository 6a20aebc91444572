"""The test of a module is found from its path: `FOLDER/NAME.py` has tests/FOLDER/test_NAME.py, or test_NAME_SUBJECT.py.

COVERED lists modules without a test file of their own by the file that tests them; SUBJECTS the test files that belong to
no module in particular.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
COMMANDS = ("quantize", "serve", "embed", "eval", "search")
WITHOUT_MIRROR = {"cases", "deploy", "e2e", "fuzz"}
"""Folders of tests that are about no folder of modules."""
COVERED = {
    "checkpoint/test_embedder.py": "dtypes matryoshka modules prompts rope transformer_settings transformers_config",
    "checkpoint/test_published.py": "description",
    "checkpoint/test_reranker.py": "score_row",
    "checkpoint/test_untrusted.py": "files numbers",
    "client/test_bounded.py": "http",
    "client/test_embeddings.py": "/text/display",
    "command/test_failures.py": "/errors options sections",
    "embed/test_cli.py": "job_options",
    "embed/test_document_process.py": "document_worker",
    "embed/test_documents_text.py": "docx_symbols docx_text front_matter html_text",
    "embed/test_formats.py": "outputs",
    "embed/test_journal.py": "/own_files spool",
    "embed/test_readers.py": "inputs rows",
    "embed/test_run.py": "/command/signals job",
    "eval/readers/test_tables.py": "files",
    "eval/report/test_html.py": "/checkpoint/model_card /report/files card files markdown parts words",
    "eval/tasks/test_mteb.py": "mteb_rows",
    "eval/test_cli.py": "choose evaluation",
    "parquet/test_file.py": "/child/process /child/worker worker",
    "quantize/test_cli.py": "device model_card run summary",
    "quantize/test_float16.py": "/checkpoint/float16 ranges",
    "quantize/test_hidden.py": "/checkpoint/head",
    "quantize/test_layerwise.py": "heap layer",
    "quantize/test_reranker.py": "calibration_pairs manifest",
    "quantize/test_refine.py": "settings",
    "quantize/test_verify.py": "verify_files",
    "quantize/test_writer.py": "parts",
    "search/test_cli.py": "answer query session",
    "search/test_index_cli.py": "build corpus nearest recall store",
    "serve/gate/test_gate.py": "asgi body engine errors openapi",
    "serve/gate/test_request.py": "json_numbers unsupported",
    "serve/gate/test_rerank.py": "rerank_answer rerank_openapi rerank_prompts rerank_request",
    "serve/test_cli.py": "engine_command json_log reporter session startup_warnings vector_facts",
    "serve/vllm_plugin/test_half_table.py": "awq compressed_tensors",
    "serve/vllm_plugin/test_int4.py": "/native int4_bytes int4_layer int4_native int4_torch",
    "serve/vllm_plugin/test_layer_cache.py": "cpu_worker gpu_worker",
    "serve/vllm_plugin/test_pieces.py": "scheduler",
    "serve/vllm_plugin/test_plugin.py": "amx lazy",
    "e2e/test_serve.py": "/serve/server_process",
    "text/rows/test_feed.py": "jsonl",
    "text/rows/test_parquet.py": "arrow",
    "text/rows/test_tables.py": "/command/row_options dialect lines options plain record",
    "text/test_texts.py": "prompts",
    "vectors/test_cache.py": "/eval/embedding sources",
    "vectors/test_vector_files.py": "dtypes matching parquet",
    "vllm/test_settings.py": "arguments gate_rules prompt_models",
    "vllm/test_supervisor.py": "float16 ports readiness shutdown",
}
SUBJECTS = {
    "vllm/test_releases.py",
    "eval/test_embedded.py",
    "quantize/test_cuda.py",
    "quantize/test_unknown_tokens.py",
    "search/test_databases.py",
    "search/test_embedded.py",
    "serve/vllm_plugin/test_cuda.py",
    "test_bench.py",
    "test_bench_wheels.py",
    "test_cases.py",
    "test_checkpoints.py",
    "test_documents.py",
    "test_github.py",
    "test_layout.py",
    "test_oracle.py",
    "test_refusals.py",
    "test_sample.py",
}


def modules() -> list[str]:
    """All modules of the product, such as "serve/gate/gate" and "client/http"."""
    tops = [*((ROOT / name, Path(name)) for name in COMMANDS), (ROOT / "qembed", Path())]
    paths = [base / path.relative_to(top) for top, base in tops for path in top.rglob("*.py") if "training" not in path.parts]
    return sorted({path.with_suffix("").as_posix() for path in paths if not path.name.startswith("__")})


def own_tests(module: str) -> list[Path]:
    """The test files with a module's name."""
    folder, name = (TESTS / module).parent, Path(module).name
    return [*folder.glob(f"test_{name}.py"), *folder.glob(f"test_{name}_*.py")]


def covered() -> dict[str, str]:
    """The test file of each module in COVERED."""
    places: dict[str, str] = {}
    for file, names in COVERED.items():
        for name in names.split():
            module = name[1:] if name.startswith("/") else (Path(file).parent / name).as_posix()
            assert module not in places, f"{module} is in COVERED twice"
            places[module] = file
    return places


def test_a_module_has_a_test_file_of_its_name_or_is_listed_with_another() -> None:
    places = covered()
    assert [module for module in modules() if not own_tests(module) and module not in places] == []
    assert [file for file in COVERED if not (TESTS / file).exists()] == []


def test_the_list_has_no_other_names() -> None:
    assert set(covered()) <= set(modules())
    assert {name for name in SUBJECTS if not (TESTS / name).exists()} == set()


def test_every_test_file_belongs_to_a_module_or_is_listed() -> None:
    files = [path for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in WITHOUT_MIRROR]
    of_modules = {path for module in modules() for path in own_tests(module)}
    others = {path.relative_to(TESTS).as_posix() for path in files if path not in of_modules}
    assert others - SUBJECTS - set(COVERED) == set()
    assert others >= SUBJECTS
