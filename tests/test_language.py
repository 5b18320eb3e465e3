"""One language: words that are not the field's are in no identifier, comment, docstring, message or document.

`BANNED` is the list. The snippets in `BROKEN` show that each of its words is noticed, those in `KEPT` what
may pass. Names that are on disk, in files of earlier versions, are in `ON_DISK`, each where it is read or
written; reports and results in `GENERATED` were written by runs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".toml", ".html"}

BANNED = {
    "picture": "image, or figure for a plot",
    "room": "package",
    "house": "package",
    "judge": "reference",
    "seam": "interface",
    "way back": "pullback",
    "row of programs": "per-block compiled steps",
    "anew": "again",
    "mend": "fix",
    "kin": "variants",
    "contestant": "method",
    "misshapen": "shape mismatch",
    "surplus": "unexpected",
    "not-a-number": "NaN",
}
"""Each word, in any form (plural, -ed, -ing) and also as a part of an identifier; and what to write."""

GENERATED = ("docs/runs/", "tests/fixtures/")

ON_DISK = {
    "experiment/files/predictions.py": ("pictures=self.images", 'file["pictures"]'),  # predictions.npz
    "experiment/study/curves.py": ('study["contestants"]',),  # study.json
    "experiment/study/results.py": ('"contestants"',),
    "experiment/study/tables.py": ('study["contestants"]',),
    "experiment/study/search_figures.py": ('study["contestants"]',),
    "tests/test_report.py": ('{"pictures": ',),
    **dict.fromkeys(
        tuple(f"tests/test_{name}.py" for name in ("docs", "older_runs", "study", "study_search")),
        ('"contestants"',),
    ),
}

# At the start of a word in running text or of a part of an identifier: "room", "_room", "Room", "aRoom".
START, END = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))", r"(?:s|ed|(?<=e)d|ing)?(?![a-z])"


def forms(word: str) -> str:
    """The pattern of a word or phrase: in small letters, as a title, in capitals, and as an identifier."""
    parts = word.split()
    spaced = [r"[\s_]+".join(parts), r"[\s_]+".join(map(str.capitalize, parts))]
    small = "|".join([*spaced, word.capitalize(), word.title().replace(" ", "")])
    return f"{START}(?:(?:{small}){END}|{'_'.join(parts).upper()}S?(?![A-Za-z]))"


PATTERNS = {word: re.compile(forms(word)) for word in BANNED}


def banned_words(path: str, text: str) -> Iterator[str]:
    """Yield "file:line: word: write ..." for each banned word in a file; `path` is relative to ROOT."""
    for allowed in ON_DISK.get(path, ()):
        text = text.replace(allowed, "")
    for word, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{path}:{line}: {match[0]!r}: write {BANNED[word]}"


def project_files() -> list[str]:
    """The documents and sources of the project."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        name
        for name in names
        if Path(name).suffix in SUFFIXES
        and name != "tests/test_language.py"
        and not name.startswith(GENERATED)
        and (ROOT / name).is_file()
    ]


def test_no_banned_word_is_in_the_project() -> None:
    files = project_files()
    assert "experiment/run/trainer.py" in files
    errors = [error for name in files for error in banned_words(name, (ROOT / name).read_text("utf-8"))]
    assert not errors, "\n".join(errors)


def test_names_on_disk_are_still_there() -> None:
    for path, names in ON_DISK.items():
        for name in names:
            assert name in (ROOT / path).read_text("utf-8"), f"{path}: {name}"


BROKEN = [
    ("picture", "def fit_picture(): ..."),
    ("picture", "class Picture: ..."),
    ("picture", "# Pictures of one channel"),
    ("room", "import rules between the rooms"),
    ("room", "ROOMS = {}"),
    ("house", "house = 1"),
    ("judge", "JUDGE = 'torch'"),
    ("judge", "it is judged by PyTorch"),
    ("seam", "the seam between both"),
    ("way back", "the way\nback"),
    ("way back", "class WayBack: ..."),
    ("row of programs", "a row of programs"),
    ("anew", "begun anew"),
    ("mend", "mend the file"),
    ("mend", "a torn line is mended"),
    ("kin", "AdaBound and its kin"),
    ("contestant", "self.contestants"),
    ("misshapen", "missing, misshapen"),
    ("surplus", "{name} is surplus"),
    ("not-a-number", "not-a-number counts as larger"),
]


@pytest.mark.parametrize(("word", "text"), BROKEN)
def test_a_banned_word_is_noticed(word: str, text: str) -> None:
    (error,) = banned_words("a.py", f"\n{text}\n")
    assert error.startswith("a.py:2: ")
    assert error.endswith(BANNED[word])


def test_every_banned_word_has_an_example() -> None:
    assert {word for word, _ in BROKEN} == set(BANNED)


@pytest.mark.parametrize(
    "text",
    [
        "a kind of mushroom",
        "KINDS = 3",
        "recommend an amendment",
        "seamless",
        "a broom",
        "kinds",
        "skin",
        "nan",
        "judgement",
    ],
)
def test_a_word_that_only_contains_one_may_pass(text: str) -> None:
    assert list(banned_words("a.py", text)) == []


def test_names_on_disk_may_stay_where_they_are_read() -> None:
    assert list(banned_words("experiment/study/tables.py", 'methods = study["contestants"]')) == []
    assert list(banned_words("experiment/study/plan.py", 'methods = study["contestants"]'))
