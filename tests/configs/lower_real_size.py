"""Traces and lowers every stage of the Qwen3-32B recipe on 64 fake devices, without weights: python FILE FOLDER.

FOLDER is the run's; the data lie in FOLDER/data. Prints a JSON object: stage -> what was lowered.
"""

import json
import pathlib
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 64)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from afrl_jax import batch_plan, inputs, recipe  # noqa: E402
from afrl_jax.label_step import trace_step  # noqa: E402
from afrl_jax.rollouts import RolloutSource  # noqa: E402
from afrl_jax.settings import RLStage, read_settings  # noqa: E402
from afrl_jax.stage_steps import stage_step  # noqa: E402
from lm_jax import rows, train_state  # noqa: E402
from lm_jax.config import preset  # noqa: E402
from lm_jax.config_file import read_config  # noqa: E402
from lm_jax.parameters import abstract  # noqa: E402
from lm_jax.sample import sample  # noqa: E402
from lm_jax.tokenizer import Tokenizer, train_tokenizer  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)


def lower(made: recipe.Recipe, name: str, stage) -> dict:
    """Lower a stage's train step, and what it samples or scores with; says how large things are."""
    config = made.inputs.shapes[stage.model]
    parameters = abstract(config, made.mesh)
    if isinstance(stage, RLStage):
        source = RolloutSource(
            made.format, config, stage.rollouts, made.judgments[stage.prompts_from],
            made.judgments[stage.experts_from], seed=0, dtype=made.settings.dtype, mesh=made.mesh,
        )  # fmt: skip
        batch = rows.abstract_batch(source.shape, stage.rollouts.prompts + stage.rollouts.expert_rows)
        prompts = stage.rollouts.prompts
        sampler = sample.lower(
            parameters, int32(prompts, source._prompt_tokens), int32(prompts),
            jax.ShapeDtypeStruct((prompts,), np.uint32), jax.random.key(0), config=config, group=stage.rollouts.group,
            max_new_tokens=source.answer_tokens, eos=made.format.tokenizer.eos, dtype=made.settings.dtype,
        )  # fmt: skip
        answers = sampler.out_info.tokens.shape
        objective, _, coefficients = made._objective(name, stage, config, parameters)
    else:
        for data in stage.mixture:
            file = made._teacher_file(data)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.zeros((len(made.judgments[data]), len(made.format.labels)), np.float32))
        objective, batch_at, coefficients = made._objective(name, stage, config, parameters)
        real, _ = batch_at(None, 0)
        batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in real.items()}
        answers = None
    transformation, step = stage_step(stage, config, objective, made.format.label_ids, made.settings)
    state = train_state.abstract_state(parameters, transformation)
    weights = {key: jax.ShapeDtypeStruct((), jnp.float32) for key in coefficients(0)}
    lowered = step.update.lower(state, batch, weights)
    after, metrics = lowered.out_info
    assert {key: x.shape for key, x in after.parameters.items()} == {key: x.shape for key, x in parameters.items()}
    grades, dtype = len(made.format.labels), made.settings.dtype
    batch_of_16, *_ = batch_plan.plan([512] * 64, [0] * 64, [0] * 64, budget=2048, rows=16)
    scores = trace_step(parameters, config, batch_of_16, grades=grades, prefix_size=512, dtype=dtype).lower()
    held = [x for x in jax.tree.leaves(state) if x.sharding is not None]
    shard_bytes = sum(4 * np.prod(x.sharding.shard_shape(x.shape)) for x in held)
    return {
        "parameters": config.parameter_count,
        "share_of_a_device": float(shard_bytes / (3 * 4 * config.parameter_count)),
        "rows": batch["tokens"].shape,
        "metrics": sorted(metrics),
        "answers": answers,
        "scores": scores.out_info.shape,
        "dtype": str(after.parameters["embed"].dtype),
    }


def main(folder: pathlib.Path):
    inputs.read_source_config = lambda source: preset(source.removeprefix("Qwen/").lower())
    tokenizer = train_tokenizer([(folder / "data/train/judgments.jsonl").read_text()], 300)
    Tokenizer.load = lambda source: tokenizer
    overrides = [f"--config.data_root={folder / 'data'}"]
    config = read_config(REPOSITORY / "configs/afrl_qwen3_32b_to_0_6b.py", overrides)
    made = recipe.Recipe(read_settings(config), config, folder / "run")
    with jax.set_mesh(made.mesh):
        found = {name: lower(made, name, stage) for name, stage in made.stages.items()}
    found["mesh"] = dict(made.mesh.shape)
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    found["gigabytes"] = int(peak) / 2**20
    print(json.dumps(found))


main(pathlib.Path(sys.argv[1]))
