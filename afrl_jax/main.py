"""Train an answer-first relevance model: `python -m afrl_jax.main --config=FILE --workdir=DIR`.

  python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/quickstart
      Trains, balances, distils, evaluates and exports a small model from scratch. Nothing is downloaded.

  python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/other --config.seed=1 --config.rl.steps=40
      Any value of a config can be changed on the command line.

Running the same command again continues where it stopped: finished stages are skipped, a running one resumes from its newest
checkpoint and ends with the same bits. A workdir remembers its config and refuses another.

What is left in the workdir: report/report.html (figures and plots), export/ (the model folder), log.jsonl and tensorboard/ (every
step), config.json. Exit status: 0 done, 1 the run failed, 2 the config or the data are wrong (said before any work is done).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; running again with the same folder continues.")


def main(arguments: list[str]) -> None:
    """Read the config, check it, run it."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(arguments[1:])}")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "afrl_jax"))
    # Imported here, so that --help and a mistyped flag answer at once.
    from afrl_jax import recipe
    from afrl_jax.settings import read_settings
    from lm_jax.run_folder import ConfigChanged
    from lm_jax.run_log import say
    from lm_jax.train_loop import NonFiniteLoss

    config = _CONFIG.value.to_dict()
    try:
        settings = read_settings(config)
        prepared = recipe.Recipe(settings, config, Path(_WORKDIR.value))
    except (ValueError, FileNotFoundError, ConnectionError, ConfigChanged) as error:
        say(f"error: {error}")
        sys.exit(2)
    try:
        prepared()
    except NonFiniteLoss as error:
        say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
