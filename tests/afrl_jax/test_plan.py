"""The plan of a config: which programs there are and what they hold; nothing is compiled here."""

import importlib.util
import pathlib

import jax
import pytest

from afrl_jax.main import main
from afrl_jax.plan import programs
from afrl_jax.settings import read_settings
from lm_jax.config_file import read_config
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import chip_bytes

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def planned(*overrides: str):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    config = read_config(CONFIGS / "afrl_smoke.py", list(overrides))
    return programs(read_settings(config), make_mesh("fsdp=4", topology("v5e:2x2")[1]))


def held(program) -> dict[str, float]:
    return {name: sum(chip_bytes(x) for x in jax.tree.leaves(tree)) for name, tree in program.held.items()}


def test_every_stage_has_its_programs():
    names = [program.name for program in planned()]
    stages = read_config(CONFIGS / "afrl_smoke.py", [])["stages"]
    for stage in stages:
        assert any(name.split(":")[0] == stage for name in names), stage
    (rl,) = {name.split(":")[0] for name in names if ":" in name}
    assert [n for n in names if n.startswith(f"{rl}:")] == [
        f"{rl}: rollout prefill", f"{rl}: rollout, 12 tokens", f"{rl}: update"
    ]  # fmt: skip
    assert names.index("teacher labels") < names.index("distill") < names.index("scoring")


def test_a_chip_holds_its_part_of_the_weights_and_two_moments():
    by_name = {program.name: program for program in planned("--config.rl.kl=0.0")}
    update, rollout = held(by_name["rl: update"]), held(by_name["rl: rollout prefill"])
    assert update["optimizer"] == pytest.approx(2 * update["weights"], rel=1e-3)  # and a count of steps
    assert rollout["weights"] == update["weights"] and rollout["optimizer"] == update["optimizer"]
    assert set(by_name["rl: rollout prefill"].resident) == {"optimizer"}
    assert rollout["cache"] > 0 and "cache" not in update


def test_labelling_holds_the_float32_model_and_its_prefixes_beside_what_it_computes_with():
    by_name = {program.name: program for program in planned("--config.dtype=bfloat16")}
    for name in ("teacher labels", "scoring"):
        found = held(by_name[name])
        assert found["master"] > 1.9 * found["weights"]  # norms stay in float32
        assert found["cache"] > 2**31  # what is kept, and prefixes of one batch
        assert set(by_name[name].resident) == {"master", "cache"}
    assert "master" not in held({program.name: program for program in planned("--config.dtype=float32")}["scoring"])


def test_a_stage_with_adapters_ends_with_both_models_in_memory():
    stage, *_ = [name for name in read_config(CONFIGS / "afrl_smoke.py", [])["stages"] if name == "sft"]
    by_name = {p.name: p for p in planned(f"--config.{stage}.lora_rank=2", "--config.dtype=bfloat16")}
    program = by_name[f"{stage}: merge"]
    with jax.set_mesh(make_mesh("fsdp=4", topology("v5e:2x2")[1])):
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.trace("none").out_info))
    assert whole / 4 > 1.9 * (held(program)["weights"] - held(by_name[stage])["optimizer"])
    assert program.resident == ("optimizer",)


def test_a_reference_stays_in_memory():
    by_name = {program.name: program for program in planned("--config.rl.kl=0.05")}
    for name in ("rl: update", "rl: rollout prefill"):
        found = by_name[name]
        assert held(found)["reference"] == held(found)["weights"] and "reference" in found.resident


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compile_for=v9:2x2"], "unknown chip 'v9'; known are v5e, v5p, v6e"),
        (["--compile_for=v5e:2x2", "--mesh=fsdp=3"], "mesh 'fsdp=3' does not cover 4 devices"),
        (["--compile_for=v5e:2x2", "--config.rl.steps=0"], "rl.steps"),
        (["--plan_file=plan.json", "--workdir=w"], "--mesh and --plan_file belong to --compile_for"),
        ([], "required: --workdir"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main([f"--config={CONFIGS / 'afrl_smoke.py'}", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
