"""Qwen-Image: a language model reads the prompt, guidance preserves the velocity's norm, the VAE is a video VAE."""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from gdro.models.base import Text
from gdro.models.diffusers_model import DiffusersModel
from gdro.models.guidance import guided

BLANK = " "  # the negative prompt intended for Qwen-Image's guidance
_BLOCK = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(img_mlp|txt_mlp)\.net\.(0\.proj|2)"


@cache
def _template() -> Any:
    """The pipeline without its components, for its template."""
    return QwenImagePipeline(scheduler=None, vae=None, transformer=None, text_encoder=None, tokenizer=None)


class QwenImageModel(DiffusersModel):
    """Qwen-Image; a guidance scale of at most 1 means no guidance and one pass."""

    pipeline = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    vae_fields = ("latents_mean", "latents_std")
    text_parts: ClassVar = {
        "tokenizer": transformers.Qwen2Tokenizer,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration,
    }
    lora_presets: ClassVar = {
        "attention": f"{_BLOCK}{_ATTENTION}",
        "attention+ff": f"{_BLOCK}({_ATTENTION}|{_FEED_FORWARD})",
    }

    @classmethod
    def call_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance_scale, "negative_prompt": BLANK}

    @classmethod
    def written(cls, tokenizer: Any, prompt: str) -> str:
        return _template().prompt_template_encode.format(prompt)

    @classmethod
    def dropped(cls) -> int:
        return int(_template().prompt_template_encode_start_idx)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` (n, max_sequence_length, D), `prompt_embeds_mask` (n, max_sequence_length): False is padding.

        `negative_prompt_embeds` (n, L, D) are those of a blank prompt, without padding.
        """
        how = {"device": self.device, "max_sequence_length": max_sequence_length}
        embeds, mask = self._text_pipeline.encode_prompt(list(prompts), **how)
        blank, _ = self._text_pipeline.encode_prompt(BLANK, **how)
        if mask is None:  # in the pipeline this means no padding
            mask = torch.ones(embeds.shape[:2], device=self.device)
        short = max_sequence_length - embeds.shape[1]
        return {
            "prompt_embeds": torch.nn.functional.pad(embeds, (0, 0, 0, short)),
            "prompt_embeds_mask": torch.nn.functional.pad(mask.bool(), (0, short)),
            "negative_prompt_embeds": blank.repeat(len(prompts), 1, 1),
        }

    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """The length of a blank prompt depends on the tokenizer; the published one is assumed."""
        width = self.transformer.config.joint_attention_dim
        return {
            "prompt_embeds": (max_sequence_length, width),
            "prompt_embeds_mask": (max_sequence_length,),
            "negative_prompt_embeds": (6, width),
        }

    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        embeds, mask = text["prompt_embeds"], text["prompt_embeds_mask"]
        # Padding would cost as much as the image's tokens, and a mask would rule out the fastest attention kernels.
        shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()
        seen = None if shortest == longest else mask[:, :longest]
        velocity = self._network(x_t, t, embeds[:, :longest], seen, height, width)
        if not self.guides(guidance_scale, distilled=self._distilled):
            return velocity
        blank = self._network(x_t, t, text["negative_prompt_embeds"], None, height, width)
        found = guided(velocity, blank, guidance_scale)
        return found * (velocity.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True))

    def _network(self, x: Tensor, t: Tensor, embeds: Tensor, mask: Tensor | None, height: int, width: int) -> Tensor:
        side = 2 * self._scale
        return self.transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=embeds.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // side, width // side)]] * len(x),
            return_dict=False,
        )[0]

    @classmethod
    def guides(cls, guidance_scale: float, *, distilled: bool) -> bool:
        return guidance_scale > 1

    @property
    def _scale(self) -> int:
        return int(2 ** len(self._vae_config["temperal_downsample"]))

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the VAE's latents, (channels, 1, 1)."""
        mean, std = (
            torch.tensor(self._vae_config[name], device=self.device) for name in ("latents_mean", "latents_std")
        )
        return mean[:, None, None], std[:, None, None]

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        mean, std = self._statistics
        frame = (self._unpack(latents, height, width) * std + mean).unsqueeze(2)
        return self._vae.decode(frame.to(self.dtype), return_dict=False)[0][:, :, 0]

    def _encode(self, pixels: Tensor) -> Tensor:
        mean, std = self._statistics
        mode = self._vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0].float()
        return self._pack((mode - mean) / std)
