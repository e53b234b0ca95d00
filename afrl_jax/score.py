"""Score pairs of query and document: one row in, one row out, in the same order.

  python -m afrl_jax.score --model=runs/quickstart/export --input=pairs.jsonl --output=scores.jsonl

    in   {"query_id": "q1", "query": "chess for kids", "doc_id": "d7", "title": "Chess openings"}
    out  {"query_id": "q1", "doc_id": "d7", "grade": "3", "expected_grade": 2.6, "probabilities": [0, 0.1, 0.2, 0.7],
          "calibrated_probabilities": [0, 0.1, 0.2, 0.7]}

A row in has `query`, optionally `context`, and the document: `title` and/or `text`, or `document`, a text or an object
{title, text, further fields}. Any other field, ids first of all, is carried to the row out. The input may also be
.jsonl.gz, .parquet or .csv. Every row is checked before the model is loaded.

A row out has
  grade                the decided label of the scale
  expected_grade       sum of grade * calibrated probability, in the scale's own numbers ("1".."4": 1 to 4), or, where a
                       label is no number, in places on the scale, 0 for the least relevant
  probabilities        the model's softmax over the label tokens, in the order of the scale, least relevant first
  calibrated_probabilities   the same after the model's calibration, which grade and expected_grade are read from;
                       without relevance.json there is none and they are equal

With --include_prompt_ids also what anybody needs to check `probabilities` with another program:
  prompt_ids           the exact tokens scored; the next token is the grade
  label_token_ids      the token of each label

Any Hugging Face causal model works, zero-shot with a default task and scale (0 irrelevant .. 3 perfectly relevant):

  python -m afrl_jax.score --model=Qwen/Qwen3-0.6B --input=pairs.parquet --output=scores.jsonl
  python -m afrl_jax.score --model=smollm2.gguf --input=pairs.jsonl --output=scores.jsonl \\
      --labels="1=irrelevant,2=partly relevant,3=relevant" --task="Judge how well the product answers the query."

The output appears under its name when it is complete; until then it is OUTPUT.partial.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afrl_jax.command_line import make_parser, parse, told_plainly, zero_shot_instruction

if TYPE_CHECKING:
    from afrl_jax.data.readers import Pair
    from afrl_jax.scoring import RelevanceModel

CHUNK = 512  # pairs in memory at a time
OUTPUTS = ("grade", "expected_grade", "probabilities", "calibrated_probabilities")
PROMPT_OUTPUTS = ("prompt_ids", "label_token_ids")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments, check the input, score it."""
    parser = make_parser("afrl_jax.score", __doc__)
    parser.add_argument("--input", required=True, type=Path, help="the pairs: .jsonl, .jsonl.gz, .parquet or .csv")
    parser.add_argument("--output", required=True, type=Path, help="where the scores go, JSON lines")
    parser.add_argument("--include_prompt_ids", action="store_true", help="write the tokens that were scored as well")
    args = parse(parser, arguments)
    # Imported here, so that --help and a mistyped argument answer at once.
    from afrl_jax.data.readers import read_pairs
    from afrl_jax.scoring import RelevanceModel
    from lm_jax import run_log

    partial = args.output.with_name(args.output.name + ".partial")
    with told_plainly(parser):
        instruction = zero_shot_instruction(args.labels, args.task)
        count = check_pairs(read_pairs(args.input), args.input, args.include_prompt_ids)
        if args.output.is_dir() or (args.output.exists() and args.output.samefile(args.input)):
            raise ValueError(f"--output: {args.output} is a folder or the input itself")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        model = RelevanceModel.load(args.model, instruction=instruction, dtype=args.dtype)
    chunks = run_log.progress(
        score_chunks(model, read_pairs(args.input), args.include_prompt_ids), "scoring", -(-count // CHUNK)
    )
    with partial.open("w", encoding="utf-8") as file:
        for rows in chunks:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(args.output)
    run_log.say(f"{count:,} pairs scored: {args.output}")


def check_pairs(pairs: Iterable[Pair], source: Path, include_prompt_ids: bool) -> int:
    """How many pairs there are.

    Raises:
        DataError: a row is bad.
        ValueError: a field that would be carried bears the name of one that is written.
    """
    written = {*OUTPUTS, *(PROMPT_OUTPUTS if include_prompt_ids else ())}
    count, taken = 0, set()
    for pair in pairs:
        count += 1
        taken |= written & pair.carried.keys()
    if taken:
        names = ", ".join(sorted(taken))
        raise ValueError(f"{source}: the output writes {names} itself; rename or drop these fields of the input")
    return count


def score_chunks(
    model: RelevanceModel, pairs: Iterable[Pair], include_prompt_ids: bool
) -> Iterator[list[dict[str, Any]]]:
    """The rows out, `CHUNK` at a time, in the order of the pairs."""
    import numpy as np

    from afrl_jax.calibration import Calibration

    labels = model.format.labels
    values, raw = np.array(label_values(labels)), Calibration.identity(len(labels))
    pairs = iter(pairs)
    while chunk := list(itertools.islice(pairs, CHUNK)):
        asked = [(pair.query, pair.document) for pair in chunk]
        logprobs = model.label_logprobs(asked)
        own, calibrated = raw.apply(logprobs), model.calibration.apply(logprobs)
        grades = [labels[grade] for grade in model.grades(calibrated)]
        written = zip(grades, (calibrated @ values).tolist(), own.tolist(), calibrated.tolist(), strict=True)
        rows = [
            {**pair.carried, **dict(zip(OUTPUTS, row, strict=True))} for pair, row in zip(chunk, written, strict=True)
        ]
        if include_prompt_ids:
            for row, prompt in zip(rows, model.format.encode_prompts(asked), strict=True):
                row |= dict(zip(PROMPT_OUTPUTS, (prompt.tokens.tolist(), list(model.format.label_ids)), strict=True))
        yield rows


def label_values(labels: Sequence[str]) -> list[float]:
    """The numbers that the labels spell, or their places on the scale where one spells none."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return [float(place) for place in range(len(labels))]


if __name__ == "__main__":
    main()
