"""FLUX.1: guidance is embedded, a CLIP encoder gives the pooled text, a T5 encoder the sequence."""

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from gdro.models.base import Text
from gdro.models.diffusers_model import DiffusersModel

_BLOCK = r"(single_)?transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"


class FluxModel(DiffusersModel):
    """FLUX.1 (dev, schnell) and the tiny model."""

    pipeline = FluxPipeline
    transformer_class = FluxTransformer2DModel
    vae_class = AutoencoderKL
    text_parts: ClassVar = {
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.T5TokenizerFast,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
    }
    reader = "tokenizer_2"
    lora_presets: ClassVar = {
        "attention": f"{_BLOCK}({_ATTENTION})",
        "attention+ff": f"{_BLOCK}({_ATTENTION}|{_FEED_FORWARD})",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ids = cache(self._make_ids)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` (n, max_sequence_length, D) and `pooled_prompt_embeds` (n, P) in the model's dtype."""
        embeds, pooled, _ = self._text_pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        config = self.transformer.config
        return {
            "prompt_embeds": (max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        embeds = text["prompt_embeds"].to(self.dtype)
        text_ids, image_ids = self._ids(embeds.shape[1], height, width)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x_t),), guidance_scale, device=self.device)
        return self.transformer(
            hidden_states=x_t,
            timestep=t,
            guidance=guidance,
            pooled_projections=text["pooled_prompt_embeds"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def _make_ids(self, text_length: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of text tokens (all zero) and of image tokens (0, row, column)."""
        side = 2 * self._scale
        image = FluxPipeline._prepare_latent_image_ids(1, height // side, width // side, self.device, torch.float32)
        return torch.zeros(text_length, 3, device=self.device), image
