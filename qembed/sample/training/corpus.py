"""The training texts: openly licensed, and available from any Debian archive.

Every text has an English text whose teacher vector is its target. The teacher reads only English, so the target of
a translated package description is the vector of its English original (Reimers and Gurevych 2020, "Making Monolingual Sentence
Embeddings Multilingual using Knowledge Distillation").
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qembed.text.prompts import DEFAULT_INSTRUCTION, instruct

LANGUAGES = (
    *("da", "de", "es", "fr", "it", "ja", "ko", "pl", "pt", "pt_BR", "ru"),
    *("sk", "uk", "cs", "zh_CN", "zh_TW", "nl", "fi", "sv", "hu", "tr", "vi"),
)
INSTRUCTIONS = (
    DEFAULT_INSTRUCTION,
    "Retrieve semantically similar text",
    "Given a product search, find matching product descriptions",
    "Given a question, retrieve passages that answer the question",
    "Find code that does what the query describes",
    "Classify the intent of the message",
)
SHARES = (
    {"synopsis": 1.0, "paragraph": 0.5, "description": 0.3, "translation": 0.5, "wordnet": 0.3, "code": 0.7},
    {"synopsis": 1.0, "paragraph": 0.8, "description": 0.15, "translation": 0.6, "wordnet": 0.0, "code": 0.7},
)
"""Share of each kind of text that a cycle trains on. Long texts take most of the time. The first cycle has general English from
WordNet; the second has only package descriptions and code, and more of them."""


@dataclass(frozen=True)
class Pair:
    """A text for the student and the English text that its target vector is made from."""

    text: str
    english: str
    language: str
    kind: str


def is_held_out(english: str) -> bool:
    """One text in a hundred, chosen by its hash, so that a translation is held out along with its original."""
    return _lot(english) < 0.01


def _lot(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def fetch(folder: Path) -> None:
    """Download package descriptions, their translations and WordNet into `folder` with apt (needs no root)."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "no-parts").mkdir(exist_ok=True)
    languages = "; ".join(f'"{code}"' for code in ("en", *LANGUAGES))
    (folder / "apt.conf").write_text(
        f'Dir::State::Lists "{folder}/lists";\nDir::Etc::parts "{folder}/no-parts";\nAcquire::Languages {{ {languages}; }};\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}
    subprocess.run(["apt-get", "update"], check=True, env=environment, cwd=folder)
    subprocess.run(["apt-get", "download", "wordnet-base"], check=True, env=environment, cwd=folder)
    package = next(folder.glob("wordnet-base_*.deb"))
    subprocess.run(["dpkg", "-x", package.name, "wordnet"], check=True, cwd=folder)


def load(folder: Path, seed: int, cycle: int) -> list[Pair]:
    """The pairs of a training cycle (0 or 1), shuffled by `seed`, without duplicate texts.

    A sixth of the short texts get a query prompt; their target stays the vector of the text without it.
    """
    chance = random.Random(seed)
    pairs = [*_debian(folder / "lists", chance), *_wordnet(folder / "wordnet", chance), *_code(chance)]
    chance.shuffle(pairs)
    seen: set[str] = set()
    selected = []
    for pair in pairs:
        if pair.text in seen or len(pair.text) < 3 or _lot("share of " + pair.text) >= SHARES[cycle][pair.kind]:
            continue
        seen.add(pair.text)
        if len(pair.text) < 200 and chance.random() < 1 / 6:
            instruction = INSTRUCTIONS[0] if chance.random() < 0.5 else chance.choice(INSTRUCTIONS)
            pair = replace(pair, text=instruct(instruction) + pair.text)
        selected.append(pair)
    return selected


def _descriptions(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(hash of the English original, synopsis, paragraphs) for each package in an apt translation list."""
    for block in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        match = re.search(r"^Description-md5: (\w+)\nDescription-[\w]+: (.*)\n((?: .*\n?)*)", block, re.MULTILINE)
        if match:
            body = re.sub(r"\n (?=\S)", " ", match[3].strip().removeprefix(" "))
            paragraphs = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n ?\.(?:\n|$| )| \. ", body)]
            yield match[1], match[2].strip(), [part for part in paragraphs if len(part) > 40]


def _cut(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


def _debian(lists: Path, chance: random.Random) -> Iterator[Pair]:
    english: dict[str, tuple[str, list[str]]] = {}
    for path in sorted(lists.glob("*_main_i18n_Translation-en")):
        for key, synopsis, paragraphs in _descriptions(path):
            english[key] = (synopsis, paragraphs)
    keys = sorted(english)
    for key in keys:
        synopsis, paragraphs = english[key]
        yield Pair(synopsis, synopsis, "en", "synopsis")
        if paragraphs and chance.random() < 0.6:
            text = _cut(chance.choice(paragraphs), 100)
            yield Pair(text, text, "en", "paragraph")
        if len(paragraphs) > 1 and chance.random() < 0.12:
            text = _cut(synopsis + "\n\n" + "\n\n".join(paragraphs), 320)
            yield Pair(text, text, "en", "description")
    for language in LANGUAGES:
        for path in sorted(lists.glob(f"*_main_i18n_Translation-{language.replace('_', '%5f')}")):
            translated = [item for item in _descriptions(path) if item[0] in english]
            chance.shuffle(translated)
            for key, synopsis, paragraphs in translated[:7000]:
                original, original_paragraphs = english[key]
                if not is_held_out(original) and chance.random() < 0.35 and paragraphs and original_paragraphs:
                    first = f"{original}. {original_paragraphs[0]}"
                    if len(first) < 600:
                        yield Pair(f"{synopsis}. {paragraphs[0]}", first, language, "translation")
                        continue
                yield Pair(synopsis, original, language, "translation")


def _wordnet(folder: Path, chance: random.Random) -> Iterator[Pair]:
    """Glosses, example sentences and headwords: general English, which package descriptions lack."""
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / "usr" / "share" / "wordnet" / f"data.{part}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith(" ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            words = fields.split(" ")
            headword = words[4].replace("_", " ").split("(")[0]
            definition = re.split(r';\s*"', gloss)[0].strip()
            if chance.random() < 0.75:
                text = chance.choice([definition, f"{headword}: {definition}", f"{definition}: {headword}"])
                yield Pair(text, text, "en", "wordnet")
            if chance.random() < 0.12:
                yield Pair(headword, headword, "en", "wordnet")
            for example in re.findall(r'"([^"]{12,})"', gloss):
                yield Pair(example, example, "en", "wordnet")


def _code(chance: random.Random) -> Iterator[Pair]:
    """Functions of Python's standard library (PSF licence)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-k]*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and 3 < (node.end_lineno or 0) - node.lineno < 40:
                text = ast.get_source_segment(source, node)
                if text and chance.random() < 0.5:
                    yield Pair(text[:1500], text[:1500], "python", "code")
