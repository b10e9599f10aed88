"""FLUX.2: text embeddings are hidden states of a language model, positions have four axes, latents are normalized.

Latents are packed 2 x 2 as in FLUX.1; the VAE stores the mean and variance of each packed channel.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, compute_empirical_mu, format_input
from torch import Tensor

from gdro.models.base import Text
from gdro.models.diffusers_model import DiffusersModel
from gdro.models.guidance import guided, with_negative

_BLOCK = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.(linear_in|linear_out)"
_FUSED = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"  # attention and feed-forward in one


class Flux2Model(DiffusersModel):
    """FLUX.2 dev: guidance is embedded, Mistral 3 reads the prompt."""

    pipeline: ClassVar[Any] = Flux2Pipeline
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    vae_fields = ("batch_norm_eps",)
    # The published tokenizer is a processor for text and images; text needs only its tokenizer, without torchvision.
    text_parts: ClassVar = {
        "tokenizer": transformers.AutoTokenizer,
        "text_encoder": transformers.Mistral3ForConditionalGeneration,
    }
    special_tokens = False
    lora_presets: ClassVar = {
        "attention": f"{_BLOCK}{_ATTENTION}|{_FUSED}",
        "attention+ff": f"{_BLOCK}({_ATTENTION}|{_FEED_FORWARD})|{_FUSED}",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ids = cache(self._make_ids)

    @classmethod
    def written(cls, tokenizer: Any, prompt: str) -> str:
        messages = format_input([prompt], SYSTEM_MESSAGE)[0]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` (n, max_sequence_length, D) in the model's dtype, three layers concatenated."""
        embeds, _ = self._text_pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (max_sequence_length, self.transformer.config.joint_attention_dim)}

    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        guidance = torch.full((len(x_t),), guidance_scale, device=self.device)
        return self._network(x_t, t, text, guidance, height, width)

    def _network(self, x_t: Tensor, t: Tensor, text: Text, guidance: Tensor | None, height: int, width: int) -> Tensor:
        embeds = text["prompt_embeds"].to(self.dtype)
        text_ids, image_ids = self._ids(embeds.shape[1], height, width)
        return self.transformer(
            hidden_states=x_t,
            timestep=t,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def _make_ids(self, text_length: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions (frame, row, column, word) of text tokens and of image tokens."""
        rows, columns = (torch.arange(side // (2 * self._scale)) for side in (height, width))
        zero = torch.zeros(1, dtype=torch.long)
        text = torch.cartesian_prod(zero, zero, zero, torch.arange(text_length))
        image = torch.cartesian_prod(zero, rows, columns, zero)
        return text.to(self.device), image.to(self.device)

    def _shift(self, tokens: int, num_inference_steps: int) -> float:
        return compute_empirical_mu(tokens, num_inference_steps)

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        mean, std = self._statistics()
        unpacked = self._unpack(latents * std + mean, height, width)
        return self._vae.decode(unpacked.to(self.dtype), return_dict=False)[0]

    def _encode(self, pixels: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (self._pack(self._vae.encode(pixels).latent_dist.mode().float()) - mean) / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of packed latents, float32."""
        norm = self._vae.bn
        return norm.running_mean.float(), (norm.running_var.float() + self._vae_config["batch_norm_eps"]).sqrt()


class Flux2KleinModel(Flux2Model):
    """FLUX.2 klein: Qwen 3 reads the prompt; true guidance above a scale of 1, none if distilled."""

    pipeline = Flux2KleinPipeline
    text_parts: ClassVar = {
        "tokenizer": transformers.AutoTokenizer,
        "text_encoder": transformers.Qwen3ForCausalLM,
    }
    special_tokens = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._distilled = bool(self._parts.index.get("is_distilled", False))

    @classmethod
    def written(cls, tokenizer: Any, prompt: str) -> str:
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **how)

    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` as in FLUX.2 and, for guidance, `negative_prompt_embeds` of an empty prompt."""
        text = super().encode_text(prompts, max_sequence_length)
        if not self._distilled:
            nothing = super().encode_text([""] * len(prompts), max_sequence_length)
            text["negative_prompt_embeds"] = nothing["prompt_embeds"]
        return text

    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        shapes = super().text_shapes(max_sequence_length)
        return shapes if self._distilled else shapes | {"negative_prompt_embeds": shapes["prompt_embeds"]}

    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        if not self.guides(guidance_scale, distilled=self._distilled):
            return self._network(x_t, t, text, None, height, width)
        both = torch.cat([x_t, x_t]), torch.cat([t, t]), with_negative(text)
        velocity, nothing = self._network(*both, None, height, width).chunk(2)
        return guided(velocity, nothing, guidance_scale)

    @classmethod
    def guides(cls, guidance_scale: float, *, distilled: bool) -> bool:
        return guidance_scale > 1 and not distilled
