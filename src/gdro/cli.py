"""The command line: parses, checks, calls. A mistake is one line on stderr and exit code 2, within a second or two.

torch is imported once the arguments are parsed; diffusers, transformers and the OCR engine once the configuration and
prompts are checked.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import NoReturn

from gdro import __version__
from gdro.common import environment
from gdro.common.errors import LostProcess, UserError, did_you_mean
from gdro.common.terminal import put, tell
from gdro.common.validation import MAX_SEED, integer, number

Override = tuple[str, str]
Act = Callable[[argparse.Namespace, list[Override]], int | None]  # the exit code; None is 0
# Commands that take no field of a run's configuration.
WITHOUT_FIELDS = ("prompts", "compare", "rewards", "unigenbench", "geneval", "arena", "calibrate", "verify")

STAGES = {
    "sample": "make groups of images of the prompts",
    "score": "score the images with a reward",
    "train": "train the adapter on the scored groups",
    "evaluate": "compare base and tuned model on held-out prompts",
    "export": "write the adapter for plain diffusers, with a model card",
    "report": "write report.html",
}


DISTRIBUTED = ("run", "demo", *STAGES)  # commands that several processes can do together


def path(text: str) -> Path:
    if not text:  # which is the current folder to Path
        raise argparse.ArgumentTypeError("it is empty; expected a path")
    return Path(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run of a comparison failed, 2 the user's mistake (one line on stderr), 130 interrupted."""
    _quiet()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        environment.check()
    except UserError as error:
        if environment.is_first():  # of several, all of which find it
            tell(f"gdro: {error}")
        return 2
    try:
        return _dispatch(argv)
    except UserError as error:
        if _speaks():
            notes = (f"({note})" for note in getattr(error, "__notes__", ()))
            tell(" ".join(["gdro:", *str(error).split(), *notes]))
        return 2
    except KeyboardInterrupt:
        if _speaks():
            tell(f"\ngdro: interrupted; `{shlex.join(['gdro', *argv])}` resumes where it stopped")
        return 130
    except LostProcess as error:
        if _speaks():
            tell(f"gdro: {error}; the same command resumes where it stopped")
        return 1
    except Exception as error:
        if not _speaks():
            return 1
        variable = environment.blamed(error)
        if variable is None:
            raise
        cause = f"{type(error).__name__}: {error}"
        tell(f"gdro: {variable}, a variable of the environment, cannot be used ({' '.join(cause.split()):.300})")
        return 2


def _several() -> bool:
    """Whether torchrun or the like has started more processes than this one."""
    return environment.world_size() > 1


def _speaks() -> bool:
    """Whether this process is the one to say why it ends: of several, the first that does."""
    if not _several():
        return True
    from gdro.common.distributed import fails_first

    return fails_first()


def _quiet() -> None:
    """Libraries' bars and notices off; gdro has its own. Whoever sets these variables keeps their values.

    Figures are drawn into files, so matplotlib's backend for windows, which it checks, is none of theirs.
    """
    os.environ["MPLBACKEND"] = "agg"
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def _dispatch(argv: list[str]) -> int:
    parser, commands = parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(f'unknown command "{argv[0]}"{did_you_mean(argv[0], commands)}')
    if argv and argv[0] in commands and argv[0] not in DISTRIBUTED and _several():
        found = os.environ["WORLD_SIZE"]
        raise UserError(f"WORLD_SIZE is {found}, but gdro {argv[0]} is one process; expected it without a launcher")
    overrides: list[Override] = []
    if argv and argv[0] not in WITHOUT_FIELDS and argv[0] in commands:
        argv, overrides = split(argv, commands[argv[0]])
    args = parser.parse_args(argv)
    act: Act = args.act
    try:
        return act(args, overrides) or 0
    except (RuntimeError, MemoryError) as error:
        if "torch" not in sys.modules:
            raise
        from gdro.common.device import failure

        line = failure(argv[0], error)  # outside of a run's stages, which tell of their own
        if line is None:
            raise
        raise UserError(line) from error


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        "gdro", description="Post-train text-to-image flow models on rewards, offline.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gdro {__version__}")
    sub = parser.add_subparsers(metavar="COMMAND", required=True)
    commands: dict[str, _Parser] = {}

    def command(name: str, about: str, act: Act) -> _Parser:
        commands[name] = sub.add_parser(name, help=about, description=about, allow_abbrev=False)
        commands[name].set_defaults(act=act)
        return commands[name]

    dotted = "Any field of the configuration can be given by its dotted name, e.g. --train.k 4 --model PATH."
    run = command("run", "all stages, from prompts to report", _run)
    stages = [command(name, about, _run) for name, about in STAGES.items()]
    for stage in (run, *stages):
        stage.add_argument(
            "config", nargs="?", type=path, help="YAML, or a recipe's name; without it the run's config.yaml"
        )
        stage.add_argument("--out", required=True, type=path, help="the run directory; an unfinished run resumes there")
        stage.epilog = dotted
    run.add_argument("--until", choices=list(STAGES), default="report", help="the last stage to do (report)")
    for name, stage in zip(STAGES, stages, strict=True):
        stage.set_defaults(stages=(name,))
    commands["score"].add_argument("--reward", help="short for --score.reward: a name, or my_module:my_function")

    plans = command("plan", "what a run will cost: FLOPs, seconds, memory, disk; needs no weights", _plan)
    plans.add_argument("config", type=path, help="YAML")
    plans.add_argument("--gpu", help="a GPU's name, e.g. h200, a100, rtx4090, or cpu; without it the device here")
    plans.add_argument("--json", action="store_true", help="all figures as JSON, in bytes, FLOPs and seconds")
    plans.epilog = dotted

    demo = command("demo", "the main job on the embedded tiny model", _demo)
    demo.add_argument("--out", default=Path("runs/demo"), type=path, help="the run directory (runs/demo)")
    demo.epilog = dotted

    imports = command("import", "take images and rewards made elsewhere, in place of sample and score", _import)
    imports.add_argument("folder", type=path, help="images and metadata.jsonl (file_name, prompt, reward, group)")
    imports.add_argument("--config", required=True, type=path, help="YAML with the model and training settings")
    imports.add_argument("--out", required=True, type=path, help="the run directory")
    imports.epilog = dotted

    compare = command("compare", "run methods side by side on the same work: table, plots, page", _compare)
    compare.add_argument("config", nargs="?", type=path, help="YAML of the comparison; without it the packaged one")
    compare.add_argument(
        "--out",
        type=path,
        help="its folder (runs/comparison, or runs/comparison-quick); an unfinished one resumes there",
    )
    compare.add_argument("--quick", action="store_true", help="the shape of it: one seed, small budgets, no search")
    compare.add_argument("--status", action="store_true", help="start nothing; what is done, and the results so far")
    compare.add_argument("--task", help="this task only")
    compare.add_argument("--jobs", type=integer(1, 1024), help="runs at once (as many as there are cores; 1 on a GPU)")
    compare.add_argument("--results", type=path, help="also write the figures to this .json file")
    compare.add_argument("--readme", type=path, help="also put the table into this Markdown file, between its markers")
    compare.add_argument("--pictures", type=path, help="also write the plots into this folder")

    command("rewards", "what can be named as reward, judge or comparator, and what each needs", _rewards)

    unigen = command("unigenbench", "measure a model, or images made elsewhere, on UniGenBench", _unigenbench)
    unigen.add_argument("file", type=path, help="UniGenBench's data/test_prompts_*.csv")
    unigen.add_argument("--out", required=True, type=path, help="its folder; an unfinished one resumes there")
    unigen.add_argument("--model", help='"tiny", a folder, or a Hub id')
    unigen.add_argument("--adapter", type=path, help="a run directory or an adapter's folder")
    unigen.add_argument("--images-from", type=path, help="a folder of INDEX_I.png, instead of --model")
    unigen.add_argument("--judge-url", help="an OpenAI-compatible endpoint; without it the images are made only")
    unigen.add_argument("--judge-model", help="the model's name there")
    unigen.add_argument("--judge-prompt", type=path, help="UniGenBench's eval/src/eval_common.py, for its words")
    unigen.add_argument("--judge-api-key-env", help="environment variable that holds the key")
    unigen.add_argument("--judge-revision", help="noted in the results")
    unigen.add_argument("--judge-concurrency", type=integer(1, 1024), default=8, help="requests at once (8)")
    unigen.add_argument("--judge-max-tokens", type=integer(1, 10**6), default=4096, help="of a reply (4096)")
    unigen.add_argument("--images", type=integer(1, 10_000), default=4, help="images a prompt (4)")
    unigen.add_argument("--steps", type=integer(1, 1000), default=30, help="steps of the solver (30)")
    unigen.add_argument("--guidance", type=number(0, 100), default=3.5, help="guidance scale (3.5)")
    unigen.add_argument("--height", type=integer(1, 8192), default=1024, help="pixels (1024)")
    unigen.add_argument("--width", type=integer(1, 8192), default=1024, help="pixels (1024)")
    unigen.add_argument("--max-sequence-length", type=integer(1, 512), default=512, help="text tokens (512)")
    unigen.add_argument("--batch-size", type=integer(1, 10**6), default=4, help="images generated at once (4)")
    unigen.add_argument("--seed", type=integer(0, MAX_SEED), default=0, help="of the noise (0)")
    unigen.add_argument("--repair", action="store_true", help="put in commas that FILE lacks; the results say so")
    unigen.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto")
    unigen.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="of the model's weights (no)")

    engines = command("calibrate", "compare the engines behind a reward on the same images", _calibrate)
    engines.add_argument("what", choices=["ocr"], help="ocr")
    engines.add_argument("images", type=path, help="a folder with metadata.jsonl (file_name, text), a run, or groups")
    engines.add_argument("--out", type=path, default=Path("calibration.json"), help="all figures (calibration.json)")
    engines.add_argument("--engine", action="append", default=[], help="this one; may be repeated (all)")
    engines.add_argument("--lang", help="PaddleOCR's language")
    engines.add_argument("--limit", type=integer(1, 10**9), help="this many images at most")

    verdicts = command("geneval", "GenEval's table of stored verdicts, without looking at an image", _geneval)
    verdicts.add_argument("results", type=path, help="the official evaluator's .jsonl, or a run's rewards .parquet")
    verdicts.add_argument("--groups", type=path, help="the groups of a .parquet without records")

    study = command("arena", "a blind human study of finished runs: a page on loopback, and its table", _arena)
    study.add_argument("runs", nargs="+", type=path, metavar="RUN", help="one: base against tuned; several: the tuned")
    study.add_argument("--out", type=path, help="the study's folder; a study begun there resumes")
    study.add_argument("--table", action="store_true", help="print the table of the study's folder RUN, serve nothing")
    study.add_argument("--host", default="127.0.0.1", help="the address to serve at (127.0.0.1)")
    study.add_argument("--port", type=integer(0, 65_535), default=8765, help="0 takes any free one (8765)")
    study.add_argument("--rater", help="the only rater; without it the page asks for a name")
    study.add_argument("--seed", type=integer(0, MAX_SEED), help="of pairs, order and sides (0)")
    study.add_argument("--pairs", type=integer(1, 10**9), help="pairs of images (a prompt once for every two models)")

    whole = command("verify", "read every file of a run or study again, and name what is damaged", _verify)
    whole.add_argument("folder", type=path, metavar="RUN", help="the run directory, or a study's folder")

    prompts = command("prompts", "write prompts that come with gdro to a file", _prompts)
    prompts.add_argument(
        "spec", nargs="?", help="gdro:TASK:SPLIT[:COUNT], tiny:TASK:SPLIT:COUNT[:SEED], or the options below"
    )
    prompts.add_argument("--task", help="ocr or geneval, of the tiny world")
    prompts.add_argument("--split", help="train, validation or test")
    prompts.add_argument("--count", type=integer(1, 10**6), help="how many prompts")
    prompts.add_argument("--seed", type=integer(0, MAX_SEED), default=0, help="another seed gives other prompts (0)")
    prompts.add_argument("--out", required=True, type=path, help="the .jsonl file to write")
    return parser, commands


def split(argv: Sequence[str], command: argparse.ArgumentParser) -> tuple[list[str], list[Override]]:
    """The command's own arguments, and every other `--name VALUE` or `--name=VALUE` as an override."""
    own = command._option_string_actions
    rest: list[str] = []
    overrides: list[Override] = []
    tokens = iter(argv)
    for token in tokens:
        option, equals, value = token.partition("=")
        if option in own or not option.startswith("--") or option == "--":
            rest.append(token)
            continue
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise UserError(f"{option} has no value; expected {option} VALUE")
        if not value.strip():  # YAML's null: "no validation", "start anew"
            raise UserError(f"{option} is empty; expected {option} VALUE, null for none")
        overrides.append((option.removeprefix("--"), value))
    return rest, overrides


def _checked(overrides: Sequence[Override], own: Iterable[str]) -> Sequence[Override]:
    from gdro.runner.config import field_names

    valid = field_names()
    for name, text in overrides:
        if name == "train.objective" and ":" in text:  # of your own, with hyperparameters of its own
            from gdro.objectives.registry import hyperparameters, objective_class

            valid += [f"train.{field}" for field in hyperparameters(objective_class(text.strip()))]
    for name, _ in overrides:
        if name not in valid:
            raise UserError(f"unknown option --{name}{did_you_mean(f'--{name}', [f'--{v}' for v in (*valid, *own)])}")
    return overrides


def _run(args: argparse.Namespace, overrides: list[Override]) -> None:
    if getattr(args, "reward", None) is not None:
        overrides = [*overrides, ("score.reward", args.reward)]
    stages = args.stages if "stages" in args else tuple(STAGES)[: list(STAGES).index(args.until) + 1]
    _go(args.config or args.out / "config.yaml", overrides, args.out, stages)


def _demo(args: argparse.Namespace, overrides: list[Override]) -> None:
    with resources.as_file(resources.files("gdro") / "recipes" / "demo.yaml") as recipe:
        _go(recipe, overrides, args.out, tuple(STAGES))


def _go(path: Path, overrides: Sequence[Override], out: Path, stages: Sequence[str]) -> None:
    from gdro.common import distributed

    with distributed.started():
        from gdro.runner.config import load_config

        config = load_config(path, _checked(overrides, ["out"]))
        from gdro.runner.pipeline import run

        lines = run(config, out, stages)
        if distributed.is_first():
            put(lines)


def _plan(args: argparse.Namespace, overrides: list[Override]) -> None:
    from gdro.runner.config import load_config

    config = load_config(args.config, _checked(overrides, ["gpu", "json"]))
    from gdro.runner.planning.report import plan_run

    put(plan_run(config, args.gpu, as_json=args.json))


def _import(args: argparse.Namespace, overrides: list[Override]) -> None:
    from gdro.runner.config import load_config

    named = [*_checked(overrides, ["config", "out"]), ("sample.prompts", str(args.out / "prompts" / "train.jsonl"))]
    config = load_config(args.config, named)
    from gdro.runner.pipeline import import_groups

    put(import_groups(config, args.folder, args.out))


def _compare(args: argparse.Namespace, _: list[Override]) -> int:
    from gdro.tools.comparison.compare import compare

    with ExitStack() as stack:
        packaged = resources.as_file(resources.files("gdro") / "recipes" / "comparison.yaml")
        lines, fine = compare(
            args.config or stack.enter_context(packaged),
            args.out or Path("runs/comparison-quick" if args.quick else "runs/comparison"),
            quick=args.quick,
            status=args.status,
            workers=args.jobs,
            task=args.task,
            results=args.results,
            readme=args.readme,
            pictures=args.pictures,
        )
    put(lines)
    return 0 if fine else 1


def _rewards(args: argparse.Namespace, _: list[Override]) -> None:
    from gdro.rewards.registry import listing

    put(listing())


def _unigenbench(args: argparse.Namespace, _: list[Override]) -> None:
    from gdro.tools.unigenbench.run import unigenbench

    own = {name: value for name, value in vars(args).items() if name not in ("act", "name", "file", "out")}
    put(unigenbench(args.file, args.out, **own))


def _calibrate(args: argparse.Namespace, _: list[Override]) -> None:
    from gdro.tools.calibrate_ocr import calibrate_ocr

    put(calibrate_ocr(args.images, args.out, engines=args.engine, lang=args.lang, limit=args.limit))


def _geneval(args: argparse.Namespace, _: list[Override]) -> None:
    from gdro.tools.geneval_results import results_table

    put(results_table(args.results, args.groups))


def _arena(args: argparse.Namespace, _: list[Override]) -> None:
    if args.table == (args.out is not None) or (args.table and len(args.runs) != 1):
        raise UserError("gdro arena: expected RUN [RUN ...] --out DIR, or DIR --table")
    from gdro.tools.arena.server import arena, arena_table

    if args.table:
        put(arena_table(args.runs[0]))
        return
    options = {name: getattr(args, name) for name in ("host", "port", "rater", "seed", "pairs")}
    put(arena(args.runs, args.out, **options))


def _prompts(args: argparse.Namespace, overrides: list[Override]) -> None:
    choices = [args.task, args.split, args.count]
    if args.spec is None and None in choices:
        raise UserError(
            "gdro prompts: expected gdro:TASK:SPLIT[:COUNT], tiny:TASK:SPLIT:COUNT[:SEED], or --task, --split and "
            "--count"
        )
    if args.spec is not None and choices != [None] * 3:
        raise UserError(f"gdro prompts: {args.spec} and --task, --split, --count; expected one of the two forms")
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out is {args.out}; expected a name that ends in .jsonl")
    from gdro.common.prompts import write_prompts
    from gdro.runner.prompt_sets import named_prompts

    own = f"tiny:{args.task}:{args.split}:{args.count}:{args.seed}"
    prompts = named_prompts(own if args.spec is None else args.spec)
    write_prompts(args.out, prompts)
    put(f"{args.out}: {len(prompts)} prompts")


def _verify(args: argparse.Namespace, _: list[Override]) -> int:
    from gdro.tools.verify import verify

    checked, lines = verify(args.folder)
    put("\n".join([*lines, f"{args.folder}: {checked} checks, {len(lines)} failed"]))
    return 2 if lines else 0
