"""gdro: post-train text-to-image flow models on rewards, offline, from groups of their own images."""

__version__ = "0.1.0"
