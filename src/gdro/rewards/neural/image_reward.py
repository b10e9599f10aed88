"""ImageReward (2304.05977): human preference by BLIP's image-grounded text encoder and a linear head.

r = (MLP(first token's state) - mean) / std; about mean 0 and standard deviation 1 over the authors' images. The towers
are transformers' BLIP classes; weights are the published ones, in safetensors under their own names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.hub import Source, locate
from gdro.common.images import to_rgb
from gdro.common.prompts import Prompt
from gdro.common.reading import reading
from gdro.rewards.base import Scores
from gdro.rewards.neural import pretrained
from gdro.rewards.neural.clip_encoder import settings_version, token_counts, tokenize
from gdro.rewards.neural.published import WEIGHTS, from_blip, linear_chain, read_chain, tensor_names

if TYPE_CHECKING:
    from torch import Tensor

MODEL, TOKENIZER = "RE-N-Y/ImageReward", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35  # per prompt, including start and end
HEAD_WIDTH = 64  # of an attention head, in both towers of BLIP
PROBE = ("blip.visual_encoder.pos_embed", "blip.text_encoder.embeddings.word_embeddings.weight", "mlp.layers.0.weight")


def standardized(raw: np.ndarray) -> np.ndarray:
    """The head's output, standardized by the authors' mean and standard deviation; any shape."""
    return (raw - MEAN) / STD


@dataclass(frozen=True)
class ImageReward:
    """Evidence: `raw` (the head's output), the prompt's number of `tokens`, and whether it was `truncated` to 35."""

    model: str
    revision: str | None
    tokenizer: str
    device: pretrained.Device
    batch_size: int
    name: ClassVar[str] = "image_reward"
    parallel: ClassVar[bool] = False
    field: ClassVar[str] = "score.reward.model"

    @cached_property
    def version(self) -> str:
        weights, tokenizer = self._sources
        return fingerprint("rule 1", MEAN, STD, TOKENS, weights.version, settings_version(tokenizer))

    def check(self, prompts: Sequence[Prompt]) -> None:
        pretrained.torch_device(self.device)
        weights, _ = self._sources
        names = tensor_names(weights.index, self.field)
        if missing := [name for name in PROBE if name not in names]:
            raise UserError(f"{self.field}: {weights.index} lacks {missing[0]}; expected the weights of ImageReward")
        _ = self._tokenizer

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        texts = [prompt.text for prompt in prompts]
        raw = np.concatenate(
            [
                self._raw(images[start : start + self.batch_size], texts[start : start + self.batch_size])
                for start in range(0, len(images), self.batch_size)
            ]
        )
        counts = token_counts(self._tokenizer, texts, TOKENS)
        return Scores(standardized(raw), [{"raw": float(r)} | count for r, count in zip(raw, counts, strict=True)])

    def _raw(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """(n,) float64: the head's output for each image with its text."""
        import torch

        preprocess, vision, text, head = self._network
        device = vision.device
        pixels = preprocess(images=[to_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
        tokens = tokenize(self._tokenizer, texts, TOKENS).to(device)
        with torch.inference_mode():
            seen = vision(pixel_values=pixels.to(device)).last_hidden_state
            read = text(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
            ).last_hidden_state
            return linear_chain(read[:, 0], head).cpu().double().numpy()

    @cached_property
    def _sources(self) -> tuple[Source, Source]:
        """Where the weights and the tokenizer are."""
        weights = f"a folder or Hub id with ImageReward's {WEIGHTS}, such as {MODEL}"
        tokenizer = f"the folder or Hub id of BERT's tokenizer, such as {TOKENIZER}"
        return (
            locate(self.model, WEIGHTS, field=self.field, expected=weights, revision=self.revision),
            locate(self.tokenizer, "tokenizer_config.json", field="score.reward.tokenizer", expected=tokenizer),
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return pretrained.load(AutoTokenizer, self._sources[1], field="score.reward.tokenizer")

    @cached_property
    def _network(self) -> "tuple[Any, Any, Any, list[tuple[Tensor, Tensor]]]":
        """(image processor, vision tower, text tower, head), on the device, for inference."""
        from safetensors.torch import load_file
        from transformers import BlipTextModel, BlipVisionModel

        path = self._sources[0].index
        with reading(path, "a safetensors file", f"{self.field}: {path}"):
            state = load_file(path)
        vision_state, text_state = from_blip(state)
        device = pretrained.torch_device(self.device)
        vision = self._tower(BlipVisionModel, vision_config(vision_state), vision_state)
        text = self._tower(BlipTextModel, text_config(text_state), text_state, add_pooling_layer=False)
        head = read_chain(state, "mlp.layers.", f"{self.field}: {path}")
        side = vision.config.image_size
        return (
            image_processor(side),
            vision.to(device),
            text.to(device),
            [(w.to(device), b.to(device)) for w, b in head],
        )

    def _tower(self, kind: Any, config: Any, state: "dict[str, Tensor]", **options: Any) -> Any:
        import torch

        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True, **options
        )
        if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
            raise UserError(f"{self.field}: {self.model} lacks {len(missing)} tensors of {kind.__name__}: {missing[0]}")
        return model.eval().requires_grad_(False)


def vision_config(state: "dict[str, Tensor]") -> Any:
    """The architecture of BlipVisionModel's tensors: a ViT as in timm (normalization epsilon 1e-6)."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth(state, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * isqrt(state["embeddings.position_embedding"].shape[1] - 1),
        layer_norm_eps=1e-6,
    )


def text_config(state: "dict[str, Tensor]") -> Any:
    """The architecture of BlipTextModel's tensors: BERT with cross-attention in every layer."""
    from transformers import BlipTextConfig

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth(state, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # what transformers calls a text encoder with cross-attention
    )


def depth(state: "dict[str, Tensor]", prefix: str) -> int:
    """The number of layers in tensors named `<prefix>N.`."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def image_processor(side: int) -> Any:
    """The published transform, which is CLIP's: shorter side to `side` (bicubic), center crop, CLIP's mean and std."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def image_reward(
    *,
    model: str = MODEL,
    revision: str | None = None,
    tokenizer: str = TOKENIZER,
    device: pretrained.Device = "auto",
    batch_size: PositiveInt = 16,
) -> ImageReward:
    """ImageReward (2304.05977). The authors publish a pickle; where loading it is acceptable, convert it for `model`:
    `save_file(torch.load("ImageReward.pt", weights_only=True), "image_reward/model.safetensors")`.
    """
    return ImageReward(model, revision, tokenizer, device, batch_size)
