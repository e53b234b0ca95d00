"""Everything a run reads, opened and checked before any work: sessions, rewrites, tokenizer, shape, mesh.

data:     {"format": "clips", "split": "train", "week": 0, "sessions": 2000}     built in, see core_jax.sessions
          {"format": "log", "path": "sessions.jsonl"}                            core_jax.session_reader
rewrites: {"format": "clips", "split": "train", "week": 0, "sessions": 8000}     what was typed after giving up
          {"format": "table", "path": "rewrites.jsonl"}                          of people, of whatever domain
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from core_jax.rewrite_format import RewriteFormat
from core_jax.schema import Context, SearchSession
from core_jax.session_reader import RewriteExample, read_rewrites, read_sessions
from core_jax.sessions import SimulatedSession, simulate
from core_jax.settings import Settings, TrainSettings
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.rows import Branch, Group
from lm_jax.run_folder import digest_of
from lm_jax.shape import shape_from_fields
from lm_jax.tokenizer import Tokenizer
from lm_jax.weights import read_source_config
from sharding.mesh import make_mesh
from sharding.rules import RULES

PADDING = 32  # prompts are padded to a multiple of it, so that sampling compiles once


@dataclasses.dataclass(frozen=True)
class Sessions:
    """The sessions of a source that the reward is defined for; `truth` is empty where nobody knows what was wanted."""

    sessions: Sequence[SearchSession]
    truth: Sequence[SimulatedSession] = ()
    without_contrast: int = 0  # sessions left out: no click, no skip or nothing random

    @property
    def contexts(self) -> list[Context]:
        """The context of each session."""
        return [session.context for session in self.sessions]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the stages read. `prompt_tokens` holds the longest prompt of the sessions, `shortest_prompt` is one's.

    `digests` of the data sets, by what the config calls them; `too_long` counts the rewrites of a source that have more
    than `rewriter.max_new_tokens` and are left out.
    """

    training: Sessions
    held_out: Sessions
    supervised: Mapping[str, list[Group]]
    format: RewriteFormat
    shape: DecoderConfig
    mesh: Mesh | None
    prompt_tokens: int
    shortest_prompt: int
    digests: Mapping[str, str]
    too_long: Mapping[str, int]


def open_inputs(settings: Settings) -> Inputs:
    """Open what a config names. Writes nothing.

    Raises:
        ValueError: names the key of the config, or the file, line and field of the data, and what would be right.
        FileNotFoundError, ConnectionError: a file or a model is not there.
    """
    mesh = make_mesh(settings.mesh) if settings.mesh or jax.device_count() > 1 else None
    _check_batches(settings, mesh)
    rewriter = settings.rewriter
    tokenizer = Tokenizer.load(rewriter.source or settings.relevance)
    format = RewriteFormat(tokenizer, max_watched_tokens=rewriter.max_watched_tokens)
    try:
        if rewriter.source:
            shape = read_source_config(rewriter.source)
        else:
            shape = shape_from_fields(rewriter.shape, tokenizer.vocab_size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"rewriter: {error}") from error
    if shape.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"rewriter: vocab_size {shape.vocab_size} is below the tokenizer's, {tokenizer.vocab_size}")
    names = (settings.sessions, settings.evaluation.sessions)
    training, held_out = (_named(f"data.{name}", open_sessions, settings.data[name], settings.seed) for name in names)
    _check_apart(*names, training, held_out)
    of_sessions = zip(names, (training, held_out), strict=True)
    digests = {f"data.{name}": digest_of(each.sessions) for name, each in of_sessions}
    supervised, too_long = {}, {}
    for name in settings.supervised.mixture:
        examples = _named(f"rewrites.{name}", open_rewrites, settings.rewrites[name], settings.seed)
        digests[f"rewrites.{name}"] = digest_of(examples)
        supervised[name] = example_groups(format, examples, rewriter.max_new_tokens)
        if left_out := len(examples) - len(supervised[name]):
            too_long[name] = left_out
            run_log.say(
                f"rewrites.{name}: {left_out:,} of {len(examples):,} have more than {rewriter.max_new_tokens} tokens, "
                "rewriter.max_new_tokens, and are left out"
            )
    sessions = [*training.sessions, *held_out.sessions]
    lengths = prompt_lengths(format, sessions)
    check_rows(settings, settings.arm, format, sessions, lengths, supervised)
    if (tokens := max(lengths) + rewriter.max_new_tokens) > shape.max_positions:
        raise ValueError(
            f"rewriter: the longest prompt and a rewrite have {tokens} tokens, its model {shape.max_positions}"
        )
    return Inputs(
        training, held_out, supervised, format, shape, mesh, padded(max(lengths)), min(lengths), digests, too_long
    )


def _check_apart(trained: str, measured: str, training: Sessions, held_out: Sessions) -> None:
    """What is measured is not learned; that it did not come later is told."""
    shared = {each.session_id for each in training.sessions} & {each.session_id for each in held_out.sessions}
    if shared:
        raise ValueError(
            f"data.{measured}: {len(shared)} sessions are in data.{trained} too, such as {min(shared)!r}; figures "
            "would flatter the rewriter"
        )
    if min(each.time for each in held_out.sessions) < max(each.time for each in training.sessions):
        run_log.say(f"data.{measured}: sessions are older than the last of data.{trained}; a week after it tells more")


def padded(longest: int) -> int:
    """Tokens that prompts of up to `longest` are padded to."""
    return -(-longest // PADDING) * PADDING


def _named(key: str, open_source: Any, source: Mapping[str, Any], seed: int) -> Any:
    try:
        return open_source(source, seed)
    except (ValueError, TypeError) as error:  # TypeError: an argument too many, too few, or of another type
        raise ValueError(f"{key}: {error}") from error


def open_sessions(source: Mapping[str, Any], seed: int) -> Sessions:
    """The sessions of a source, those that the reward is not defined for left out and counted."""
    arguments = dict(source)
    kind = arguments.pop("format", None)
    truth: list[SimulatedSession] = []
    if kind == "clips":
        truth = list(_simulated(arguments, seed))
        found = [each.session for each in truth]
    elif kind == "log":
        found = read_sessions(**arguments)
    else:
        raise ValueError(f"format: {kind!r} is unknown; it is one of clips, log")
    kept = [session for session in found if session.has_contrast]
    if not kept:
        raise ValueError(f"none of {len(found)} sessions has clicked, skipped and random documents: {dict(source)}")
    return Sessions(kept, [each for each in truth if each.session.has_contrast], len(found) - len(kept))


def _simulated(arguments: dict[str, Any], seed: int) -> Iterator[SimulatedSession]:
    if "sessions" not in arguments:
        raise ValueError("sessions: how many of them is to be said")
    count = arguments.pop("sessions")
    return run_log.progress(simulate(seed, count=count, **arguments), "simulating sessions", count)


def open_rewrites(source: Mapping[str, Any], seed: int) -> list[RewriteExample]:
    """The supervised examples of a source."""
    arguments = dict(source)
    kind = arguments.pop("format", None)
    if kind == "clips":
        simulated = _simulated(arguments, seed)
        examples = [RewriteExample(each.session.context, each.next_query) for each in simulated if each.next_query]
    elif kind == "table":
        examples = read_rewrites(**arguments)
    else:
        raise ValueError(f"format: {kind!r} is unknown; it is one of clips, table")
    if not examples:
        raise ValueError(f"there is no rewrite in {dict(source)}")
    return examples


def example_groups(format: RewriteFormat, examples: Sequence[RewriteExample], max_new_tokens: int) -> list[Group]:
    """Supervised examples as groups of one branch; a rewrite longer than the rewriter may write is left out."""
    groups = []
    prompts = format.encode_prompts([example.context for example in examples])
    for prompt, example in zip(prompts, examples, strict=True):
        answer = format.encode_rewrite(example.rewrite)
        if len(answer) > max_new_tokens:
            continue
        inputs = np.concatenate([prompt, answer[:-1]])
        ones = np.ones(len(answer), np.float32)
        branch = Branch(inputs, answer, np.zeros(len(answer), np.int32), {"explanation_weight": ones})
        groups.append(Group(np.zeros(0, np.int32), [branch]))
    if not groups:
        raise ValueError(f"none of {len(examples)} rewrites has at most rewriter.max_new_tokens = {max_new_tokens}")
    return groups


def _check_batches(settings: Settings, mesh: Mesh | None) -> None:
    """The mesh must divide the rows that it is given at once."""
    parts = 1
    for axis in RULES["batch"]:
        parts *= mesh.shape[axis] if mesh else 1
    given = {"phases.rows": settings.phases.rows}
    for name in (settings.arm, *(["supervised"] if settings.supervised.mixture else [])):
        stage: TrainSettings = getattr(settings, name)
        given[f"{name}.rows / {name}.micro_batches"] = stage.rows // stage.micro_batches
    for key, rows in given.items():
        if rows % parts:
            raise ValueError(f"{key} is {rows}, which the mesh's {parts} parts of a batch must divide")


def prompt_lengths(format: RewriteFormat, sessions: Sequence[SearchSession]) -> list[int]:
    """Tokens of each session's prompt."""
    return [len(prompt) for prompt in format.encode_prompts([session.context for session in sessions])]


def check_rows(
    settings: Settings,
    arm: str,
    format: RewriteFormat,
    sessions: Sequence[SearchSession],
    lengths: Sequence[int],
    supervised: Mapping[str, list[Group]],
) -> None:
    """The longest pair, group or example of a stage must fit into its rows; `lengths` are those of the prompts.

    Raises:
        ValueError: names the key, and the session.
    """
    place = int(np.argmax(lengths))
    answers = {"mpo": 2, "grpo": settings.grpo.group}[arm] * settings.rewriter.max_new_tokens
    query = format.length(sessions[place].context.query)
    needed = {
        arm: (
            lengths[place] - 1 + answers,
            f"the prompt of session {sessions[place].session_id!r} has {lengths[place]} tokens: its query {query}, "
            f"what was watched at most {settings.rewriter.max_watched_tokens}, rewriter.max_watched_tokens",
        )
    }
    if supervised:
        longest = max(len(group.branches[0].inputs) for groups in supervised.values() for group in groups)
        said = f"the longest prompt and rewrite of supervised.mixture have {longest}"
        needed["supervised"] = longest, said
        if arm == "mpo" and settings.mpo.rehearsal and longest > needed[arm][0]:
            needed[arm] = longest, said
    for name, (tokens, said) in needed.items():
        if tokens > (found := getattr(settings, name).row_tokens):
            raise ValueError(f"{name}.row_tokens: {found} is too small, {tokens} are needed: {said}")
