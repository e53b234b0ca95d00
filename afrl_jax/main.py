"""Train an answer-first relevance model: teacher, student, report and exported model from one config.

  python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/quickstart
      Trains, balances, distils, evaluates and exports a small model from scratch. Nothing is downloaded.

  python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/other --config.seed=1 --config.rl.steps=40
      Any value of a config can be changed on the command line; a list is written ("sft","rl"). afrl_jax/settings.py
      says which keys there are.

Running the same command again continues where it stopped, after a kill too: finished stages are skipped, a running one
resumes from its newest checkpoint and ends with the same bits. A workdir remembers its config and refuses another.

What is left in the workdir: report/report.html (figures and plots), export/ (the model folder), log.jsonl and
tensorboard/ (every step), config.json.

Exit status: 0 done; 1 the run failed; 2 the command, the config or the data are wrong, said before any work is done;
130 or 143 it was stopped (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lm_jax.config_file import read_config

STOPPED = "stopped; the same command continues from the newest checkpoint\n"
SHOW_CURSOR = "\x1b[?25h\n"  # the progress bar hides it


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
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where the run lives, or goes on")
    parsed, overrides = parser.parse_known_args(arguments)
    try:
        config = read_config(parsed.config, overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "afrl_jax"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    _run(parser, config, parsed.workdir)


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once, as a kill would, which every part of a run survives; an exception might be caught on its way."""
    os.write(2, ((SHOW_CURSOR if os.isatty(2) else "") + STOPPED).encode())
    os._exit(128 + number)


def _run(parser: argparse.ArgumentParser, config: Mapping[str, Any], workdir: Path) -> None:
    # Imported here, so that --help and a mistyped argument answer at once.
    from afrl_jax.recipe import Recipe
    from afrl_jax.settings import read_settings
    from lm_jax.train_loop import NonFiniteLoss

    try:
        recipe = Recipe(read_settings(config), config, workdir)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    try:
        recipe()
    except NonFiniteLoss as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
