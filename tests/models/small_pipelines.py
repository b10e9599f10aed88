"""Very small, real pipelines of the families other than FLUX.1: random weights from configurations, no download."""

from conftest import CHARACTERS, clip_config, clip_tokenizer, small_vae, t5_encoder, t5_tokenizer
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

# Qwen-Image's pipeline puts a prompt into a template and drops the 34 tokens before it: each of these is one.
TEMPLATE = [
    *("<|im_start|>", "<|im_end|>", "system", "user", "assistant", "Describe"),
    *(" the", " image", " by", " detailing", " color", " shape", " size", " texture", " quantity", " text"),
    *(" spatial", " relationships", " of", " objects", " and", " background"),
]


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


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a character, but whole words for the template."""
    tokens = ["<|endoftext|>", *CHARACTERS, "Ġ", "Ċ"]  # the last two are a space and a line's end
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_tokens(TEMPLATE)
    return tokenizer


def small_qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    width = {"hidden_size": 32, "intermediate_size": 32}
    text = {
        **width,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {**width, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.1, 0.0, 0.1, 0.2],
            latents_std=[0.5, 1.0, 1.5, 2.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )
