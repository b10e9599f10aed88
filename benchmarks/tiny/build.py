"""The parts of the tiny model: the real classes of a FluxPipeline at tiny size, tokenizers that need no download."""

import string

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from gdro.tiny import world

TEXT_LENGTH = 24  # T5 tokens; the longest caption of the world has 23
TEXT_WIDTH, POOLED_WIDTH = 128, 64


def words() -> list[str]:
    """Every lower-case word a caption can hold."""
    names = [*world.WALLS, *world.COLORS, *world.SHAPES, *world.PLURALS.values(), *world.COUNTS.values()]
    text = " ".join(["a an and on wall with sign that says", *names, *world.POSITIONS])
    return sorted(set(text.split()))


def t5_tokenizer() -> T5TokenizerFast:
    """Whole words for the captions' vocabulary, single characters for everything else, a sign's word included."""
    characters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    vocab += [(f"▁{word}", -1.0) for word in words()] + [('▁"', -1.0)]
    vocab += [(c, -8.0) for c in characters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that spell the captions' vocabulary; other words fall apart into characters."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocab = [*characters, *(f"{c}</w>" for c in characters)]
    merges: dict[str, None] = {}
    for word in words():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges[f"{pieces[-2]} {pieces[-1]}"] = None
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            vocab.append(pieces[-1])
    tokens = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(m.split()) for m in merges],
        model_max_length=48,
    )


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """An untrained tiny FluxPipeline: 64-channel packed latents of 8 x 8 pixels, guidance embedded."""
    torch.manual_seed(seed)  # the classes initialize from the global generator
    t5, clip = t5_tokenizer(), clip_tokenizer()
    end = clip.convert_tokens_to_ids("<|endoftext|>")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=64,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=POOLED_WIDTH,
                intermediate_size=2 * POOLED_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=48,
                projection_dim=POOLED_WIDTH,
                bos_token_id=clip.convert_tokens_to_ids("<|startoftext|>"),
                eos_token_id=end,
                pad_token_id=end,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=TEXT_WIDTH,
                num_layers=2,
                num_heads=8,
                relative_attention_num_buckets=32,
                relative_attention_max_distance=32,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )
