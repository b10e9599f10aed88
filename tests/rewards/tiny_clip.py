"""Small real checkpoints of the kinds the CLIP rewards read: random weights, transformers' own classes and files."""

from itertools import pairwise
from pathlib import Path

import torch
from conftest import clip_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

SIDE, PATCH, WIDTH, EMBEDDING, HEADS, LAYERS, CONTEXT = 32, 8, 32, 16, 2, 2, 48


def clip_config(activation: str = "quick_gelu") -> CLIPConfig:
    tokenizer = clip_tokenizer()
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": EMBEDDING,
        "hidden_act": activation,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIDE, "patch_size": PATCH}
    return CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=EMBEDDING)


def save_clip(folder: Path, *, seed: int = 0, activation: str = "quick_gelu") -> Path:
    """A CLIPModel with its processor, as `from_pretrained` reads it; weights large enough to tell images apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(clip_config(activation))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        nn.init.constant_(model.logit_scale, 4.6)
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(image_processor, clip_tokenizer()).save_pretrained(folder)
    return folder


def save_head(folder: Path, widths: tuple[int, ...] = (EMBEDDING, 12, 8, 6, 4, 1), seed: int = 0) -> nn.Sequential:
    """LAION's predictor, small, saved under its published names; dropouts take the numbers 1, 3 and 5."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = [nn.Linear(a, b) for a, b in pairwise(widths)]
    first, second, third, *rest = linear
    head = nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), *rest).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, folder / "model.safetensors")
    return head


class Block(nn.Module):
    """open_clip's ResidualAttentionBlock, plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(WIDTH), Transformer(), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBEDDING))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP with its names, written out from the published architecture: pre-norm ViT, causal text."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer, self.ln_final = Visual(), Transformer(), nn.LayerNorm(WIDTH)
        self.token_embedding = nn.Embedding(len(clip_tokenizer()), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, ids: Tensor, ends: Tensor) -> Tensor:
        """`ends`: the place of each text's last token."""
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ends] @ self.text_projection


def save_open_clip(folder: Path, seed: int = 0, prefix: str = "model.") -> OpenClip:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OpenClip().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # biases and norms too: one in another's place shows
                if name != "logit_scale":
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    state = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state | {f"{prefix}attn_mask": torch.zeros(2, 2)}, folder / "model.safetensors")
    return model
