"""The loop: prompts -> sample -> score -> train -> evaluate -> export -> report. Nothing else.

Everything bad that can be known from the input is refused before the first stage starts. Each stage goes on where it
stopped; a finished one is not done again. One process at a time works in a run directory.
"""

import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gdro.config import RunConfig, check_unchanged, save_config, saved_config
from gdro.errors import UserError
from gdro.evaluation.measure import measure
from gdro.files import discard, sweep, write_json
from gdro.groups.importer import import_folder, read_metadata
from gdro.groups.store import GroupStore
from gdro.models import FlowModel, check_model, load_model
from gdro.progress import duration, interval
from gdro.prompts import Prompt, read_prompts, write_prompts
from gdro.rewards.base import Judge, Reward
from gdro.rewards.registry import load_judge, load_reward
from gdro.rewards.store import read_header, read_rewards
from gdro.rng import numpy_rng
from gdro.rundir import Clock, alone, read_json
from gdro.samplers.generate import group_id
from gdro.stages.evaluate import evaluate, summary_section
from gdro.stages.sample import sample
from gdro.stages.score import score
from gdro.stages.train import check_sampling, train
from gdro.training.checkpoint import find_checkpoint, steps_saved
from gdro.training.log import require_trackers

STAGES = ("sample", "score", "train", "evaluate", "export", "report")
SPLIT_OF_STAGE = {"sample": "train", "score": "train", "train": "validation", "evaluate": "test"}


def run(config: RunConfig, out: Path, stages: Sequence[str] = STAGES) -> str:
    """Do `stages` in the run directory `out`; returns the lines that say what came out.

    Raises UserError for bad input, before any long work, and if another process works in `out`.
    """
    with alone(out):
        job = Run(config, out, stages)
        job.check(stages)
        for stage in stages:
            with job.clock.running(stage):
                getattr(job, stage)()
        job.summarise()
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
        _check_size(config, next(iter(members.values()))[0].path)
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
        self.groups, self.adapter, self.checkpoints = out / "groups", out / "adapter", out / "checkpoints"
        self.evaluation, self.imported = out / "evaluation.json", out / "rewards" / "imported.parquet"
        self.clock = Clock(out / "seconds.json")

    # ---- stages

    def sample(self) -> None:
        if self._is_sampled():
            _say(f"sample: finished before, {self.groups}")
            return
        sample(self.config.sample, self.model, self.prompts["train"], self.groups, seed=self.config.seed)

    def score(self) -> None:
        if self.scores == self.imported and self.stages != ["score"]:  # asked for alone, the reward scores them too
            _say(f"score: imported before, {self.imported}")
            return
        score(self.config.score, self.reward, self.groups, self.scores.parent)

    def train(self) -> None:
        if self._is_trained():
            _say(f"train: finished before, {self.checkpoints}")
            return
        for name in ("evaluation.json", "summary.json", "report.html"):  # they would speak of another adapter
            (self.out / name).unlink(missing_ok=True)
        train(
            self.config.train,
            self.model,
            self.groups,
            self.scores,
            self.out,
            seed=self.config.seed,
            sampling=self.sampling,
            validate=self._validate if self.config.train.validates else None,
        )

    def evaluate(self) -> None:
        if self.evaluation.exists():
            _say(f"evaluate: finished before, {self.evaluation}")
            return
        self.model.load_adapter(self._export())  # what is measured is the file that is handed on
        evaluate(
            self.config.evaluate,
            self.model,
            self.prompts["test"],
            self.reward,
            self.judge,
            self.out,
            seed=self.config.seed,
            sample_config=self.config.sample,
            **self.scoring,
        )

    def export(self) -> None:
        self.summarise()  # its figures go into the model card
        self._export()

    def report(self) -> None:
        from gdro.stages.report import report

        report(self.out)

    # ---- what the stages share

    @cached_property
    def device(self) -> torch.device:
        cuda = torch.cuda.is_available()
        if self.config.device == "cuda" and not cuda:
            raise UserError('device is "cuda", but torch finds no GPU; expected "auto" or "cpu"')
        return torch.device("cuda" if cuda and self.config.device != "cpu" else "cpu")

    @cached_property
    def model(self) -> FlowModel:
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32
        return load_model(self.config.model, device=self.device, dtype=dtype)

    @cached_property
    def reward(self) -> Reward:
        return load_reward(self.config.score.reward)

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
        return {split: _resolve(field, spec) for split, (field, spec) in named.items() if spec is not None}

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that generation and training must share."""
        return self.config.sample.model_dump(include={"guidance_scale", "max_sequence_length", "height", "width"})

    @property
    def scoring(self) -> dict[str, int]:
        """How the reward is run in validation and evaluation."""
        return {"score_workers": self.config.score.workers, "score_batch_size": self.config.score.batch_size}

    @property
    def scores(self) -> Path:
        """The file of rewards to train on: an imported one unless the reward has scored the groups itself."""
        own = self.out / "rewards" / f"{self.reward.name}.parquet"
        return self.imported if self.imported.exists() and not own.exists() else own

    def begun(self) -> set[str]:
        """The stages that have left results which the configuration must keep to."""
        left = {
            "sample": self.groups.is_dir() and any(self.groups.glob("*.parquet")),
            "train": bool(steps_saved(self.checkpoints)),
            "evaluate": (self.out / "evaluation").is_dir(),
        }
        return {stage for stage, there in left.items() if there}

    def _is_sampled(self) -> bool:
        expected = {group_id(prompt, 0) for prompt in self.prompts["train"]}
        return "sample" in self.begun() and not self._has_gap() and set(GroupStore(self.groups).group_ids) == expected

    def _has_gap(self) -> bool:
        """Whether a file of groups is missing among the others."""
        names = sorted(path.name for path in self.groups.glob("groups-*.parquet"))
        return names != [f"groups-{i:05d}.parquet" for i in range(len(names))]

    def _is_trained(self) -> bool:
        return self.config.train.max_train_steps in steps_saved(self.checkpoints)

    def _validate(self, model: FlowModel, step: int) -> dict[str, float]:
        folder = self.out / "validation" / f"step-{step:06d}"
        for path in set(folder.parent.glob("step-*")) - {folder}:  # the last one's images are kept, to look at
            discard(path)
        sweep(folder.parent)
        return measure(
            self.config.evaluate,
            model,
            self.prompts["validation"],
            self.reward,
            self.judge,
            folder,
            seed=self.config.seed,
            generation=self.config.sample,
            label=f"validate step {step}",
            **self.scoring,
        ).means()

    def _export(self) -> Path:
        from gdro.stages.export import export  # diffusers takes seconds to import

        return export(self.out, self.adapter)

    # ---- checks

    def check(self, stages: Sequence[str]) -> None:
        """Refuse bad input; then note the configuration and the prompts in the run directory."""
        begun = self.begun()
        # scoring once more, with another reward, is no change of what was trained on
        saved = saved_config(self.out) if begun else None
        other_reward = saved is not None and saved.score.reward != self.config.score.reward
        rescoring = list(stages) == ["score"] and "train" in begun and other_reward
        check_unchanged(self.config, self.out, begun - {"train"} if rescoring else begun)
        self._check_splits(begun)
        if {"sample", "train", "evaluate"} & set(stages):
            _ = self.device
            check_model(self.config.model)
        self._check_files(stages)
        if not rescoring:
            self._check_version(stages, begun)
        self._check_scorers(stages)
        if "sample" in stages and not self._is_sampled():
            self._check_model(stages)
        if "train" not in begun and saved != self.config:
            discard(self.out / "validation")  # measured by what may have changed
        if not rescoring:
            save_config(self.config, self.out)
        for split in ("train", "validation", "test"):
            path = self.out / "prompts" / f"{split}.jsonl"
            if split in self.prompts:
                write_prompts(path, self.prompts[split])
            else:
                path.unlink(missing_ok=True)

    def _check_splits(self, begun: set[str]) -> None:
        """Held-out prompts must be held out, and the prompts must stay those that the run was begun with."""
        fields = {"train": "sample.prompts", "validation": "train.validation_prompts", "test": "evaluate.prompts"}
        for split, other, use in (
            ("validation", "train", "trained on"),
            ("test", "train", "trained on"),
            ("validation", "test", "tested on"),
        ):
            texts = {prompt.text for prompt in self.prompts[other]}
            shared = [prompt.text for prompt in self.prompts.get(split, []) if prompt.text in texts]
            if shared:
                raise UserError(
                    f"{fields[split]} has {len(shared)} of {fields[other]}, such as {json.dumps(shared[0])}; "
                    f"expected prompts that are not {use}"
                )
        for split, stage in (("train", "train"), ("validation", "train"), ("test", "evaluate")):
            path = self.out / "prompts" / f"{split}.jsonl"
            if stage in begun and split in self.prompts and path.exists() and read_prompts(path) != self.prompts[split]:
                raise UserError(f"{path} has other prompts than there are now; expected those the run was begun with")

    def _check_scorers(self, stages: Sequence[str]) -> None:
        """The reward and the judge must know what to do with the prompts they will meet."""
        splits = {split for stage, split in SPLIT_OF_STAGE.items() if stage in stages and split in self.prompts}
        for split in sorted(splits):
            self.reward.check(self.prompts[split])
            if self.judge is not None and split != "train":
                self.judge.check(self.prompts[split])
        done = {"sample": self._is_sampled, "train": self._is_trained, "evaluate": self.evaluation.exists}
        if any(stage in stages and not is_done() for stage, is_done in done.items()):
            self._try_functions()

    def _try_functions(self) -> None:
        """A user's reward or judge that returns nonsense is found on two images of noise, not after the long work."""
        config = self.config.sample
        shape = (2, config.height, config.width, 3)
        noise = numpy_rng(0, "trial").integers(0, 256, shape, dtype="uint8")
        images = [Image.fromarray(pixels) for pixels in noise]
        prompts = (self.prompts["test"] * 2)[:2]
        if ":" in self.config.score.reward:
            self.reward(images, prompts)
        if self.judge is not None and ":" in str(self.config.evaluate.judge):
            self.judge(images, prompts)

    def _check_files(self, stages: Sequence[str]) -> None:
        """What earlier stages left must be there and whole."""
        remade = "sample" in stages and ("sample" not in self.begun() or self._has_gap())
        if not remade and {"sample", "score", "train"} & set(stages):
            store = GroupStore(self.groups)
            if "train" in stages:
                check_sampling(store, self.sampling)
            if "train" in stages and "sample" not in stages and not self._is_sampled():
                raise UserError(
                    f"{self.groups} holds {len(store.group_ids)} groups, which are not those of the "
                    f'{len(self.prompts["train"])} sample.prompts; expected them whole (run "gdro sample" first)'
                )
            if "train" in stages and "score" not in stages:
                read_rewards(self.scores, store)
        if "train" in stages:
            train = self.config.train
            require_trackers(train.report_to)
            find_checkpoint(self.checkpoints, train.resume_from_checkpoint, train.max_train_steps)
        elif {"evaluate", "export"} & set(stages) and not steps_saved(self.checkpoints):
            raise UserError(f"{self.checkpoints} holds no checkpoint; expected step-*/ written by `gdro train`")

    def _check_version(self, stages: Sequence[str], begun: set[str]) -> None:
        """Rewards of an older version of the reward are not trained on, nor replaced once something was."""
        trained = "train" in begun
        if not {"score", "train"} & set(stages) or ("score" in stages and not trained):
            return
        path = self.scores
        if path == self.imported or not path.exists():
            return
        version, now = read_header(path).version, self.reward.version
        if version != now:
            wanted = "the version trained on, or another --out" if trained else 'one version (run "gdro score" again)'
            raise UserError(
                f"score.reward: {self.reward.name} is of version {now}, but {path} was scored by version {version}; "
                f"expected {wanted}"
            )

    def _check_model(self, stages: Sequence[str]) -> None:
        """What only the loaded model can tell: whether the images' size and the layers to train suit it."""
        self.model.latent_shape(self.config.sample.height, self.config.sample.width)
        if "train" in stages:
            self.model.check_targets(self.config.train.target_modules)

    # ---- results

    def summarise(self) -> None:
        """Write summary.json, once there is an evaluation."""
        found = read_json(self.evaluation)
        if found is None:
            return
        stages = {stage: self.clock.seconds.get(stage, 0.0) for stage in ("sample", "score", "train", "evaluate")}
        summary = {
            **summary_section(found),
            "seconds": {**stages, "total": round(sum(self.clock.seconds.values()), 3)},
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


def _check_size(config: RunConfig, image: Path) -> None:
    """Images of another size than the configuration's would be refused once training starts."""
    with Image.open(image) as first:
        width, height = first.size
    for field, value, found in (("width", config.sample.width, width), ("height", config.sample.height, height)):
        if value != found:
            raise UserError(f"sample.{field} is {value}, but {image} is {width}x{height}; expected {found}")


def _resolve(field: str, spec: str) -> list[Prompt]:
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
