"""The programs of a rewriter's recipe, for `lm_jax.plan_table`: shapes that follow from the config alone.

No sessions, weights or tokenizer are opened. Prompts are taken to be as long as the config lets them be, and the heads
of published models are known by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from afrl_jax.data import batches
from afrl_jax.plan import scoring
from afrl_jax.sft import SFT
from afrl_jax.sft import TERMS as SFT_TERMS
from core_jax import grpo, mpo
from core_jax.inputs import padded
from core_jax.phases import make_optimizer
from core_jax.settings import Settings, TrainSettings
from lm_jax import lora, run_log, train_state
from lm_jax.config import PRESETS, DecoderConfig
from lm_jax.parameters import abstract
from lm_jax.plan_programs import planned_shape, rows_on_mesh, sampling, training
from lm_jax.rows import Branch, Group, RowShape
from lm_jax.token_loss import Objective
from sharding.plan import Program

WORDS = 64  # tokens of a prompt's task, query and slot
SHORTEST = 16  # tokens of the shortest prompt, which decides how many rewrites a row must have room for
QUERY, GRADES = 512, 4  # what the deployed relevance model reads before a document, and how many grades it tells apart
DOCUMENT = 256  # tokens of a document


def programs(settings: Settings, mesh: Mesh) -> list[Program]:
    """The steps that take a run's memory and time, in the order in which it needs them.

    Raises:
        ValueError, ConnectionError: a model whose shape cannot be known.
    """
    return list(_programs(settings, mesh))


def _programs(settings: Settings, mesh: Mesh) -> Iterator[Program]:
    rewriter = settings.rewriter
    relevance = _relevance(settings)
    vocabulary = relevance.vocab_size if relevance else 0  # a rewriter from scratch has the relevance model's tokenizer
    config = planned_shape(rewriter.source, rewriter.shape, vocabulary)
    if settings.supervised.mixture:
        yield _supervised(settings, config, mesh)
    yield from (_mpo if settings.arm == "mpo" else _grpo)(settings, config, mesh)
    if relevance and not settings.proxy:
        yield scoring("scoring", relevance, mesh, query=QUERY, document=DOCUMENT, grades=GRADES, dtype=settings.dtype)


def _relevance(settings: Settings) -> DecoderConfig | None:
    """The shape of the deployed relevance model, None where it is not there yet."""
    known = Path(settings.relevance).name.lower() in PRESETS
    if not known and not Path(settings.relevance).exists():
        run_log.say(f"relevance: {settings.relevance} is not there; its scoring is left out of the plan")
        if not settings.rewriter.source:
            raise ValueError("relevance: a rewriter from scratch needs its vocabulary")
        return None
    return planned_shape(settings.relevance, {}, 0)


def _prompt(settings: Settings, row_tokens: int, answers: int) -> int:
    """Tokens of a prompt, `answers` of whose rewrites share a row with it."""
    longest = settings.rewriter.max_watched_tokens + WORDS
    room = row_tokens - answers * settings.rewriter.max_new_tokens
    if room < SHORTEST:
        raise ValueError(f"row_tokens: {row_tokens} has no room for a prompt with {answers} rewrites")
    return min(longest, room)


def _supervised(settings: Settings, config: DecoderConfig, mesh: Mesh) -> Program:
    stage, answer = settings.supervised, settings.rewriter.max_new_tokens
    inputs = np.zeros(SHORTEST + answer - 1, np.int32)
    group = Group(np.zeros(0, np.int32), [Branch(inputs, np.zeros(answer, np.int32), np.zeros(answer, np.int32))])
    shape = batches.sft_row_shape([group], stage.row_tokens, 1)
    return _update("start", stage, SFT, SFT_TERMS, shape, settings, config, mesh)


def _mpo(settings: Settings, config: DecoderConfig, mesh: Mesh) -> Iterator[Program]:
    """A phase: rewrites are drawn, the pairs' log-probs under the reference computed once, then the update."""
    stage, phases = settings.mpo, settings.phases
    prompt = _prompt(settings, stage.row_tokens, 2)
    parameters = abstract(config, mesh)
    yield from _drawing("phase", settings, config, mesh, phases.rows, phases.rewrites, prompt, {"weights": parameters})
    shape = mpo.row_shape(stage.row_tokens, SHORTEST, settings.rewriter.max_new_tokens)
    batch = rows_on_mesh(mesh, shape, stage.rows)
    yield Program(
        "phase: log-probs of the reference",
        lambda remat: mpo.pair_logprobs.trace(parameters, batch, config=config, dtype=settings.dtype),
        {"weights": parameters, "batch": batch},
        stage.rows * shape.tokens,
        "tokens",
    )
    transformation = make_optimizer(config, stage)
    state = _state(stage, settings, config, mesh)
    scalar = jax.ShapeDtypeStruct((), np.float32)
    yield training(
        "phase: update",
        lambda remat: mpo.make_step(
            config, transformation, beta=stage.beta, delta=stage.delta, micro_batches=stage.micro_batches,
            dtype=settings.dtype, remat=remat,
        ),
        mpo.MPOState(state.step, state.parameters, state.optimizer, scalar, scalar),
        shape, stage.rows, dict.fromkeys(mpo.TERMS, 1.0), mesh, {"reference": parameters},
    )  # fmt: skip


def _grpo(settings: Settings, config: DecoderConfig, mesh: Mesh) -> Iterator[Program]:
    """Rewrites are drawn at every step, with the optimizer in memory."""
    stage = settings.grpo
    prompt = _prompt(settings, stage.row_tokens, stage.group)
    state = _state(stage, settings, config, mesh)
    held = {"weights": state.parameters, "optimizer": state.optimizer}
    yield from _drawing("grpo", settings, config, mesh, stage.rows, stage.group, prompt, held)
    objective, shape = grpo.objective(settings), grpo.row_shape(settings)
    yield _update("grpo: update", stage, objective, tuple(grpo.COEFFICIENTS), shape, settings, config, mesh)


def _drawing(
    name: str, settings: Settings, config: DecoderConfig, mesh: Mesh, prompts: int, group: int, prompt: int,
    held: Mapping[str, Any],
) -> Iterator[Program]:  # fmt: skip
    return sampling(
        f"{name}: sampling", config, mesh, held, prompts=prompts, prompt_tokens=padded(prompt),
        group=group, max_new_tokens=settings.rewriter.max_new_tokens, dtype=settings.dtype,
    )  # fmt: skip


def _update(
    name: str, stage: TrainSettings, objective: Objective, terms: Sequence[str], shape: RowShape, settings: Settings,
    config: DecoderConfig, mesh: Mesh,
) -> Program:  # fmt: skip
    transformation = make_optimizer(config, stage)

    def make_step(remat: str) -> train_state.Step:
        return train_state.make_step(
            config, objective, transformation, label_ids=(0,), micro_batches=stage.micro_batches, dtype=settings.dtype,
            remat=remat,
        )  # fmt: skip

    state = _state(stage, settings, config, mesh)
    return training(name, make_step, state, shape, stage.rows, dict.fromkeys(terms, 1.0), mesh)


def _state(stage: TrainSettings, settings: Settings, config: DecoderConfig, mesh: Mesh) -> train_state.TrainState:
    weights = lora.abstract_attached(
        config, rank=stage.lora_rank, targets=stage.lora_targets, dtype=settings.dtype, mesh=mesh
    )
    return train_state.abstract_state(weights, make_optimizer(config, stage))
