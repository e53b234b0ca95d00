import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax import train_loop
from lm_jax.checkpoint import Checkpoints
from lm_jax.run_log import RunLog
from lm_jax.token_loss import ratio
from lm_jax.train_loop import NonFiniteLoss, fit
from lm_jax.train_state import Step, TrainState, create

OPTIMIZER = optax.adam(0.1)


@jax.jit
def gradients(parameters, batch, coefficients):
    def loss(parameters):
        error = ((parameters["w"] - batch["x"]) ** 2).sum(-1)
        return coefficients["fit"] * ratio((batch["weight"] * error).sum(), batch["weight"].sum())

    value, gradient = jax.value_and_grad(loss)(parameters)
    return gradient, {"loss": value}


def make_step() -> Step:
    """A step of a toy model that has the interface of `make_step`, and donates its state as that does."""

    @jax.jit(donate_argnums=0)
    def update(state, batch, coefficients, learning_rate):
        gradient, metrics = gradients(state.parameters, batch, coefficients)
        updates, moments = OPTIMIZER.update(gradient, state.optimizer)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        parameters = {name: x + learning_rate * updates[name] for name, x in state.parameters.items()}
        return TrainState(state.step + 1, parameters, moments), metrics

    return Step(update, gradients)


def first_state() -> TrainState:
    return create({"w": jnp.linspace(-1.0, 1.0, 50_000)}, OPTIMIZER)


def batch_at(state, step):
    """From the step number and the state, as rollouts are."""
    rng = np.random.default_rng(step)
    drawn = float(state.parameters["w"][step]) + rng.normal(size=(4, 50_000))
    batch = {"x": drawn.astype(np.float32), "weight": np.ones(4, np.float32), "groups": np.ones((4, 5), np.int32)}
    return batch, {"reward": float(step)}


def run(folder, steps=11, save_every=3, batch_at=batch_at, step=None):
    log = RunLog(folder)
    try:
        return fit(
            stage="toy",
            state=first_state(),
            step=step or make_step(),
            batch_at=batch_at,
            coefficients=lambda step: {"fit": 1.0 + 0.1 * step},
            learning_rate=lambda step: 1.0 / (1 + step),
            steps=steps,
            folder=folder / "checkpoints",
            log=log,
            save_every=save_every,
        )
    finally:
        log.close()


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Killed(BaseException):
    pass


def killed_at(step):
    def draw(state, number):
        if number == step:
            raise Killed
        return batch_at(state, number)

    return draw


def assert_same_bits(first, second):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder), records(folder)


def test_seconds_are_added_up_over_resumes(tmp_path, monkeypatch):
    """A clock that moves one second a look: what a killed process had done counts, the time it was away does not."""
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(train_loop, "time", types.SimpleNamespace(monotonic=tick))
    with pytest.raises(Killed):
        run(tmp_path, batch_at=killed_at(8))
    before = [record["seconds"] for record in records(tmp_path)]
    assert before == list(range(1, len(before) + 1))
    now[0] += 1e6
    run(tmp_path)
    after = [record["seconds"] for record in records(tmp_path)]
    assert after[:6] == before[:6]  # the checkpoint at 6 is the newest
    assert after[6:] == [before[-1] + n for n in range(1, 6)]


@pytest.mark.parametrize("kills", [[1], [3], [5], [10], [4, 4, 8]])
def test_a_resumed_run_ends_with_the_same_bits_and_one_record_a_step(tmp_path, uninterrupted, kills):
    for step in kills:
        with pytest.raises(Killed):
            run(tmp_path, batch_at=killed_at(step))
    final, expected = uninterrupted
    assert_same_bits(run(tmp_path), final)
    found = records(tmp_path)
    assert [record["step"] for record in found] == list(range(11))
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("stage", "step", "loss", "grad_norm", "reward", "learning_rate"):
            assert mine[name] == theirs[name]
        assert mine["learning_rate"] == 1.0 / (1 + mine["step"])
        assert mine["tokens_per_second"] > 0


def test_a_metric_without_data_is_left_out_of_the_log(tmp_path):
    step = make_step()

    def update(*arguments):
        state, metrics = step.update(*arguments)
        return state, metrics | {"of_nothing": jnp.float32(0) / 0, "of_something": jnp.float32(0)}

    run(tmp_path, steps=2, step=Step(update, gradients))
    found = records(tmp_path)
    assert len(found) == 2
    for record in found:
        assert "of_nothing" not in record
        assert record["of_something"] == 0


def test_told_to_stop_it_ends_after_steps_that_belong_together(tmp_path, monkeypatch, uninterrupted):
    """Every third step draws anew from the state before it; a run that stopped between would draw too early."""
    held = {}

    def thirds(state, step):
        start = step - step % 3
        if start not in held:
            held[start] = batch_at(state, start)
        return held[start]

    def run_thirds(folder):
        held.clear()
        log = RunLog(folder)
        return fit(
            stage="toy", state=first_state(), step=make_step(), batch_at=thirds, coefficients=lambda step: {"fit": 1.0},
            learning_rate=lambda step: 1.0, steps=11, folder=folder / "checkpoints", log=log, save_every=6, together=3,
        )  # fmt: skip

    whole = run_thirds(tmp_path / "whole")
    asked = iter(range(1, 100))
    with monkeypatch.context() as patched:
        patched.setattr(train_loop.distributed.stop, "wanted", lambda: next(asked) >= 4)
        with pytest.raises(train_loop.Preempted, match="saved at step 6"):
            run_thirds(tmp_path / "stopped")
    assert_same_bits(run_thirds(tmp_path / "stopped"), whole)


def test_a_checkpoint_holds_the_state_of_its_step_though_the_next_step_overwrites_it(tmp_path):
    """The state is donated to the next step while the checkpoint may still be being written."""
    with pytest.raises(Killed):
        run(tmp_path, batch_at=killed_at(5))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() == 3
    saved = checkpoints.restore(3, jax.eval_shape(first_state))
    checkpoints.close()
    assert int(saved.step) == 3
    assert_same_bits(saved, run(tmp_path / "three", steps=3))


def test_a_checkpoint_cut_short_is_not_used_and_the_log_says_so(tmp_path, uninterrupted, capsys):
    """A kill between step 3 and step 6 may leave a part of the checkpoint after step 6."""
    with pytest.raises(Killed):
        run(tmp_path, batch_at=killed_at(5))
    partial = tmp_path / "checkpoints/6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/3", partial)
    next(path for path in partial.rglob("*") if path.is_file() and "METADATA" not in path.name.upper()).unlink()
    capsys.readouterr()
    assert_same_bits(run(tmp_path), uninterrupted[0])
    said = capsys.readouterr().err
    assert "toy: the checkpoint 6.orbax-checkpoint-tmp was cut short and is not used\ntoy: resumed at step 3\n" in said
    assert not partial.exists()


def test_one_compilation_for_a_whole_stage(tmp_path):
    step = make_step()
    run(tmp_path, step=step)
    assert step.update._cache_size() == 1


def test_a_finished_stage_does_nothing_more(tmp_path, uninterrupted):
    run(tmp_path, steps=7, save_every=3)
    seen = []
    run(tmp_path, steps=7, save_every=3, batch_at=lambda state, n: (seen.append(n), batch_at(state, n))[1])
    assert seen == [6]  # from the checkpoint after step 5


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_where(tmp_path, bad):
    def draw(state, step):
        batch, host = batch_at(state, step)
        if step == 7:
            batch["x"][0, 0] = np.nan if bad == "loss" else 1e25  # its square is infinite
        return batch, host

    with pytest.raises(NonFiniteLoss, match=r"toy: loss (nan|inf), .* at step 7; .* checkpoint is .*checkpoints.6"):
        run(tmp_path, batch_at=draw)
    assert [record["step"] for record in records(tmp_path)] == list(range(7))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() == 6
    assert np.isfinite(checkpoints.restore(6, jax.eval_shape(first_state)).parameters["w"]).all()
    checkpoints.close()


def test_a_bad_loss_right_before_a_checkpoint_is_not_kept(tmp_path):
    def draw(state, step):
        batch, host = batch_at(state, step)
        if step == 2:
            batch["x"][0, 0] = np.nan
        return batch, host

    with pytest.raises(NonFiniteLoss, match=r"at step 2; no checkpoint yet"):
        run(tmp_path, batch_at=draw)
    assert records(tmp_path)[-1]["step"] == 1


def test_the_checkpoint_an_error_names_is_on_disk(tmp_path, monkeypatch):
    """Writing goes on in the background: the error must not overtake it."""
    closed = []
    original = Checkpoints.close
    monkeypatch.setattr(train_loop.Checkpoints, "close", lambda self: (original(self), closed.append(self)))

    def draw(state, step):
        batch, host = batch_at(state, step)
        if step == 3:
            batch["x"][0, 0] = np.nan
        return batch, host

    with pytest.raises(NonFiniteLoss, match=r"checkpoint is .*checkpoints.3"):
        run(tmp_path, batch_at=draw)
    assert len(closed) == 1
