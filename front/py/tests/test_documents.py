"""The examples in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
DOCUMENTS = [PACKAGE / "README.md", PACKAGE.parents[1] / "README.md"]
EXAMPLES = [
    (document, example)
    for document in DOCUMENTS
    for example in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.S | re.M)
]


def test_each_document_has_an_example() -> None:
    assert {document for document, _ in EXAMPLES} == set(DOCUMENTS)


@pytest.mark.parametrize("at", range(len(EXAMPLES)))
def test_an_example_runs(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    document, example = EXAMPLES[at]
    exec(compile(example, str(document), "exec"), {"__name__": "__main__"})
