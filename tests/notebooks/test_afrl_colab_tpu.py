"""The Colab notebook from its first cell to its last, on the CPU with the smoke config."""

import pathlib
import re
import subprocess
import sys
import zipfile

import nbclient
import nbformat
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def cell_with(notebook, text: str):
    """The one code cell whose source has `text`."""
    [found] = [cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source]
    return found


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, and the run's folder; the parameters are its first code cell."""
    workdir = tmp_path_factory.mktemp("colab") / "run"
    notebook = nbformat.read(REPOSITORY / "notebooks/afrl_colab_tpu.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is kept without what a run left in it
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f'\nCONFIG, WORKDIR = "configs/afrl_smoke.py", "{workdir}"'
    client = nbclient.NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": REPOSITORY / "notebooks"}}
    )
    client.execute()
    return notebook, workdir


def test_the_install_cell_may_run_again(tmp_path):
    origin = tmp_path / "origin"
    (origin / "afrl_jax").mkdir(parents=True)
    (origin / "afrl_jax/__init__.py").touch()
    (origin / "requirements.txt").touch()
    git = ["git", "-C", origin, "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "c"]):
        subprocess.run([*git, *command], check=True)
    notebook = nbformat.read(REPOSITORY / "notebooks/afrl_colab_tpu.ipynb", as_version=4)
    cell = cell_with(notebook, "nvidia-smi").source
    program = f"REPOSITORY = {str(origin)!r}\n{cell}\n{cell}"
    (tmp_path / "colab").mkdir()
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "colab", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"CPU; {tmp_path / 'colab/afrl'}\n" * 2
    assert not (tmp_path / "colab/afrl/afrl").exists()


def test_outside_a_checkout_it_says_what_is_missing(tmp_path):
    cell = cell_with(nbformat.read(REPOSITORY / "notebooks/afrl_colab_tpu.ipynb", as_version=4), "nvidia-smi").source
    (tmp_path / "content").mkdir()
    command = [sys.executable, "-c", f'REPOSITORY = ""\n{cell}']
    ran = subprocess.run(command, cwd=tmp_path / "content", capture_output=True, text=True)
    assert ran.returncode == 1
    assert "put the git address of the project into REPOSITORY above" in ran.stderr


def test_it_finds_the_device_and_trains(executed):
    notebook, workdir = executed
    assert printed(cell_with(notebook, "nvidia-smi")) == f"CPU; {REPOSITORY}\n"
    assert f"report: {workdir / 'report/report.html'}" in printed(cell_with(notebook, "afrl_jax.main"))


def test_it_shows_figures_and_every_plot(executed):
    notebook, workdir = executed
    outputs = cell_with(notebook, "metrics.json").outputs
    [table] = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert re.findall(r"^\| (\w+) \| 0\.\d{3} ", table, re.MULTILINE) == ["sft", "rl", "student"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == len(list((workdir / "report").glob("*.png"))) > 5


def test_it_scores_a_pair_and_explains_it(executed):
    notebook, _ = executed
    scored = printed(cell_with(notebook, "model.rank")).splitlines()
    assert scored[0] == "on cpu"
    scores = [float(line.split()[0]) for line in scored[1:]]
    assert len(scores) == 2 and 1 >= scores[0] >= scores[1] >= 0
    assert printed(cell_with(notebook, "model.explain")).strip()


def test_it_packs_the_model(executed):
    notebook, workdir = executed
    assert str(workdir / "model.zip") in printed(cell_with(notebook, "make_archive"))
    packed = set(zipfile.ZipFile(workdir / "model.zip").namelist())
    assert {"model.safetensors", "relevance.json", "config.json", "sequence_classifier/model.safetensors"} <= packed
