"""Judge a model on graded judgments: every figure with its 95% interval, and a report.

  python -m afrl_jax.evaluate --model=runs/quickstart/export --judgments=data/test --output=runs/quickstart/test

A judgments folder has three tables, each .jsonl, .jsonl.gz or .parquet:

    queries    {"query_id": "q1", "text": "chess for kids"}
    documents  {"doc_id": "d7", "title": "Chess openings", "text": "For children"}
    judgments  {"query_id": "q1", "doc_id": "d7", "grade": 3}

Grades are those of the model's scale. Where the data spell them otherwise, name the raw grades of each label, several
for one label joined by "/"; where they are means of several raters, name the cuts between neighbouring labels:

  ... --grades=-2/0,1,2                     scale of 3, -2 and 0 are both the lowest
  ... --grades=1,2,3 --thresholds=1.5,2.5   1.0 to 3.0, to the nearest of three

Probabilities and grades use the calibration and decision that the model was exported with, fitted on other data.
--calibration=DIR fits them again, on judgments that must not share queries with those evaluated. A model without
relevance.json is asked zero-shot, on the default scale 0..3 or the one given, and has no calibration of its own:

  python -m afrl_jax.evaluate --model=Qwen/Qwen3-0.6B --judgments=data/test --calibration=data/dev --labels=1,2,3,4

The table goes to stdout. --output=DIR also keeps metrics.json (flat: model/<metric>, with /low and /high) and
report.html with its plots and their CSV files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afrl_jax.command_line import at_least, make_parser, parse, told_plainly, zero_shot_instruction

if TYPE_CHECKING:
    from afrl_jax.evaluation import Figure
    from afrl_jax.schema import Judgment

NAME = "model"  # what metrics.json and the report call it


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments and judgments, score, print, write."""
    parser = make_parser("afrl_jax.evaluate", __doc__)
    parser.add_argument("--judgments", required=True, type=Path, help="the judgments folder to evaluate on")
    parser.add_argument("--documents", default="documents", help="name of the table of documents, where it is another")
    parser.add_argument("--grades", help="raw grades of each label of the scale, least relevant first: 0/1,2,3,4")
    parser.add_argument("--thresholds", help="cuts between neighbouring labels for fractional raw grades: 1.5,2.5,3.5")
    parser.add_argument("--calibration", type=Path, help="fit calibration and decision on this judgments folder")
    parser.add_argument("--output", type=Path, help="folder for metrics.json and the report")
    parser.add_argument("--explained_pairs", type=at_least(0), default=100, help="explanations checked, where gold")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=128, help="of a checked explanation")
    parser.add_argument("--resamples", type=at_least(1), default=1000, help="of queries, for the intervals")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the resamples")
    args = parse(parser, arguments)
    # Imported here, so that --help and a mistyped argument answer at once.
    from afrl_jax import relevance_file
    from afrl_jax.data.readers import read_judgments
    from afrl_jax.evaluation import evaluate_predictions
    from afrl_jax.model_evaluation import calibrate, predict_judgments
    from afrl_jax.report import write_report
    from afrl_jax.scoring import RelevanceModel
    from lm_jax.program import use_kernels

    use_kernels(args.kernels)
    with told_plainly(parser):
        given = zero_shot_instruction(args.labels, args.task)
        # The scale is known before the weights are read, so a bad row is told at once.
        instruction = relevance_file.instruction_of(relevance_file.read(args.model), given)
        source = {"documents": args.documents, **grade_options(args.grades, args.thresholds)}
        judgments = read_judgments({"path": args.judgments, **source}, instruction.scale)
        fit_on = read_judgments({"path": args.calibration, **source}, instruction.scale) if args.calibration else []
        check_disjoint(judgments, fit_on)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
        model = RelevanceModel.load(args.model, instruction=given, dtype=args.dtype)
    if fit_on:
        model.calibration, model.decision = calibrate(model, fit_on)
    predictions = predict_judgments(
        model, judgments, explained_pairs=args.explained_pairs, max_new_tokens=args.max_new_tokens
    )
    facts = {
        "model": args.model,
        "judgments": f"{args.judgments}: {len(judgments):,} pairs, "
        f"{len({judgment.query.query_id for judgment in judgments}):,} queries",
        "calibration": str(args.calibration or ("the model's own" if model.version else "none")),
        "grade": str(model.decision),
    }
    figures = evaluate_predictions(predictions, seed=args.seed, resamples=args.resamples)
    print("\n".join(f"{name:12} {value}" for name, value in facts.items()) + "\n\n" + table(figures))
    if args.output:
        write_report(
            args.output,
            {NAME: predictions},
            model.format.instruction,
            title=f"{args.model} on {args.judgments}",
            facts=facts,
            seed=args.seed,
            resamples=args.resamples,
        )
        print(f"\nreport: {args.output / 'report.html'}")


def table(figures: Mapping[str, Figure]) -> str:
    """Figures and their intervals in aligned columns."""
    width = max(map(len, figures))
    lines = [f"{'':{width}}   value   95% interval"]
    for name, (value, low, high) in figures.items():
        lines.append(f"{name:{width}}  {value:6.3f}  {low:6.3f} to {high:6.3f}")
    return "\n".join(lines)


def grade_options(grades: str | None, thresholds: str | None) -> dict[str, Any]:
    """`grades` and `thresholds` of `GradeMapping` from their spelling on the command line.

    Raises:
        ValueError: a threshold is no number.
    """
    options: dict[str, Any] = {}
    if grades is not None:
        options["grades"] = [[raw.strip() for raw in label.split("/")] for label in grades.split(",")]
    if thresholds is not None:
        try:
            options["thresholds"] = [float(cut) for cut in thresholds.split(",")]
        except ValueError as error:
            raise ValueError(f"--thresholds: must be numbers such as 1.5,2.5; got {thresholds!r}") from error
    return options


def check_disjoint(judgments: Sequence[Judgment], fit_on: Sequence[Judgment]) -> None:
    """Raises ValueError where calibration would be fitted on the text of a query that is evaluated."""
    from afrl_jax.answer_format import query_texts

    if shared := query_texts(judgments) & query_texts(fit_on):
        raise ValueError(
            f"--calibration: {len(shared)} of its queries are also in --judgments, such as {min(shared)!r}; "
            "figures would flatter the model"
        )


if __name__ == "__main__":
    main()
