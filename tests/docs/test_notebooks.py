"""The notebooks run from the first cell to the last, on a tiny backbone, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIME_BACKBONE", str(backbone("qwen2_vl")))
    monkeypatch.setenv("UNIME_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) > 3
    assert all(cell.execution_count for cell in code)
    assert [cell for cell in code if cell.outputs]


def test_they_are_kept_without_outputs():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        assert not [cell for cell in book.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
