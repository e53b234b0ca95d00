"""The promotion gate over half a year of simulated weeks: what it lets pass, what it stops, beside two other gates.

  python -m benchmarks.gate_study --workdir=runs/gate_study            24 weeks; run it again to go on after a kill
  python -m benchmarks.gate_study --workdir=runs/gate_smoke --config=configs/core_smoke.py --quick

Trains the rewriter of the config (by default the quickstart's) for one phase, so that the weeks have something left to
gain, then redeploys weekly with drift, trained on 500 sessions and judged on 1,500 each. Every incident of
`core_jax.incidents` is planted, two of them for two weeks, the other weeks are clean. Leaves weeks/report.html in the
workdir, and with --output=FILE.md the study as a page with its picture beside it. Checked at the end: what was in
production after each week is what the gate's decisions say, by the registry's log. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from core_jax.gate import GATES, Decision
from core_jax.incidents import INCIDENTS
from core_jax.registry import Registry
from core_jax.weekly import REGISTRY
from core_jax.weekly_report import week_rows

REPOSITORY = Path(__file__).resolve().parents[1]
# week: incident. Two last for two weeks; the others are alone, so that recovery is seen in the week after.
SCHEDULE = {
    3: "length_padding", 6: "title_copying", 7: "title_copying", 10: "constant_rewrite", 12: "length_biased_relevance",
    13: "length_biased_relevance", 16: "corrupted_checkpoint", 19: "keyword_stuffing", 22: "length_penalty_removed",
}  # fmt: skip
WEEKS, QUICK_WEEKS = 24, 7


def main() -> None:
    """Run the weeks, then tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/core_quickstart.py")
    parser.add_argument("--output", type=Path, help="the study's page, such as docs/studies/gate.md")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_WEEKS} weeks of few sessions")
    parser.add_argument("overrides", nargs="*", help="--config.key=value, after --")
    args = parser.parse_args()
    args.workdir = args.workdir.resolve()  # the run is started elsewhere
    weeks = QUICK_WEEKS if args.quick else WEEKS
    planted = {f"week{week}": incident for week, incident in SCHEDULE.items() if week <= weeks}
    small = {"sessions": 12, "held_out": 300, "searches": 4}  # the gate judges nothing below 100 queries
    full = {"sessions": 500, "held_out": 1500}
    sizes = {"weeks": weeks, "incidents": planted, **(small if args.quick else full)}
    command = [sys.executable, "-m", "core_jax.main", f"--config={args.config}", f"--workdir={args.workdir}"]
    overrides = ["--config.phases.count=1", *(f"--config.weekly.{key}={value}" for key, value in sizes.items())]
    began = time.monotonic()
    subprocess.run([*command, *overrides, *args.overrides], check=True, cwd=REPOSITORY)
    seconds = time.monotonic() - began
    found = [
        json.loads((args.workdir / "stages" / f"week{week}" / "done.json").read_text()) for week in range(1, weeks + 1)
    ]
    check_history(args.workdir, found)
    metrics = json.loads((args.workdir / "weeks" / "metrics.json").read_text())
    if args.output:
        write_study(args.output, args.workdir, " ".join([args.config, *args.overrides]), found, metrics)
    print(json.dumps({"seconds": round(seconds, 1), "weeks": weeks, "incidents": len(planted), **metrics}))


def check_history(workdir: Path, weeks: Sequence[Mapping[str, Any]]) -> None:
    """The registry's moves are the gate's promotions, in order. One that a kill cut short was made again: it is one."""
    records = Registry(workdir / REGISTRY, lambda folder: None).history()
    moves = [to for to, _ in itertools.groupby(record["to"] for record in records if record["action"] == "promote")]
    promoted = [week["candidate"] for week in weeks if week["decisions"]["gate"] == Decision.PROMOTE]
    assert moves[1:] == promoted, f"the log's moves {moves[1:]} are not the gate's {promoted}"


def write_study(
    file: Path, workdir: Path, config: str, weeks: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]
) -> None:
    """The page, and its picture beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / "weeks" / "judge.png", file.with_name(f"{file.stem}_judge.png"))
    lines = [
        "# The promotion gate as a detector",
        "",
        f"{len(weeks)} simulated weeks with drift, `{config}`, the weeks begun after one phase. Made by",
        "",
        "```\npython -m benchmarks.gate_study --workdir=runs/gate_study --output=docs/studies/gate.md\n```",
        "",
        "| gate | clean weeks blocked | promoted | incident weeks blocked | promoted | plantings never blocked "
        "| mean delay, weeks |",
        "|---|---|---|---|---|---|---|",
    ]
    rates = ("false_block_rate", "promotion_rate", "detection_rate", "let_through_rate")
    for name in GATES:
        delay = metrics.get(f"{name}/mean_delay_weeks")
        cells = [name, *(share(metrics, name, each) for each in rates), f"{metrics[f'{name}/never_detected']:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {'–' if delay is None else f'{delay:.1f}'} |")
    lines += [
        "",
        "Shares with 95% Wilson intervals; what is neither blocked nor promoted was on hold. All gates saw the same "
        "candidates; which candidates there were, the first gate's decisions shaped. `reward_only` asks the deployed "
        "relevance model, also where that has gone wrong.",
        "",
        f"![What rewrites say against what was meant, week by week]({file.stem}_judge.png)",
        "",
        "| incident | what it is | " + " | ".join(GATES) + " |",
        "|---|---|" + "---|" * len(GATES),
    ]
    for incident in dict.fromkeys(week["incident"] for week in weeks if week["incident"]):
        shares = [share(metrics, name, f"detection_rate/{incident}") for name in GATES]
        lines.append(f"| {incident} | {INCIDENTS[incident].meaning} | " + " | ".join(shares) + " |")
    rows = week_rows(weeks)
    lines += ["", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(cell) for cell in row.values()) + " |" for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def share(metrics: Mapping[str, float], gate: str, figure: str) -> str:
    """A rate with its interval."""
    if f"{gate}/{figure}" not in metrics:
        return "–"
    value, low, high = (metrics[f"{gate}/{figure}{end}"] for end in ("", "/low", "/high"))
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()
