"""Counter-based randomness: every draw is a function of (seed, purpose, index) only.

No generator carries over from one draw to the next, so draws do not depend on batch size, order, worker count or
interruption, and there is no RNG state to save in a checkpoint.
"""

import hashlib

import numpy as np
import torch


def _key(seed: int, purpose: str, index: tuple[int | str, ...]) -> int:
    text = "\x1f".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_rng(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A fresh CPU generator for the draw named by (seed, purpose, index).

    PyTorch's CPU generator uses only the low 32 bits of its seed, so two of n draws coincide with probability about
    n^2 / 2^33: 10,000 images all have different noise with 99 %. NumPy's generator uses the whole key.
    """
    return torch.Generator().manual_seed(_key(seed, purpose, index))


def numpy_rng(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A fresh NumPy generator for the draw named by (seed, purpose, index)."""
    return np.random.Generator(np.random.Philox(_key(seed, purpose, index)))
