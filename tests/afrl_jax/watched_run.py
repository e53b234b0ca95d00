"""The program, watched: `python watched_run.py EVENTS DEATH --config=... --workdir=...`; maybe one of many processes.

At its end EVENTS holds a JSON list of what happened, in order: ["compiled", function] and ["logged", stage, step].
At the moment that DEATH names, the process is ended as by `kill -9`:

    logged:STAGE:STEP:SECONDS   so long after that record was written
    saving:STAGE:STEP           while that checkpoint is being written in the background
    finishing:STAGE             all of a stage is on disk but the mark that it is finished
    exporting                   the exported folder is written but not yet in its place
    never

PyTorch is not found here: neither training, nor the report, nor export may need it.
"""

import importlib.machinery
import json
import os
import pathlib
import signal
import sys
import threading

find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)

import jax  # noqa: E402

from afrl_jax import export, main  # noqa: E402
from lm_jax import run_folder, run_log, train_loop  # noqa: E402
from tests import quick_compiling  # noqa: E402, F401


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(module, name, act):
    """`act` runs before the function or method of that name, with the same arguments."""
    original = getattr(module, name)

    def both(*arguments, **named):
        act(*arguments, **named)
        return original(*arguments, **named)

    setattr(module, name, both)


def watch(death: str) -> list:
    events = []
    kind, *where = death.split(":")

    def compiled(event, duration, fun_name="", **rest):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(["compiled", fun_name])

    def logged(log, stage, step, metrics):
        events.append(["logged", stage, step])
        if kind == "logged" and [stage, str(step)] == where[:2]:
            threading.Timer(float(where[2]), die).start()

    def saving(checkpoints, step, state):
        if kind == "saving" and [pathlib.Path(folder_of[checkpoints]).name, str(step)] == where:
            threading.Timer(0.001, die).start()

    def finishing(file, text):
        if kind == "finishing" and file.name == "done.json" and [file.parent.name] == where:
            die()

    def exporting(*arguments):
        if kind == "exporting":
            die()

    folder_of = {}
    before(train_loop.Checkpoints, "__init__", lambda self, folder, *rest: folder_of.update({self: folder}))
    before(train_loop.Checkpoints, "save", saving)
    before(run_log.RunLog, "write", logged)
    before(run_folder, "write_atomically", finishing)
    before(export, "_differences", exporting)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    return events


events_file, death, *arguments = sys.argv[1:]
events = watch(death)
main.main(arguments)
pathlib.Path(events_file).write_text(json.dumps(events))
