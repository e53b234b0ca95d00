"""How a program of the project behaves towards the person who started it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# What an exchange with a process that is gone says: a status of the collective or coordination service.
_LOST = re.compile("UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|FAILED_PRECONDITION|[Gg]loo")
# A fault of the program or of its size, which comes again however often it is started.
_OWN = re.compile("Mosaic|[Cc]ompil|RESOURCE_EXHAUSTED")

STOPPED = "stopped; the same command continues from the newest checkpoint\n"
STOPPING = "SIGTERM: the running step is finished and saved first\n"
SHOW_CURSOR = "\x1b[?25h\n"  # the progress bar hides it


def before_jax() -> None:
    """Settings of JAX for a program of ours, where the environment has none; call it before JAX is imported.

    Compiled programs are kept between runs, in a folder that all programs share. And a machine without a TPU but with
    its library, which compiles for TPUs, runs on the CPU without asking that library first, which is loud.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "afrl_jax"))
    devices = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    plugins = importlib.metadata.entry_points(group="jax_plugins")  # GPUs come as such
    if importlib.util.find_spec("libtpu") and not devices and not plugins:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def use_kernels(name: str) -> None:
    """The implementation by which kernels run from here on, "auto" or one of `kernels.implementation.NAMES`.

    What is chosen for each kernel is told to the person who watches, once.
    """
    from kernels import implementation
    from lm_jax.run_log import say

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"kernel {record.getMessage()}")

    implementation.setting.set_global(name)
    implementation.log.handlers = [Told()]
    implementation.log.setLevel(logging.INFO)
    implementation.log.propagate = False


def end_at_once_when_stopped() -> None:
    """Ctrl-C and SIGTERM end the program as a kill would, which every part of a run survives.

    An exception might be caught on its way. The status is 128 + the signal's number. `join_run` takes over SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def join_run(parser: argparse.ArgumentParser) -> None:
    """Join the run's other processes, if there are any; from here on SIGTERM is a request to save and end.

    Call it before anything else of jax. One process speaks for all. The program ends with status 75 where the others
    did not come.
    """
    from lm_jax import run_log
    from sharding import distributed

    try:
        distributed.start(hears_sigterm=True)
    except (ValueError, RuntimeError) as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(distributed.PREEMPTED if _lost(error) else 2)  # at once: nobody is there to wait for
    distributed.stop.listen(lambda: os.write(2, STOPPING.encode()))
    if not distributed.is_primary():
        run_log.silence()


@contextlib.contextmanager
def ending_as_told(parser: argparse.ArgumentParser, *failures: type[Exception]) -> Iterator[None]:
    """Around the run: exit status 1 where it failed, 75 where the same command is to be started again.

    With several processes none that failed, or ends by `parser.exit`, waits for the others, which may wait for it.

    Args:
        failures: what the run fails with, besides a loss that is no number.
    """
    import jax

    from lm_jax.train_loop import NonFiniteLoss, Preempted
    from sharding import distributed

    def leave(status: int, message: str = "") -> None:
        if jax.process_count() == 1:
            parser.exit(status, message)
        sys.stderr.flush()
        os.write(2, message.encode())
        os._exit(status)

    try:
        yield
    except SystemExit as ended:
        if not isinstance(ended.code, int) or not ended.code:
            raise
        leave(ended.code)
    except (NonFiniteLoss, *failures) as error:
        leave(1, f"error: {error}\n")
    except Preempted as error:
        os.write(2, f"{error}; {STOPPED}".encode())
        os._exit(distributed.PREEMPTED)  # at once: of the other processes some may be gone already
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        if not _lost(error) or not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
            os._exit(1)
        reason = f"{error}\nprocess {jax.process_index()}: the run cannot go on without the others; {STOPPED}"
        os.write(2, reason.encode())
        os._exit(distributed.PREEMPTED)


def _lost(error: Exception) -> bool:
    """Whether an error is that another process is gone."""
    return bool(_LOST.search(str(error)) and not _OWN.search(str(error)))


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, ((SHOW_CURSOR if os.isatty(2) else "") + STOPPED).encode())
    os._exit(128 + number)
