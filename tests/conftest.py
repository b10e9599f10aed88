"""Shared fixtures: a very small, real FluxPipeline made from configurations alone (random weights, no download)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads of their own would only take turns
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + "\"'.,:;!?-"


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE without merges: one token a character."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=48)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram over single characters and the word mark."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: T5TokenizerFast, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


def small_vae() -> AutoencoderKL:
    """4 x 4 pixels are one latent of 16 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.5,
        shift_factor=0.25,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def small_flux() -> FluxPipeline:
    """64x32 pixels are 32 tokens of 64 channels; guidance-embedded and shifted by resolution like FLUX.1-dev."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_image_seq_len=4096),
        vae=small_vae(),
        text_encoder=CLIPTextModel(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a generator of its own is the same at every run, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pipeline, as `FluxPipeline.from_pretrained` reads it. Do not write into it."""
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small_flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's pipeline, as diffusers writes it, and of the tiny model. Do not write into it."""
    from small_pipelines import PIPELINES

    from gdro.models.loading import TINY_FOLDER

    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if name == "tiny":
            return TINY_FOLDER
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                PIPELINES[name]().save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def flux(flux_folder: Path) -> Any:
    """A fresh gdro FluxModel on `flux_folder` (CPU, float32)."""
    from gdro.models import load_model

    return load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
