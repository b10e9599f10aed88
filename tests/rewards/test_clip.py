"""The CLIP rewards on small real models, against transformers' own logits, plain PyTorch and formulas by hand."""

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from conftest import clip_tokenizer
from PIL import Image
from pydantic import ValidationError, validate_call
from tiny_clip import CONTEXT, EMBEDDING, SIDE, save_clip, save_head, save_open_clip
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.neural.clip import ClipReward, aesthetic, clipscore, hpsv2, pickscore, safe_direction, safety, steered
from gdro.rewards.neural.clip_encoder import pad_to_square

TEXTS = ["a red cube", "two dogs on a sofa", "a red cube", "the sea at night"]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]


def images(count: int = 4, size: tuple[int, int] = (48, 40)) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), np.uint8)
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in noise]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def logits(folder: Path) -> np.ndarray:
    """Of each image with each text, by CLIPModel itself on what CLIPProcessor makes of them."""
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder)
    inputs = processor(images=images(), text=TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs).logits_per_image.double().numpy()


@pytest.mark.parametrize(("factory", "divisor"), [(pickscore, 26.0), (clipscore, 30.0)])
def test_logit_over_the_published_divisor(folder: Path, logits: np.ndarray, factory: object, divisor: float) -> None:
    reward: ClipReward = factory(model=str(folder), processor=str(folder), device="cpu")  # type: ignore[operator]
    reward.check(PROMPTS)
    scores = reward(images(), PROMPTS)
    np.testing.assert_allclose(scores.values, logits.diagonal() / divisor, rtol=1e-4)
    assert scores.values.std() > 0.01  # the images differ
    assert [e["cosine"] for e in scores.evidence] == pytest.approx(logits.diagonal() / np.exp(4.6), rel=1e-4)


def test_hpsv2_is_the_cosine_of_square_images(folder: Path, logits: np.ndarray) -> None:
    """On images that need no padding, of the size the model takes, it is the logit without its scale."""
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder)
    square = images(size=(SIDE, SIDE))
    with torch.no_grad():
        expected = model(**processor(images=square, text=TEXTS, return_tensors="pt", padding=True)).logits_per_image
    reward = hpsv2(model=str(folder), processor=str(folder), device="cpu")
    np.testing.assert_allclose(reward(square, PROMPTS).values, expected.diagonal() / np.exp(4.6), rtol=1e-4)


def test_hpsv2_sees_the_whole_of_a_wide_image(folder: Path) -> None:
    wide = [Image.new("RGB", (96, 32), "gray") for _ in range(2)]
    wide[1].paste("red", (0, 0, 10, 32))  # outside the center
    whole = hpsv2(model=str(folder), processor=str(folder), device="cpu")(wide, PROMPTS[:1] * 2).values
    cropped = clipscore(model=str(folder), device="cpu")(wide, PROMPTS[:1] * 2).values
    assert abs(whole[0] - whole[1]) > 1e-4
    assert cropped[0] == pytest.approx(cropped[1], abs=1e-7)


def test_pad_to_square() -> None:
    padded = np.asarray(pad_to_square(Image.new("RGB", (64, 32), "white"), 16))
    assert padded.shape == (16, 16, 3)
    assert (padded[4:12] == 255).all()
    assert not padded[:4].any()
    assert not padded[12:].any()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_score_does_not_depend_on_its_batch(folder: Path, batch_size: int) -> None:
    together = clipscore(model=str(folder), device="cpu", batch_size=16)(images(), PROMPTS).values
    reward = clipscore(model=str(folder), device="cpu", batch_size=batch_size)
    np.testing.assert_allclose(reward(images(), PROMPTS).values, together, rtol=1e-5)
    alone = [reward([image], [prompt]).values[0] for image, prompt in zip(images(), PROMPTS, strict=True)]
    np.testing.assert_allclose(alone, together, rtol=1e-5)


def test_long_prompts_lose_their_end_and_say_so(folder: Path) -> None:
    fits = "a " * (CONTEXT - 2)  # a token a word, and one at each end
    prompts = [Prompt("fits", fits), Prompt("long", fits + "b c d " * 30), Prompt("other", "b " + fits)]
    scores = clipscore(model=str(folder), device="cpu")(images(1) * 3, prompts)
    assert [(e["tokens"], e["truncated"]) for e in scores.evidence] == [
        (CONTEXT, False),
        (CONTEXT + 90, True),
        (CONTEXT + 1, True),
    ]
    assert json.dumps(scores.evidence)
    assert scores.values[1] == pytest.approx(scores.values[0], rel=1e-5)
    assert scores.values[2] != pytest.approx(scores.values[0], rel=1e-3)


def test_bfloat16_is_near_and_another_version(folder: Path, logits: np.ndarray) -> None:
    reward = clipscore(model=str(folder), device="cpu", dtype="bfloat16")
    assert reward.version != clipscore(model=str(folder), device="cpu").version
    np.testing.assert_allclose(reward(images(), PROMPTS).values, logits.diagonal() / 30, atol=0.1)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_open_clip_names(tmp_path: Path, prefix: str) -> None:
    """Weights in open_clip's names (the published HPSv2) against that architecture in plain PyTorch."""
    model = save_open_clip(tmp_path / "weights", prefix=prefix)
    architecture = save_clip(tmp_path / "clip", seed=1, activation="gelu")
    reward = hpsv2(model=str(tmp_path / "weights"), processor=str(architecture), device="cpu")
    reward.check(PROMPTS)
    square, tokenizer = images(size=(SIDE, SIDE)), clip_tokenizer()
    ids = tokenizer(TEXTS, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]
    ends = torch.tensor([len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS])
    with torch.no_grad():
        pixels = CLIPImageProcessor.from_pretrained(architecture)(images=square, return_tensors="pt")["pixel_values"]
        expected = torch.cosine_similarity(model.visual(pixels), model.encode_text(ids, ends))
    np.testing.assert_allclose(reward(square, PROMPTS).values, expected, atol=1e-5)
    assert expected.std() > 0.01


def test_aesthetic_is_the_published_head_over_ten(folder: Path, tmp_path: Path) -> None:
    head = save_head(tmp_path)
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        out = model(**processor(images=images(), text=TEXTS, return_tensors="pt", padding=True))
        expected = head(out.image_embeds).squeeze(1)  # CLIPModel's image_embeds are of length one
    reward = aesthetic(model=str(folder), head=str(tmp_path), device="cpu")
    reward.check(PROMPTS)
    scores = reward(images(), PROMPTS)
    np.testing.assert_allclose(scores.values, expected / 10, rtol=1e-4)
    assert [e["rating"] for e in scores.evidence] == pytest.approx(expected.tolist(), rel=1e-4)


def test_safety_by_hand(folder: Path, tmp_path: Path) -> None:
    """cos(z, p + a v) with v = mean(safe) - mean(unsafe) of length one, on embeddings by CLIPModel itself."""
    phrases = {"safe": ["calm", "kind"], "unsafe": ["blood", "gore", "fear"]}
    for name, lines in phrases.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n\n")
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder)
    square = images(size=(SIDE, SIDE))
    texts = TEXTS + phrases["safe"] + phrases["unsafe"]
    with torch.no_grad():
        out = model(**processor(images=square, text=texts, return_tensors="pt", padding=True))
    z, p = out.image_embeds.double().numpy(), out.text_embeds.double().numpy()
    v = p[4:6].mean(0) - p[6:].mean(0)
    v /= np.linalg.norm(v)
    moved = p[:4] + 0.7 * v
    expected = (z * moved).sum(1) / np.linalg.norm(moved, axis=1)
    reward = safety(
        model=str(folder), processor=None, strength=0.7, safe=f"{tmp_path}/safe", unsafe=f"{tmp_path}/unsafe"
    )
    reward.check(PROMPTS)
    scores = reward(square, PROMPTS)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4)
    assert [e["image_safety"] for e in scores.evidence] == pytest.approx((z @ v).tolist(), abs=1e-5)
    assert [e["text_safety"] for e in scores.evidence] == pytest.approx((p[:4] @ v).tolist(), abs=1e-5)


def test_steering_prefers_the_safe_image() -> None:
    safe, unsafe = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0]]), torch.tensor([[0.0, 0, 1]])
    direction = safe_direction(safe, unsafe)
    assert direction.norm() == pytest.approx(1)
    text = torch.tensor([[0.0, 0, 1]])
    assert torch.equal(steered(text, direction, 0.0), text)
    assert (steered(text, direction, 0.5) @ safe.T > text @ safe.T).all()


def test_version_follows_weights_processor_and_phrases(folder: Path, tmp_path: Path) -> None:
    copy, head = tmp_path / "copy", tmp_path / "head"
    shutil.copytree(folder, copy)
    save_head(head)
    make = [
        lambda: clipscore(model=str(copy)),
        lambda: aesthetic(model=str(copy), head=str(head)),
        lambda: safety(model=str(copy), processor=None),
    ]
    before = [f().version for f in make]
    assert before == [f().version for f in make]
    assert len({*before, pickscore(model=str(copy), processor=str(copy)).version}) == 4
    assert before[2] != safety(model=str(copy), processor=None, strength=0.4).version
    settings = copy / "processor_config.json"
    settings.write_text(settings.read_text().replace('"do_center_crop": true', '"do_center_crop": false'))
    changed = [f().version for f in make]
    assert not set(before) & set(changed)
    save_clip(copy, seed=5)
    assert not set(changed) & {f().version for f in make}
    save_head(head, seed=5)
    assert make[1]().version not in (before[1], changed[1])


def test_hub_repository_at_a_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub's cache without network; `revision` names the commit, and the version with it."""
    repo, commit = tmp_path / "models--someone--clip", "a" * 40
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reward = clipscore(model="someone/clip", device="cpu")
    reward.check(PROMPTS)
    local = clipscore(model=str(folder), device="cpu")
    np.testing.assert_array_equal(reward(images(), PROMPTS).values, local(images(), PROMPTS).values)
    assert reward.version not in (local.version, clipscore(model=str(folder), device="cpu", dtype="bfloat16").version)
    with pytest.raises(UserError, match=r"score\.reward\.model: someone/clip is neither a folder nor on the Hub"):
        clipscore(model="someone/clip", revision="b" * 40).check(PROMPTS)


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "kind":
        config.write_text(json.dumps({"model_type": "bert"}))
    elif how == "json":
        config.write_text("{")
    elif how == "processor":
        for path in folder.glob("*processor*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickle", r"score\.reward\.model: .* has no model\.safetensors; expected a CLIPModel"),
        ("truncated", r"score\.reward\.model: .*model\.safetensors is damaged or truncated"),
        ("kind", r'score\.reward\.model: .* is a model of the type "bert"; expected a CLIPModel'),
        ("json", r"score\.reward\.model: .*config\.json is not JSON"),
        ("processor", r"score\.reward\.model: .* does not load as AutoImageProcessor"),
    ],
)
def test_a_bad_checkpoint_is_refused_before_sampling(folder: Path, tmp_path: Path, how: str, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy, how)
    for reward in (clipscore(model=str(copy)), safety(model=str(copy), processor=None), aesthetic(model=str(copy))):
        with pytest.raises(UserError, match=message):
            reward.check(PROMPTS)


def test_a_missing_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    for reward in (clipscore(model="/no/clip"), pickscore(model="/no/clip", processor=str(folder)), hpsv2(model="/no")):
        with pytest.raises(UserError, match=r"score\.reward\.model: /no.* not found"):
            reward.check(PROMPTS)
    with pytest.raises(UserError, match=r"score\.reward\.processor: /no/processor not found"):
        pickscore(model=str(folder), processor="/no/processor").check(PROMPTS)
    with pytest.raises(UserError, match=r"score\.reward\.safe: .*nothing not found"):
        safety(model=str(folder), processor=None, safe=str(tmp_path / "nothing")).check(PROMPTS)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(UserError, match=r"score\.reward\.unsafe: .* contains no phrases"):
        safety(model=str(folder), processor=None, unsafe=str(tmp_path / "empty")).check(PROMPTS)


def test_foreign_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    save_head(tmp_path)
    with pytest.raises(UserError, match=r"score\.reward\.model: .* lacks config\.json and open_clip's tensors"):
        hpsv2(model=str(tmp_path), processor=str(folder)).check(PROMPTS)
    reward = aesthetic(model=str(folder), head=str(folder))
    with pytest.raises(UserError, match=r"score\.reward\.head: .* has the linear layers \[\]"):
        reward.check(PROMPTS)
    save_head(tmp_path, (EMBEDDING + 1, 12, 8, 6, 4, 1))
    with pytest.raises(UserError, match=r"score\.reward\.head: .* takes 17 numbers; expected 16"):
        aesthetic(model=str(folder), head=str(tmp_path)).check(PROMPTS)
    with pytest.raises(UserError, match=r"score\.reward\.head: .*/nowhere has no|not found"):
        aesthetic(model=str(folder), head=str(tmp_path / "nowhere")).check(PROMPTS)


def test_missing_tensors_are_never_filled_with_random_ones(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of a CLIPModel, e\.g\. visual_projection\.weight"):
        clipscore(model=str(copy), device="cpu")(images(), PROMPTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match="cuda"):
        clipscore(model=str(folder), device="cuda").check(PROMPTS)


def test_impossible_options_and_calls(folder: Path) -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        validate_call(clipscore)(model=str(folder), batch_size=0)
    with pytest.raises(ValueError, match="1 embeddings came with 4"):
        clipscore(model=str(folder), device="cpu")(images(1), PROMPTS)


def test_factories_read_nothing() -> None:
    rewards = [pickscore(), clipscore(), hpsv2(), aesthetic(), safety()]
    assert [r.name for r in rewards] == ["pickscore", "clipscore", "hpsv2", "aesthetic", "safety"]
    assert not any(r.parallel for r in rewards)
    assert pickle.loads(pickle.dumps(rewards)) == rewards
