"""Rewards and judges by name."""

from gdro.errors import UserError, did_you_mean
from gdro.rewards.base import Judge, Reward
from gdro.rewards.geneval import GenevalReward
from gdro.rewards.ocr import OcrReward
from gdro.rewards.user import UserJudge, UserReward

REWARDS = ("ocr", "ocr_strict", "geneval", "geneval_strict")
JUDGES = ("tiny",)


def load_reward(spec: str) -> Reward:
    """A reward by its name or, for a function of the user's own, `module:function`."""
    if ":" in spec:
        return UserReward(spec, "score.reward")
    if spec not in REWARDS:
        raise UserError(f'score.reward: "{spec}" is no reward, nor module:function{did_you_mean(spec, REWARDS)}')
    if spec.startswith("geneval"):
        from gdro.tiny.vision import TinyDetector  # a layer above, so only when it is asked for

        return GenevalReward(TinyDetector(), strict=spec == "geneval_strict")
    return OcrReward(strict=spec == "ocr_strict")


def load_judge(spec: str) -> Judge:
    """A judge by its name or, for a function of the user's own, `module:function`."""
    if ":" in spec:
        return UserJudge(spec, "evaluate.judge")
    if spec not in JUDGES:
        raise UserError(f'evaluate.judge: "{spec}" is no judge, nor module:function{did_you_mean(spec, JUDGES)}')
    from gdro.tiny.judge import TinyJudge  # a layer above, so only when it is asked for

    return TinyJudge()
