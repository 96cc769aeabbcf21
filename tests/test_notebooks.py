"""The notebooks run on recorded profiles, draw, and are committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from costmodel.calibration.factors import mean_error

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PAPER = FOLDER / "03_flexgen_paper.ipynb"
# A cell behind those of the notebook, whose fits take most of a minute.
TELL_ERRORS = """
import json

print(json.dumps([list(left_out), [overall_weights(run.policy).disk > 0 for run in runs]]))
"""


def test_there_are_four() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_draws(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(path, as_version=4)
    if path == PAPER:
        notebook.cells.append(nbformat.v4.new_code_cell(TELL_ERRORS))
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=place).execute()
    kinds = {
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    }
    assert "image/png" in kinds
    if path == PAPER:
        _check_errors(notebook.cells[-1].outputs[0]["text"])


def _check_errors(told: str) -> None:
    """Check the mean error of each of the paper's runs, predicted from the eleven others.

    FlexGen's own model misses by 42.6 %, and by 78 % where weights and cache are on disk, in a run
    of its released code.
    """
    errors, on_disk = json.loads(told)
    assert len(errors) == 12 and mean_error(errors) <= 0.20
    of_disk = [error for error, is_on_disk in zip(errors, on_disk, strict=True) if is_on_disk]
    assert len(of_disk) == 4 and mean_error(of_disk) <= 0.20
