"""What a rollout records of its stochastic steps, for policy gradients."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """The w consecutive stochastic steps of a group's K images, on the CPU in float32.

    `states` (K, w + 1, tokens, channels): x before each step and after the last; `log_probs` (K, w): each step's
    Gaussian log-density under the sampling policy, averaged over elements; `times` (w + 1,): t of each state,
    decreasing.
    """

    states: Tensor
    log_probs: Tensor
    times: Tensor
