"""Very small, real pipelines of the families: random weights from configurations, no download."""

from typing import Any

from conftest import CHARACTERS, clip_config, clip_tokenizer, small_flux, small_vae, t5_encoder, t5_tokenizer
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

# Qwen-Image's pipeline puts a prompt into a template and drops the 34 tokens before it: each of these is one.
TEMPLATE = [
    *("<|im_start|>", "<|im_end|>", "system", "user", "assistant", "Describe"),
    *(" the", " image", " by", " detailing", " color", " shape", " size", " texture", " quantity", " text"),
    *(" spatial", " relationships", " of", " objects", " and", " background"),
]
# Chat templates: of messages, and of messages made of parts (without the first, a page of instructions).
TURNS = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
PARTS = "{% for part in (messages | last).content %}{{ part.text }}{% endfor %}<|im_end|>"


def small_sd3() -> StableDiffusion3Pipeline:
    """Like 3.5 medium: normalized queries and keys, a second attention in the first layers, a constant shift."""
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


def chat_tokenizer(chat_template: str) -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


def qwen_config(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )


def small_z_image() -> ZImagePipeline:
    """Its constant shift; axes of 64 positions of text and of 16 rows and columns."""
    tokenizer = chat_tokenizer(TURNS)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(),
        text_encoder=Qwen3Model(qwen_config(tokenizer, layers=2)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[80, 16, 16],
        ),
    )


def flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """What dev and klein share; the VAE's statistics are some that show."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
    )
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.2, 2)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": vae,
        "transformer": Flux2Transformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    }


def small_flux2() -> Flux2Pipeline:
    """Like dev: guidance embedded; the text is layers 10, 20 and 30 of Mistral 3, whose eye is never used."""
    tokenizer = chat_tokenizer(PARTS)
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    eye = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eye, image_token_id=0))
    return Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(guidance_embeds=True))


def small_flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    """The text is layers 9, 18 and 27 of Qwen 3."""
    tokenizer = chat_tokenizer(TURNS)
    encoder = Qwen3ForCausalLM(qwen_config(tokenizer, layers=28))
    parts = flux2_parts(guidance_embeds=False)
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, is_distilled=is_distilled, **parts)


PIPELINES = {
    "flux": small_flux,
    "sd3": small_sd3,
    "qwen-image": small_qwen_image,
    "z-image": small_z_image,
    "flux2": small_flux2,
    "flux2-klein": small_flux2_klein,
}
