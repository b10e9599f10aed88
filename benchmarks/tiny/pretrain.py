"""Pre-train the tiny model on its world: `python -m tiny.pretrain --out ../runs/pretrain`, run in benchmarks/.

Three stages, each resumable: text encoders (every token learns to tell its neighbors, the pooled vector its words),
the VAE (refined once more on shapes, later), then the transformer by flow matching. On two cores about two hours; any
later call with the same arguments goes on where the last one stopped. Everything drawn is a function of the seed and
a counter.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import load_file, save_file
from tiny.build import TEXT_LENGTH, build_pipeline
from torch import Tensor, nn

from gdro.common.files import atomic_path, write_json
from gdro.common.rng import numpy_rng, torch_rng
from gdro.tiny import world

NEIGHBORS = (-4, -3, -2, -1, 0, 1, 2)  # offsets a T5 token learns to tell; -4 places a letter in its word
SATURATED = 0.9  # distance of a pixel's largest channel from its smallest, of 2, that only shapes reach
GUIDANCE = (1.0, 6.0)  # the range of guidance the transformer sees; its default, 3.5, inside it

# From this scene of the transformer's stream on: shares of signs and of signs with shapes, and of slips in letters and
# in shapes. Letters come first; small shapes carry little of the loss and are learned late, so most of the later scenes
# are theirs. The slips, pictures that belie their caption as pictures of the web do, give the base its flaws however
# long it is trained: it knows what it then does carelessly, as large models do.
Curriculum = tuple[tuple[int, tuple[float, float], tuple[float, float]], ...]
CURRICULUM: Curriculum = (
    (0, (0.4, 0.2), (0.0, 0.0)),
    (57_344, (0.1, 0.15), (0.0, 0.0)),
    (90_112, (0.2, 0.15), (0.3, 0.0)),
    (163_840, (0.2, 0.1), (0.1, 0.0)),
    (262_144, (0.15, 0.15), (0.1, 0.0)),
    (368_640, (0.2, 0.15), (0.3, 0.12)),
)
BATCH = 128
CHUNK = 8192  # fresh pictures encoded at a time; also the unit of resumption
VISITS = 2  # times each picture is used, with new noise
# Cycles of the learning rate: chunks and peak. After the first the shapes were too rough, after the second the words
# too good (OCR reward .83, little room to improve) and squares round: the VAE had blurred them. So before the third
# the VAE is refined on shapes; the third learns them anew, and the slips while its rate decays.
CYCLES = ((20, 1.0), (12, 0.7), (20, 0.8))
REFINED = 32  # the chunk before which the VAE is refined
REFINEMENT: Curriculum = ((0, (0.2, 0.2), (0.0, 0.0)),)
EMPHASIS = 6.0  # weight of the shapes' pixels while it is


def scenes(
    seed: int, purpose: str, start: int, count: int, curriculum: Curriculum = CURRICULUM[:1]
) -> tuple[list[str], Tensor]:
    """Captions and pictures (count, 3, 32, 64) in [-1, 1] of scenes `start` ... of a stream."""
    captions, pictures = [], []
    for i in range(start, start + count):
        rng = numpy_rng(seed, purpose, i)
        mixture, slips = next((shares, slips) for first, shares, slips in reversed(curriculum) if i >= first)
        scene = world.random_scene(rng, mixture)
        captions.append(world.caption(scene))
        drawn = world.with_slips(scene, rng, *slips) if any(slips) else scene
        pictures.append(torch.from_numpy(world.render(drawn, rng)))
    return captions, torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(pipe: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    def ids(tokenizer: object, length: int) -> Tensor:
        return tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids  # type: ignore[operator]

    return ids(pipe.tokenizer_2, TEXT_LENGTH), ids(pipe.tokenizer, pipe.tokenizer_max_length)


def train_text(pipe: FluxPipeline, seed: int, steps: int, batch: int = 128) -> None:
    """T5: tell the tokens around each token. CLIP: tell the words of the caption from the pooled vector."""
    t5, clip = pipe.text_encoder_2, pipe.text_encoder
    torch.manual_seed(seed)
    heads = nn.ModuleList(
        [nn.Linear(t5.config.d_model, t5.config.vocab_size) for _ in NEIGHBORS]
        + [nn.Linear(clip.config.hidden_size, clip.config.vocab_size)]
    )
    parameters = [*t5.parameters(), *clip.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 2 * (steps - step) / steps)
        captions = []
        for i in range(step * batch, (step + 1) * batch):
            captions.append(world.caption(world.random_scene(numpy_rng(seed, "pretrain-text", i))))
        t5_ids, clip_ids = tokenize(pipe, captions)
        hidden = t5(t5_ids)[0]
        losses = []
        for offset, head in zip(NEIGHBORS, heads, strict=False):
            target = torch.roll(t5_ids, -offset, 1)
            inside = slice(max(0, -offset), TEXT_LENGTH - max(0, offset))
            losses.append(F.cross_entropy(head(hidden[:, inside]).flatten(0, 1), target[:, inside].flatten()))
        bag = torch.zeros(batch, clip.config.vocab_size).scatter_(1, clip_ids, 1.0)
        pooled_loss = F.binary_cross_entropy_with_logits(heads[-1](clip(clip_ids).pooler_output), bag)
        loss = torch.stack(losses).mean() + 10 * pooled_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text {step} neighbors {torch.stack(losses).mean():.4f} words {pooled_loss:.5f}", flush=True)


def train_vae(
    pipe: FluxPipeline,
    seed: int,
    steps: int,
    purpose: str = "pretrain-vae",
    curriculum: Curriculum = CURRICULUM[:1],
    emphasis: float = 0.0,
    batch: int = 64,
) -> None:
    """Reconstruction with noise on the latents in place of a KL term, then the scale that makes their std 1.

    Pixels at and around a saturated color, which only shapes have, weigh 1 + `emphasis`.
    """
    vae = pipe.vae
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 1.5 * (steps - step) / steps)
        _, x = scenes(seed, purpose, step * batch, batch, curriculum)
        with torch.autocast("cpu", torch.bfloat16):  # convolutions this narrow run twice as fast
            z = vae.encode(x).latent_dist.mean.float()
            noise = torch.randn(z.shape, generator=torch_rng(seed, f"{purpose}-noise", step))
            y = vae.decode(z + 0.1 * noise).sample.float()
        saturated = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True) > SATURATED).float()
        weight = 1 + emphasis * F.max_pool2d(saturated, 3, 1, 1)
        reconstruction = (weight * (y - x).pow(2)).mean() + 0.25 * (weight * (y - x).abs()).mean()
        # |z|^2 near 1 keeps the added noise meaningful: the encoder cannot outgrow it
        loss = reconstruction + 0.002 * (z.pow(2).mean((0, 2, 3)) - 1).clamp(min=0).mean() + 1e-4 * z.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step} mse {F.mse_loss(y, x):.5f} latent std {z.std():.3f}", flush=True)
    with torch.no_grad():
        _, x = scenes(seed, f"{purpose}-scale", 0, 512)
        z = vae.encode(x).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))


@torch.no_grad()
def encode_chunk(pipe: FluxPipeline, seed: int, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed latents (count, 32, 64), T5 states (count, 24, 128) and pooled vectors (count, 64) of fresh scenes."""
    captions, x = scenes(seed, "pretrain-flow", start, count, CURRICULUM)
    t5_ids, clip_ids = tokenize(pipe, captions)
    latents, states, pooled = [], [], []
    for i in range(0, count, 256):
        z = (
            pipe.vae.encode(x[i : i + 256]).latent_dist.mean - pipe.vae.config.shift_factor
        ) * pipe.vae.config.scaling_factor
        latents.append(pipe._pack_latents(z, len(z), z.shape[1], z.shape[2], z.shape[3]))
        states.append(pipe.text_encoder_2(t5_ids[i : i + 256])[0])
        pooled.append(pipe.text_encoder(clip_ids[i : i + 256]).pooler_output)
    return torch.cat(latents), torch.cat(states), torch.cat(pooled)


class FlowTrainer:
    """Flow matching on a stream of fresh scenes, in chunks; each picture is used VISITS times with new noise."""

    chunk_count = sum(chunks for chunks, _ in CYCLES)
    steps_per_chunk = CHUNK * VISITS // BATCH

    def __init__(self, pipe: FluxPipeline, seed: int, *, compiled: bool):
        self.pipe, self.seed = pipe, seed
        model = pipe.transformer
        self.parameters = dict(model.named_parameters())
        matrices = [
            p for n, p in self.parameters.items() if p.ndim == 2 and "transformer_blocks" in n and "norm" not in n
        ]
        inside = {id(p) for p in matrices}
        rest = [p for p in self.parameters.values() if id(p) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lr = [2e-3, 1e-3]
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.forward = torch.compile(model) if compiled else model
        self.text_ids = torch.zeros(TEXT_LENGTH, 3)
        self.image_ids = pipe._prepare_latent_image_ids(1, world.HEIGHT // 8, world.WIDTH // 8, "cpu", torch.float32)

    def learning_rate(self, step: int) -> float:
        """Share of the base rate; each cycle has a short warm-up, a plateau and a linear decay over its last third."""
        begin = 0
        for chunks, peak in CYCLES:
            length = chunks * self.steps_per_chunk
            if step < begin + length:
                return peak * min(1.0, (step - begin + 1) / 200, 3 * (begin + length - step) / length)
            begin += length
        raise ValueError(f"step {step} lies beyond the last cycle, which ends at {begin}")

    def run_chunk(self, index: int) -> float:
        data = encode_chunk(self.pipe, self.seed, index * CHUNK, CHUNK)
        order = torch.cat(
            [torch.randperm(CHUNK, generator=torch_rng(self.seed, "pretrain-order", index, v)) for v in range(VISITS)]
        )
        total = 0.0
        for i in range(self.steps_per_chunk):
            step = index * self.steps_per_chunk + i
            x0, states, pooled = (part[order[i * BATCH : (i + 1) * BATCH]] for part in data)
            total += self.step(step, x0, states, pooled)
        return total / self.steps_per_chunk

    def step(self, step: int, x0: Tensor, states: Tensor, pooled: Tensor) -> float:
        rng = torch_rng(self.seed, "pretrain-noise", step)
        t = torch.sigmoid(torch.randn(len(x0), generator=rng))
        guidance = torch.empty(len(x0)).uniform_(*GUIDANCE, generator=rng)
        noise = torch.randn(x0.shape, generator=rng)
        x_t = torch.lerp(x0, noise, t[:, None, None])
        v = self.forward(
            hidden_states=x_t,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(v, noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * self.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.999, step / (step + 100))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter, 1 - decay)
        return loss.item()

    def save(self, path: Path, chunks: int) -> None:
        tensors = {f"ema/{n}": p for n, p in self.ema.items()} | {
            f"raw/{n}": p.data for n, p in self.parameters.items()
        }
        for k, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"opt{k}/{i}/{name}": value for name, value in state.items()}
        with atomic_path(path) as tmp:
            save_file({n: p.contiguous() for n, p in tensors.items()}, tmp, metadata={"chunks": str(chunks)})

    @torch.no_grad()
    def load(self, path: Path) -> int:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            chunks = int(file.metadata()["chunks"])
        tensors = load_file(path)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"raw/{name}"])
            self.ema[name].copy_(tensors[f"ema/{name}"])
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"opt{k}/"):
                    _, i, name = key.split("/")
                    state.setdefault(int(i), {})[name] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return chunks


def save_pipeline(pipe: FluxPipeline, folder: Path, ema: dict[str, Tensor]) -> None:
    pipe.transformer.load_state_dict(ema)
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.json"):  # the folder the parts came from means nothing elsewhere
        value = json.loads(path.read_text())
        if isinstance(value, dict) and "_name_or_path" in value:
            write_json(path, {name: v for name, v in value.items() if name != "_name_or_path"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="working folder; the model lands in OUT/model")
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--refine-steps", type=int, default=1500, help="of the VAE, on shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer (needs a C++ compiler)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    encoders = args.out / "encoders"
    if (encoders / "model_index.json").exists():
        pipe = FluxPipeline.from_pretrained(encoders)
    else:
        pipe = build_pipeline(args.seed)
        train_text(pipe, args.seed, args.text_steps)
        train_vae(pipe, args.seed, args.vae_steps)
        pipe.save_pretrained(encoders)
    trainer = FlowTrainer(pipe, args.seed, compiled=args.compile)
    state = args.out / "state.safetensors"
    start = trainer.load(state) if state.exists() else 0
    refined = args.out / "refined_vae"
    if start > REFINED:
        pipe.vae = AutoencoderKL.from_pretrained(refined)
    began = time.monotonic()
    for index in range(start, trainer.chunk_count):
        if index == REFINED:
            train_vae(pipe, args.seed, args.refine_steps, "pretrain-vae-refine", REFINEMENT, EMPHASIS)
            pipe.vae.save_pretrained(refined)
        loss = trainer.run_chunk(index)
        trainer.save(state, index + 1)
        rate = (index + 1 - start) * CHUNK * VISITS / (time.monotonic() - began)
        seen = (index + 1) * CHUNK * VISITS
        left = (trainer.chunk_count * CHUNK * VISITS - seen) / rate / 60
        print(f"flow {seen} images, loss {loss:.4f}, {rate:.0f} images/s, {left:.0f} min left", flush=True)
        with open(args.out / "log.jsonl", "a") as log:
            log.write(json.dumps({"images": seen, "loss": loss, "images_per_second": rate}) + "\n")
    save_pipeline(pipe, args.out / "model", trainer.ema)
    write_json(args.out / "model" / "pretraining.json", {k: v for k, v in vars(args).items() if k != "out"})


if __name__ == "__main__":
    main()
