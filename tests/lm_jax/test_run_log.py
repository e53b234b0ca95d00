import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lm_jax import run_log
from lm_jax.run_log import RunLog, read_log


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_record_a_step(tmp_path):
    log = RunLog(tmp_path)
    log.write("sft", 0, {"loss": 1.5, "grad_norm": math.inf, "reward": math.nan})
    log.write("sft", 1, {"loss": 1.25})
    log.close()
    first, second = records(tmp_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"stage": "sft", "step": 0, "loss": 1.5, "grad_norm": None, "reward": None}
    assert second == {"stage": "sft", "step": 1, "loss": 1.25}


def test_resuming_forgets_what_will_be_written_again(tmp_path):
    log = RunLog(tmp_path)
    log.resume("sft", 0)  # nothing yet
    for stage in ("text", "sft"):
        for step in range(5):
            log.write(stage, step, {"loss": float(step)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 5, "lo')  # a kill in the middle of a line
    again = RunLog(tmp_path)
    again.resume("sft", 3)
    again.write("sft", 3, {"loss": 30.0})
    assert [(r["stage"], r["step"]) for r in records(tmp_path)] == [
        *(("text", step) for step in range(5)), *(("sft", step) for step in range(4)),
    ]  # fmt: skip
    assert records(tmp_path)[-1]["loss"] == 30.0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["log.jsonl"]


def test_seconds_of_a_stage_are_those_of_its_newest_record(tmp_path):
    log = RunLog(tmp_path)
    assert log.seconds("sft") == 0
    for stage, seconds in (("text", 7.5), ("sft", 2.0), ("sft", 3.5)):
        log.write(stage, 0, {"seconds": seconds})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 2, "seco')
    assert [log.seconds(stage) for stage in ("text", "sft", "rl")] == [7.5, 3.5, 0]


def test_a_silent_process_reads_no_log_that_another_is_writing(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("half a line of\nanother process")
    monkeypatch.setattr(run_log, "_silent", False)
    run_log.silence()
    assert RunLog(tmp_path).seconds("sft") == 0


def tensorboard_events(file):
    data = file.read_bytes()
    while data:  # records of a TFRecord file: length (8 bytes), its checksum (4), the event, its checksum (4)
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_sees_the_finite_values_of_each_stage(tmp_path):
    log = RunLog(tmp_path)
    log.write("rl", 4, {"reward": 0.75, "kl": math.nan})
    log.write("distill", 0, {"loss": 2.0})
    log.close()
    found = [
        (file.parent.name, value.tag, event.step, value.simple_value)
        for file in sorted((tmp_path / "tensorboard").glob("*/*"))
        for event in tensorboard_events(file)
        for value in event.summary.value
    ]
    assert found == [("distill", "loss", 0, 2.0), ("rl", "reward", 4, 0.75)]


def test_tensorboard_is_told_which_steps_a_resumed_stage_writes_again(tmp_path):
    log = RunLog(tmp_path)
    for step in (2, 3):
        log.write("rl", step, {"reward": 0.5})
    log.close()
    (file,) = (tmp_path / "tensorboard" / "rl").iterdir()
    started = [event.step for event in tensorboard_events(file) if event.session_log.status == SessionLog.START]
    assert started == [2]  # what other files have from this step on is hidden


@pytest.mark.parametrize("watched", [True, False])
def test_progress_passes_everything_on(monkeypatch, watched):
    monkeypatch.setattr(run_log.sys.stderr, "isatty", lambda: watched, raising=False)
    assert list(run_log.progress(range(3, 7), "sft", 7, 3)) == [3, 4, 5, 6]


def test_where_nobody_watches_a_line_now_and_then_says_how_long(monkeypatch):
    said, clock = [], iter(np.arange(0.0, 1000.0, 20.0))
    monkeypatch.setattr(run_log, "say", said.append)
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(run_log.sys.stderr, "isatty", lambda: False, raising=False)
    run_log.set_note("loss 0.5")
    list(run_log.progress(range(6, 12), "sft", 12, 6, every=30.0))
    # 20 seconds an item; a line at the second and at the fourth of six.
    assert said == [f"sft: {done}/12, {left} s left  loss 0.5" for done, left in ((8, 80), (10, 40), (12, 0))]
    run_log.set_note("")


def test_read_log_leaves_out_a_torn_last_line_only(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "sft", "step": 1, "loss": 2.5}\n{"stage": "sft", "st')
    assert read_log(path) == [{"stage": "sft", "step": 1, "loss": 2.5}]
    path.write_text('{"stage"\n{"stage": "sft", "step": 1}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:1: not a log record"):
        read_log(path)


def test_events_outlive_a_process_that_ends_at_once(tmp_path):
    log = RunLog(tmp_path)
    log.write("sft", 0, {"loss": 2.0})
    log.close()  # before os._exit
    (file,) = (tmp_path / "tensorboard" / "sft").glob("*")
    assert [event.step for event in tensorboard_events(file) for _ in event.summary.value] == [0]
    log.close()  # once more, as a run that ends well does
