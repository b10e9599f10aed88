"""`gdro unigenbench`: images of the benchmark's prompts, the judge's verdicts on them, the table."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import ValidationError

from gdro.common.errors import UserError
from gdro.common.files import fingerprint, write_bytes, write_json
from gdro.common.progress import Progress
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.rewards.judges.endpoint import Endpoint, Question
from gdro.runner.directory import alone
from gdro.samplers.settings import Generation
from gdro.tools.unigenbench.criteria import ENGLISH
from gdro.tools.unigenbench.images import Folder, Sampled, find_adapter
from gdro.tools.unigenbench.judging import JudgePrompt, own_prompt, read_scores
from gdro.tools.unigenbench.published import published_prompt
from gdro.tools.unigenbench.reading import read_prompt_file
from gdro.tools.unigenbench.scores import aggregate, markdown, notes, percent, rows

AT_ONCE = 64  # images in memory while the judge is asked about them
JUDGE_SECONDS = 300.0  # per request; a reply has up to 4096 tokens
SHOWN = 8  # prompts on the page


@dataclass(frozen=True)
class Verdict:
    """The judge's 0 or 1 for each test point of an image; None, and the reason, if it gave none."""

    scores: list[int] | None
    reason: str | None
    reply: str | None


def unigenbench(
    file: Path,
    out: Path,
    *,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_prompt: Path | None = None,
    judge_api_key_env: str | None = None,
    judge_revision: str | None = None,
    judge_concurrency: int = 8,
    judge_max_tokens: int = 4096,
    model: str | None = None,
    adapter: Path | None = None,
    images_from: Path | None = None,
    images: int = 4,
    steps: int = 30,
    guidance: float = 3.5,
    height: int = 1024,
    width: int = 1024,
    max_sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    mixed_precision: Literal["no", "bf16"] = "no",
    repair: bool = False,
) -> str:
    """Measure `model` (with `adapter`), or the images in `images_from`, on a UniGenBench file; returns the table.

    Writes `out`/results.{json,md,html} and answers.jsonl (every reply). Resumes where it stopped: images are kept in
    `out`/groups, replies in `out`/judge.sqlite. Without `judge_url` it only makes the images. The defaults are the
    published ones: 4 images, 30 steps, guidance 3.5, 1024x1024, replies of at most 4096 tokens. Raises UserError before
    any image is made for bad input or an endpoint that does not answer, and at the end if no image got a verdict.
    """
    benchmark = read_prompt_file(file, repair=repair)
    language, prompts = benchmark.language, benchmark.prompts
    question = own_prompt(language) if judge_prompt is None else published_prompt(judge_prompt, language)
    question.check(prompts)
    source: Folder | Sampled
    if (model is None) == (images_from is None):
        found = "neither" if model is None else "both"
        raise UserError(f"gdro unigenbench: {found} of --model and --images-from; expected one of them")
    generation = _generation(images, steps, guidance, height, width, max_sequence_length, batch_size)
    if model is not None:
        folder = None if adapter is None else find_adapter(adapter)
        source = Sampled(out / "groups", model, folder, generation, seed, device, mixed_precision)
    elif adapter is not None:
        raise UserError("--adapter requires --model; with --images-from there is nothing to adapt")
    else:
        assert images_from is not None
        source = Folder(images_from, images)
    if (judge_url is None) != (judge_model is None):
        raise UserError("gdro unigenbench: one of --judge-url and --judge-model; expected both, or neither")
    source.check(prompts)
    with alone(out):
        if judge_url is None or judge_model is None:
            source.make(prompts)
            return f"{out}: images of {len(prompts)} prompts; pass --judge-url and --judge-model to have them judged"
        judge = Endpoint(
            url=judge_url,
            model=judge_model,
            api_key_env=judge_api_key_env,
            revision=judge_revision,
            concurrency=judge_concurrency,
            timeout=JUDGE_SECONDS,
            max_tokens=judge_max_tokens,
            cache=str(out / "judge.sqlite"),
        )
        judge.check()
        source.make(prompts)
        verdicts = ask(judge, question, prompts, source.images, images)
        missing = _missing([verdict for of_prompt in verdicts.values() for verdict in of_prompt])
        if missing["missing"] == missing["asked"]:
            raise UserError(
                f"judge {judge_url} gave none of {missing['asked']} images a verdict ({missing['reasons']})"
            )
        points = {p.id: [ENGLISH[language][name] for name in p.fields["points"]] for p in prompts}
        results: dict[str, Any] = {
            "benchmark": "UniGenBench",
            "file": str(file),
            "repairs": benchmark.repairs,
            "prompts_digest": fingerprint([prompt.to_json() for prompt in prompts]),
            "language": language,
            "prompts": len(prompts),
            "images": {
                "per_prompt": images,
                **missing,
                "from": source.about,
            },
            "judge": {
                "model": judge_model,
                "revision": judge_revision,
                "version": judge.version,
                "prompt": question.source,
                "prompt_digest": question.digest,
                "own_meanings": [name for name in question.lent if any(name in p.fields["points"] for p in prompts)],
            },
            **aggregate((points[i], verdict.scores) for i, of_prompt in verdicts.items() for verdict in of_prompt),
        }
        table = markdown(results)
        write_bytes(out / "answers.jsonl", _answers(prompts, verdicts).encode())
        write_bytes(out / "results.html", _page(results, prompts, verdicts, source.images).encode())
        write_bytes(out / "results.md", table.encode())
        write_json(out / "results.json", results)
    return f"{table}{out / 'results.html'}"


def ask(
    judge: Endpoint,
    question: JudgePrompt,
    prompts: Sequence[Prompt],
    images_of: Callable[[Prompt], Sequence[Image.Image]],
    per_prompt: int,
) -> dict[str, list[Verdict]]:
    """The verdicts on each prompt's images, in the prompts' order; one question per image, with all its test points."""
    verdicts: dict[str, list[Verdict]] = {prompt.id: [] for prompt in prompts}

    def count(prompt: Prompt) -> int:
        return len(prompt.fields["points"])

    with Progress("judge", len(prompts) * per_prompt, "img") as progress:
        # prompts with equally many test points go together: the form of a reply depends only on their number
        for number, group in groupby(sorted(prompts, key=count), count):
            alike, step = list(group), max(1, AT_ONCE // per_prompt)
            for some in (alike[start : start + step] for start in range(0, len(alike), step)):
                asked = [(p.id, Question(question.question(p), (image,))) for p in some for image in images_of(p)]
                answers = judge.ask([q for _, q in asked], partial(read_scores, count=number))
                for (prompt_id, _), (scores, answer) in zip(asked, answers, strict=True):
                    verdicts[prompt_id].append(Verdict(scores, answer.reason, answer.text))
                progress.advance(len(asked))
    return verdicts


def _generation(
    images: int, steps: int, guidance: float, height: int, width: int, max_sequence_length: int, batch_size: int
) -> Generation:
    options = {
        "images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "max_sequence_length": max_sequence_length,
        "batch_size": batch_size,
    }
    try:
        return Generation(**options, prompts_per_shard=4)
    except ValidationError as error:
        wrong = error.errors()[0]
        field = str(wrong["loc"][0])
        short = {"images_per_prompt": "images", "num_inference_steps": "steps", "guidance_scale": "guidance"}
        option = short.get(field, field.replace("_", "-"))
        raise UserError(f"--{option} is {wrong['input']}; {wrong['msg']}") from None


def _missing(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How many images were asked about, how many have no verdict, and the reasons, most common first."""
    # only up to the colon: the rest (the reply) differs for each; answers.jsonl has all of it
    reasons = Counter(str(verdict.reason).partition(":")[0] for verdict in verdicts if verdict.scores is None)
    return {"asked": len(verdicts), "missing": reasons.total(), "reasons": dict(reasons.most_common())}


def _answers(prompts: Sequence[Prompt], verdicts: dict[str, list[Verdict]]) -> str:
    """One line per image, with everything its table entries are based on."""
    lines = []
    for prompt in prompts:
        for image, verdict in enumerate(verdicts[prompt.id]):
            line = {"index": int(prompt.id), "image": image, "points": prompt.fields["points"], **vars(verdict)}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _page(
    results: dict[str, Any],
    prompts: Sequence[Prompt],
    verdicts: dict[str, list[Verdict]],
    images_of: Callable[[Prompt], Sequence[Image.Image]],
) -> str:
    """One self-contained page: the table, and the images of prompts drawn at random."""
    from jinja2 import Environment, StrictUndefined

    from gdro.evaluation.gallery import figure

    gallery = []
    for place in sorted(numpy_rng(0, "benchmark page").permutation(len(prompts))[:SHOWN]):
        prompt, shown = prompts[place], []
        for i, (image, verdict) in enumerate(zip(images_of(prompt), verdicts[prompt.id], strict=True)):
            scores = verdict.scores
            marks = None if scores is None else list(zip(prompt.fields["points"], scores, strict=True))
            alt = f"image {i} of prompt {prompt.id}"
            shown.append(figure(image, float("nan"), {}, alt) | {"verdict": marks, "reason": verdict.reason})
        gallery.append({"prompt": prompt.text, "images": shown})
    origin = results["images"]["from"]
    subject = origin.get("folder") or origin["model"]
    if origin.get("adapter"):
        subject += f" with {origin['adapter']['folder']}"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("gdro.tools.unigenbench") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        results=results, rows=rows(results), notes=notes(results), percent=percent, gallery=gallery, subject=subject
    )
