"""FLUX: diffusers' FluxPipeline taken apart so that it can be trained, and put together exactly as it generates."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from gdro.errors import UserError
from gdro.models import lora
from gdro.models.base import Text
from gdro.models.loading import revision_of
from gdro.samplers.schedulers import flow_scheduler

_BLOCK = r"(single_)?transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
LORA_PRESETS = {
    "attention": f"{_BLOCK}({_ATTENTION})",
    "attention+ff": f"{_BLOCK}({_ATTENTION}|{_FEED_FORWARD})",
}

_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


class FluxModel:
    """FlowModel on diffusers' real classes. Base weights are frozen in `dtype`; the LoRA is float32.

    In bfloat16 the transformer runs under autocast, so that the LoRA's products are bfloat16 too. The velocity is
    always returned in float32.
    """

    def __init__(self, name: str, source: str, commit: str | None, *, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self._source, self._commit = source, commit
        self.transformer = self._load(FluxTransformer2DModel, "transformer")
        self._vae_config: dict[str, Any] = self._config(AutoencoderKL, "vae")
        self._scheduler_config: dict[str, Any] = self._config(FlowMatchEulerDiscreteScheduler, "scheduler")
        self._scale = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        self._ids = cache(self._make_ids)
        self._adapter: dict[str, nn.Parameter] = {}
        self._lora_layers: list[BaseTunerLayer] = []
        self.evaluations = 0

    @cached_property
    def revision(self) -> str:
        """The Hub commit, or the digest of the transformer's weights."""
        return revision_of(self._source, self._commit)

    @property
    def weights(self) -> str:
        """`revision`, and the digest of the adapter if it is in use: what `velocity` computes at this moment."""
        if not any(not layer.disable_adapters for layer in self._lora_layers):
            return self.revision
        digest = hashlib.sha256()
        for name, parameter in sorted(self._adapter.items()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return f"{self.revision}+{digest.hexdigest()[:16]}"

    # ---- text

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """`prompt_embeds` (n, max_sequence_length, D) and `pooled_prompt_embeds` (n, P) in the model's dtype."""
        embeds, pooled, _ = self._text_pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @cached_property
    def _text_pipeline(self) -> Any:
        return FluxPipeline(
            scheduler=None,
            vae=None,
            transformer=None,
            tokenizer=self._load(transformers.CLIPTokenizer, "tokenizer"),
            tokenizer_2=self._load(transformers.T5TokenizerFast, "tokenizer_2"),
            text_encoder=self._load(transformers.CLIPTextModel, "text_encoder"),
            text_encoder_2=self._load(transformers.T5EncoderModel, "text_encoder_2"),
        )

    # ---- velocity

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(tokens, channels) of one image; a token is a square of 2 x 2 VAE latents."""
        side = 2 * self._scale
        for field, value in (("height", height), ("width", width)):
            if value <= 0 or value % side:
                raise UserError(f"{field}: {value} does not fit the model's grid; expected a multiple of {side}")
        return (height // side) * (width // side), self.transformer.config.in_channels

    def velocity(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        """v_theta(x_t, t, c): x_t (n, tokens, channels), t (n,) in (0, 1), text of n rows; float32 out."""
        self.evaluations += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        embeds = text["prompt_embeds"].to(self.device, self.dtype)
        text_ids, image_ids = self._ids(embeds.shape[1], height, width)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x_t),), guidance_scale, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = self.transformer(
                hidden_states=x_t.to(self.device, self.dtype),
                timestep=t.to(self.device),
                guidance=guidance,
                pooled_projections=text["pooled_prompt_embeds"].to(self.device, self.dtype),
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        return velocity.float()

    def _make_ids(self, text_length: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of text tokens (all zero) and of image tokens (0, row, column)."""
        side = 2 * self._scale
        image = FluxPipeline._prepare_latent_image_ids(1, height // side, width // side, self.device, torch.float32)
        return torch.zeros(text_length, 3, device=self.device), image

    def scheduler(self, name: str, num_inference_steps: int, height: int, width: int) -> Any:
        """A deterministic flow scheduler with its timesteps set as FluxPipeline sets them."""
        tokens, _ = self.latent_shape(height, width)
        return flow_scheduler(name, self._scheduler_config, num_inference_steps, tokens, self.device)

    # ---- images

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of packed latents (n, tokens, channels)."""
        unpacked = FluxPipeline._unpack_latents(latents.to(self.device), height, width, self._scale)
        unpacked = unpacked / self._vae_config["scaling_factor"] + self._vae_config["shift_factor"]
        pixels = self._vae.decode(unpacked.to(self.dtype), return_dict=False)[0]
        return self._image_processor.postprocess(pixels, output_type="pil")

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Packed latents (n, tokens, channels), float32, of images of one size; the mode of the VAE's posterior.

        Raises UserError for images of different sizes or off the model's grid.
        """
        width, height = images[0].size
        for image in images:
            if image.size != (width, height):
                raise UserError(
                    f"image: {image.size[0]}x{image.size[1]} pixels; expected {width}x{height} like the first"
                )
        self.latent_shape(height, width)
        pixels = self._image_processor.preprocess([image.convert("RGB") for image in images], height, width)
        posterior = self._vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        latents = (posterior.mode().float() - self._vae_config["shift_factor"]) * self._vae_config["scaling_factor"]
        n, channels, rows, columns = latents.shape
        return FluxPipeline._pack_latents(latents, n, channels, rows, columns)

    @cached_property
    def _vae(self) -> Any:
        return self._load(AutoencoderKL, "vae")

    @cached_property
    def _image_processor(self) -> Any:
        return VaeImageProcessor(vae_scale_factor=2 * self._scale)

    # ---- adapter

    def check_targets(self, targets: str | Sequence[str]) -> None:
        """Raise UserError if `targets` do not name layers of this model."""
        lora.resolve_targets(self.transformer, targets, LORA_PRESETS)

    def add_adapter(self, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> None:
        """Add a LoRA that leaves the model as it is (B = 0), in place of any other; drawn from `seed` alone."""
        self._drop_adapter()
        resolved = lora.resolve_targets(self.transformer, targets, LORA_PRESETS)
        lora.add_lora(self.transformer, rank=rank, alpha=alpha, targets=resolved, seed=seed)
        self._own_adapter()

    def adapter(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by name (float32, trainable); empty without an adapter."""
        return dict(self._adapter)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the adapter in place; names and shapes must be the adapter's own."""
        strange = set(state) ^ set(self._adapter)
        if strange:
            raise UserError(f"adapter: layer {min(strange)} is in only one of the state and the model's adapter")
        with torch.no_grad():
            for name, parameter in self._adapter.items():
                if state[name].shape != parameter.shape:
                    raise UserError(
                        f"adapter: {name} has shape {tuple(state[name].shape)}; expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(state[name])

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside it the model is the reference. Nesting is allowed; the adapter is back after any exception."""
        layers = [layer for layer in self._lora_layers if not layer.disable_adapters]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def load_adapter(self, folder: Path) -> None:
        """Add the adapter in `folder`, in place of any other."""
        self._drop_adapter()
        lora.read_lora(FluxPipeline, self.transformer, folder)
        self._own_adapter()

    def _own_adapter(self) -> None:
        self._adapter = lora.own_in_float32(self.transformer)
        self._lora_layers = [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]

    def _drop_adapter(self) -> None:
        if self._adapter:
            self.transformer.unload_lora()
        self._adapter, self._lora_layers = {}, []

    # ---- files

    def _load(self, kind: Any, part: str) -> Any:
        """Component `part`, frozen and complete (a missing tensor would otherwise be drawn at random)."""
        options: dict[str, Any] = {"subfolder": part, "revision": self._commit}
        if not issubclass(kind, nn.Module):
            return self._try(part, lambda: kind.from_pretrained(self._source, **options))
        options |= {"use_safetensors": True, "output_loading_info": True}
        key = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
        model, info = self._try(part, lambda: kind.from_pretrained(self._source, **options, **{key: self.dtype}))
        missing = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
        if missing:
            raise UserError(f"model: {self.name}: {part} lacks {len(missing)} weights ({min(missing)}, ...)")
        return model.eval().requires_grad_(False).to(self.device)

    def _config(self, kind: Any, part: str) -> Any:
        return self._try(part, lambda: kind.load_config(self._source, subfolder=part, revision=self._commit))

    def _try(self, part: str, load: Any) -> Any:
        try:
            return load()
        except _LOAD_ERRORS as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"model: {self.name}: {part} cannot be loaded ({cause})") from None
