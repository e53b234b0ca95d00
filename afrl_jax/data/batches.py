"""From judgments to grain pipelines of packed rows: tokenized once, random access, resumed by step alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from afrl_jax.answer_format import LABEL, MATCH, AnswerFormat
from afrl_jax.schema import DomainText, Judgment
from lm_jax.rows import Batch, Branch, Group, RowShape, plan_rows, render_row, stack
from lm_jax.tokenizer import Tokenizer
from lm_jax.train_loop import BatchAt

# What supervised rows carry besides tokens: see afrl_jax.sft.
SFT_VALUES = ("label_weight", "explanation_weight")
# Of each token of the reason in a text with asides: it copies, which is quickly learned and would outnumber verdicts.
REASON_WEIGHT = 0.25
# Times the data are gone through: without end their count is rounded up beyond what an index may be.
EPOCHS = 10**9


def balanced_weights(judgments: Sequence[Judgment], grades: int, power: float) -> np.ndarray:
    """Weight of each judgment: its own times (frequency of its grade) ** -power, scaled to mean 1.

    power 0 leaves the natural mix, .5 is the square-root balance, 1 weighs every grade the same.
    """
    grade = np.array([judgment.grade for judgment in judgments])
    share = np.maximum(np.bincount(grade, minlength=grades), 1) / len(grade)
    weight = share[grade] ** -power * np.array([judgment.weight for judgment in judgments])
    return weight / weight.mean()


def label_values(judgment: Judgment, grades: int, weight: float) -> dict[str, np.ndarray | float]:
    """What the label slot of a judged pair carries: its unit in the denominator and the gold grade, one-hot."""
    return {"label_unit": weight, "label_gold": np.eye(grades, dtype=np.float32)[judgment.grade]}


def answer_branch(
    format: AnswerFormat,
    judgment: Judgment,
    document: np.ndarray,
    weight: float,
    extra_label_values: Mapping[str, np.ndarray] | None = None,
    evidence: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int32), np.zeros(0, np.int32)),
) -> Branch:
    """Document, slot and gold answer as a branch of the query's trunk; the last answer token is only predicted.

    `evidence` are places in the document and the tokens that the states there are asked for besides.
    """
    answer, segments = format.encode_answer(judgment)
    places, words = evidence
    segments = np.concatenate([segments, np.full(len(words), MATCH, np.int32)])
    is_label = (segments == LABEL).astype(np.float32)
    return Branch(
        inputs=np.concatenate([document, answer[:-1]]),
        targets=np.concatenate([answer, words]),
        segments=segments,
        token_values={"label_weight": weight * is_label, "explanation_weight": weight * (1 - is_label)},
        label_values=label_values(judgment, len(format.labels), weight) | dict(extra_label_values or {}),
        at=np.concatenate([len(document) - 1 + np.arange(len(answer)), places]),
    )


def judgment_groups(
    format: AnswerFormat,
    judgments: Sequence[Judgment],
    weights: Sequence[float] | None = None,
    extra_label_values: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[Group]:
    """One group a query: instruction and query as trunk, a branch for each judged document.

    `weights` replace the judgments' own; `extra_label_values` are more floats for each label slot (teacher log-probs).
    """
    weights = [judgment.weight for judgment in judgments] if weights is None else weights
    extra = extra_label_values or [{}] * len(judgments)
    prompts = format.encode_prompts([(judgment.query, judgment.document) for judgment in judgments])
    groups: dict[bytes, Group] = {}
    for judgment, prompt, weight, values in zip(judgments, prompts, weights, extra, strict=True):
        group = groups.setdefault(prompt.prefix.tobytes(), Group(prompt.prefix, []))
        evidence = format.encode_evidence(judgment, prompt.document)
        group.branches.append(answer_branch(format, judgment, prompt.document, float(weight), values, evidence))
    return list(groups.values())


def text_groups(tokenizer: Tokenizer, texts: Sequence[DomainText], row_tokens: int) -> list[Group]:
    """Domain texts for the language-modelling stage: no trunk; learned pieces and the end of text are predicted.

    Pieces are tokenized apart, as the parts of a prompt are. A text longer than a row goes on in another one.
    """
    groups = []
    encoded = iter(tokenizer.encode_batch([piece for text in texts for piece in text.pieces]))
    for text in texts:
        pieces = list(itertools.islice(encoded, len(text.pieces)))
        if text.asides:
            groups.append(Group(np.zeros(0, np.int32), [_text_with_asides(pieces, tokenizer.eos)]))
            continue
        ids = np.array([*itertools.chain.from_iterable(pieces), tokenizer.eos], np.int32)
        learned = np.repeat([*(number % 2 for number in range(len(pieces))), 1], [*map(len, pieces), 1])
        for start in range(0, len(ids) - 1, row_tokens):
            piece, weight = (values[start : start + row_tokens + 1] for values in (ids, learned.astype(np.float32)))
            segments = np.full(len(piece) - 1, LABEL + 1, np.int32)
            branch = Branch(piece[:-1], piece[1:], segments, {"explanation_weight": weight[1:]})
            groups.append(Group(np.zeros(0, np.int32), [branch]))
    return groups


def _text_with_asides(pieces: Sequence[Sequence[int]], eos: int) -> Branch:
    *before, last_given, answer = pieces
    given, asides = [*before[::2], last_given], [aside[0] for aside in before[1::2]]
    places = np.cumsum([len(piece) for piece in given])[:-1] - 1
    targets = np.array([*answer, eos, *asides], np.int32)
    weight = np.ones(len(targets), np.float32)
    weight[1 : len(answer) + 1] = REASON_WEIGHT
    inputs = np.array([*itertools.chain.from_iterable(given), *answer], np.int32)
    return Branch(
        inputs,
        targets,
        np.full(len(targets), MATCH, np.int32),
        {"explanation_weight": weight},
        at=np.concatenate([np.arange(len(inputs) - len(answer) - 1, len(inputs)), places]),
    )


def sft_row_shape(groups: Sequence[Group], tokens: int, grades: int) -> RowShape:
    """A row of `tokens` with room for the targets and label slots of the densest rows these groups can make."""
    branches = [branch for group in groups for branch in group.branches]
    density = max(len(branch.targets) / len(branch.inputs) for branch in branches)
    labels = max(1.0 / len(branch.inputs) if branch.label_values is not None else 0.0 for branch in branches)
    return RowShape(
        tokens=tokens,
        targets=min(tokens, -(-int(np.ceil(density * tokens)) // 16) * 16),
        labels=max(1, int(np.ceil(labels * tokens))),
        token_values=SFT_VALUES,
        label_values=(("label_unit", ()), ("label_gold", (grades,))),
    )


def row_batches(
    sources: Sequence[tuple[Sequence[Group], float]],
    shape: RowShape,
    *,
    rows: int,
    branches_together: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """A shuffled dataset of batches, as good as endless: element i is the batch of step i, whatever was read before.

    Args:
        sources: groups with their share of the rows in the mixture.
        rows: rows a batch.
        share: (index, count): of every batch, the index-th of `count` equal pieces; only its rows are rendered.

    Raises:
        ValueError: the pieces would not be equal.
    """
    index, count = share
    if rows % count:
        raise ValueError(f"{rows} rows a batch cannot be dealt to {count} processes evenly")
    datasets = []
    for number, (groups, _) in enumerate(sources):
        plan = plan_rows(groups, shape, branches_together=branches_together, seed=seed + number)
        render: Callable[[list], Batch] = lambda row, groups=groups: render_row(groups, row, shape)
        datasets.append(grain.MapDataset.source(plan).seed(seed + number).shuffle().repeat(EPOCHS).map(render))
    mixed = grain.MapDataset.mix(datasets, [share for _, share in sources]) if len(datasets) > 1 else datasets[0]
    pieces = mixed.batch(rows // count, batch_fn=stack)
    return pieces if count == 1 else pieces[index::count]


def from_step(dataset: grain.MapDataset, step: int) -> Iterable[Mapping[str, np.ndarray]]:
    """Batches from `step` on, read ahead in the background."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset[step:].to_iter_dataset(options))


def in_order(dataset: grain.MapDataset) -> BatchAt:
    """Batches of a random-access dataset, read ahead from the first step that is asked for."""
    reading: dict[int, Any] = {}

    def batch_at(state: Any, step: int) -> tuple[Mapping[str, np.ndarray], dict[str, float]]:
        iterator = reading.pop(step, None) or from_step(dataset, step)
        batch = next(iterator)
        reading[step + 1] = iterator
        return batch, {}

    return batch_at
