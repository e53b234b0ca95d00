"""SIGTERM while a process does something that never ends: it ends all the same, in the time that it is given."""

import os
import subprocess
import sys
import time

import pytest

from sharding.distributed import GRACE, PREEMPTED
from tests.many_processes import REPOSITORY

HANGING = """
import os, signal, sys, time

from sharding import distributed

distributed.GRACE = float(sys.argv[1])
assert not distributed.stop.wanted()
distributed.stop.listen(lambda: print("told", flush=True))
for _ in range(int(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGTERM)
assert distributed.stop.wanted()  # a step would save now
time.sleep(60)
"""


@pytest.mark.parametrize(("grace", "signals", "status"), [(0.5, 1, PREEMPTED), (60, 2, 128 + 15)])
def test_a_process_that_is_told_to_stop_ends_in_the_time_it_is_given(grace, signals, status):
    command = [sys.executable, "-c", HANGING, str(grace), str(signals)]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=300
    )
    assert (done.returncode, done.stdout) == (status, "told\n"), done.stderr
    assert time.monotonic() - began > (grace if signals == 1 else 0)


def test_the_stated_values():
    """docs/tpu_pod.md and scripts/tpu_pod.sh say them."""
    page = (REPOSITORY / "docs/tpu_pod.md").read_text()
    assert f"status {PREEMPTED}" in page and f"after {GRACE} s" in page
    assert f"exit status {PREEMPTED}" in (REPOSITORY / "scripts/tpu_pod.sh").read_text()
