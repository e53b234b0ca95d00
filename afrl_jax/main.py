"""Train an answer-first relevance model: teacher, student, report and exported model from one config.

  python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/quickstart
      Trains, balances, distils, evaluates and exports a small model from scratch. Nothing is downloaded.

  python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/other --config.seed=1 --config.rl.steps=40
      Any value of a config can be changed on the command line; a list is written ("sft","rl"). afrl_jax/settings.py
      says which keys there are.

  python -m afrl_jax.main --config=configs/afrl_qwen3_32b_to_0_6b.py --compile_for=v5p:4x4x4 [--mesh=auto]
      Runs nothing: compiles every stage's step for that TPU slice, which need not be there, and says whether it fits,
      how long a step takes and what limits it. --mesh=auto looks for the fastest mesh and remat policy first.

Running the same command again continues where it stopped, after a kill too: finished stages are skipped, a running one
resumes from its newest checkpoint and ends with the same bits. A workdir remembers its config and refuses another.

What is left in the workdir: report/report.html (figures and plots), export/ (the model folder), log.jsonl and
tensorboard/ (every step), config.json.

Many processes (a TPU pod, SLURM, plain addresses): the same command in each, see docs/tpu_pod.md.

Exit status: 0 done; 1 the run failed, or the plan does not fit; 2 the command, the config or the data are wrong, said
before any work is done; 75 start it again: SIGTERM came and the step is saved, or another process was lost; 130 it was
stopped (Ctrl-C).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_jax.config_file import read_config
from lm_jax.host_memory import keep_freed_memory
from lm_jax.plan_arguments import add_plan_arguments, check_plan_arguments, end_with_plan
from lm_jax.program import before_jax, end_at_once_when_stopped, ending_as_told, join_run, use_kernels


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the config, check it and the data, run it."""
    parser = argparse.ArgumentParser(
        prog="python -m afrl_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=FILE --workdir=DIR [--config.key=value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the experiment, a file in configs/")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where the run lives, or goes on")
    add_plan_arguments(parser)
    parsed, overrides = parser.parse_known_args(arguments)
    check_plan_arguments(parser, parsed)
    try:
        config = read_config(parsed.config, overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if parsed.compile_for:
        _plan(parser, config, parsed)
        return
    before_jax()
    keep_freed_memory()
    end_at_once_when_stopped()
    _run(parser, config, parsed.workdir)


def _plan(parser: argparse.ArgumentParser, config: Mapping[str, Any], parsed: argparse.Namespace) -> None:
    from afrl_jax.plan import programs
    from afrl_jax.settings import read_settings

    end_with_plan(parser, parsed, config, read_settings, programs)


def _run(parser: argparse.ArgumentParser, config: Mapping[str, Any], workdir: Path) -> None:
    join_run(parser)
    # Imported here, so that --help and a mistyped argument answer at once.
    from afrl_jax.instructions.budget import BudgetExceeded
    from afrl_jax.instructions.client import LanguageModelError
    from afrl_jax.recipe import Recipe
    from afrl_jax.settings import read_settings

    with ending_as_told(parser, BudgetExceeded, LanguageModelError):
        try:
            settings = read_settings(config)
            use_kernels(settings.kernels)
            recipe = Recipe(settings, config, workdir)
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        recipe()


if __name__ == "__main__":
    main()
