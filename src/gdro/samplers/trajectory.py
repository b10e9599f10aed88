"""What a rollout keeps of its stochastic steps, for policy gradients to learn from."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """The w consecutive stochastic steps of a group's K images, on the CPU in float32.

    `states` (K, w + 1, tokens, channels): x before each step and after the last; `log_probs` (K, w): mean over elements
    of each step's Gaussian log-density under the policy that sampled; `times` (w + 1,): t of each state, falling.
    """

    states: Tensor
    log_probs: Tensor
    times: Tensor
