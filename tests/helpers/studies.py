"""Studies in tests: run in one process, with a list of what their runs evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiment.__main__ import main
from experiment.data.loading import Data


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    """Of NumPy's engine: the networks are too small to start others for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpy_ref.engine.thread_count", lambda: 1)
        yield


def run_study(file: Path, out: Path) -> list[str]:
    """Run the study of a file; return the splits that its runs evaluated, in order."""
    evaluated: list[Any] = []
    batches = Data.eval_batches

    def counted(self: Data, split: Any, batch_size: int) -> Any:
        evaluated.append(split)
        return batches(self, split, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Data, "eval_batches", counted)
        assert main(["study", str(file), "--run-dir", str(out)]) == 0
    return evaluated
