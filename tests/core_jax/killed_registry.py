"""`python killed_registry.py FOLDER`: the same moves again and again, each time ended as by `kill -9` one step later.

A step is a line of core_jax/registry.py. After each death the registry is looked at, and the next moves are made.
Prints one JSON line: how many deaths, and the distinct states found after them.
"""

import json
import os
import pathlib
import shutil
import signal
import sys

from core_jax import registry
from core_jax.registry import Registry


def passes(folder: pathlib.Path) -> None:
    if "broken" in (folder / "weights").read_text():
        raise ValueError("golden input 0 is answered otherwise")


def die_at(step: int):
    """A trace function that ends the process at the `step`-th line of the registry's code."""
    left = [step]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != registry.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def moves(folder: pathlib.Path) -> None:
    """Publish a third version, promote it, go back."""
    of = Registry(folder / "registry", passes, clock=lambda: 0.0)
    third = of.publish(folder / "third", who="t", why="w")
    of.promote(third, who="t", why="w", figures={"x": 1.0})
    of.rollback(who="t", why="w")


def main(folder: pathlib.Path) -> None:
    for name in ("first", "second", "third"):
        (folder / name).mkdir()
        (folder / name / "weights").write_text(name)
    start = Registry(folder / "registry", passes, clock=lambda: 0.0)
    first, second = (start.publish(folder / name, who="t", why="w") for name in ("first", "second"))
    start.promote(first, who="t", why="w")
    start.promote(second, who="t", why="w")
    shutil.copytree(folder / "registry", folder / "template", symlinks=True)
    seen, step, ended = set(), 0, False
    while not ended:
        shutil.rmtree(folder / "registry")
        shutil.copytree(folder / "template", folder / "registry", symlinks=True)
        child = os.fork()
        if not child:
            sys.settrace(die_at(step))
            moves(folder)
            os._exit(0)
        ended = os.waitpid(child, 0)[1] == 0
        after = Registry(folder / "registry", passes, clock=lambda: 0.0)
        before_repair = after.production()
        production = after.verify(before_repair).name  # complete, and it passes
        content = (folder / "registry" / "production" / "weights").read_text()
        assert {first: "first", second: "second"}.get(production, "third") == content
        last = [record["to"] for record in after.history() if record["action"] in registry.MOVES][-1]
        seen.add((content, "as logged" if last == production else "log ahead"))
        moved = [record["action"] for record in after.history() if record["action"] in registry.MOVES][-1]
        if last != production and moved == "rollback":  # repeating the killed command does what it would have done
            assert after.rollback(who="t", why="w") == second
            after.promote(production, who="t", why="w")
        after.promote(first, who="t", why="w")  # whatever was left behind, the next command works
        assert after.production() == first and after.rollback(who="t", why="w") == production
        assert len(list((folder / "registry" / "versions").glob("*"))) in (2, 3)
        recovered = [record for record in after.history() if record["action"] == "recovered"]
        assert len(recovered) == (last != production), (step, recovered)
        step += 1
    print(json.dumps({"deaths": step - 1, "seen": sorted(seen)}))


main(pathlib.Path(sys.argv[1]))
