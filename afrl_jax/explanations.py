"""Explanations as they are written: on from the keys and values that gave the grade, to a verdict that repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from afrl_jax.answer_format import VERDICT_LINE, AnswerFormat
from afrl_jax.answer_grammar import explanation_table
from afrl_jax.label_scorer import LabelScorer, Prefix
from lm_jax.shared_prefix import answer_cache
from lm_jax.stream import answer_room, follow


def explanations(
    scorer: LabelScorer,
    format: AnswerFormat,
    prompts: Sequence[Prefix],
    grades: Sequence[int],
    *,
    max_new_tokens: int,
    room: int | None = None,
) -> Iterator[list[tuple[str, bool]]]:
    """The answers to prompts as they are decoded, greedily, [(text so far, whether it is complete)], again and again.

    An answer begins with the label of its grade, goes on in the words of the format alone, whatever the model would
    rather write (see `afrl_jax.answer_grammar`), and ends with that label. So an answer that is complete can be parsed
    and agrees with its grade, at both of its ends.

    Args:
        prompts: of `scorer.prefill`.
        grades: decided for each, indices on the scale.
        max_new_tokens: an answer that is not complete by then stays cut off.
        room: tokens that answers are given room for, `max_new_tokens` by default; each value is compiled.
    """
    count = len(prompts)
    # Answers are written in powers of two of rows, so that few shapes are compiled.
    rows = [*range(count), *[count - 1] * ((1 << (count - 1).bit_length()) - count)]
    cache = answer_cache(
        [prompts[row].block for row in rows],
        [prompts[row].length for row in rows],
        answer_room(room or max_new_tokens),
    )
    first = np.array(format.label_ids, np.int32)[[grades[row] for row in rows]]
    answers: list[list[int]] = [[] for _ in range(count)]
    for found_nP in follow(
        scorer.parameters,
        cache,
        first,
        config=scorer.config,
        max_new_tokens=max_new_tokens,
        leads_to_SV=explanation_table(format.tokenizer, scorer.config.vocab_size),
        dtype=scorer.dtype,
    ):
        for answer, tokens in zip(answers, found_nP.T.tolist(), strict=False):
            answer += tokens
        told = [_told(format, answer, grade) for answer, grade in zip(answers, grades, strict=True)]
        yield told
        if all(complete for _, complete in told):
            return


def _told(format: AnswerFormat, answer: list[int], grade: int) -> tuple[str, bool]:
    """The text of an answer's tokens, and whether it is complete."""
    before, verdict, _ = format.tokenizer.decode(answer).partition(VERDICT_LINE)
    return (f"{before}{verdict} {format.labels[grade]}", True) if verdict else (before, False)
