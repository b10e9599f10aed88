"""Z-Image: the network's time runs from noise (0) to image (1), and captions keep their own length."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad

from gdro.models.base import Text
from gdro.models.diffusers_model import DiffusersModel
from gdro.models.guidance import guided, with_negative

_BLOCK = r"(noise_refiner|context_refiner|layers)\.\d+\."
_ATTENTION = r"attention\.(to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"feed_forward\.(w1|w2|w3)"


class ZImageModel(DiffusersModel):
    """Z-Image and Z-Image Turbo. Guidance is v + s (v - v_nothing), so a scale of 0 means no guidance and one pass."""

    pipeline = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    vae_class = AutoencoderKL
    text_parts: ClassVar = {"tokenizer": transformers.AutoTokenizer, "text_encoder": transformers.Qwen3Model}
    lora_presets: ClassVar = {
        "attention": f"{_BLOCK}{_ATTENTION}",
        "attention+ff": f"{_BLOCK}({_ATTENTION}|{_FEED_FORWARD})",
    }

    @classmethod
    def written(cls, tokenizer: Any, prompt: str) -> str:
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **how)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` (n, max_sequence_length, D) and `prompt_embeds_mask`: False is padding.

        For guidance, the same for an empty prompt, as `negative_...`.
        """
        embeds, negative = self._text_pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=max_sequence_length
        )
        text, places = {}, torch.arange(max_sequence_length, device=self.device)
        for name, captions in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative)):
            padded = [pad(caption, (0, 0, 0, max_sequence_length - len(caption))) for caption in captions]
            text[name] = torch.stack(padded)
            text[f"{name}_mask"] = torch.stack([places < len(caption) for caption in captions])
        return text

    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        embeds, mask = (max_sequence_length, self.transformer.config.cap_feat_dim), (max_sequence_length,)
        of_prompt = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
        return of_prompt | {f"negative_{name}": shape for name, shape in of_prompt.items()}

    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        x = self._unpack(x_t, height, width)
        if not self.guides(guidance_scale, distilled=self._distilled):
            return self._pack(self._network(x, t, text))
        velocity, nothing = self._network(torch.cat([x, x]), torch.cat([t, t]), with_negative(text)).chunk(2)
        return self._pack(guided(velocity, nothing, guidance_scale, start=velocity))

    def _network(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """v = eps - x0 (n, channels, rows, columns), float32; the network itself predicts x0 - eps."""
        lengths = text["prompt_embeds_mask"].sum(1).tolist()
        embeds = text["prompt_embeds"].to(self.dtype)
        captions = [caption[:length] for caption, length in zip(embeds, lengths, strict=True)]
        images = list(x.unsqueeze(2).unbind())  # of one frame each
        found = self.transformer(images, 1 - t, captions, return_dict=False)[0]
        return -torch.stack(found).squeeze(2).float()

    @classmethod
    def guides(cls, guidance_scale: float, *, distilled: bool) -> bool:
        return guidance_scale > 0

    @property
    def _channels(self) -> int:
        return 4 * int(self.transformer.config.in_channels)
