"""The programs of a recipe, for `lm_jax.plan_table`: every stage's step with shapes that follow from the config alone.

No data, weights or tokenizer are opened. Prompts are taken to be as long as `Lengths` says, documents as long as the
config lets them be, and the head of a published model is known by its name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from afrl_jax.batch_plan import PREFIXES, plan
from afrl_jax.data import batches, clips
from afrl_jax.label_scorer import BATCH_TOKENS, CACHE_BYTES, padded
from afrl_jax.label_step import abstract_in_dtype, trace_step
from afrl_jax.rollouts import prompt_width, rollout_row_shape
from afrl_jax.settings import DistillStage, ModelSettings, RLStage, Settings, Stage
from afrl_jax.stage_steps import stage_objective, stage_step
from lm_jax import lora, train_state
from lm_jax.config import DecoderConfig
from lm_jax.parameters import abstract
from lm_jax.plan_programs import on_mesh, planned_shape, sampling, training
from lm_jax.rows import Branch, Group, RowShape
from sharding.distributed import batch_parts
from sharding.plan import Program


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of what a row is made of: instruction and query, a document, an answer."""

    query: int
    document: int
    answer: int

    @classmethod
    def of(cls, settings: Settings) -> Lengths:
        """At most 512 tokens of instruction and query, documents and answers as long as the config lets them be."""
        # Rows of RL are as long as their prompts and answers.
        rows = min((stage.row_tokens for stage in settings.stages if not isinstance(stage, RLStage)), default=4096)
        answer = min(settings.evaluation.max_new_tokens, rows // 4)
        query = min(512, rows // 4)
        return cls(query, min(settings.max_document_tokens, rows - query - answer), answer)

    @property
    def prompt(self) -> int:
        return self.query + self.document


def programs(settings: Settings, mesh: Mesh) -> list[Program]:
    """The steps that take a run's memory and time, in the order in which it needs them.

    Raises:
        ValueError, ConnectionError: a model whose shape cannot be known.
    """
    return list(_programs(settings, mesh))


def _programs(settings: Settings, mesh: Mesh) -> Iterator[Program]:
    shapes: dict[str, DecoderConfig] = {}
    for model in ("teacher", "student"):
        if any(stage.model == model for stage in settings.stages):
            shapes[model] = _shape(getattr(settings, model), settings, shapes)
    labelled = False
    for name, stage in zip(settings.stage_names, settings.stages, strict=True):
        if isinstance(stage, DistillStage) and not labelled:
            yield _scoring("teacher labels", settings, shapes["teacher"], mesh)
            labelled = True
        yield from STAGE_PROGRAMS.get(type(stage), _train)(name, stage, settings, shapes[stage.model], mesh)
        if stage.lora_rank:
            yield _merge(name, stage, settings, shapes[stage.model], mesh)
    yield _scoring("scoring", settings, shapes[settings.stages[-1].model], mesh)


def _shape(model: ModelSettings, settings: Settings, known: Mapping[str, DecoderConfig]) -> DecoderConfig:
    if model.cut:
        return dataclasses.replace(known["teacher"], layers=model.cut)
    return planned_shape(model.source, model.shape, settings.vocabulary)


def _grades(settings: Settings) -> int:
    return len((settings.instruction or clips.instruction()).scale)


def _train(name: str, stage: Stage, settings: Settings, config: DecoderConfig, mesh: Mesh) -> Iterator[Program]:
    """The step of a stage whose batches are rows of judged pairs."""
    lengths = Lengths.of(settings)
    answer = np.zeros(lengths.answer, np.int32)
    inputs = np.zeros(lengths.document + lengths.answer - 1, np.int32)
    group = Group(np.zeros(lengths.query, np.int32), [Branch(inputs, answer, answer, label_values={})])
    shape = batches.sft_row_shape([group], stage.row_tokens, _grades(settings))
    if isinstance(stage, DistillStage):
        teacher = ("teacher_logprob", (_grades(settings),))
        shape = dataclasses.replace(shape, label_values=(*shape.label_values, teacher))
    yield _update(name, stage, settings, config, shape, stage.rows, mesh)


def _reinforce(name: str, stage: RLStage, settings: Settings, config: DecoderConfig, mesh: Mesh) -> Iterator[Program]:
    """Rollout prefill, the whole rollout, and the update on what was rolled out."""
    lengths, rollouts = Lengths.of(settings), stage.rollouts
    state = _state(stage, settings, config, mesh)
    reference = {"reference": state.parameters} if stage.kl else {}
    yield from sampling(
        f"{name}: rollout", config, mesh, {"weights": state.parameters, "optimizer": state.optimizer, **reference},
        prompts=rollouts.prompts, prompt_tokens=prompt_width(lengths.prompt), group=rollouts.group,
        max_new_tokens=rollouts.max_new_tokens, dtype=settings.dtype,
    )  # fmt: skip
    answers = rollouts.group * rollouts.max_new_tokens
    gold = rollouts.max_new_tokens if rollouts.gated else 0
    shape = rollout_row_shape(lengths.prompt + answers + gold, answers + gold, rollouts.group, _grades(settings))
    yield _update(f"{name}: update", stage, settings, config, shape, rollouts.rows, mesh, reference)


# A kind of stage -> its programs; a kind that is not here trains on rows of judged pairs.
STAGE_PROGRAMS: dict[type[Stage], Callable[..., Iterator[Program]]] = {RLStage: _reinforce}


def _update(
    name: str, stage: Stage, settings: Settings, config: DecoderConfig, shape: RowShape, rows: int, mesh: Mesh,
    beside: Mapping[str, Any] | None = None,
) -> Program:  # fmt: skip
    objective, coefficients = stage_objective(stage)

    def make_step(remat: str) -> train_state.Step:
        changed = dataclasses.replace(settings, remat=remat)
        return stage_step(stage, config, objective, tuple(range(_grades(settings))), changed)[1]

    state = _state(stage, settings, config, mesh)
    return training(name, make_step, state, shape, rows, coefficients(0), mesh, beside)


def _merge(name: str, stage: Stage, settings: Settings, config: DecoderConfig, mesh: Mesh) -> Program:
    """The end of a stage with adapters: the float32 model beside the one that was trained. Its start holds as much."""
    state = _state(stage, settings, config, mesh)

    def trace(remat: str) -> Any:
        return jax.jit(functools.partial(lora.merge, config=config)).trace(state.parameters)

    held = {"weights": state.parameters, "optimizer": state.optimizer}
    return Program(f"{name}: merge", trace, held, 1, "models", ("optimizer",))


def _scoring(name: str, settings: Settings, config: DecoderConfig, mesh: Mesh) -> Program:
    lengths = Lengths.of(settings)
    return scoring(
        name, config, mesh, query=lengths.query, document=lengths.document, grades=_grades(settings),
        dtype=settings.dtype, master=True,
    )  # fmt: skip


def scoring(
    name: str, config: DecoderConfig, mesh: Mesh, *, query: int, document: int, grades: int, dtype: str,
    master: bool = False,
) -> Program:  # fmt: skip
    """One full batch of one query's documents, with so many tokens before the documents and in each.

    Its time is that of one query; in memory are, besides, the prefixes of as many as may come together, and a full
    cache of them. `master`: and the float32 model that a run goes on from.
    """
    rows = batch_parts(mesh)
    count = rows * max(1, BATCH_TOKENS // document)
    batch, *_ = plan([document] * count, [0] * count, [0] * count, budget=BATCH_TOKENS, rows=rows)
    parameters = abstract(config, mesh)
    trace = functools.partial(
        trace_step, parameters, config, batch, grades=grades, prefix_size=padded(query), dtype=dtype
    )
    prefix = 2 * config.layers * padded(query) * config.kv_heads * config.head_size * jnp.dtype(dtype).itemsize
    more = min(PREFIXES, batch.slots * rows) - 1
    beside = {"cache": jax.ShapeDtypeStruct((CACHE_BYTES + more * prefix,), np.uint8)}
    if master and dtype != "float32":
        beside["master"] = parameters
    held = {"weights": abstract_in_dtype(parameters, config, dtype), **beside}
    held["batch"] = [on_mesh(mesh, np.int32, rows, batch.tokens)]
    return Program(name, lambda remat: trace(), held, len(batch.items), "pairs", tuple(beside))


def _state(stage: Stage, settings: Settings, config: DecoderConfig, mesh: Mesh) -> train_state.TrainState:
    transformation, _ = stage_step(stage, config, stage_objective(stage)[0], (0,), settings)
    weights = lora.abstract_attached(
        config, rank=stage.lora_rank, targets=stage.lora_targets, dtype=settings.dtype, mesh=mesh
    )
    return train_state.abstract_state(weights, transformation)
