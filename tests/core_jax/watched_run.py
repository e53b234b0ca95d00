"""The program, watched: `python watched_run.py EVENTS DEATH --config=... --workdir=...`.

At its end EVENTS holds a JSON list of the jitted functions that were compiled, in order. At the moment that DEATH
names, the process is ended as by `kill -9`:

    drawn:PHASE:BLOCK      after that block of rewrites was drawn, before it is on disk
    scored:PHASE           when the rewards are there and nothing else
    logged:STAGE:STEP      after that record was written and the checkpoint before it
    finishing:STAGE        all of a stage is on disk but the mark that it is finished
    never
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax

from core_jax import main, phases
from lm_jax import run_folder, run_log
from tests import quick_compiling  # noqa: F401


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watch(death: str, workdir: pathlib.Path) -> list[str]:
    compiled = []
    kind, *where = death.split(":")

    def after(module, name, act):
        original = getattr(module, name)

        def both(*arguments, **named):
            result = original(*arguments, **named)
            act(*arguments, **named)
            return result

        setattr(module, name, both)

    def dumped(record, **rest):
        blocks[0] += isinstance(record, dict) and "rewrites" in record
        # Blocks are of four sessions: at a block's second one, the first is still in the file's buffer.
        if kind == "drawn" and where[0] == running[0] and blocks[0] == 4 * int(where[1]) + 2:
            die()

    def began(phase, *arguments, **named):
        running[0], blocks[0] = phase.name, 0

    def scored(*arguments, **named):
        if kind == "scored" and where == running:
            die()

    def logged(log, stage, step, metrics):
        if kind == "logged" and where == [stage, str(step)]:
            while not any(path.name.isdigit() for path in (workdir / "checkpoints" / stage).iterdir()):
                time.sleep(0.01)  # orbax writes in the background
            die()

    finish = run_folder.write_atomically

    def finishing(file, text):
        if kind == "finishing" and file.name == "done.json" and [file.parent.name] == where:
            die()
        finish(file, text)

    blocks, running = [0], [""]
    collect = phases.Phase.collect
    phases.Phase.collect = lambda phase, parameters: (began(phase), collect(phase, parameters))[1]
    after(phases.json, "dumps", dumped)
    after(phases, "score_rewrites", scored)
    after(run_log.RunLog, "write", logged)
    run_folder.write_atomically = finishing
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, fun_name="", **rest: (
            compiled.append(fun_name) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    return compiled


events_file, death, *arguments = sys.argv[1:]
events = watch(death, next(pathlib.Path(each[10:]) for each in arguments if each.startswith("--workdir=")))
main.main(arguments)
pathlib.Path(events_file).write_text(json.dumps(events))
