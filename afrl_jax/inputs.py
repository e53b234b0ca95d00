"""Everything a run reads, opened and checked before any work: data, tokenizer, answer format, model shapes, mesh."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from afrl_jax.answer_format import AnswerFormat, plain_texts, query_texts
from afrl_jax.data import clips, clips_rulebooks, sources
from afrl_jax.data.batches import text_groups
from afrl_jax.instructions.evolution import queries_of
from afrl_jax.schema import DomainText, Instruction, Judgment
from afrl_jax.settings import (
    DistillStage,
    EvolveStage,
    ModelSettings,
    RLStage,
    Settings,
    SFTStage,
    Stage,
    TextStage,
    sources_of,
)
from lm_jax.config import DecoderConfig
from lm_jax.run_folder import digest_of
from lm_jax.shape import evenly_spaced, shape_from_fields
from lm_jax.tokenizer import Tokenizer, train_tokenizer
from lm_jax.weights import read_source_config
from sharding.distributed import batch_parts
from sharding.mesh import make_mesh

BUILT_IN = (*sources.GENERATORS, sources.TEXTS)  # data formats that bring their own instruction
TOKENIZER_TEXTS = 4000  # of each data set, that a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the stages read. `shapes` has the models that some stage trains."""

    judgments: Mapping[str, list[Judgment]]
    texts: Mapping[str, list[DomainText]]
    format: AnswerFormat
    shapes: Mapping[str, DecoderConfig]
    mesh: Mesh | None

    def digests(self) -> dict[str, str]:
        """SHA-256 of each data set as it was read, its order included."""
        return {name: digest_of(rows) for name, rows in {**self.texts, **self.judgments}.items()}


def open_inputs(settings: Settings, tokenizer_folder: Path) -> Inputs:
    """Open what a config names. Writes nothing.

    Args:
        tokenizer_folder: where a run before this one left the tokenizer it trained; without it, one is trained.

    Raises:
        ValueError: names the key of the config, or the file, line and field of the data, and what would be right.
        FileNotFoundError, ConnectionError: a file or a model is not there.
    """
    mesh = make_mesh(settings.mesh) if settings.mesh or jax.device_count() > 1 else None
    for name, stage in zip(settings.stage_names, settings.stages, strict=True):
        _check_batch(name, stage, mesh)
    instruction = settings.instruction or _built_in_instruction(settings)
    judgments, texts = _open_data(settings, instruction)
    if settings.tokenizer != "train":
        tokenizer = Tokenizer.load(settings.tokenizer or settings.teacher.source)
    elif tokenizer_folder.exists():
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        tokenizer = _train_tokenizer(settings, instruction, judgments, texts)
    if tokenizer.eos is None:
        raise ValueError("the tokenizer has no end-of-text token, which ends answers: tokenizer_config.json, eos_token")
    format = AnswerFormat(
        tokenizer, instruction, max_document_tokens=settings.max_document_tokens, show_rules=settings.show_rules
    )
    shapes: dict[str, DecoderConfig] = {}
    for model in sorted({stage.model for stage in settings.stages}, reverse=True):  # the teacher first
        shapes[model] = _shape(model, getattr(settings, model), tokenizer, shapes)
        _check_tokenizer(model, settings, format, judgments)
    _check_apart(settings, format, judgments)
    if settings.evolve and settings.evolve.calibration:
        _check_judge(settings.evolve, judgments)
    _check_rows(settings, format, shapes, judgments)
    _check_text_rows(settings, tokenizer, texts)
    return Inputs(judgments, texts, format, shapes, mesh)


def _check_batch(name: str, stage: Stage, mesh: Mesh | None) -> None:
    """The mesh must divide the rows that it is given at once."""
    parts = batch_parts(mesh)
    if isinstance(stage, RLStage):
        rollouts = stage.rollouts
        given = {
            "rollouts.prompts": rollouts.prompts,
            "(rollouts.prompts + rollouts.expert_rows) / micro_batches": rollouts.rows // stage.micro_batches,
        }
    else:
        given = {"rows / micro_batches": stage.rows // stage.micro_batches}
    for key, rows in given.items():
        if rows % parts:
            raise ValueError(f"{name}: {key} is {rows}, which the mesh's {parts} parts of a batch must divide")


def _built_in_instruction(settings: Settings) -> Instruction:
    foreign = [name for name, source in settings.data.items() if source.get("format") not in BUILT_IN]
    if foreign:
        raise ValueError(f"the config has no `instruction`, which the data {', '.join(foreign)} need")
    if any(source.get("format") == "clips_rulebooks" for source in settings.data.values()):
        return clips_rulebooks.full_rulebook()  # each rule ends in its grade, as in the queries' own instructions
    return clips.instruction()


def _open_data(
    settings: Settings, instruction: Instruction
) -> tuple[dict[str, list[Judgment]], dict[str, list[DomainText]]]:
    """Judgments and texts by name, of every data set that a stage or the evaluation names."""
    judged = {settings.evaluation.test, settings.evaluation.calibration}
    if settings.evolve:
        evolve = settings.evolve
        judged |= {evolve.dev_new, evolve.dev_replay, evolve.test, evolve.calibration} - {""}
    read = set()
    for stage in settings.stages:
        named = sources_of(stage)
        texts = {name for name in named if settings.data[name].get("format") == sources.TEXTS}
        texts |= named if isinstance(stage, TextStage) else set()
        read |= texts
        judged |= named - texts
    found: tuple[dict, dict] = ({}, {})
    for name in sorted(judged | read):
        source = settings.data[name]
        try:
            if source.get("format") in BUILT_IN and len(instruction.scale) != len(clips.instruction().scale):
                raise ValueError(f"clips are not graded on the scale of the instruction, {instruction.scale.labels}")
            if name in judged:
                rows = found[0][name] = sources.open_judgments(source, instruction, settings.seed)
            if name in read:
                rows = found[1][name] = sources.open_texts(source, settings.seed)
        except (ValueError, TypeError) as error:  # TypeError: an argument too many, too few, or of another type
            raise ValueError(f"data.{name}: {error}") from error
        if not rows:
            raise ValueError(f"data.{name} is empty: {dict(source)}")
    return found


def _train_tokenizer(
    settings: Settings,
    instruction: Instruction,
    judgments: Mapping[str, list[Judgment]],
    texts: Mapping[str, list[DomainText]],
) -> Tokenizer:
    """Of what the stages train on alone: pairs that measure or calibrate have no say in which merges are learned."""
    trained_on = sorted(set().union(*map(sources_of, settings.stages)))
    corpus = [text.text for name in trained_on for text in texts.get(name, [])[:TOKENIZER_TEXTS]]
    for judgment in itertools.chain.from_iterable(judgments.get(name, [])[:TOKENIZER_TEXTS] for name in trained_on):
        corpus += plain_texts(_graded(judgment), instruction, show_rules=settings.show_rules)
    return train_tokenizer(corpus, settings.vocabulary)


def _graded(judgment: Judgment) -> Judgment:
    """With a grade in any case: what is read here does not depend on which, every label is one token."""
    return dataclasses.replace(judgment, grade=judgment.grade or 0)


def _shape(
    model: str, settings: ModelSettings, tokenizer: Tokenizer, shapes: Mapping[str, DecoderConfig]
) -> DecoderConfig:
    try:
        if settings.cut:
            layers = evenly_spaced(shapes["teacher"].layers, settings.cut)
            shape = dataclasses.replace(shapes["teacher"], layers=len(layers))
        elif settings.source:
            shape = read_source_config(settings.source)
        else:
            shape = shape_from_fields(settings.shape, tokenizer.vocab_size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{model}: {error}") from error
    if shape.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"{model}: vocab_size {shape.vocab_size} is below the tokenizer's, {tokenizer.vocab_size}")
    return shape


def _check_tokenizer(
    model: str, settings: Settings, format: AnswerFormat, judgments: Mapping[str, list[Judgment]]
) -> None:
    """Weights know the tokens of their own tokenizer alone; one without a tokenizer is taken at its word."""
    source, used = getattr(settings, model).source, settings.tokenizer or settings.teacher.source
    if source in ("", used):
        return
    try:
        own = Tokenizer.load(source)
    except FileNotFoundError:
        return
    some = itertools.chain.from_iterable(rows[:20] for rows in judgments.values())
    for judgment in some:
        for text in plain_texts(_graded(judgment), format.instruction, show_rules=settings.show_rules):
            if own.encode(text) != format.tokenizer.encode(text):
                raise ValueError(
                    f"{model}.source: the tokenizer of {source!r} makes other tokens than that of {used!r}, which the "
                    f"run uses, for example of {text[:60]!r}; its weights would read them as other words"
                )


def _check_apart(settings: Settings, format: AnswerFormat, judgments: Mapping[str, list[Judgment]]) -> None:
    """What is measured is not learned: no pair of test or calibration is trained on, no query is in both.

    Pairs are the same whose prompts are, token for token, whatever their ids, blanks and what was cut off. Data that
    are split by pairs, not by queries, pass: then a query is trained on with other documents.
    """
    prompts = functools.cache(lambda name: _prompts(format, judgments[name]))
    trained = set().union(*map(sources_of, settings.stages)) & judgments.keys()
    named = {key: getattr(settings.evaluation, key) for key in ("test", "calibration")}
    for key, name in named.items():
        held = set(prompts(name))
        for source in sorted(trained):
            both = zip(judgments[source], prompts(source), strict=True)
            shared = [judgment for judgment, prompt in both if prompt in held]
            if shared:
                raise ValueError(
                    f"evaluation.{key}: {len(shared)} pairs of data.{source}, which is trained on, are in data.{name} "
                    f"too, such as query {shared[0].query.text!r} with document {shared[0].document.doc_id!r}; "
                    "figures would flatter the model"
                )
    test, calibration = (query_texts(judgments[name]) for name in named.values())
    if shared := test & calibration:
        raise ValueError(
            f"evaluation.calibration: {len(shared)} queries of data.{named['calibration']} are in data.{named['test']} "
            f"too, such as {min(shared)!r}; figures would flatter the model"
        )


def _check_judge(evolve: EvolveStage, judgments: Mapping[str, list[Judgment]]) -> None:
    """What calibrates the judge of an instruction has none of its own, and no query that the judge is then asked."""
    name = evolve.calibration
    if any(judgment.query.instruction for judgment in judgments[name]):
        raise ValueError(f"evolve.calibration: data.{name} has pairs that were judged under instructions of their own")
    for other in filter(None, (evolve.dev_new, evolve.dev_replay, evolve.test)):
        if shared := queries_of(judgments[name]) & queries_of(judgments[other]):
            raise ValueError(
                f"evolve.calibration: {len(shared)} queries of data.{name} are in data.{other} too, such as "
                f"{min(shared)[1]!r}"
            )


def _prompts(format: AnswerFormat, judgments: Sequence[Judgment]) -> list[bytes]:
    """A digest of each pair's prompt."""
    prompts = format.encode_prompts([(judgment.query, judgment.document) for judgment in judgments])
    return [hashlib.blake2b(prompt.tokens.tobytes(), digest_size=16).digest() for prompt in prompts]


def _check_rows(
    settings: Settings,
    format: AnswerFormat,
    shapes: Mapping[str, DecoderConfig],
    judgments: Mapping[str, list[Judgment]],
) -> None:
    """The longest pair of a stage must fit into its rows, and have no more tokens than the model was made for."""
    longest: dict[str, tuple[int, Judgment]] = {}
    for name, stage in zip(settings.stage_names, settings.stages, strict=True):
        if not isinstance(stage, SFTStage | DistillStage):
            continue
        for source in stage.mixture.keys() & judgments.keys():
            if source not in longest:
                prompts = format.encode_prompts([(judgment.query, judgment.document) for judgment in judgments[source]])
                lengths = [
                    len(prompt.tokens) + len(format.encode_answer(_graded(judgment))[0]) - 1
                    for prompt, judgment in zip(prompts, judgments[source], strict=True)
                ]
                longest[source] = max(zip(lengths, judgments[source], strict=True), key=lambda pair: pair[0])
            tokens, judgment = longest[source]
            limits = {
                f"{name}.row_tokens": stage.row_tokens,
                f"{stage.model}: max_positions": shapes[stage.model].max_positions,
            }
            for key, limit in limits.items():
                if tokens > limit:
                    raise ValueError(
                        f"{key}: {limit} is too small: in data.{source}, query {judgment.query.query_id!r} with "
                        f"document {judgment.document.doc_id!r} and its answer has {tokens} tokens; "
                        f"max_document_tokens ({settings.max_document_tokens}) cuts documents"
                    )


def _check_text_rows(settings: Settings, tokenizer: Tokenizer, texts: Mapping[str, list[DomainText]]) -> None:
    """A text with asides is not split: the longest must fit into the rows of its stages."""
    longest: dict[str, int] = {}
    for name, stage in zip(settings.stage_names, settings.stages, strict=True):
        if isinstance(stage, RLStage):
            continue
        named = {stage.texts} if isinstance(stage, TextStage) else stage.mixture.keys() & texts.keys()
        for source in named:
            if source not in longest:
                whole = (text for text in texts[source] if text.asides)
                some = heapq.nlargest(200, whole, key=lambda text: len(text.text))  # among them the longest in tokens
                groups = text_groups(tokenizer, some, stage.row_tokens)
                longest[source] = max((len(group.branches[0].inputs) for group in groups), default=0)
            if longest[source] > stage.row_tokens:
                raise ValueError(
                    f"{name}.row_tokens: {stage.row_tokens} is too small: in data.{source} a text has "
                    f"{longest[source]} tokens"
                )
