"""Stable Diffusion 3 and 3.5: true classifier-free guidance, two CLIP encoders and T5, latents patched by the network.

The network patches latents itself; here they are packed 2 x 2 as FLUX's are, so that every family's latents are
(tokens, channels).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from gdro.common.errors import UserError
from gdro.models.base import Text
from gdro.models.diffusers_model import DiffusersModel
from gdro.models.guidance import guided, with_negative

_BLOCK = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"


class StableDiffusion3Model(DiffusersModel):
    """Stable Diffusion 3, 3.5 medium and large; a guidance scale of at most 1 means no guidance and one pass."""

    pipeline = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    vae_class = AutoencoderKL
    text_parts: ClassVar = {
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.CLIPTokenizer,
        "tokenizer_3": transformers.T5TokenizerFast,
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "text_encoder_3": transformers.T5EncoderModel,
    }
    reader = "tokenizer_3"
    lora_presets: ClassVar = {
        "attention": f"{_BLOCK}{_ATTENTION}",
        "attention+ff": f"{_BLOCK}({_ATTENTION}|{_FEED_FORWARD})",
    }

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` (n, 77 + max_sequence_length, D) and `pooled_prompt_embeds` (n, P), also for empty prompts.

        77 is CLIP's own length.
        """
        embeds, negative, pooled, negative_pooled = self._text_pipeline.encode_prompt(
            list(prompts), None, None, device=self.device, max_sequence_length=max_sequence_length
        )
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(tokens, channels) of one image; UserError also for a size beyond the network's table of positions."""
        shape = super().latent_shape(height, width)
        most = self.transformer.config.pos_embed_max_size * self.transformer.config.patch_size * self._scale
        for field, value in (("height", height), ("width", width)):
            if value > most:
                raise UserError(f"{field}: {value} is beyond the model's positions; expected at most {most}")
        return shape

    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        config = self.transformer.config
        clip = transformers.CLIPTextConfig(**self._parts.json("text_encoder/config.json"))
        of_prompt = {
            "prompt_embeds": (clip.max_position_embeddings + max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
        return of_prompt | {f"negative_{name}": shape for name, shape in of_prompt.items()}

    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        x = self._unpack(x_t, height, width)
        if not self.guides(guidance_scale, distilled=self._distilled):
            return self._pack(self._network(x, t, text))
        velocity, nothing = self._network(torch.cat([x, x]), torch.cat([t, t]), with_negative(text)).chunk(2)
        return self._pack(guided(velocity, nothing, guidance_scale))

    def _network(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=t * self._scheduler_config.get("num_train_timesteps", 1000),
            encoder_hidden_states=text["prompt_embeds"].to(self.dtype),
            pooled_projections=text["pooled_prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]

    @classmethod
    def guides(cls, guidance_scale: float, *, distilled: bool) -> bool:
        return guidance_scale > 1

    def _sigmas(self, num_inference_steps: int) -> list[float] | None:
        return None

    @property
    def _channels(self) -> int:
        return 4 * int(self.transformer.config.in_channels)
