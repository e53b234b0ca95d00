"""Who computes which rows; SIGTERM while a process does something that never ends: it ends in the time it is given."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from sharding.chips import topology
from sharding.distributed import GRACE, PREEMPTED, pieces, row_blocks
from sharding.mesh import make_mesh
from tests.many_processes import REPOSITORY, start_together

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


SCORING = """
import os, signal, time

from lm_jax.program import end_at_once_when_stopped
from sharding import distributed

end_at_once_when_stopped()
distributed.start()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_program_without_steps_that_joins_others_ends_at_once_when_told(tmp_path):
    [(status, said)] = start_together([["-c", SCORING]], tmp_path / "logs", alone=False)
    assert status == 128 + 15, said


def test_the_stated_values():
    """docs/tpu_pod.md and scripts/tpu_pod.sh say them."""
    page = (REPOSITORY / "docs/tpu_pod.md").read_text()
    assert f"status {PREEMPTED}" in page and f"after {GRACE} s" in page
    assert f"exit status {PREEMPTED}" in (REPOSITORY / "scripts/tpu_pod.sh").read_text()


@pytest.mark.parametrize(
    ("slice_name", "shape", "processes", "count"),
    [
        ("v5p:4x4x4", "fsdp=16,tensor=4", 16, 8),  # two hosts for each pair of blocks, and the pair lies apart
        ("v5p:4x4x4", "fsdp=64", 16, 16),
        ("v5e:4x4", "fsdp=16", 4, 4),
        ("v5e:4x4", "fsdp=2,tensor=8", 4, 2),
        ("v5p:2x2x4", "fsdp=2,tensor=8", 4, 1),  # every host holds parts of both blocks
    ],
)
def test_the_hosts_of_a_slice_agree_on_the_pieces_of_a_batch(slice_name, shape, processes, count):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it describes slices")
    mesh = make_mesh(shape, topology(slice_name)[1])
    held, found = row_blocks(mesh), pieces(mesh)
    assert len(held) == processes and len(found) == count
    assert {len(piece) for piece in found} == {mesh.shape["fsdp"] // count}
    assert sorted(np.concatenate(found).tolist()) == list(range(mesh.shape["fsdp"]))
    assert set(held.values()) <= set(found)


def test_processes_that_hold_rows_in_turn_share_the_work_and_get_them_back_in_order(tmp_path):
    ends = start_together([[REPOSITORY / "tests/sharding/interleaved.py"]] * 2, tmp_path / "logs")
    assert [status for status, _ in ends] == [0, 0], ends
    for index, (_, said) in enumerate(ends):
        found = json.loads(said.splitlines()[-1])
        assert found["share"] == [index, 2]
        assert found["whole"] == (2 * np.arange(16.0).reshape(8, 2)).tolist()
        assert found["total"] == 120.0
