"""Score pairs of query and document: one row in, one row out, in the same order.

  python -m afrl_jax.score --model=runs/quickstart/export --input=pairs.jsonl --output=scores.jsonl

    in   {"query_id": "q1", "query": "chess for kids", "doc_id": "d7", "title": "Chess openings"}
    out  {"query_id": "q1", "doc_id": "d7", "grade": "3", "expected_grade": 2.6, "probabilities": [0, 0.1, 0.2, 0.7],
          "calibrated_probabilities": [0, 0.1, 0.2, 0.7]}

A row in has `query`, optionally `context`, and the document: `title` and/or `text`, or `document`, a text or an object
{title, text, further fields}. Any other field, ids first of all, is carried to the row out. The input may also be
.jsonl.gz, .parquet or .csv; an OUTPUT that ends in .parquet becomes Parquet, any other JSON lines. A row that is no
pair, or whose probabilities the model computes as no numbers, is left out; OUTPUT.bad.jsonl holds it, and why.

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

With --explain=0.01 one row in a hundred also has
  explanation          the grade and the reasoning after it, as the model writes it; the verdict at its end is the grade
  explanation_truncated   whether it was cut off at --explanation_tokens, before that verdict

Any Hugging Face causal model works, zero-shot with a default task and scale (0 irrelevant .. 3 perfectly relevant):

  python -m afrl_jax.score --model=Qwen/Qwen3-0.6B --input=pairs.parquet --output=scores.parquet
  python -m afrl_jax.score --model=smollm2.gguf --input=pairs.jsonl --output=scores.jsonl \\
      --labels="1=irrelevant,2=partly relevant,3=relevant" --task="Judge how well the product answers the query."

Killed at any moment, the same command goes on where it was: no row is lost, none is written twice. The output appears
under its name when it is complete; until then it is OUTPUT.partial. OUTPUT.progress stays beside it and says of what
model and input it is: the same command finds it done. Started twice at a time, the second start is refused.

The devices of a machine share the work: by default each has the whole model and some of the pairs, with --mesh=fsdp=-1
a part of the model. So do the processes of a job (`sharding.distributed`: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID): process 2 of 8 scores its eighth of the rows, on its own devices, and writes scores.2-of-8.jsonl; one
behind the other these are the rows in order.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afrl_jax.command_line import CACHE_HELP, at_least, make_parser, parse, told_plainly, zero_shot_instruction

if TYPE_CHECKING:
    from afrl_jax.data.readers import BadRow, Pair
    from afrl_jax.scoring import RelevanceModel

CHUNK = 512  # rows in memory at a time; what a kill can cost
# Fields of rows out, each with a value of its type.
OUTPUTS = {"grade": "", "expected_grade": 0.0, "probabilities": [0.0], "calibrated_probabilities": [0.0]}
PROMPT_OUTPUTS = {"prompt_ids": [0], "label_token_ids": [0]}
EXPLANATION_OUTPUTS = {"explanation": "", "explanation_truncated": False}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments, check the input, score it."""
    args = parse(parser := make_arguments(), arguments)
    # Imported here, so that --help and a mistyped argument answer at once.
    import jax

    from afrl_jax.data.readers import read_pairs
    from afrl_jax.resumable_rows import ResumableRows
    from afrl_jax.scoring import RelevanceModel
    from lm_jax import run_log
    from lm_jax.program import use_kernels
    from sharding import distributed
    from sharding.mesh import make_mesh

    with told_plainly(parser):
        distributed.start()
        use_kernels(args.kernels)
        part, parts = jax.process_index(), jax.process_count()
        instruction = zero_shot_instruction(args.labels, args.task)
        if not 0 <= args.explain <= 1:
            raise ValueError(f"--explain: a share of the rows, 0 to 1; got {args.explain:g}")
        outputs = written(args)
        count = check_rows(args.input, set(outputs))
        if args.output.is_dir() or (args.output.exists() and args.output.samefile(args.input)):
            raise ValueError(f"--output: {args.output} is a folder or the input itself")
        devices = jax.local_devices()
        mesh = make_mesh(args.mesh, devices)  # one that does not fit is told whatever the devices
        mesh = mesh if len(devices) > 1 else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        with told_plainly(parser):
            model = RelevanceModel.load(
                args.model, instruction=instruction, dtype=args.dtype, mesh=mesh, cache_bytes=args.cache_bytes
            )
            args.output.parent.mkdir(parents=True, exist_ok=True)
            output = part_name(args.output, part, parts)
            out = ResumableRows(output, identity(args, model) | {"part": [part, parts]}, outputs)
        start, stop = count * part // parts, count * (part + 1) // parts
        done = out.rows + out.bad_rows
        rows = itertools.islice(enumerate(read_pairs(args.input)), start + done, stop)
        total = -(-(stop - start) // CHUNK)
        for chunk in run_log.progress(chunks(rows), "scoring", total, start=done // CHUNK):
            some = (args.include_prompt_ids, args.explain, args.explanation_tokens, args.max_query_tokens)
            out.append(*score_chunk(model, chunk, *some))
        distributed.barrier("scored")  # who ends early ends the others
        out.finish()
        distributed.barrier("finished")
    run_log.say(f"{out.rows:,} pairs scored: {output}")
    if out.bad_rows:
        run_log.say(f"{out.bad_rows:,} rows have no score; they are, each with its reason, in {out.bad}")


def make_arguments() -> argparse.ArgumentParser:
    """The arguments: the model's, and what comes in and goes out."""
    parser = make_parser("afrl_jax.score", __doc__)
    parser.add_argument("--input", required=True, type=Path, help="the pairs: .jsonl, .jsonl.gz, .parquet or .csv")
    parser.add_argument("--output", required=True, type=Path, help="where the scores go: .jsonl or .parquet")
    parser.add_argument("--include_prompt_ids", action="store_true", help="write the tokens that were scored as well")
    parser.add_argument("--explain", type=float, default=0.0, help="the share of rows to explain, 0 to 1 (%(default)s)")
    parser.add_argument("--explanation_tokens", type=at_least(1), default=128, help="of one, at most (%(default)s)")
    parser.add_argument(
        "--max_query_tokens",
        type=at_least(1),
        default=4096,
        help="of a query with its context; a pair with more gets no score: it would take much memory (%(default)s)",
    )
    parser.add_argument("--mesh", default="data=-1", help="how the devices of a process share the work (%(default)s)")
    parser.add_argument("--cache_bytes", type=at_least(0), help=CACHE_HELP)
    return parser


def written(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that rows out get, each with a value of its type."""
    return OUTPUTS | (PROMPT_OUTPUTS if args.include_prompt_ids else {}) | (EXPLANATION_OUTPUTS if args.explain else {})


def identity(args: argparse.Namespace, model: RelevanceModel) -> dict[str, Any]:
    """What makes a job this job: only the same one may go on where it was."""
    from afrl_jax import relevance_file

    stat = args.input.stat()
    names = ("labels", "task", "dtype", "include_prompt_ids", "explain", "explanation_tokens", "max_query_tokens")
    options = {name: getattr(args, name) for name in names}
    source = {"input": str(args.input), "input_bytes": stat.st_size, "input_changed": stat.st_mtime}
    # What may become another behind the same path: weights, also of a model without a version of its own, and grades.
    served = {"model_version": model.version or relevance_file.model_version(args.model)}
    served |= {"calibration": model.calibration.to_json(), "decision": model.decision.to_json()}
    return source | {"model": args.model} | served | options


def part_name(output: Path, part: int, parts: int) -> Path:
    """Where one of several processes writes."""
    return output if parts == 1 else output.with_name(f"{output.stem}.{part}-of-{parts}{output.suffix}")


def check_rows(source: Path, written: set[str]) -> int:
    """How many rows there are, bad ones counted.

    Raises:
        DataError: none of them is a pair, or the file cannot be read.
        ValueError: a field that would be carried bears the name of one that is written.
    """
    from afrl_jax.data.readers import BadRow, read_pairs
    from afrl_jax.data.tables import DataError

    reasons: list[str] = []
    pairs, bad, taken = 0, 0, set()
    for row in read_pairs(source):
        if isinstance(row, BadRow):
            bad += 1
            reasons = [*reasons, row.reason][:20]
        else:
            pairs += 1
            taken |= written & row.carried.keys()
    if not pairs:
        raise DataError(reasons, bad)
    if taken:
        names = ", ".join(sorted(taken))
        raise ValueError(f"{source}: the output writes {names} itself; rename or drop these fields of the input")
    return pairs + bad


def chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """`CHUNK` rows at a time."""
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def score_chunk(
    model: RelevanceModel,
    chunk: Sequence[tuple[int, Pair | BadRow]],
    include_prompt_ids: bool,
    explain: float,
    explanation_tokens: int,
    max_query_tokens: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows out of pairs in their order, and the bad rows: no pairs, pairs with too long a query, and those that the
    model finds no numbers for.

    `explain` of all rows are explained, evenly spread over the file, whatever is scored with what.
    """
    import numpy as np

    from afrl_jax.answer_format import VERDICT_LINE
    from afrl_jax.calibration import Calibration
    from afrl_jax.data.readers import BadRow

    bad = [dataclasses.asdict(row) for _, row in chunk if isinstance(row, BadRow)]
    numbered = [(number, row) for number, row in chunk if not isinstance(row, BadRow)]
    labels, head = model.format.labels, len(model.format.head_tokens)
    prompts = model.format.encode_prompts([(pair.query, pair.document) for _, pair in numbered])
    lengths = [len(prompt.prefix) - head for prompt in prompts]
    told = "its query and context have {} tokens; --max_query_tokens is {}"
    bad += [
        not_scored(*row, told.format(tokens, max_query_tokens))
        for row, tokens in zip(numbered, lengths, strict=True)
        if tokens > max_query_tokens
    ]
    numbered = [row for row, tokens in zip(numbered, lengths, strict=True) if tokens <= max_query_tokens]
    logprobs = model.label_logprobs([(pair.query, pair.document) for _, pair in numbered])
    finite = np.isfinite(model.calibration.apply(logprobs)).all(axis=1)
    told = "the model gave probabilities that are not numbers"
    bad += [not_scored(*row, told) for row, fine in zip(numbered, finite, strict=True) if not fine]
    numbered, logprobs = list(itertools.compress(numbered, finite)), logprobs[finite]
    own, calibrated = Calibration.identity(len(labels)).apply(logprobs), model.probabilities(logprobs)
    grades, pairs = model.grades(calibrated), [pair for _, pair in numbered]
    asked = [(pair.query, pair.document) for pair in pairs]
    values = (
        [labels[grade] for grade in grades],
        (calibrated @ np.array(label_values(labels))).tolist(),
        own.tolist(),
        calibrated.tolist(),
    )
    rows = [
        {**pair.carried, **dict(zip(OUTPUTS, row, strict=True))}
        for pair, row in zip(pairs, zip(*values, strict=True), strict=True)
    ]
    if include_prompt_ids:
        for row, prompt in zip(rows, model.format.encode_prompts(asked), strict=True):
            row |= dict(zip(PROMPT_OUTPUTS, (prompt.tokens.tolist(), list(model.format.label_ids)), strict=True))
    chosen = [place for place, (n, _) in enumerate(numbered) if int((n + 1) * explain) > int(n * explain)]
    answers = model.answers(
        [asked[place] for place in chosen],
        grades=[int(grades[place]) for place in chosen],
        max_new_tokens=explanation_tokens,
    )
    for place, answer in zip(chosen, answers, strict=True):
        rows[place] |= dict(zip(EXPLANATION_OUTPUTS, (answer, VERDICT_LINE not in answer), strict=True))
    return rows, bad


def not_scored(number: int, pair: Pair, why: str) -> dict[str, Any]:
    """The bad row of a pair, row `number` of the input; it may come in again."""
    query, document = pair.query, pair.document
    asked = {"query": query.text, "context": query.context}
    shown = {"title": document.title, "text": document.text, **document.fields}
    return {"reason": f"row {number + 1}: {why}", "values": {**pair.carried, **asked, "document": shown}}


def label_values(labels: Sequence[str]) -> list[float]:
    """The numbers that the labels spell, or their places on the scale where one spells none."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return [float(place) for place in range(len(labels))]


if __name__ == "__main__":
    main()
