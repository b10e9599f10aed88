"""Which sampling steps of a round are stochastic (Flow-GRPO-Fast; MixGRPO, 2507.21802); the others follow the ODE."""

from typing import Literal, get_args

from gdro.common.rng import numpy_rng

Window = Literal["all", "fixed", "random", "sliding"]


def window_steps(
    window: Window,
    *,
    size: int | None,
    start: int | None,
    interval: int | None,
    num_steps: int,
    round: int,
    seed: int,
) -> range:
    """The consecutive stochastic steps, out of 0 .. num_steps - 1, in round `round`.

    The last step, to t = 0, is never stochastic: it is not trained on, and its noise would only stay in the image.
    all: all steps but the last; fixed: `size` from `start`; random: `size` from a start drawn for the round; sliding:
    `size` from a start that advances by one every `interval` rounds and wraps around. Fields that a window does not use
    are None. Raises ValueError for a window outside the steps.
    """
    trainable = num_steps - 1
    if window == "all":
        size, start = trainable, 0
    if size is None or not 1 <= size <= trainable:
        raise ValueError(f"a window of {size} steps; expected 1 to {trainable}, of {num_steps} without the last")
    places = trainable - size + 1
    if window == "random":
        start = int(numpy_rng(seed, "window", round).integers(places))
    elif window == "sliding":
        if interval is None or interval < 1:
            raise ValueError(f"a window sliding every {interval} rounds; expected at least 1")
        start = round // interval % places
    elif window not in get_args(Window):
        raise ValueError(f"window {window!r}; expected one of {', '.join(get_args(Window))}")
    if start is None or not 0 <= start < places:
        raise ValueError(f"a window of {size} steps from step {start}; expected it to start at 0 to {places - 1}")
    return range(start, start + size)
