"""The recipe: judgments -> staged training -> distillation -> evaluation -> exported model, in one resumable run.

The stages of a config run in order. Each trains the teacher or the student from where the stage before it left that
model, and leaves its parameters in the run folder; a finished stage is skipped. Before the first `distill` stage the
teacher writes its label distributions to disk; from then on it is not in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afrl_jax.data import batches, clips_rulebooks
from afrl_jax.distill import graded_by_teacher
from afrl_jax.export import export_model
from afrl_jax.inputs import open_inputs
from afrl_jax.instructions import BUDGET, CONNECTION
from afrl_jax.instructions.budget import BudgetExceeded
from afrl_jax.instructions.probe import ModelJudge
from afrl_jax.instructions.run import evolve_instruction
from afrl_jax.instructions.synthesis import read_the_words
from afrl_jax.label_scorer import LabelScorer
from afrl_jax.model_evaluation import Evaluated, evaluate_model
from afrl_jax.report import write_report
from afrl_jax.rollouts import RolloutSource, repeat_updates
from afrl_jax.schema import Judgment
from afrl_jax.scoring import RelevanceModel
from afrl_jax.settings import DistillStage, EvolveStage, ModelSettings, RLStage, Settings, Stage, TextStage
from afrl_jax.stage_steps import stage_learning_rate, stage_objective, stage_step
from lm_jax import lora, run_log, train_state
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters, abstract, initialize
from lm_jax.rows import Group
from lm_jax.run_folder import RunFolder, refuse_other_config, refuse_other_data
from lm_jax.shape import cut_layers, evenly_spaced
from lm_jax.token_loss import Objective
from lm_jax.train_loop import BatchAt, fit
from lm_jax.weights import read_weights
from sharding import distributed


class Recipe:
    """One run of one config in one folder. Making it checks config and data; only then does the folder appear.

    Raises:
        ValueError, OSError: as `read_settings`, `open_inputs` and `RunFolder` say.
    """

    def __init__(self, settings: Settings, config: Mapping[str, Any], workdir: Path):
        if settings.evolve and jax.process_count() > 1:
            raise ValueError(
                f"evolve: an instruction evolves in one process, not in {jax.process_count()}; leave it out here and "
                "run python -m afrl_jax.instructions on the model that is exported"
            )
        compared = _compared(config)
        refuse_other_config(workdir, compared)
        self.settings, self.config = settings, config
        self.stages = dict(zip(settings.stage_names, settings.stages, strict=True))
        self.inputs = open_inputs(settings, workdir / "tokenizer")
        self.format, self.mesh, self.judgments = self.inputs.format, self.inputs.mesh, self.inputs.judgments
        self.digests = self.inputs.digests()
        refuse_other_data(workdir, self.digests, "data.")
        self.run = RunFolder(workdir, compared)
        self.held: tuple[str, Parameters] | None = None  # the stage whose parameters are in memory
        distributed.on_primary("inputs", self._keep_inputs)

    def __call__(self) -> dict[str, float]:
        """Run what is not finished yet; returns the report's metrics."""
        log = run_log.RunLog(self.run.path)
        if self.mesh is not None:
            jax.set_mesh(self.mesh)
        for name, stage in self.stages.items():
            if isinstance(stage, DistillStage):
                self._teacher_labels(stage)
            if self.run.finished(name) is None:
                self._train(name, stage, log)
            else:
                run_log.say(f"{name}: finished before")
        log.close()
        if self.settings.evolve:
            self.run.once("evolve", lambda: self._evolve(self.settings.evolve))
        evaluated = {name: self._evaluate(name, stage) for name, stage in self._evaluated_stages().items()}
        metrics = self._report(evaluated) if distributed.is_primary() else {}
        self._export(evaluated, metrics)
        return metrics

    def _keep_inputs(self) -> None:
        self.run.keep_digests(self.digests)
        folder = self.run.path / "tokenizer"
        if self.settings.tokenizer == "train" and not folder.exists():
            self.format.tokenizer.save(partial := folder.with_name("tokenizer.partial"))
            partial.rename(folder)

    # --- models ----------------------------------------------------------------------------------------------------

    def _start(self, model: str) -> Parameters:
        """The first parameters of the teacher or the student."""
        settings: ModelSettings = getattr(self.settings, model)
        if settings.cut:
            teacher, parameters = self.inputs.shapes["teacher"], self._parameters_after(self._last_stage("teacher"))
            return cut_layers(teacher, parameters, evenly_spaced(teacher.layers, settings.cut))[1]
        if settings.source:
            return read_weights(settings.source, mesh=self.mesh)[1]
        return initialize(self.inputs.shapes[model], self.settings.seed + (model == "student"), self.mesh)

    def _last_stage(self, model: str, before: str | None = None) -> str | None:
        names = self.settings.stage_names
        earlier = names[: names.index(before)] if before else names
        return next((name for name in reversed(earlier) if self.stages[name].model == model), None)

    def _parameters_after(self, stage_name: str) -> Parameters:
        if self.held is None or self.held[0] != stage_name:
            self.held = None
            config = self.inputs.shapes[self.stages[stage_name].model]
            self.held = (stage_name, self.run.arrays(stage_name, abstract(config, self.mesh)))
        return self.held[1]

    # --- training --------------------------------------------------------------------------------------------------

    def _train(self, name: str, stage: Stage, log: run_log.RunLog) -> None:
        began = time.monotonic()
        before = self._last_stage(stage.model, name)
        config = self.inputs.shapes[stage.model]
        parameters = self._parameters_after(before) if before else self._start(stage.model)
        self.held = None
        parameters = lora.attach(
            config, parameters, rank=stage.lora_rank, targets=stage.lora_targets, seed=self.settings.seed,
            dtype=self.settings.dtype, mesh=self.mesh,
        )  # fmt: skip
        objective, batch_at, coefficients = self._objective(name, stage, config, parameters)
        transformation, step = stage_step(stage, config, objective, self.format.label_ids, self.settings)
        if isinstance(stage, RLStage) and stage.kl:
            parameters = jax.tree.map(lambda x: x.copy(), parameters)  # the step donates them; the reference stays
        preparing = time.monotonic() - began
        state = fit(
            stage=name,
            state=train_state.create(parameters, transformation),
            step=step,
            batch_at=batch_at,
            coefficients=coefficients,
            learning_rate=stage_learning_rate(stage),
            steps=stage.steps,
            folder=self.run.checkpoints(name),
            log=log,
            save_every=stage.save_every,
            mesh=self.mesh,
            together=stage.updates if isinstance(stage, RLStage) else 1,
        )
        parameters = lora.merge(state.parameters, config=config)
        seconds = round(preparing + log.seconds(name), 1)
        self.run.finish(name, {"seconds": seconds, "steps": stage.steps}, parameters)
        self.held = (name, parameters)
        run_log.say(f"{name}: {stage.steps} steps in {seconds:.0f} s")

    def _objective(
        self, name: str, stage: Stage, config: DecoderConfig, parameters: Parameters
    ) -> tuple[Objective, BatchAt, Callable[[int], dict[str, float]]]:
        """What a stage minimizes, the batch of each step, and the coefficients of its terms."""
        # A stage numbers its sources from its seed on: no two stages may share one.
        seed = (self.settings.seed * 1000 + self.settings.stage_names.index(name)) * 100
        if isinstance(stage, RLStage):
            return self._rl(stage, config, parameters, seed)
        if isinstance(stage, TextStage):
            groups = [(self._groups(stage.texts, stage), 1.0)]
        else:
            groups = [(self._groups(source, stage), share) for source, share in stage.mixture.items()]
        grades = len(self.format.labels)
        shape = batches.sft_row_shape([g for some, _ in groups for g in some], stage.row_tokens, grades)
        if isinstance(stage, DistillStage):
            teacher = ("teacher_logprob", (grades,))
            shape = dataclasses.replace(shape, label_values=(*shape.label_values, teacher))
        dataset = batches.row_batches(
            groups, shape, rows=stage.rows, branches_together=stage.branches_together, seed=seed,
            share=distributed.share(self.mesh),
        )  # fmt: skip
        objective, coefficients = stage_objective(stage)
        return objective, batches.in_order(dataset), coefficients

    def _groups(self, source: str, stage: Stage) -> list[Group]:
        if source in self.inputs.texts:
            return batches.text_groups(self.format.tokenizer, self.inputs.texts[source], stage.row_tokens)
        judgments, extra = self.judgments[source], None
        if isinstance(stage, DistillStage):
            found = np.load(self._teacher_file(source))
            judgments, extra = graded_by_teacher(judgments, found), [{"teacher_logprob": row} for row in found]
        weights = batches.balanced_weights(judgments, len(self.format.labels), stage.balance)
        return batches.judgment_groups(self.format, judgments, weights, extra)

    def _rl(self, stage: RLStage, config: DecoderConfig, parameters: Parameters, seed: int):
        settings = stage.rollouts
        prompts = self.judgments[stage.prompts_from]
        experts = self.judgments[stage.experts_from] if stage.experts_from else []
        source = functools.partial(RolloutSource, self.format, config, settings, seed=seed, dtype=self.settings.dtype)
        if stage.arm == "rehearsal":
            practised = source(experts, [], mesh=self.mesh)
            experts = practised.own_right_answers(parameters, rows=stage.rollouts.prompts)
            run_log.say(f"rehearsal: the model answers {len(experts)} of {len(practised.judgments)} experts all right")
        rollouts = source(prompts, experts, reference=parameters if stage.kl else None, mesh=self.mesh)
        objective, coefficients = stage_objective(stage)
        return objective, repeat_updates(rollouts, stage.updates), coefficients

    # --- distillation ----------------------------------------------------------------------------------------------

    def _teacher_file(self, source: str) -> Path:
        return self.run.path / "stages" / f"teacher_labels.{source}" / "logprobs.npy"

    def _teacher_labels(self, stage: DistillStage) -> None:
        """The teacher's label log-probs of every pair the student will see, float32 [N, C] on disk."""
        for source in stage.mixture:
            if source not in self.judgments:
                continue

            def label(source: str = source) -> dict[str, Any]:
                began = time.monotonic()
                teacher = self._last_stage("teacher")
                prompts = self.format.encode_prompts([(j.query, j.document) for j in self.judgments[source]])
                scorer = LabelScorer(
                    self._parameters_after(teacher), self.inputs.shapes["teacher"], self.format.label_ids,
                    head=self.format.head_tokens, dtype=self.settings.dtype,
                )  # fmt: skip
                title = f"teacher labels of {source}"
                found = scorer.label_logprobs(prompts, progress=lambda b: run_log.progress(b, title, len(b)))
                distributed.on_primary("teacher labels", lambda: _save(self._teacher_file(source), found))
                return {"seconds": round(time.monotonic() - began, 1), "pairs": len(prompts)}

            self.run.once(f"teacher_labels.{source}", label)
        self.held = None  # the student is trained without the teacher in memory

    # --- instructions ----------------------------------------------------------------------------------------------

    def _evolve(self, evolve: EvolveStage) -> dict[str, Any]:
        """The trained model judges while its instruction evolves; all that comes of it is in evolution/."""
        began = time.monotonic()
        stage = self._last_stage(evolve.model)
        dtype = self.settings.dtype
        model = RelevanceModel(
            self.inputs.shapes[evolve.model], self._parameters_after(stage), self.format, dtype=dtype
        )
        base, references = self.settings.instruction, {}
        if base is None:  # the built-in world
            base = clips_rulebooks.base_instruction()
            for name, held_out in (("full rulebook", False), ("full rulebook, held-out wording", True)):
                references[name] = clips_rulebooks.full_rulebook(held_out_wording=held_out)
        names = {"dev_new": evolve.dev_new, "dev_replay": evolve.dev_replay, "test": evolve.test}
        held = self.judgments[evolve.calibration or self.settings.evaluation.calibration]
        # A model that learned to read was trained on pairs with instructions of their own: nothing is fitted on these.
        reads = any(judgment.query.instruction for judgment in held)
        rounds = evolve_instruction(
            ModelJudge(model, () if reads else held),
            base,
            {name: self.judgments[source] for name, source in names.items() if source},
            evolve,
            self.run.path / "evolution",
            references=references,
            second=read_the_words if references else None,
            rule_frequency=clips_rulebooks.natural_frequencies() if references else None,
        )[evolve.proposer]
        if rounds[-1].unfinished:
            raise BudgetExceeded(f"{rounds[-1].stopped}; run again with a larger budget to go on from here")
        facts = {"rounds": len(rounds) - 1, "dev_new_before": rounds[0].new, "dev_new": rounds[-1].new}
        return {"seconds": round(time.monotonic() - began, 1), **facts}

    # --- measuring -------------------------------------------------------------------------------------------------

    def _evaluated_stages(self) -> dict[str, str]:
        """Name in the report -> stage: the last SFT and the last RL stage in their order, then the student's last."""
        found = {}
        for name, stage in self.stages.items():
            if not isinstance(stage, TextStage):
                key = stage.model if stage.model == "student" else "rl" if isinstance(stage, RLStage) else "sft"
                found.pop(key, None)
                found[key] = name
        return dict(sorted(found.items(), key=lambda item: item[0] == "student"))

    def _evaluate(self, name: str, stage_name: str) -> Evaluated:
        stage = self.stages[stage_name]
        evaluation = self.settings.evaluation
        folder = self.run.path / "stages" / f"evaluate.{name}"
        if self.run.finished(folder.name) is None:
            began = time.monotonic()
            evaluated = evaluate_model(
                self._parameters_after(stage_name),
                self.inputs.shapes[stage.model],
                self.format,
                test=self.judgments[evaluation.test],
                calibration=self.judgments[evaluation.calibration],
                explained_pairs=evaluation.explained_pairs,
                max_new_tokens=evaluation.max_new_tokens,
                dtype=self.settings.dtype,
                title=name,
            )
            distributed.on_primary("evaluation", lambda: _keep(evaluated, folder))
            self.run.finish(folder.name, {"seconds": round(time.monotonic() - began, 1)})
        return Evaluated.load(folder)

    def _report(self, evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
        names = [*self.settings.stage_names, *(f"evaluate.{name}" for name in evaluated)]
        seconds = {name: self.run.finished(name)["seconds"] for name in names}
        facts = {f"{name} (s)": f"{value:.0f}" for name, value in seconds.items()}
        for model in dict.fromkeys(stage.model for stage in self.settings.stages):
            facts[f"{model} parameters"] = f"{self.inputs.shapes[model].parameter_count:,}"
        test, calibration = self.settings.evaluation.test, self.settings.evaluation.calibration
        facts |= {f"grade of {name}": str(each.decision) for name, each in evaluated.items()}
        facts["judged pairs"] = f"{len(self.judgments[test]):,} of data.{test}; calibrated on data.{calibration}"
        return write_report(
            self.run.path / "report",
            {name: each.predictions for name, each in evaluated.items()},
            self.format.instruction,
            title=self.settings.title or "AFRL run",
            records=run_log.read_log(self.run.path / "log.jsonl"),
            facts=facts,
            seed=self.settings.seed,
            resamples=self.settings.evaluation.resamples,
        )

    def _export(self, evaluated: Mapping[str, Evaluated], metrics: Mapping[str, float]) -> None:
        """The last model evaluated becomes export/."""
        name, chosen = list(evaluated.items())[-1]
        stage_name = self._evaluated_stages()[name]
        stage = self.stages[stage_name]

        def export() -> dict[str, Any]:
            return export_model(
                self.run.path / "export",
                self._parameters_after(stage_name),
                self.inputs.shapes[stage.model],
                self.format,
                calibration=chosen.calibration,
                decision=chosen.decision,
                golden=_spread(self.judgments[self.settings.evaluation.test], 8),
                figures={key.removeprefix(f"{name}/"): v for key, v in metrics.items() if key.startswith(f"{name}/")},
                config=self.config,
                title=self.settings.title or "AFRL relevance model",
            )

        self.run.once("export", export, leaves=self.run.path / "export")
        run_log.say(f"report: {self.run.path / 'report' / 'report.html'}\nexport: {self.run.path / 'export'}")


def run(settings: Settings, config: Mapping[str, Any], workdir: Path) -> dict[str, float]:
    """Run a config in a folder, from wherever it stands; returns the report's metrics."""
    return Recipe(settings, config, workdir)()


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config must be the same when its run is taken up again: a language model's server and budget need
    not."""
    evolve = config.get("evolve") or {}
    if not evolve.get("chat"):
        return dict(config)
    kept = {key: value for key, value in evolve["chat"].items() if key not in (*CONNECTION, *BUDGET)}
    return {**config, "evolve": {**evolve, "chat": kept}}


def _save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, array)


def _keep(evaluated: Evaluated, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    evaluated.save(folder)


def _spread(judgments: Sequence[Judgment], count: int) -> list[tuple[Any, Any]]:
    """`count` pairs spread evenly over the judgments."""
    places = np.linspace(0, len(judgments) - 1, min(count, len(judgments))).astype(int)
    return [(judgments[i].query, judgments[i].document) for i in places]
