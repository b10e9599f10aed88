"""What all families share: diffusers' frozen components, a LoRA on the transformer, text and images in and out.

A family (one file each) defines how its pipeline encodes text, calls its transformer, schedules time and, if different
from FLUX.1, packs and scales its latents.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.images import to_rgb
from gdro.models import lora, tokenizers
from gdro.models.base import Text
from gdro.models.components import Components
from gdro.models.finite import check_rows, check_weights
from gdro.models.quantization import Quantization, quantized
from gdro.models.schedulers import flow_scheduler, resolution_shift

# Per function: with and without adapter and gradient, for each number of images, and again for another LoRA.
RECOMPILATIONS = 64


class DiffusersModel(ABC):
    """FlowModel on diffusers' real classes. Base weights are frozen in `dtype`; the LoRA is float32.

    In bfloat16 the transformer runs under autocast, so the LoRA's products are bfloat16 too. Velocities are always
    returned in float32.
    """

    pipeline: ClassVar[Any]  # diffusers' pipeline, whose functions encode text and pack latents
    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    vae_fields: ClassVar[Sequence[str]] = ("scaling_factor", "shift_factor")  # configuration fields that scale latents
    text_parts: ClassVar[Mapping[str, Any]]  # tokenizers and text encoders by component name
    reader: ClassVar[str] = "tokenizer"  # the tokenizer whose tokens `max_sequence_length` limits
    special_tokens: ClassVar[bool] = True  # whether it adds special tokens to what `written` returns
    _distilled = False  # guidance-distilled, as model_index.json says for some models
    lora_presets: ClassVar[Mapping[str, str]]  # name: regular expression of layer names

    def __init__(
        self,
        parts: Components,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        sharded: bool = False,
    ) -> None:
        self.name, self.device, self.dtype, self.quantization = parts.name, device, dtype, quantization
        self._parts = parts
        self._stamps = {} if device.type == "meta" else {part: parts.stamp(part) for part in parts.kinds}
        options = quantized(quantization, dtype) if quantization else {}
        if quantization and "quantization_config" in parts.json("transformer/config.json"):
            raise UserError(f'quantization is "{quantization}", but {parts.name} is stored quantized; expected none')
        whole = torch.device("cpu") if sharded else device
        self.transformer = self._load(self.transformer_class, "transformer", whole, **options)
        if sharded:
            distributed.shard(self.transformer, self._blocks(), device)
        self._vae_config, self._scheduler_config = parts.vae(), parts.scheduler()
        if device.type != "meta":  # it is small, and damage shows before the images it would decode are made
            self._own_vae = self._load(self.vae_class, "vae", torch.device("cpu"))
        self._adapter: dict[str, nn.Parameter] = {}
        self._lora_layers: list[BaseTunerLayer] = []
        self.nfe = 0

    @cached_property
    def revision(self) -> str:
        """The Hub commit, or the digest of the folder's files; and the quantization."""
        base = self._parts.revision()
        for part in self._stamps:
            self._check_unchanged(part)
        return f"{base}-{self.quantization}" if self.quantization else base

    @property
    def fingerprint(self) -> str:
        """`revision`, plus the adapter's digest while it is in use: identifies what `velocity` computes now."""
        if not any(not layer.disable_adapters for layer in self._lora_layers):
            return self.revision
        digest = hashlib.sha256()
        for name, parameter in sorted(self._adapter.items()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return f"{self.revision}+{digest.hexdigest()[:16]}"

    # ---- what a family defines

    @classmethod
    def written(cls, tokenizer: Any, prompt: str) -> str:
        """The prompt as given to the tokenizer `reader`: in the pipeline's template."""
        return prompt

    @classmethod
    def dropped(cls) -> int:
        """How many of its first tokens the text encoder reads but the transformer does not get."""
        return 0

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """Named tensors of n rows in the model's dtype; their shapes depend only on `max_sequence_length`."""

    @abstractmethod
    def text_shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's tensors in `encode_text`, without encoding anything."""

    @abstractmethod
    def _predict(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        """The transformer's velocity (n, tokens, channels), guidance applied; called under autocast in bfloat16."""

    @classmethod
    def call_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """Arguments that give a pipeline call the guidance `velocity` applies at this scale."""
        return {"guidance_scale": guidance_scale}

    @classmethod
    def guides(cls, guidance_scale: float, *, distilled: bool) -> bool:
        """Whether this scale means classifier-free guidance: a second pass without the prompt."""
        return False

    def _sigmas(self, num_inference_steps: int) -> list[float] | None:
        """Noise levels before the shift; None: the scheduler's own."""
        return [1 - i / num_inference_steps for i in range(num_inference_steps)]

    def _shift(self, tokens: int, num_inference_steps: int) -> float:
        """mu of a schedule with dynamic shift."""
        return resolution_shift(self._scheduler_config, tokens)

    @property
    def _scale(self) -> int:
        """Pixels per side of one VAE latent."""
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

    @property
    def _channels(self) -> int:
        """Channels of a packed token."""
        return int(self.transformer.config.in_channels)

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Pixels (n, 3, height, width) of packed latents (n, tokens, channels)."""
        unpacked = self._unpack(latents, height, width)
        unpacked = unpacked / self._vae_config["scaling_factor"] + self._vae_config["shift_factor"]
        return self._vae.decode(unpacked.to(self.dtype), return_dict=False)[0]

    def _encode(self, pixels: Tensor) -> Tensor:
        """Packed latents of pixels (n, 3, height, width): the mode of the VAE's posterior."""
        mode = self._vae.encode(pixels).latent_dist.mode().float()
        return self._pack((mode - self._vae_config["shift_factor"]) * self._vae_config["scaling_factor"])

    def _pack(self, latents: Tensor) -> Tensor:
        """(n, channels, rows, columns) of VAE latents -> (n, tokens, 4 channels)."""
        return diffusers.FluxPipeline._pack_latents(latents, *latents.shape)

    def _unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `_pack`."""
        return diffusers.FluxPipeline._unpack_latents(latents, height, width, self._scale)

    # ---- memory and speed

    def compile(self) -> None:
        """Compile the transformer's blocks, each kind once, with and without the adapter."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
        for block in self._blocks():
            block.compile()

    def checkpoint_activations(self, enabled: bool) -> None:
        """Whether a forward pass with gradient keeps only each block's input; the backward recomputes the rest."""
        if enabled:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()

    def free(self) -> None:
        """Move the text encoders and VAE to the host's memory until their next use."""
        for part in {"_own_text_pipeline", "_own_vae"} & set(vars(self)):
            _moved(vars(self)[part], torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _blocks(self) -> list[nn.Module]:
        lists = (part for part in self.transformer.children() if isinstance(part, nn.ModuleList))
        return [block for blocks in lists for block in blocks]

    # ---- velocity

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(tokens, channels) of one image; a token is a square of 2 x 2 VAE latents."""
        side = 2 * self._scale
        for field, value in (("height", height), ("width", width)):
            if value <= 0 or value % side:
                raise UserError(f"{field}: {value} does not fit the model's grid; expected a multiple of {side}")
        return (height // side) * (width // side), self._channels

    def passes(self, guidance_scale: float) -> int:
        """Passes through the transformer for one velocity: two with classifier-free guidance."""
        return 1 + self.guides(guidance_scale, distilled=self._distilled)

    def velocity(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        """v_theta(x_t, t, c): x_t (n, tokens, channels), t (n,) in (0, 1), text of n rows -> x_t's shape, float32."""
        self.nfe += len(x_t) * self.passes(guidance_scale) * (3 if torch.is_grad_enabled() else 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = self._predict(
                x_t.to(self.device, self.dtype),
                t.to(self.device),
                {name: value.to(self.device) for name, value in text.items()},
                guidance_scale=guidance_scale,
                height=height,
                width=width,
            )
        return velocity.float()

    def scheduler(self, name: str, num_inference_steps: int, height: int, width: int) -> Any:
        """A deterministic flow scheduler, its timesteps set as in the pipeline."""
        tokens, _ = self.latent_shape(height, width)
        return flow_scheduler(
            name,
            self._scheduler_config,
            num_inference_steps,
            sigmas=self._sigmas(num_inference_steps),
            mu=self._shift(tokens, num_inference_steps),
            device=self.device,
        )

    # ---- text and images

    @property
    def _text_pipeline(self) -> Any:
        """The pipeline with only its text encoders."""
        return _moved(self._own_text_pipeline, self.device)

    @property
    def _vae(self) -> Any:
        return _moved(self._own_vae, self.device)

    @cached_property
    def _own_text_pipeline(self) -> Any:
        parts = {}
        for name, kind in self.text_parts.items():
            self._check_unchanged(name)
            parts[name] = self._load(kind, name) if issubclass(kind, nn.Module) else tokenizers.load(self._parts, name)
        return self.pipeline(scheduler=None, vae=None, transformer=None, **parts)

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of packed latents (n, tokens, channels). Raises NotFinite, with the row, for NaN (black pixels)."""
        pixels = self._decode(latents.to(self.device), height, width)
        check_rows("the VAE's pixels", pixels)
        return self._image_processor.postprocess(pixels, output_type="pil")

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Packed latents (n, tokens, channels), float32, of images of one size: the mode of the VAE's posterior.

        Raises UserError for images of different sizes or off the model's grid.
        """
        width, height = images[0].size
        for image in images:
            if image.size != (width, height):
                raise UserError(
                    f"image: {image.size[0]}x{image.size[1]} pixels; expected {width}x{height} like the first"
                )
        self.latent_shape(height, width)
        pixels = self._image_processor.preprocess([to_rgb(image) for image in images], height, width)
        latents = self._encode(pixels.to(self.device, self.dtype)).float()
        check_rows("the VAE's latents", latents)
        return latents

    @cached_property
    def _own_vae(self) -> Any:
        return self._load(self.vae_class, "vae")

    @cached_property
    def _image_processor(self) -> Any:
        return VaeImageProcessor(vae_scale_factor=2 * self._scale)

    # ---- adapter

    def check_targets(self, targets: str | Sequence[str]) -> None:
        """Raise UserError unless `targets` name layers of this model."""
        lora.resolve_targets(self.transformer, targets, self.lora_presets)

    def add_adapter(self, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> None:
        """Replace any adapter by a new LoRA that leaves the model unchanged (B = 0); it depends only on `seed`."""
        self._drop_adapter()
        resolved = lora.resolve_targets(self.transformer, targets, self.lora_presets)
        lora.add_lora(self.transformer, rank=rank, alpha=alpha, targets=resolved, seed=seed)
        self._own_adapter()

    def adapter(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by name (float32, trainable); empty without an adapter."""
        return dict(self._adapter)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the adapter in place; UserError unless its names and shapes are the adapter's."""
        strange = set(state) ^ set(self._adapter)
        if strange:
            raise UserError(f"adapter: layer {min(strange)} is in only one of the state and the model's adapter")
        check_weights("adapter", state.items())
        with torch.no_grad():
            for name, parameter in self._adapter.items():
                if state[name].shape != parameter.shape:
                    raise UserError(
                        f"adapter: {name} has shape {tuple(state[name].shape)}; expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(state[name])

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within it, the model is the reference. Nesting is allowed; the adapter is restored after any exception."""
        layers = [layer for layer in self._lora_layers if not layer.disable_adapters]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def load_adapter(self, folder: Path) -> None:
        """Replace any adapter by the one in `folder`."""
        self._drop_adapter()
        lora.read_lora(self.pipeline, self.transformer, folder)
        self._own_adapter()

    def _own_adapter(self) -> None:
        self._adapter = lora.own_in_float32(self.transformer)
        self._lora_layers = [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]

    def _drop_adapter(self) -> None:
        if self._adapter:
            self.transformer.unload_lora()
        self._adapter, self._lora_layers = {}, []

    # ---- files

    def networks(self) -> dict[str, nn.Module]:
        """Every network of the pipeline by component name, loaded."""
        encoders = {part: kind for part, kind in self.text_parts.items() if issubclass(kind, nn.Module)}
        return {"transformer": self.transformer, "vae": self._vae} | {p: self._load(k, p) for p, k in encoders.items()}

    def _load(self, kind: Any, part: str, device: torch.device | None = None, **options: Any) -> Any:
        """Network `part`, frozen, checked to be complete (missing tensors would be random) and finite."""
        options |= {"subfolder": part, "revision": self._parts.commit}
        with self._parts.refusing(part):
            if self.device.type == "meta":
                return self._outline(kind, options)
            self._check_unchanged(part)
            options |= {"use_safetensors": True, "output_loading_info": True}
            key = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
            model, info = kind.from_pretrained(self._parts.source, **options, **{key: self.dtype})
        missing = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
        if missing:
            raise self._parts.error(f"{part} lacks {len(missing)} weights ({min(missing)}, ...)")
        model = model.eval().requires_grad_(False).to(device or self.device)
        check_weights(f"model: {self.name}: {part}", [*model.named_parameters(), *model.named_buffers()])
        return model

    def _outline(self, kind: Any, options: Mapping[str, Any]) -> Any:
        """A component of the right shapes and types but without weights, for plans."""
        with torch.device("meta"):
            if issubclass(kind, diffusers.ModelMixin):
                model = kind.from_config(kind.load_config(self._parts.source, **options))
            else:
                model = kind(kind.config_class.from_pretrained(self._parts.source, **options))
        return nn.Module.to(model.eval().requires_grad_(False), self.dtype)

    def _check_unchanged(self, part: str) -> None:
        """Raise UserError if the files have changed since the start, under the same revision."""
        if self._parts.stamp(part) != self._stamps[part]:
            raise self._parts.error(f"the files of {part} have changed since the start; expected them left alone")


def _moved(part: Any, device: torch.device) -> Any:
    """A model, or a pipeline and its models, on the device."""
    for one in part.components.values() if isinstance(part, diffusers.DiffusionPipeline) else [part]:
        if isinstance(one, nn.Module) and any(weight.device != device for weight in one.parameters()):
            one.to(device)
    return part
