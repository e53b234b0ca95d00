"""Train a query rewriter for search after browse against a deployed relevance model.

  python -m core_jax.main --config=configs/core_quickstart.py --workdir=runs/core
      Supervised start, phases of semi-online MPO, a report and an exported rewriter. Nothing is downloaded.

  python -m core_jax.main --config=configs/core_quickstart.py --workdir=runs/other --config.mpo.weights="(1,0,0)"
      Any value of a config can be changed on the command line. core_jax/settings.py says which keys there are.

  python -m core_jax.main --config=configs/core_qwen3.py --compile_for=v5e:2x4 [--mesh=auto] \\
      --config.relevance=Qwen/Qwen3-0.6B
      Runs nothing: compiles every step for that TPU slice, which need not be there, and says whether it fits, how long
      a step takes and what limits it. A relevance model that is not there yet may go by the name of its shape.

The relevance model is the folder that the config names (`--config.relevance=DIR`); where it is absent, the run that
makes it is started first, if the config names one (`relevance_config`).

Running the same command again continues where it stopped, after a kill too: finished stages are skipped, a running one
resumes and ends with the same bits. A workdir remembers its config and refuses another.

What is left in the workdir: report/report.html (figures and plots), export/ (the rewriter), log.jsonl and tensorboard/
(every step), config.json; where the config simulates weekly redeploys, weeks/ with a page for every Monday, registry/
and the store of rewrites, see core_jax/weekly.py and `python -m core_jax.registry --help`.

Exit status: 0 done; 1 the run failed, or the plan does not fit; 2 the command, the config or the data are wrong, said
before any work is done; 75 start it again: SIGTERM came and the step is saved; 130 it was stopped (Ctrl-C).
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
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
        prog="python -m core_jax.main",
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
    from core_jax.plan import programs
    from core_jax.settings import read_settings

    end_with_plan(parser, parsed, config, read_settings, programs)


def _run(parser: argparse.ArgumentParser, config: Mapping[str, Any], workdir: Path) -> None:
    # Imported here, so that --help and a mistyped argument answer at once.
    join_run(parser)
    import jax

    from core_jax.phases import NoPairs
    from core_jax.recipe import OtherRelevance, Recipe
    from core_jax.registry import RegistryError
    from core_jax.settings import Settings, read_settings
    from core_jax.weekly import Weekly

    if jax.process_count() > 1:
        parser.exit(
            2, f"error: {jax.process_count()} processes: a rewriter is trained by one, with all of its devices\n"
        )

    def make_relevance(settings: Settings) -> None:
        """Run the AFRL recipe whose export the config expects, as its own program."""
        folder = Path(settings.relevance)
        if folder.exists() or not settings.relevance_config:
            return
        if folder.name != "export":
            raise ValueError(f"relevance: {folder} is absent; a run of relevance_config leaves its model in .../export")
        command = [sys.executable, "-m", "afrl_jax.main", f"--config={settings.relevance_config}"]
        with subprocess.Popen([*command, f"--workdir={folder.parent}"]) as making:
            before = signal.signal(signal.SIGTERM, lambda number, frame: making.send_signal(number))  # it saves first
            status = making.wait()
            signal.signal(signal.SIGTERM, before)
        if status:
            parser.exit(status, f"error: relevance: {folder} is not made, see above\n")

    try:
        settings = read_settings(config)
        use_kernels(settings.kernels)
        make_relevance(settings)
        recipe = Recipe(settings, config, workdir)
        weekly = Weekly(recipe) if settings.weekly.weeks else None
        _ = recipe.run  # all is checked: the folder appears, or it is said why it cannot
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    with ending_as_told(parser, NoPairs, OtherRelevance, RegistryError, ConnectionError):
        recipe()
        if weekly:
            weekly()


if __name__ == "__main__":
    main()
