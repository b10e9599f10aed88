"""The loop: prompts -> (sample -> score -> train) x rounds -> evaluate -> export -> report. Nothing else.

Bad input is refused before the first stage starts (`checks`). Each stage goes on where it stopped; a finished one is
not done again. One process at a time works in a run directory.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gdro import distributed
from gdro.checks import check, check_sizes
from gdro.config import RunConfig, check_unchanged, save_config
from gdro.errors import UserError
from gdro.evaluation.measure import make_scored, measure
from gdro.files import discard, sweep, write_json
from gdro.groups.importer import import_folder, read_metadata
from gdro.groups.store import GroupStore, discard_trajectories
from gdro.models import FlowModel, check_model, load_model, passes
from gdro.models.replica import Replica
from gdro.progress import duration, interval, say
from gdro.prompts import Prompt, read_prompts, write_prompts
from gdro.rewards.base import Judge
from gdro.rewards.derived import Scorer
from gdro.rewards.registry import load_judge, load_reward
from gdro.rng import torch_rng
from gdro.rundir import Clock, alone, read_json
from gdro.samplers.generate import group_id
from gdro.stages.evaluate import evaluate, summary_section
from gdro.stages.sample import sample
from gdro.stages.score import STANDARD, score
from gdro.stages.train import Round, generator_weights, over, train
from gdro.training.checkpoint import checkpoint_path, load_checkpoint, mark_stopped, steps_saved, stopped_at

ROUND = ("sample", "score", "train")
STAGES = (*ROUND, "evaluate", "export", "report")


def run(config: RunConfig, out: Path, stages: Sequence[str] = STAGES) -> str:
    """Do `stages` in the run directory `out`; returns the lines that say what came out.

    Raises UserError for bad input, before any long work, and if another process works in `out`.
    """
    with alone(out):
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
        distributed.first(job.summarise)
        return job.outcome(stages[-1])


def import_groups(config: RunConfig, folder: Path, out: Path) -> str:
    """In place of sampling and scoring: the images and rewards in `folder` become the groups of the run `out`.

    `config.sample.prompts` must name `out`/prompts/train.jsonl, which is written here.
    """
    with alone(out):
        job = Run(config, out)
        members = read_metadata(folder)
        check_unchanged(config, out, job.begun())
        check_model(config.model)
        check_sizes(config, [rows[0].path for rows in members.values()])
        write_prompts(Path(config.sample.prompts), [rows[0].prompt for rows in members.values()])
        save_config(config, out)
        with job.clock.running("sample"):
            import_folder(
                folder,
                job.model,
                job.groups,
                job.imported.parent,
                guidance_scale=config.sample.guidance_scale,
                max_sequence_length=config.sample.max_sequence_length,
                reward_name=job.imported.stem,
            )
        return f"{job.groups}: {len(members)} groups; {job.imported}"


class Run:
    """A run directory and its stages, each a method; model, reward and judge are loaded when first needed."""

    def __init__(self, config: RunConfig, out: Path, stages: Sequence[str] = STAGES) -> None:
        self.config, self.out, self.stages = config, out, list(stages)
        self.adapter, self.checkpoints = out / "adapter", out / "checkpoints"
        self.evaluation, self.imported = out / "evaluation.json", out / "rewards" / "imported.parquet"
        self.clock = Clock(out / "seconds.json")

    def do(self, stage: str) -> None:
        """One stage, on the clock; of those of a round, that of the round at which the run stands.

        No process leaves it before all are done with it, so each finds the run directory as the others do.
        """
        with self.clock.running(stage):
            getattr(self, stage)()
            distributed.wait()

    # ---- stages

    def sample(self) -> None:
        number = self.round
        if number == 0 and self.is_sampled():
            say(f"sample: finished before, {self.groups}")
            return
        distributed.first(lambda: self._make_room(number))
        if number:
            self._carry(self._place(number))  # groups that other weights left there are refused
        config, replica = self.config, self._replica(number) if self.config.engine == "ray" else None
        sample(
            config.sample, self.model, self.due(number), self.groups, seed=config.seed, round=number, replica=replica
        )

    def _make_room(self, number: int) -> None:
        """Delete what the round does not go on from."""
        over = number - self.config.rounds.keep  # a round never trained on again
        if over >= 0:
            discard_trajectories(self._folder(over) / "groups")
        if self._lacks_trajectories():  # the run went back to an earlier checkpoint
            discard(self.groups)

    def score(self) -> None:
        if self.scores == self.imported and self.stages != ["score"]:  # asked for alone, the reward scores them too
            say(f"score: imported before, {self.imported}")
            return
        fit, ray = not self.round, self.config.engine == "ray"
        score(self.config.score, self.reward, self.groups, self.scores.parent, standard=self.standard, fit=fit, ray=ray)

    def train(self) -> None:
        if self.is_trained():
            say(f"train: finished before, {self.checkpoints}")
            return
        if distributed.is_first():
            for name in ("evaluation.json", "summary.json", "report.html"):  # they would speak of another adapter
                (self.out / name).unlink(missing_ok=True)
        place = self._place(self.round)
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
        if self.evaluation.exists():
            say(f"evaluate: finished before, {self.evaluation}")
            return
        distributed.first(self._export)
        self.model.load_adapter(self.adapter)  # what is measured is the file that is handed on
        evaluate(
            self.config.evaluate,
            self.model,
            self.prompts["test"],
            self.measure,
            self.judge,
            self.out,
            seed=self.config.seed,
            sample_config=self.config.sample,
            **self.scoring,
        )

    def export(self) -> None:
        if distributed.is_first():
            self.summarise()  # its figures go into the model card
            self._export()

    def report(self) -> None:
        if distributed.is_first():
            from gdro.stages.report import report

            report(self.out, self._scores(0))

    # ---- what the stages share

    @cached_property
    def device(self) -> torch.device:
        gpus, local = torch.cuda.device_count(), distributed.local_size()
        if self.config.device == "cuda" and not gpus:
            raise UserError('device is "cuda", but torch finds no GPU; expected "auto" or "cpu"')
        if not gpus or self.config.device == "cpu":
            return torch.device("cpu")
        if local > gpus:
            raise UserError(
                f"LOCAL_WORLD_SIZE is {local}, but torch finds {gpus} GPUs; expected a process each at most"
            )
        return torch.device("cuda", torch.cuda.current_device()) if local > 1 else torch.device("cuda")

    @cached_property
    def model(self) -> FlowModel:
        config = self.config
        model = load_model(
            config.model,
            device=self.device,
            dtype=self._dtype,
            quantisation=config.quantisation,
            sharded=config.distributed == "fsdp" and distributed.size() > 1,
        )
        if config.compile:
            model.compile()
        return model

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32

    @cached_property
    def reward(self) -> Scorer:
        """What is trained on."""
        return load_reward(self.config.score.reward)

    @cached_property
    def measure(self) -> Scorer:
        """What validation and evaluation measure."""
        other = self.config.evaluate.reward
        return self.reward if other is None else load_reward(other, "evaluate.reward")

    @cached_property
    def judge(self) -> Judge | None:
        return None if self.config.evaluate.judge is None else load_judge(self.config.evaluate.judge)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of each split that the configuration names."""
        config = self.config
        named = {
            "train": ("sample.prompts", config.sample.prompts),
            "validation": (
                "train.validation_prompts",
                config.train.validation_prompts if config.train.validates else None,
            ),
            "test": ("evaluate.prompts", config.evaluate.prompts),
        }
        return {split: resolve(field, spec) for split, (field, spec) in named.items() if spec is not None}

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that generation and training must share."""
        shared = {"guidance_scale", "max_sequence_length", "height", "width", "buckets", "sampler", "noise_level"}
        return self.config.sample.model_dump(include=shared)

    @property
    def scoring(self) -> dict[str, Any]:
        """How the reward is run in validation and evaluation."""
        score = self.config.score
        return {"score_workers": score.workers, "score_batch_size": score.batch_size, "standard": self.standard}

    @property
    def standard(self) -> Path:
        return self.out / "rewards" / STANDARD

    @property
    def round(self) -> int:
        """The round (from 0) at which the run stands: that of the next step, or of the last one if training is over."""
        done = max(steps_saved(self.checkpoints), default=0)
        return self.config.rounds.of_step(max(1, done if self.is_trained() else done + 1))

    @property
    def groups(self) -> Path:
        """The groups of that round."""
        return self._folder(self.round) / "groups"

    @property
    def scores(self) -> Path:
        """The file of rewards to train on in that round."""
        return self._scores(self.round)

    def scored(self) -> Path | None:
        """The latest file of rewards there is."""
        files = (self._scores(number) for number in range(self.round, -1, -1))
        return next((file for file in files if file.exists()), None)

    def _folder(self, round: int) -> Path:
        return self.out / "rounds" / f"{round:04d}" if round else self.out

    def _scores(self, round: int) -> Path:
        """A round's rewards: of round 0 the imported ones, unless the reward has scored its groups itself."""
        own = self._folder(round) / "rewards" / f"{self.reward.name}.parquet"
        return self.imported if not round and self.imported.exists() and not own.exists() else own

    def due(self, round: int) -> list[Prompt]:
        """The prompts of a round: all, or the next `rounds.prompts` of an epoch, which is a new order each time.

        Imported groups are round 0, whole.
        """
        prompts, count = self.prompts["train"], self.config.rounds.prompts
        if count is None or (not round and self.imported.exists()):
            return prompts
        epoch, place = divmod(round, len(prompts) // count)
        order = torch.randperm(len(prompts), generator=torch_rng(self.config.seed, "round/prompts", epoch)).tolist()
        return [prompts[i] for i in order[place * count : (place + 1) * count]]

    def _place(self, number: int) -> Round:
        """What training must know of a round."""
        rounds, train, sample = self.config.rounds, self.config.train, self.config.sample
        done, last = rounds.steps(number, train.max_train_steps)
        calls = sample.calls * passes(self.config.model, sample.guidance_scale)
        calls *= sample.images_per_prompt * (rounds.prompts or len(self.prompts["train"]))
        return Round(
            number=number,
            done=done,
            last=last if rounds.train_steps else None,
            kept=[
                (self._folder(old) / "groups", self._scores(old))
                for old in range(max(0, number - rounds.keep + 1), number)
            ],
            generator=rounds.generator,
            sampled=calls * (number + (not self.imported.exists())),  # importing round 0 cost none
            ahead=calls if rounds.train_steps else 0,
            seconds=lambda: {stage: self.clock.seconds.get(stage, 0.0) for stage in ROUND},
        )

    def _carry(self, round: Round) -> None:
        """Give the model the adapter that samples the round."""
        if not self.model.adapter():
            self.model.add_adapter(**self._lora)
        self.model.load_adapter_state(generator_weights(self.checkpoints, round))

    def _replica(self, number: int) -> Replica:
        """The model that samples round `number`, for other processes."""
        config = self.config
        replica = Replica(
            name=config.model,
            dtype=self._dtype,
            quantisation=config.quantisation,
            compile=config.compile,
            device=config.device,
        )
        if not number:
            return replica
        state = generator_weights(self.checkpoints, self._place(number))
        return replace(replica, lora=self._lora, state={name: tensor.cpu() for name, tensor in state.items()})

    @property
    def _lora(self) -> dict[str, Any]:
        """What a fresh adapter is made with."""
        train = self.config.train
        return {
            "rank": train.rank,
            "alpha": train.lora_alpha,
            "targets": train.target_modules,
            "seed": self.config.seed,
        }

    def begun(self) -> set[str]:
        """The stages that have left results which the configuration must keep to."""
        groups = self._folder(0) / "groups"
        left = {
            "sample": groups.is_dir() and any(groups.glob("*.parquet")),
            "train": bool(steps_saved(self.checkpoints)),
            "evaluate": (self.out / "evaluation").is_dir(),
        }
        return {stage for stage, there in left.items() if there}

    def _lacks_trajectories(self) -> bool:
        """Whether the round's groups are to be learnt from step by step, but only the images are left."""
        wanted = self.config.train.loss.kind == "trajectory" and self.config.rounds.train_steps is not None
        return wanted and any(self.groups.glob("*.parquet")) and not GroupStore(self.groups).has_trajectories

    def is_sampled(self) -> bool:
        """Whether the round's groups are whole, and those of its prompts."""
        number, groups = self.round, self.groups
        expected = {group_id(prompt, number) for prompt in self.due(number)}
        return any(groups.glob("*.parquet")) and not self.has_gap() and set(GroupStore(groups).group_ids) == expected

    def has_gap(self) -> bool:
        """Whether a file of groups is missing among the others."""
        names = sorted(path.name for path in self.groups.glob("groups-*.parquet"))
        return names != [f"groups-{i:05d}.parquet" for i in range(len(names))]

    def settle(self) -> None:
        """Note that training is over if the last checkpoint is past limits that were set since."""
        steps = steps_saved(self.checkpoints)
        if not steps or self.is_trained():
            return
        train, step = self.config.train, steps[-1]
        place = self._place(self.config.rounds.of_step(step))
        spent = load_checkpoint(checkpoint_path(self.checkpoints, step)).memory["evaluations"]
        reason = over(train, place, step, spent)
        if reason:
            mark_stopped(self.checkpoints, step, reason, train)

    def is_trained(self) -> bool:
        """Whether training has come to its end: the last step, the target, or the budget."""
        return stopped_at(self.checkpoints, self.config.train) is not None

    def _validate(self, model: FlowModel, step: int) -> dict[str, float]:
        with self.clock.running("validate"):
            return self._measure(model, step)

    def _measure(self, model: FlowModel, step: int) -> dict[str, float]:
        folder = self.out / "validation" / f"step-{step:06d}"
        if distributed.is_first():
            for path in set(folder.parent.glob("step-*")) - {folder}:  # the last one's images are kept, to look at
                discard(path)
            sweep(folder.parent)
        config, prompts, label = self.config.evaluate, self.prompts["validation"], f"validate step {step}"
        rewards = make_scored(
            config,
            model,
            prompts,
            self.measure,
            folder,
            seed=self.config.seed,
            generation=self.config.sample,
            label=label,
            **self.scoring,
        )
        at_once = self.config.score.batch_size
        return distributed.first(
            lambda: measure(
                config, prompts, self.measure, self.judge, rewards, score_batch_size=at_once, label=label
            ).means()
        )

    def _export(self) -> None:
        from gdro.stages.export import export  # diffusers takes seconds to import

        export(self.out, self.adapter)

    # ---- results

    def evaluations(self) -> dict[str, int]:
        """Model evaluations that sampling and training the final adapter took."""
        steps = steps_saved(self.checkpoints)
        if not steps:
            return {"sample": 0, "train": 0}
        spent = load_checkpoint(checkpoint_path(self.checkpoints, steps[-1])).memory["evaluations"]
        return {"sample": self._place(self.round).sampled, "train": spent}

    def summarise(self) -> None:
        """Write summary.json, once there is an evaluation."""
        found = read_json(self.evaluation)
        if found is None:
            return
        seconds = self.clock.seconds
        stages = {stage: seconds.get(stage, 0.0) for stage in ("sample", "score", "train", "validate", "evaluate")}
        summary = {
            **summary_section(found),
            "seconds": {**stages, "total": round(sum(seconds.values()), 3)},
            "evaluations": self.evaluations(),
            "steps": max(steps_saved(self.checkpoints), default=0),
            "rounds": self.round + 1,
            "objective": self.config.train.objective,
            "model": self.config.model,
            "prompts": {split: len(self.prompts[split]) for split in ("train", "test")},
            "seed": self.config.seed,
        }
        write_json(self.out / "summary.json", summary)

    def outcome(self, stage: str) -> str:
        """What the last stage left, and the headline if there is one."""
        left = {
            "sample": self.groups,
            "score": self.scores,
            "train": self.checkpoints,
            "evaluate": self.evaluation,
            "export": self.adapter,
            "report": self.out / "report.html",
        }
        lines = [f"{stage}: {left[stage]} ({duration(sum(self.clock.seconds.values()))} in all)"]
        summary = read_json(self.out / "summary.json")
        for name in ("reward", "corrected") if summary and stage in ("evaluate", "report") else ():
            result = summary[name]
            if result["base"] is not None:
                lines.append(
                    f"{name}: {result['base']:.3f} -> {result['tuned']:.3f} "
                    f"({result['gain']:+.3f}, 95 % {interval(result['ci95'])})"
                )
        return "\n".join(lines)


def resolve(field: str, spec: str) -> list[Prompt]:
    """Prompts of a file or of the tiny world; UserError names `field`."""
    if spec.startswith("tiny:"):
        from gdro.tiny.prompts import tiny_prompts

        read: Any = tiny_prompts
    else:
        read = read_prompts
    try:
        return read(spec)
    except UserError as error:
        raise UserError(f"{field}: {str(error).removeprefix('prompts: ')}") from None
