"""Very small, real pipelines of the families other than FLUX.1: random weights from configurations, no download."""

from conftest import clip_config, clip_tokenizer, small_vae, t5_encoder, t5_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection


def small_sd3() -> StableDiffusion3Pipeline:
    """Like 3.5 medium: normalised queries and keys, a second attention in the first layers, a constant shift."""
    clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip_2)),
        tokenizer_2=clip_2,
        text_encoder_3=t5_encoder(t5, width=80),  # wider than both CLIPs together, which are padded to it
        tokenizer_3=t5,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=80,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    )
