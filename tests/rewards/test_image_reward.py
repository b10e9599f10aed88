"""ImageReward on small random weights under the published names, against its architecture in plain PyTorch."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import BertTokenizerFast, CLIPImageProcessor

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.neural.image_reward import MEAN, STD, TOKENS, ImageReward, image_reward

VISION, TEXT, PATCH, SIDE, LAYERS = 128, 64, 16, 32, 2  # heads are 64 wide in both towers, so two and one of them
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "on", "the", "sea", "dog"]
TEXTS = ["a red cube", "the dog on the sea", "a red dog", "sea"]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]
State = dict[str, Tensor]


def weights(seed: int = 0) -> State:
    """Random tensors of the published names and kinds of shapes (Salesforce's BLIP: a timm ViT and a BERT)."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, VISION),
        "visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, VISION),
        "visual_encoder.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (VISION,),
        "text_encoder.embeddings.word_embeddings.weight": (len(WORDS), TEXT),
        "text_encoder.embeddings.position_embeddings.weight": (64, TEXT),
        "vision_proj.weight": (16, VISION),
        "vision_proj.bias": (16,),
    }

    def dense(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for i in range(LAYERS):
        block, layer = f"visual_encoder.blocks.{i}", f"text_encoder.encoder.layer.{i}"
        dense(f"{block}.attn.qkv", VISION, 3 * VISION)
        dense(f"{block}.attn.proj", VISION, VISION)
        dense(f"{block}.mlp.fc1", VISION, 2 * VISION)
        dense(f"{block}.mlp.fc2", 2 * VISION, VISION)
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        for kind, source in (("attention", TEXT), ("crossattention", VISION)):
            dense(f"{layer}.{kind}.self.query", TEXT, TEXT)
            dense(f"{layer}.{kind}.self.key", source, TEXT)
            dense(f"{layer}.{kind}.self.value", source, TEXT)
            dense(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        dense(f"{layer}.intermediate.dense", TEXT, 2 * TEXT)
        dense(f"{layer}.output.dense", 2 * TEXT, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    norm("visual_encoder.norm", VISION)
    norm("text_encoder.embeddings.LayerNorm", TEXT)
    generator = torch.Generator().manual_seed(seed)
    state = {f"blip.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), ((TEXT, 12), (12, 8), (8, 6), (6, 4), (4, 1)), strict=True):
        state[f"mlp.layers.{number}.weight"] = torch.randn((outputs, inputs), generator=generator)
        state[f"mlp.layers.{number}.bias"] = torch.randn((outputs,), generator=generator)
    return state


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, length, width) each; heads are 64 wide; `mask` (n, keys) is True where a key may be looked at."""
    heads = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v)]
    seen = scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None, None])
    return seen.transpose(1, 2).flatten(2)


def published(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(n,): the score, from the tensors as published: pre-norm ViT, post-norm BERT with cross-attention, head."""

    def dense(name: str, x: Tensor) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    x = torch.conv2d(pixels, state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}.cls_token"].expand(len(x), 1, -1), x], 1) + state[f"{v}.pos_embed"]
    for i in range(LAYERS):
        block = f"{v}.blocks.{i}"
        qkv = dense(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + dense(f"{block}.attn.proj", attend(*qkv))
        x = x + dense(f"{block}.mlp.fc2", gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{v}.norm", x, 1e-6)

    t = "blip.text_encoder"
    y = state[f"{t}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{t}.embeddings.LayerNorm", y, 1e-12)
    for i in range(LAYERS):
        layer = f"{t}.encoder.layer.{i}"
        for kind, other, allowed in (("attention", None, mask.bool()), ("crossattention", x, None)):
            part, source = f"{layer}.{kind}", y if other is None else other
            q, k, w = (
                dense(f"{part}.self.query", y),
                dense(f"{part}.self.key", source),
                dense(f"{part}.self.value", source),
            )
            y = norm(f"{part}.output.LayerNorm", y + dense(f"{part}.output.dense", attend(q, k, w, allowed)), 1e-12)
        inner = gelu(dense(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", y + dense(f"{layer}.output.dense", inner), 1e-12)
    y = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        y = dense(f"mlp.layers.{number}", y)
    return (y.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


def images(count: int = 4, size: tuple[int, int] = (48, 40)) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), np.uint8)
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in noise]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and in `bert` the tokenizer."""
    folder = tmp_path_factory.mktemp("image_reward")
    save_file(weights(), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return folder


def reward(folder: Path, batch_size: int = 16) -> ImageReward:
    return image_reward(model=str(folder), tokenizer=str(folder / "bert"), device="cpu", batch_size=batch_size)


def test_the_published_architecture(folder: Path) -> None:
    ours = reward(folder)
    ours.check(PROMPTS)
    scores = ours(images(), PROMPTS)
    tokens = BertTokenizerFast.from_pretrained(folder / "bert")(TEXTS, padding=True, return_tensors="pt")
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor(images=images(), return_tensors="pt")["pixel_values"]
    expected = published(weights(), pixels, tokens["input_ids"], tokens["attention_mask"]).numpy()
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4)
    assert expected.std() > 0.05
    assert [e["raw"] for e in scores.evidence] == pytest.approx((expected * STD + MEAN).tolist(), rel=1e-4)
    assert json.dumps(scores.evidence)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_score_does_not_depend_on_its_batch(folder: Path, batch_size: int) -> None:
    together = reward(folder)(images(), PROMPTS).values
    np.testing.assert_allclose(reward(folder, batch_size)(images(), PROMPTS).values, together, rtol=1e-5)


def test_long_prompts_lose_their_end_and_say_so(folder: Path) -> None:
    fits = "sea " * (TOKENS - 2)
    scores = reward(folder)(images(1) * 2, [Prompt("fits", fits), Prompt("long", fits + "red dog")])
    assert [(e["tokens"], e["truncated"]) for e in scores.evidence] == [(TOKENS, False), (TOKENS + 2, True)]
    assert scores.values[0] == pytest.approx(scores.values[1], rel=1e-5)


def test_version_follows_weights_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = reward(copy).version
    assert before == reward(folder).version
    save_file(weights(seed=1), copy / "model.safetensors")
    changed = reward(copy).version
    path = copy / "bert" / "tokenizer.json"
    path.write_text(path.read_text().replace('"dog"', '"cat"'))
    assert len({before, changed, reward(copy).version}) == 3


def test_bad_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.reward\.model: /no/weights not found; expected .* ImageReward's"):
        image_reward(model="/no/weights", tokenizer=str(folder / "bert")).check(PROMPTS)
    with pytest.raises(UserError, match=r"score\.reward\.tokenizer: /no/bert not found"):
        image_reward(model=str(folder), tokenizer="/no/bert").check(PROMPTS)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"score\.reward\.model: .* is damaged or truncated"):
        reward(copy).check(PROMPTS)
    save_file({"blip.visual_encoder.pos_embed": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"score\.reward\.model: .* lacks blip\.text_encoder.*; expected the weights"):
        reward(copy).check(PROMPTS)
    state = load_file(folder / "model.safetensors")
    state.pop("blip.visual_encoder.blocks.1.attn.qkv.bias")
    save_file(state, path)
    with pytest.raises(UserError, match=r"lacks 1 tensors of BlipVisionModel: .*layers\.1\.self_attn\.qkv\.bias"):
        reward(copy)(images(), PROMPTS)


def test_the_factory_reads_nothing() -> None:
    made = image_reward()
    assert (made.name, made.parallel) == ("image_reward", False)
    assert pickle.loads(pickle.dumps(made)) == made
