"""The recipe of the rewriter: sessions -> supervised start -> phases -> evaluation -> exported rewriter, resumable.

The deployed relevance model is frozen throughout. After the start and after every phase the rewriter is measured on
sessions that it is not trained on; a finished stage is skipped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from afrl_jax.data import batches
from afrl_jax.scoring import RelevanceModel
from afrl_jax.sft import SFT
from afrl_jax.sft import TERMS as SFT_TERMS
from core_jax import grpo
from core_jax.evaluation import Evaluated, evaluate
from core_jax.inputs import Inputs, open_inputs
from core_jax.phases import Phase, adapted, learning_rate, make_optimizer
from core_jax.relevance import BM25Relevance, DeployedRelevance, Relevance
from core_jax.report import write_report
from core_jax.rewriter import Rewriter, export_weights
from core_jax.sampler import InProcess, Sampler, Server
from core_jax.schema import SearchSession
from core_jax.search.trial import Trial
from core_jax.settings import Settings, TrainSettings
from lm_jax import lora, run_log, train_state
from lm_jax.parameters import Parameters, abstract, initialize
from lm_jax.run_folder import RunFolder, refuse_other_config, refuse_other_data
from lm_jax.token_loss import Objective
from lm_jax.train_loop import BatchAt, fit
from lm_jax.weights import read_weights

START, GRPO = "start", "grpo"
GOLDEN = 8  # contexts that an exported rewriter proves itself with


class OtherRelevance(RuntimeError):
    """The deployed relevance model was exchanged in the middle of a run."""


class Recipe:
    """One run of one config in one folder. Making it checks config and data; the folder appears when it runs.

    Raises:
        ValueError, OSError: as `read_settings`, `open_inputs` and `RunFolder` say.
    """

    def __init__(self, settings: Settings, config: Mapping[str, Any], workdir: Path):
        refuse_other_config(workdir, config)
        self.settings, self.config = settings, config
        self.inputs = open_inputs(settings)
        refuse_other_data(workdir, self.inputs.digests)
        self._workdir = workdir
        self.held: tuple[str, Parameters] | None = None  # the stage whose parameters are in memory

    @functools.cached_property
    def run(self) -> RunFolder:
        """The run's folder, which appears when it is first asked for: others may check more of the config before."""
        folder = RunFolder(self._workdir, self.config)
        folder.keep_digests(self.inputs.digests)
        return folder

    @property
    def stages(self) -> list[str]:
        """The training stages in order: the start, then the phases, or GRPO as one."""
        if self.settings.arm == "grpo":
            return [START, GRPO]
        return [START, *(f"phase{number}" for number in range(1, self.settings.phases.count + 1))]

    def __call__(self) -> dict[str, float]:
        """Run what is not finished yet; returns the report's metrics."""
        log = run_log.RunLog(self.run.path)
        if self.inputs.mesh is not None:
            jax.set_mesh(self.inputs.mesh)
        evaluated = {}
        for number, name in enumerate(self.stages):
            if self.run.finished(name) is None:
                self._train(number, name, log)
            else:
                run_log.say(f"{name}: finished before")
            evaluated[name] = self._evaluate(name)
        log.close()
        metrics = self._report(evaluated)
        self._export(metrics)
        return metrics

    # --- what the stages share --------------------------------------------------------------------------------------

    @functools.cached_property
    def relevance(self) -> Relevance:
        """The reward's relevance, frozen: the deployed model, or the proxy arm."""
        if self.settings.proxy:
            shown = [each.document for session in self.inputs.training.sessions for each in session.shown]
            return BM25Relevance(shown)
        return self.deployed

    @functools.cached_property
    def deployed(self) -> DeployedRelevance:
        """The deployed relevance model; every figure of the report is by it, whatever the reward asks.

        Raises:
            OtherRelevance: the run began with another.
        """
        model = RelevanceModel.load(self.settings.relevance, dtype=self.settings.dtype, mesh=self.inputs.mesh)
        deployed = DeployedRelevance(model, self.run.path / "relevance.sqlite")
        version = self.run.once("relevance", lambda: {"version": deployed.version})["version"]
        if version != deployed.version:
            raise OtherRelevance(
                f"relevance: {self.settings.relevance} holds version {deployed.version[:12]}, the run began with "
                f"{version[:12]}; put that back, or use another --workdir"
            )
        return deployed

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Where phases draw their rewrites."""
        return make_sampler(self.settings, self.inputs, self.run.path / "served")

    def _parameters_after(self, name: str) -> Parameters:
        if self.held is None or self.held[0] != name:
            self.held = None
            self.held = (name, self.run.arrays(name, abstract(self.inputs.shape, self.inputs.mesh)))
        return self.held[1]

    # --- training --------------------------------------------------------------------------------------------------

    def _train(self, number: int, name: str, log: run_log.RunLog) -> None:
        seed = self.settings.seed * 1000 + number
        if name == START:
            parameters = self._start(seed, log)
        elif name == GRPO:
            parameters = self._grpo(seed, log)
        else:
            phase = Phase(
                name, self.settings, self.inputs, self._sessions_of(number - 1), relevance=self.relevance,
                sampler=self.sampler, run=self.run, log=log, seed=seed,
            )  # fmt: skip
            parameters = phase(self._parameters_after(self.stages[number - 1]))
        self.held = (name, parameters)

    def _sessions_of(self, phase: int) -> list[SearchSession]:
        """The phase's sessions: the next `phases.contexts` of the training sessions, in turn."""
        sessions = self.inputs.training.sessions
        count = self.settings.phases.contexts or len(sessions)
        return [sessions[(phase * count + place) % len(sessions)] for place in range(min(count, len(sessions)))]

    def _start(self, seed: int, log: run_log.RunLog) -> Parameters:
        """The rewriter before any reward: pretrained or random, then supervised where the config says so."""
        settings, inputs, stage = self.settings, self.inputs, self.settings.supervised
        if settings.rewriter.source:
            parameters = read_weights(settings.rewriter.source, mesh=inputs.mesh)[1]
        else:
            parameters = initialize(inputs.shape, settings.seed, inputs.mesh)
        if not stage.mixture:
            self.run.finish(START, {"seconds": 0.0, "steps": 0}, parameters)
            return parameters
        groups = [(inputs.supervised[name], share) for name, share in stage.mixture.items()]
        shape = batches.sft_row_shape([group for some, _ in groups for group in some], stage.row_tokens, 1)
        dataset = batches.row_batches(groups, shape, rows=stage.rows, branches_together=1, seed=seed)
        coefficients = dict.fromkeys(SFT_TERMS, 0.0) | {"sft/explanation": 1.0}
        return self.fit(START, stage, stage.steps, parameters, SFT, batches.in_order(dataset), coefficients, log)

    def _grpo(self, seed: int, log: run_log.RunLog) -> Parameters:
        stage, sessions = self.settings.grpo, self.inputs.training.sessions
        source = grpo.RolloutSource(self.settings, self.inputs, sessions, self.relevance, seed)
        steps = grpo.steps_of_budget(self.settings, len(sessions))
        objective = grpo.objective(self.settings)
        return self.fit(
            GRPO, stage, steps, self._parameters_after(START), objective, source.batch, grpo.COEFFICIENTS, log
        )

    def fit(
        self,
        name: str,
        stage: TrainSettings,
        steps: int,
        parameters: Parameters,
        objective: Objective,
        batch_at: BatchAt,
        coefficients: Mapping[str, float],
        log: run_log.RunLog,
    ) -> Parameters:
        """Train one stage to its end in the run's folder; the parameters that it began with are given up."""
        self.held = None
        settings, shape = self.settings, self.inputs.shape
        transformation = make_optimizer(shape, stage)
        parameters = adapted(parameters, stage, self.inputs, settings, settings.seed)
        state = fit(
            stage=name,
            state=train_state.create(parameters, transformation),
            step=train_state.make_step(
                shape, objective, transformation, label_ids=(0,), micro_batches=stage.micro_batches,
                dtype=settings.dtype, remat=settings.remat,
            ),  # no grade is read here: label id 0 stands for none
            batch_at=batch_at,
            coefficients=lambda step: coefficients,
            learning_rate=learning_rate(stage, steps),
            steps=steps,
            folder=self.run.checkpoints(name),
            log=log,
            save_every=stage.save_every,
            mesh=self.inputs.mesh,
        )  # fmt: skip
        seconds = round(log.seconds(name), 1)
        parameters = lora.merge(state.parameters, config=shape)
        self.run.finish(name, {"seconds": seconds, "steps": steps}, parameters)
        run_log.say(f"{name}: {steps} steps in {seconds:.0f} s")
        return parameters

    # --- measuring -------------------------------------------------------------------------------------------------

    def _rewriter(self, name: str) -> Rewriter:
        return Rewriter(
            self.inputs.shape, self._parameters_after(name), self.inputs.format,
            max_new_tokens=self.settings.rewriter.max_new_tokens, dtype=self.settings.dtype,
        )  # fmt: skip

    def _evaluate(self, name: str) -> Evaluated:
        folder = self.run.path / "stages" / f"evaluate.{name}"
        if self.run.finished(folder.name) is None:
            began = time.monotonic()
            held_out, reward = self.inputs.held_out, self.settings.reward
            evaluated = evaluate(self._rewriter(name), held_out, self.deployed, reward, self._trial)
            evaluated.save(folder)
            self.run.finish(folder.name, {"seconds": round(time.monotonic() - began, 1)})
            rate = evaluated.values["improvement_rate"].mean()
            run_log.say(f"{name}: {rate:.1%} of held-out rewrites improve on their query")
        return Evaluated.load(folder)

    @functools.cached_property
    def _trial(self) -> Trial | None:
        """Searches of the first held-out contexts, where what was meant is known."""
        truth, count = self.inputs.held_out.truth, self.settings.evaluation.searches
        return Trial.of(truth[:count], truth[count:]) if truth and count else None

    def _report(self, evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
        training, held_out = self.inputs.training, self.inputs.held_out
        finished = {name: self.run.finished(name) for name in self.stages}
        seconds = finished | {f"evaluate.{name}": self.run.finished(f"evaluate.{name}") for name in evaluated}
        facts = {f"{name} (s)": f"{each['seconds']:.0f}" for name, each in seconds.items()}
        facts["rewriter parameters"] = f"{self.inputs.shape.parameter_count:,}"
        facts["relevance model"] = f"{self.settings.relevance} ({self.deployed.version[:12]})"
        facts["training sessions"] = f"{len(training.sessions):,}; {training.without_contrast:,} had no contrast"
        for name, count in self.inputs.too_long.items():
            facts[f"rewrites.{name}"] = f"{count:,} left out: more than {self.settings.rewriter.max_new_tokens} tokens"
        facts["held-out sessions"] = f"{len(held_out.sessions):,}; {held_out.without_contrast:,} had no contrast"
        return write_report(
            self.run.path / "report",
            evaluated,
            {name: facts for name, facts in finished.items() if "pairs" in facts},
            title=self.settings.title or "CoRe run",
            records=run_log.read_log(self.run.path / "log.jsonl"),
            facts=facts,
            seed=self.settings.seed,
            resamples=self.settings.evaluation.resamples,
        )

    def _export(self, metrics: Mapping[str, float]) -> None:
        """The rewriter of the last stage becomes export/."""
        last = self.stages[-1]
        contexts = self.inputs.held_out.contexts
        golden = contexts[:: max(1, len(contexts) // GOLDEN)][:GOLDEN]
        figures = {key.removeprefix(f"{last}/"): value for key, value in metrics.items() if key.startswith(f"{last}/")}

        def export() -> dict[str, Any]:
            described = self._rewriter(last).export(
                self.run.path / "export", golden, figures=figures, relevance_version=self.deployed.version,
                title=self.settings.title,
            )  # fmt: skip
            return {"weights_digest": described["weights_digest"]}

        self.run.once("export", export, leaves=self.run.path / "export")
        run_log.say(f"report: {self.run.path / 'report' / 'report.html'}\nexport: {self.run.path / 'export'}")


def make_sampler(settings: Settings, inputs: Inputs, served: Path) -> Sampler:
    """The sampler that a config names, for prompts as long as those of `inputs`; a server reads the folder `served`."""
    answer = settings.rewriter.max_new_tokens
    if settings.sampler.url:
        return Server(
            inputs.format, settings.sampler.url, served,
            lambda parameters, folder: export_weights(folder, inputs.shape, parameters, inputs.format.tokenizer),
            max_new_tokens=answer, reload=settings.sampler.reload, model=settings.sampler.model,
            parallel=settings.sampler.parallel, patience=settings.sampler.patience,
        )  # fmt: skip
    return InProcess(
        inputs.format, inputs.shape, max_new_tokens=answer, prompt_tokens=inputs.prompt_tokens,
        rows=settings.phases.rows, dtype=settings.dtype, mesh=inputs.mesh,
    )  # fmt: skip


def run(settings: Settings, config: Mapping[str, Any], workdir: Path) -> dict[str, float]:
    """Run a config in a folder, from wherever it stands; returns the report's metrics."""
    return Recipe(settings, config, workdir)()
