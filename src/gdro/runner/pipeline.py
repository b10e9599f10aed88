"""The loop: prompts -> (sample -> score -> train) x rounds -> evaluate -> export -> report. Nothing else.

Bad input is refused before the first stage starts (`checks`). Stages resume where they stopped; finished ones are
skipped. Only one process at a time works in a run directory.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gdro.common import distributed
from gdro.common.device import telling
from gdro.common.errors import UserError
from gdro.common.files import discard, sweep
from gdro.common.progress import duration, interval, say
from gdro.common.prompts import write_prompts
from gdro.common.sealed import find_record, write_record
from gdro.evaluation.measure import make_scored, measure
from gdro.groups.importing import import_folder, read_metadata
from gdro.groups.sampling import sample_groups
from gdro.groups.scoring import ScoreFiles
from gdro.groups.store import discard_trajectories
from gdro.models import FlowModel, check_model
from gdro.objectives.registry import name_of
from gdro.runner.checks import check, check_sizes, tell_cut
from gdro.runner.config import RunConfig, check_unchanged, save_config, savings
from gdro.runner.directory import alone
from gdro.runner.state import ROUND, STAGES, RunState
from gdro.stages.evaluate import evaluate, summary_section
from gdro.stages.score import score
from gdro.stages.train import Round, behavior_weights, over, train
from gdro.training.checkpoint import checkpoint_path, load_checkpoint, mark_best, mark_stopped, steps_saved
from gdro.training.log import DriftAlarm


def run(config: RunConfig, out: str | Path, stages: Sequence[str] = STAGES) -> str:
    """Run `stages` in the run directory `out`, resuming where they stopped; returns a summary of the outcome.

    `out` then holds adapter/ and report.html among other files. Processes that a launcher started share the work.
    Raises UserError for bad input, before any long work, and if another process is using `out`.
    """
    out = Path(out)
    with distributed.started(), alone(out):
        job = Run(config, out, stages)
        check(job)
        again = [stage for stage in stages if stage in ROUND]
        if "train" in again:
            distributed.first(job.settle)
        while True:
            for stage in again:
                job.do(stage)
            if again != list(ROUND) or job.is_trained():
                break
        for stage in stages[len(again) :]:
            job.do(stage)
        distributed.first(job.summarize)
        return job.outcome(stages[-1])


def import_groups(config: RunConfig, folder: Path, out: Path) -> str:
    """Instead of sampling and scoring, make the images and rewards in `folder` the groups of the run `out`.

    `config.sample.prompts` must name `out`/prompts/train.jsonl, which is written here.
    """
    with alone(out):
        job = Run(config, out)
        members = read_metadata(folder)
        check_unchanged(config, out, job.begun())
        check_model(config.model)
        check_sizes(config, {rows[0].path: rows[0].size for rows in members.values()})
        tell_cut(config.model, [rows[0].prompt for rows in members.values()], config.sample.max_sequence_length)
        write_prompts(Path(config.sample.prompts), [rows[0].prompt for rows in members.values()])
        save_config(config, out)
        with job.clock.running("sample"):
            import_folder(
                members,
                job.model,
                job.groups,
                job.imported.parent,
                guidance_scale=config.sample.guidance_scale,
                max_sequence_length=config.sample.max_sequence_length,
                reward_name=job.imported.stem,
            )
        return f"{job.groups}: {len(members)} groups; {job.imported}"


class Run(RunState):
    """A run's stages, each a method."""

    def do(self, stage: str) -> None:
        """Run and time one stage; for sample, score and train, that of the run's current round.

        No process leaves before all are done, so all see the run directory in the same state.
        """
        with self.clock.running(stage), telling(stage, savings(self.config, stage)):
            getattr(self, stage)()
            distributed.wait()

    # ---- stages

    def sample(self) -> None:
        """Sample the current round's groups."""
        number = self.round
        if number == 0 and self.is_sampled():
            say(f"sample: finished before, {self.groups}")
            return
        distributed.first(lambda: self._make_room(number))
        if number:
            self._carry(self.place(number))  # groups by other weights are refused
        config, make = self.config, None
        if config.engine == "ray":
            from gdro.runner.ray_engine import make_shards

            make = partial(make_shards, self._replica(number))
        sample_groups(
            config.sample, self.model, self.due(number), self.groups, seed=config.seed, round=number, make=make
        )

    def _make_room(self, number: int) -> None:
        """Delete what later rounds no longer need."""
        over = number - self.config.rounds.keep  # a round never trained on again
        if over >= 0:
            discard_trajectories(self._folder(over) / "groups")
        if self._lacks_trajectories():  # the run was resumed from an earlier checkpoint
            discard(self.groups)

    def score(self) -> None:
        """Score the current round's groups."""
        if self.scores == self.imported and self.stages != ["score"]:  # `score` alone scores them too
            say(f"score: imported before, {self.imported}")
            return
        elsewhere: ScoreFiles | None = None
        if self.config.engine == "ray":
            from gdro.runner.ray_engine import score_files

            elsewhere = score_files
        score(
            self.config.score,
            self.reward,
            self.groups,
            self.scores.parent,
            standard=self.standard,
            fit=not self.round,
            score_files=elsewhere,
        )

    def train(self) -> None:
        """Train to the end of the current round."""
        if self.is_trained():
            say(f"train: finished before, {self.checkpoints}")
            return
        if distributed.is_first():
            for name in ("evaluation.json", "summary.json", "report.html"):  # they would describe another adapter
                (self.out / name).unlink(missing_ok=True)
        place = self.place(self.round)
        train(
            self.config.train,
            self.model,
            self.groups,
            self.scores,
            self.out,
            seed=self.config.seed,
            sampling=self.sampling,
            validate=self._validate if self.config.train.validates else None,
            round=place,
        )

    def evaluate(self) -> None:
        """Evaluate the exported adapter against the base."""
        if self.evaluation.exists():
            say(f"evaluate: finished before, {self.evaluation}")
            return
        self._check_base()
        alarm = distributed.first(self._export)
        self.model.load_adapter(self.adapter)  # measure the exported file itself
        evaluate(
            self.config.evaluate,
            self.model,
            self.prompts["test"],
            self.metric,
            self.out,
            self.config.sample,
            judge=self.judge,
            seed=self.config.seed,
            alarm=alarm,
            **self.scoring,
        )

    def _check_base(self) -> None:
        """Raise UserError if the adapter was trained on a model that differs from this one in any component."""
        for step in steps_saved(self.checkpoints)[-1:]:
            trained_on = load_checkpoint(checkpoint_path(self.checkpoints, step)).settings["model"]
            if trained_on != self.model.revision:
                raise UserError(
                    f"model: {self.model.name} has revision {self.model.revision!r}, but {self.checkpoints} was "
                    f"trained on {trained_on!r}; expected the components it was trained with"
                )

    def export(self) -> None:
        """Write the adapter and its model card."""
        if distributed.is_first():
            self.summarize()  # its results go into the model card
            self._export()

    def report(self) -> None:
        """Write report.html."""
        if distributed.is_first():
            from gdro.stages.report import report

            report(self.out, self._scores(0))

    def _carry(self, round: Round) -> None:
        """Load the adapter that samples the round into the model."""
        if not self.model.adapter():
            self.model.add_adapter(**self._lora)
        self.model.load_adapter_state(behavior_weights(self.checkpoints, round))

    def settle(self) -> None:
        """Record the best checkpoint, and that training is over if the last one exceeds limits set since."""
        steps = steps_saved(self.checkpoints)
        if not steps:
            return
        train, step = self.config.train, steps[-1]
        memory = load_checkpoint(checkpoint_path(self.checkpoints, step)).memory
        mark_best(self.checkpoints, memory["best"])
        if self.is_trained():
            return
        reason = over(train, self.place(self.config.rounds.of_step(step)), step, memory["nfe"])
        if reason:
            mark_stopped(self.checkpoints, step, reason, train)

    def _validate(self, model: FlowModel, step: int) -> dict[str, float]:
        with self.clock.running("validate"), telling("validate", savings(self.config, "validate")):
            return self._measure(model, step)

    def _measure(self, model: FlowModel, step: int) -> dict[str, float]:
        folder = self.out / "validation" / f"step-{step:06d}"
        if distributed.is_first():
            for path in set(folder.parent.glob("step-*")) - {folder}:  # keep only the last one's images
                discard(path)
            sweep(folder.parent)
        config, prompts, label = self.config.evaluate, self.prompts["validation"], f"validate step {step}"
        rewards = make_scored(
            config,
            model,
            prompts,
            self.metric,
            folder,
            seed=self.config.seed,
            generation=self.config.sample,
            label=label,
            **self.scoring,
        )
        score = self.config.score
        return distributed.first(
            lambda: measure(
                config,
                prompts,
                self.metric,
                self.judge,
                rewards,
                score_batch_size=score.batch_size,
                max_missing=score.max_missing,
                label=label,
            ).means()
        )

    def _export(self) -> dict[str, Any] | None:
        """Write the adapter; returns the state of the training alarm at its checkpoint."""
        from gdro.stages.export import chosen, export

        export(self.config, self.out)
        checkpoint = chosen(self.checkpoints, self.config.train.export)
        return DriftAlarm.state(checkpoint.memory["alarm"], checkpoint.step)

    # ---- results

    def nfe(self) -> dict[str, int]:
        """Model evaluations that sampling and training the final adapter took."""
        steps = steps_saved(self.checkpoints)
        if not steps:
            return {"sample": 0, "train": 0}
        spent = load_checkpoint(checkpoint_path(self.checkpoints, steps[-1])).memory["nfe"]
        return {"sample": self.place(self.round).sampled, "train": spent}

    def summarize(self) -> None:
        """Write summary.json if there is an evaluation."""
        found = find_record(self.evaluation)
        if found is None:
            return
        seconds = self.clock.seconds
        stages = {stage: seconds.get(stage, 0.0) for stage in ("sample", "score", "train", "validate", "evaluate")}
        summary = {
            **summary_section(found),
            "seconds": {**stages, "total": round(sum(seconds.values()), 3)},
            "nfe": self.nfe(),
            "steps": max(steps_saved(self.checkpoints), default=0),
            "rounds": self.round + 1,
            "objective": name_of(self.config.train.objective),
            "model": self.config.model,
            "prompts": {split: len(self.prompts[split]) for split in ("train", "test")},
            "seed": self.config.seed,
        }
        write_record(self.out / "summary.json", summary)

    def outcome(self, stage: str) -> str:
        """The last stage's result, and the headline if there is one."""
        left = {
            "sample": self.groups,
            "score": self.scores,
            "train": self.checkpoints,
            "evaluate": self.evaluation,
            "export": self.adapter,
            "report": self.out / "report.html",
        }
        lines = [f"{stage}: {left[stage]} ({duration(sum(self.clock.seconds.values()))} in all)"]
        summary = find_record(self.out / "summary.json")
        if summary is None or stage not in ("evaluate", "report"):
            return lines[0]
        lines.append(f"verdict: {summary['verdict']['headline']}")
        for name in ("reward", "corrected"):
            result = summary[name]
            if result["base"] is not None:
                lines.append(
                    f"{name}: {result['base']:.3f} -> {result['tuned']:.3f} "
                    f"({result['gain']:+.3f}, 95 % {interval(result['ci95'])})"
                )
        return "\n".join(lines)
