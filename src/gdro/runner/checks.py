"""Checks before a run's first stage: everything wrong that can be known from the input.

The checks read a run (`pipeline.Run`) and do none of its work; they raise UserError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import discard
from gdro.common.progress import say
from gdro.common.prompts import Prompt, read_prompts, same_text, write_prompts
from gdro.common.rng import numpy_rng
from gdro.groups.sampling import check_round_ids
from gdro.groups.scores import read_header, read_rewards
from gdro.groups.store import GroupStore
from gdro.models import check_compiler, check_model, check_quantization, text_seen
from gdro.rewards.derived import DerivedReward, base_rewards, is_relative
from gdro.rewards.pointwise import Pointwise
from gdro.rewards.user import UserJudge, UserReward
from gdro.rewards.winrate import WinRate
from gdro.runner.config import RunConfig, check_unchanged, save_config, saved_config
from gdro.runner.state import RunState
from gdro.stages.train import check_sampling
from gdro.training.checkpoint import find_checkpoint, steps_saved
from gdro.training.log import require_trackers

SPLIT_OF_STAGE = {"sample": "train", "score": "train", "train": "validation", "evaluate": "test"}


def check(job: RunState) -> None:
    """Refuse bad input, then save the configuration and the prompts in the run directory.

    The first of several processes checks; each loads the model.
    """
    distributed.first(lambda: _check_input(job))
    if "sample" in job.stages and not job.is_sampled():
        _check_model(job)
    distributed.first(lambda: _note(job))


def _check_input(job: RunState) -> None:
    begun, rescoring = job.begun(), _is_rescoring(job)
    processes, groups = distributed.size(), job.config.train.groups_per_step
    if "train" in job.stages and groups % processes:
        raise UserError(f"train.groups_per_step is {groups}; expected a multiple of the {processes} processes")
    check_unchanged(job.config, job.out, begun - {"train"} if rescoring else begun)
    _check_splits(job, begun)
    prompts, due = len(job.prompts["train"]), job.config.rounds.prompts
    if due is not None and due > prompts:
        raise UserError(f"rounds.prompts is {due}; expected at most the {prompts} of sample.prompts")
    if {"sample", "train", "evaluate"} & set(job.stages):
        check_model(job.config.model)
        if job.config.quantization is not None:
            check_quantization(job.config.quantization, job.device)
        if job.config.compile:
            check_compiler(job.device)
    if job.config.engine == "ray" and {"sample", "score"} & set(job.stages):
        if find_spec("ray") is None:
            raise UserError('engine is "ray", which is not installed; expected pip install "gdro[ray]", or local')
        if processes > 1:
            raise UserError(f'engine is "ray", but there are {processes} processes; expected one, or local')
    _check_files(job)
    if not rescoring:
        _check_version(job, begun)
    _check_scorers(job)
    todo = [stage for stage, is_done in _done(job).items() if stage in job.stages and not is_done()]
    _check_text(job, todo)
    if todo and job.device.type == "cuda":
        _check_memory(job, todo)


def _is_rescoring(job: RunState) -> bool:
    """Whether this only rescores with another reward, without changing what was trained on."""
    begun = job.begun()
    saved = saved_config(job.out) if begun else None
    other_reward = saved is not None and saved.score.reward != job.config.score.reward
    return job.stages == ["score"] and "train" in begun and other_reward


def _note(job: RunState) -> None:
    begun = job.begun()
    saved = saved_config(job.out) if begun else None
    if "train" not in begun and saved != job.config:
        for path in (job.out / "validation").glob("step-*"):  # measured with settings that may have changed
            discard(path)
    if not _is_rescoring(job):
        save_config(job.config, job.out)
    for split in ("train", "validation", "test"):
        path = job.out / "prompts" / f"{split}.jsonl"
        if split in job.prompts:
            write_prompts(path, job.prompts[split])
        else:
            path.unlink(missing_ok=True)


def _check_splits(job: RunState, begun: set[str]) -> None:
    """Held-out prompts must be held out, and prompts must not change after the run has begun."""
    fields = {"train": "sample.prompts", "validation": "train.validation_prompts", "test": "evaluate.prompts"}
    for split, other, use in (
        ("validation", "train", "trained on"),
        ("test", "train", "trained on"),
        ("validation", "test", "tested on"),
    ):
        texts = {same_text(prompt.text) for prompt in job.prompts[other]}
        shared = [prompt.text for prompt in job.prompts.get(split, []) if same_text(prompt.text) in texts]
        if shared:
            raise UserError(
                f"{fields[split]} has {len(shared)} of {fields[other]}, such as {json.dumps(shared[0])}; "
                f"expected prompts that are not {use} (not even in another case or spacing)"
            )
    if job.config.rounds.train_steps is not None:
        check_round_ids(job.prompts["train"], "sample.prompts")
    for split, stage in (("train", "train"), ("validation", "train"), ("test", "evaluate")):
        path = job.out / "prompts" / f"{split}.jsonl"
        if stage in begun and split in job.prompts and path.exists() and read_prompts(path) != job.prompts[split]:
            raise UserError(f"{path} has other prompts than now; expected those the run was begun with")


def _check_scorers(job: RunState) -> None:
    """The reward and the judge must accept the prompts they will get."""
    splits = {split for stage, split in SPLIT_OF_STAGE.items() if stage in job.stages and split in job.prompts}
    for split in sorted(splits):
        scorer = job.reward if split == "train" else job.metric
        scorer.check(job.prompts[split])
        if job.judge is not None and split != "train":
            job.judge.check(job.prompts[split])
    _check_measure(job)
    if any(stage in job.stages and not is_done() for stage, is_done in _done(job).items()):
        _try_functions(job)


def _done(job: RunState) -> dict[str, Callable[[], bool]]:
    """Stages that use the model, with a function that tells whether each is finished."""
    return {"sample": job.is_sampled, "train": job.is_trained, "evaluate": job.evaluation.exists}


def _check_measure(job: RunState) -> None:
    """The metric must be comparable between two models: absolute scores on one scale."""
    validates = "train" in job.stages and job.config.train.validates
    if not validates and "evaluate" not in job.stages:
        return
    field = "score.reward" if job.config.evaluate.reward is None else "evaluate.reward"
    if is_relative(job.metric):
        raise UserError(
            f"{field}: {job.metric.name} compares the images of a group, so it cannot compare models; expected "
            "evaluate.reward to name another"
        )
    standardizes = isinstance(job.metric, DerivedReward) and job.metric.standardizes
    if standardizes and (field == "evaluate.reward" or job.imported.exists()):
        raise UserError(
            f"{field}: {job.metric.name} is standardized by the images it first scored for training, but there are "
            "none; expected standardize: false in each of its sections"
        )


def _try_functions(job: RunState) -> None:
    """Try a user's reward and judge on two noise images, so nonsense shows before the long work, not after it."""
    config = job.config.sample
    shape = (2, config.height, config.width, 3)
    noise = numpy_rng(0, "trial").integers(0, 256, shape, dtype="uint8")
    images = [Image.fromarray(pixels) for pixels in noise]
    prompts = (job.prompts["test"] * 2)[:2]
    for reward in {id(r): r for scorer in (job.reward, job.metric) for r in base_rewards(scorer)}.values():
        if isinstance(reward, WinRate) and isinstance(reward.comparator, Pointwise):
            reward = reward.comparator.reward
        if isinstance(reward, UserReward):
            reward(images, prompts)
    if isinstance(job.judge, UserJudge):
        job.judge(images, prompts)


def _check_files(job: RunState) -> None:
    """The files of earlier stages must exist and be complete."""
    remade = "sample" in job.stages and (not any(job.groups.glob("*.parquet")) or job.has_gap())
    if not remade and {"sample", "score", "train"} & set(job.stages):
        store = GroupStore(job.groups)
        if "train" in job.stages:
            check_sampling(store, job.sampling)
            if "trajectories" in job.config.train.objective.needs and not {"sample"} & set(job.stages):
                store.trajectory(store.group_ids[0])  # raises if there is none
        if "train" in job.stages and "sample" not in job.stages and not job.is_sampled():
            raise UserError(
                f"{job.groups} holds {len(store.group_ids)} groups, which are not those of the "
                f'{len(job.prompts["train"])} sample.prompts; expected all of them (run "gdro sample" first)'
            )
        if "train" in job.stages and "score" not in job.stages:
            read_rewards(job.scores, store)
    if "train" in job.stages:
        train = job.config.train
        require_trackers(train.report_to)
        find_checkpoint(job.checkpoints, train.resume_from_checkpoint, train.max_train_steps)
    elif {"evaluate", "export"} & set(job.stages) and not steps_saved(job.checkpoints):
        raise UserError(f"{job.checkpoints} holds no checkpoints; expected step-*/ written by `gdro train`")


def _check_version(job: RunState, begun: set[str]) -> None:
    """Refuse scores by an older version of the reward, and replacing scores that were trained on."""
    trained = "train" in begun
    if not {"score", "train"} & set(job.stages) or ("score" in job.stages and not trained):
        return
    path = job.scored()
    if path is None or path == job.imported:
        return
    version, now = read_header(path).version, job.reward.version
    if version != now:
        wanted = "the version trained on, or another --out" if trained else 'one version (run "gdro score" again)'
        raise UserError(
            f"score.reward: {job.reward.name} has version {now}, but {path} was scored by version {version}; "
            f"expected {wanted}"
        )


def _check_text(job: RunState, todo: Sequence[str]) -> None:
    """Report cut prompts; the words that an OCR reward looks for must be in the part that is read."""
    from gdro.rewards.ocr.reward import OcrReward, target_of

    length = job.config.sample.max_sequence_length
    splits = [SPLIT_OF_STAGE[stage] for stage in todo if SPLIT_OF_STAGE[stage] in job.prompts]
    everyone = [prompt for split in splits for prompt in job.prompts[split]]
    seen = _seen(job.config.model, everyone, length)
    for split in splits:
        scorer = job.reward if split == "train" else job.metric
        if not any(isinstance(reward, OcrReward) for reward in base_rewards(scorer)):
            continue
        for prompt in job.prompts[split]:
            if prompt.text in seen and target_of(prompt) not in seen[prompt.text]:
                raise UserError(
                    f'sample.max_sequence_length is {length}, at which the {split} prompt "{prompt.id}" is cut after '
                    f"{_end(seen[prompt.text])}, before the end of the text that the reward {scorer.name} looks for; "
                    "expected more tokens or a shorter prompt"
                )
    _say_cut(everyone, seen, length)


def tell_cut(model: str, prompts: Sequence[Prompt], length: int) -> None:
    """Report how many of the prompts the model's text encoder cuts at this length."""
    _say_cut(prompts, _seen(model, prompts, length), length)


def _seen(model: str, prompts: Sequence[Prompt], length: int) -> dict[str, str]:
    """Text -> the part that is read, for the prompts that are cut."""
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    return {t: seen for t, seen in zip(texts, text_seen(model, texts, length), strict=True) if seen is not None}


def _say_cut(prompts: Sequence[Prompt], seen: Mapping[str, str], length: int) -> None:
    cut = [prompt for prompt in prompts if prompt.text in seen]
    if cut:
        say(
            f"max_sequence_length is {length}: {len(cut)} of {len(prompts)} prompts are cut, such as "
            f'"{cut[0].id}" after {_end(seen[cut[0].text])}'
        )


def _end(text: str) -> str:
    return json.dumps(text[-60:], ensure_ascii=False)


def _check_memory(job: RunState, todo: Sequence[str]) -> None:
    """Refuse what cannot fit on the GPU according to the plan, before minutes go into loading it."""
    if job.config.distributed == "fsdp":  # each GPU then holds a part, which is not planned
        return
    from gdro.runner.planning.plan import refuse
    from gdro.runner.planning.shapes import shapes_of

    train = job.config.train
    own = train.model_copy(update={"groups_per_step": train.groups_per_step // distributed.size()})
    config = job.config.model_copy(update={"train": own})
    memory = torch.cuda.get_device_properties(job.device).total_memory
    refuse(config, shapes_of(config, cuda=True), memory, todo)


def _check_model(job: RunState) -> None:
    """Checks that need the loaded model: the images' size and the layers to train must suit it."""
    for height, width in job.config.sample.sizes:
        job.model.latent_shape(height, width)
    if "train" in job.stages:
        job.model.check_targets(job.config.train.target_modules)


def check_sizes(config: RunConfig, images: Mapping[Path, tuple[int, int]]) -> None:
    """Raise UserError for images (with width and height) whose size is not in the configuration: training needs it."""
    sizes = config.sample.sizes
    for image, (width, height) in images.items():
        if (height, width) not in sizes:
            raise UserError(
                f"sample.height, sample.width: {', '.join(f'{w}x{h}' for h, w in sizes)}, but {image} is "
                f"{width}x{height}; expected the same, or [{height}, {width}] in sample.buckets"
            )
