"""The plan of a rewriter's config: its programs and what they hold, and the table that the program prints."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from core_jax.plan import programs
from core_jax.settings import read_settings
from lm_jax.config import preset
from lm_jax.config_file import read_config
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import chip_bytes

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SMOKE = REPOSITORY / "configs/core_smoke.py"
NAMED = "--config.relevance=Qwen/Qwen3-0.6B"
PHASE = ["phase: sampling prefill", "phase: sampling, {} tokens", "phase: log-probs of the reference", "phase: update"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs")


def planned(config, *overrides: str):
    return programs(read_settings(read_config(config, list(overrides))), make_mesh("fsdp=4", topology("v5e:2x2")[1]))


def held(program, name: str) -> float:
    return sum(chip_bytes(x) for x in jax.tree.leaves(program.held[name]))


def test_the_real_size_by_its_name():
    by_name = {each.name: each for each in planned(REPOSITORY / "configs/core_qwen3.py", NAMED)}
    assert list(by_name) == ["start", *(name.format(48) for name in PHASE), "scoring"]
    weights = preset("qwen3-1.7b").parameter_count * 4 / 4  # float32, a quarter each; norms are whole on each chip
    for name in ("start", "phase: update", "phase: sampling prefill"):
        assert held(by_name[name], "weights") == pytest.approx(weights, rel=1e-3)
    assert held(by_name["phase: update"], "optimizer") == pytest.approx(2 * weights, rel=1e-3)
    assert by_name["phase: update"].resident == ("reference",)
    scored = preset("qwen3-0.6b").parameter_count * 2 / 4  # bfloat16: what a scorer keeps of a model it has loaded
    assert held(by_name["scoring"], "weights") == pytest.approx(scored, rel=1e-3)
    prompt = 256 + 64  # a watched document, and the words around it
    cache = 28 * 64 * (prompt + 16 * 48) * 8 * 128 * 2 * 2 / 4  # layers, contexts, tokens; keys and values, bf16
    assert held(by_name["phase: sampling prefill"], "cache") == cache


def test_online_grpo_samples_with_the_optimizer_in_memory():
    found = planned(SMOKE, NAMED, "--config.arm=grpo", "--config.grpo.rows=4")
    assert [each.name for each in found] == [
        "start", "grpo: sampling prefill", "grpo: sampling, 12 tokens", "grpo: update", "scoring"
    ]  # fmt: skip
    assert found[1].resident == ("optimizer",)


def test_a_relevance_model_that_is_not_there_is_left_out_or_missed(capsys, tmp_path):
    absent = f"--config.relevance={tmp_path / 'absent'}"
    names = [each.name for each in planned(REPOSITORY / "configs/core_qwen3.py", absent)]
    assert names[-1] == "phase: update"
    assert "its scoring is left out of the plan" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="relevance: a rewriter from scratch needs its vocabulary"):
        planned(SMOKE, absent)


def test_the_program_compiles_all_and_writes_figures(tmp_path):
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "core_jax.main", f"--config={SMOKE}", "--compile_for=v5e:2x2", NAMED]
    done = subprocess.run(
        [*command, "--config.proxy=bm25", f"--plan_file={file}"], capture_output=True, text=True, cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2, 4 chips, mesh fsdp=4, remat none" in done.stderr + done.stdout
    figures = json.loads(file.read_text())
    assert [each["name"] for each in figures] == ["start", *(name.format(12) for name in PHASE)]
    assert all(each["fits"] and 0 < each["mfu"] < 1 and each["seconds"] > 0 for each in figures)
