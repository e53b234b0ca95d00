"""The plan's figures are those of the golden file: the small set; `python -m benchmarks.plan_figures` compares all."""

import importlib.util
import json

import pytest

from benchmarks.plan_figures import GOLDEN, MESHES, STUDENT, TEACHERS, differences, entries
from lm_jax.config import preset
from sharding.chips import CHIPS


def test_the_students_programs_cost_what_they_did():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    golden = json.loads(GOLDEN.read_text())
    found = dict(entries("0.6B", "v5e:4x4", lambda entry, program: program == "scoring"))
    assert list(found) == ["student v5e:4x4 scoring"]
    for name, figures in found.items():
        assert not differences(figures, golden[name]), "see benchmarks/plan_figures.py for what to do about it"


@pytest.mark.parametrize(
    ("program", "mfu"),
    # The goal is .5; the update of RL misses it by .033, as the config says.
    [("sft_rules", 0.5), ("sft_conflicts", 0.5), ("rl: update", 0.466)],
)
def test_the_teachers_steps_fit_and_use_half_of_the_chips(program, mfu):
    figures = json.loads(GOLDEN.read_text())[f"32B v5p:4x4x4 {program}"]
    assert figures["fits"]
    assert figures["GiB"] < 0.9 * CHIPS["v5p"].memory / 2**30
    assert figures["MFU"] >= mfu


@pytest.mark.parametrize("teacher", ["0.6B", "8B", "32B"])
def test_every_program_of_the_recipe_fits_into_its_slice(teacher):
    of_teacher = {n: f for n, f in json.loads(GOLDEN.read_text()).items() if n.startswith(f"{teacher} v5p:4x4x4")}
    assert len(of_teacher) == 6
    for name, figures in of_teacher.items():
        assert figures["fits"] and figures["GiB"] < 0.9 * CHIPS["v5p"].memory / 2**30, name


def test_the_golden_file_has_every_program():
    names = json.loads(GOLDEN.read_text())
    of_first = {name.removeprefix("0.6B v5p:4x4x4 ") for name in names if name.startswith("0.6B v5p:4x4x4 ")}
    assert len(of_first) == 6
    expected = {f"{teacher} {place} {program}" for teacher in TEACHERS for place in MESHES for program in of_first}
    assert {*names} == expected | {f"student {place} {program}" for place in MESHES for program in STUDENT}


def test_the_golden_file_is_of_plausible_figures():
    """Independent of the compiler: what a chip holds of a model follows from its size and the mesh."""
    for name, figures in json.loads(GOLDEN.read_text()).items():
        if figures["fits"]:
            assert 0 < figures["MFU"] < 1, name
            assert figures["s"] >= figures["s computing"] > 0, name
        if name == "student v5e:4x4 distill":  # float32 weights over 16 chips, kept to three digits
            weights = preset("qwen3-0.6b").parameter_count * 4 / 16 / 2**30
            assert figures["GiB of weights"] == pytest.approx(weights, rel=0.01)
            assert figures["GiB of optimizer"] == pytest.approx(2 * figures["GiB of weights"], rel=0.01)
