"""A FLUX.1-dev folder with random weights, for measuring speed and memory where the real weights cannot be had.

The transformer and the VAE have FLUX.1-dev's true shapes (11.9 billion parameters, 24 GB in bfloat16); the two text
encoders have their true output widths but one layer, as text is encoded once and does not count. The tokenizers are the
tiny model's. `--tiny` makes every width small instead, to try what reads the folder.

    python benchmarks/random_flux.py --device cuda --out flux-random
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny.build import clip_tokenizer, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel


def random_flux(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> FluxPipeline:
    """The pipeline, drawn from torch's global generator on `device`."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    heads, joint, pooled = (2, 64, 32) if tiny else (24, 4096, 768)
    with device:
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2 if tiny else 19,
            num_single_layers=4 if tiny else 38,
            attention_head_dim=128,
            num_attention_heads=heads,
            joint_attention_dim=joint,
            pooled_projection_dim=pooled,
            guidance_embeds=True,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32) if tiny else (128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=pooled,
                intermediate_size=4 * pooled,
                projection_dim=pooled,
                num_hidden_layers=1,
                num_attention_heads=pooled // 16,
                max_position_embeddings=77,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=joint, d_kv=64, d_ff=joint, num_layers=1, num_heads=joint // 64)
        )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=vae.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=clip,
        text_encoder_2=text_encoder_2.to(dtype),
        tokenizer_2=t5,
        transformer=transformer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # the transformer in float32 would not fit beside its copy
    pipe = random_flux(torch.device(arguments.device), torch.bfloat16, tiny=arguments.tiny)
    pipe.save_pretrained(arguments.out)
    print(f"{arguments.out}: {sum(p.numel() for p in pipe.transformer.parameters()) / 1e9:.3f} billion parameters")


if __name__ == "__main__":
    main()
