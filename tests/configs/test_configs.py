"""Every config reads, and the real-size recipe lowers in all its stages."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

from afrl_jax import inputs
from afrl_jax.data.readers import write_judgments
from afrl_jax.schema import Document, Explanation, Judgment, Match, Query, Scale
from afrl_jax.settings import read_settings
from lm_jax.config import preset
from lm_jax.config_file import read_config

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("afrl_*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_says_how_it_is_run_and_reads(file):
    config = read_config(file, [])
    settings = read_settings(config)
    assert settings.title
    whole = {"SFTStage", "RLStage", "DistillStage"}
    taught = {"SFTStage", "TextStage"}  # a model whose instruction is evolved afterwards
    assert {type(stage).__name__ for stage in settings.stages} >= (taught if file.stem == "afrl_rulebooks" else whole)
    assert f"python -m afrl_jax.main --config=configs/{file.name} --workdir=" in file.read_text().split('"""')[1]
    json.dumps(config)


def test_the_ten_lines_of_the_readme_make_a_config_of_the_one_that_they_are_copied_into():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Your own data, in ten lines")[2]
    lines = text.partition("```python\n")[2].partition("```")[0]
    assert len(lines.splitlines()) <= 10
    config = read_config(REPOSITORY / "configs/afrl_crowdflower_smollm2.py", []) | ast.literal_eval("{" + lines + "}")
    settings = read_settings(config)
    assert [stage.kind for stage in settings.stages] == ["sft", "rl", "distill"]
    assert settings.teacher.source == "Qwen/Qwen3-0.6B" and settings.student.cut == 14
    longest = min(stage.row_tokens for stage in settings.stages if hasattr(stage, "row_tokens"))
    assert 48 < settings.max_document_tokens <= longest // 2


def test_one_override_moves_all_data_of_a_config():
    for file in CONFIGS:
        config = read_config(file, ["--config.data_root=elsewhere"])
        paths = [source["path"] for source in config["data"].values() if "path" in source]
        assert all(path.startswith("elsewhere/") for path in paths)


def test_a_judge_that_reads_is_asked_as_it_was_trained():
    """Every rule of the instruction that is exported ends in its grade, as in the instructions that training shows."""
    settings = read_settings(read_config(REPOSITORY / "configs" / "afrl_rulebooks.py", []))
    instruction = inputs._built_in_instruction(settings)
    assert len(instruction.rules) > 20
    for rule in instruction.rules:
        assert [rule.text.rpartition(": ")[2]] == [instruction.scale.labels[grade] for grade in rule.grades]


@pytest.fixture
def data_folder(tmp_path):
    """Judgments of the recipe's scale, with documents as long as it lets them be."""
    for name in ("train", "hard", "expert", "calibration", "dev"):
        judgments = [
            Judgment(
                Query(f"q{query}", f"red shoes number {query} for {name}"),
                Document(f"d{query}-{grade}", "Shoes", "blue leather with laces " * 400),
                grade,
                Explanation(("red",), ("blue",), (Match.VIOLATED,), grade + 1),  # the recipe has a rule for each grade
                (grade + 1,),
            )
            for query in range(8)
            for grade in range(4)
        ]
        write_judgments(tmp_path / "data" / name, judgments, Scale(("0", "1", "2", "3")))
    return tmp_path


def test_every_stage_of_the_real_size_lowers_without_memory(data_folder):
    """64 devices in the mesh of the config, 32 billion parameters as shapes."""
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("lower_real_size.py"), data_folder],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("mesh") == {"data": 1, "fsdp": 16, "tensor": 4}
    assert found.pop("gigabytes") < 4
    assert list(found) == ["sft_rules", "sft_conflicts", "rl", "distill"]
    teacher, student = preset("qwen3-32b").parameter_count, preset("qwen3-0.6b").parameter_count
    assert teacher == pytest.approx(32.76e9, rel=1e-3) and student == pytest.approx(0.596e9, rel=1e-2)
    assert [stage["parameters"] for stage in found.values()] == [teacher] * 3 + [student]
    for stage in found.values():
        assert stage["share_of_a_device"] == pytest.approx(1 / 64, rel=0.01)  # norms alone are whole everywhere
        assert stage["dtype"] == "float32"  # the master weights
        assert stage["scores"] == [16, 6, 4]
        assert {"loss", "grad_norm", "sft/label", "first_token/accuracy"} <= set(stage["metrics"])
    assert found["sft_rules"]["rows"] == found["distill"]["rows"] == [128, 4096]
    assert found["rl"]["rows"][0] == 192 + 64 and found["rl"]["rows"][1] > 8 * 256 + 1024
    assert found["rl"]["answers"] == [192, 8, 256]
    assert "policy" in found["rl"]["metrics"] and "distill/divergence" in found["distill"]["metrics"]
