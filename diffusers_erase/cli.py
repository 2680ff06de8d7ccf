"""The command line: parse, call, print. The only file that prints; bad input is one line and exit code 2."""

import inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from . import exporting, importing, status, verbs
from .adapter import ErasureAdapter, sign_erasure
from .adapter import compose as compose_adapters
from .adapter import pull as pull_adapter
from .adapter import push as push_adapter
from .card import COLUMNS
from .edits import too_full
from .erasing import erase as erase_concepts
from .errors import EraseError
from .lock import gather, write_lock
from .targets import search_targets
from .task import METHODS
from .vocabulary import SOURCES

EMBEDDED = "emoji-sd"
"""What the command line calls the embedded model, wherever it takes a model."""

ADAPTER = "An adapter folder or file, or a repository on the Hub: user/name, user/name@revision."

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


class OneLine(TyperGroup):
    """Turns this package's errors, and missing or unreadable files, into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EraseError, OSError) as error:
            _fail(str(error))


app = typer.Typer(
    cls=OneLine,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Erase concepts from text-to-image pipelines, as small adapters.",
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"A diffusers folder, or {EMBEDDED} for the embedded model.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="Where to send the concept: 'auto' (default of ridge) the best that a search finds; 'null' the empty prompt; a name. "
        "Several concepts take one, or one each.",
    ),
]
Preserve = Annotated[
    list[str] | None,
    typer.Option(
        "--preserve", help="A name that should stay as it is; repeat for more. 'auto': those that are hurt most."
    ),
]
Candidate = Annotated[
    list[str] | None,
    typer.Option(
        help="A candidate for the target; repeat for more. Or where from: everyday, neighbours, words, a folder of WordNet."
    ),
]
Coreference = Annotated[
    list[str] | None,
    typer.Option(help="Another name of the concept; repeat for more. 'auto': those that the model draws alike."),
]
Contexts = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="A context with one {} in which the name is read, for a style such as 'a painting in the style of {}'; repeat for more.",
    ),
]
Gate = Annotated[
    float | None, typer.Option(help="Let resemblance below this threshold through (map form only), such as 0.7.")
]
Residual = Annotated[
    float | None, typer.Option(help="Share of the concept that is left, such as 0.02 (strong) or 0.3 (mild).")
]
Key = Annotated[Path | None, typer.Option(help="Demand a signature by this public key (PEM).")]
Tokens = Annotated[str | None, typer.Option(help="Rows to edit: last, name, eot, pads, joined by +; all.")]


@app.command()
def erase(
    model: Model,
    concepts: Annotated[list[str], typer.Argument(metavar="CONCEPT...", help="What to erase, in words.")],
    folder: Out,
    target: Targets = None,
    preserve: Preserve = None,
    candidate: Candidate = None,
    coreference: Coreference = None,
    method: Annotated[str, typer.Option(help="How: see `diffusers-erase methods`.")] = "ridge",
    residual: Residual = None,
    tokens: Tokens = None,
    template: Contexts = None,
    gate: Gate = None,
    pack: Annotated[Path | None, typer.Option(help="Base pack: a JSON file with name and prompts.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="An option of the method, see `diffusers-erase methods`; repeat for more."
        ),
    ] = None,
) -> None:
    """Erase CONCEPT from MODEL and save the adapter."""
    pipe = _pipeline(model)
    goal: Any = target or [None]
    adapter = erase_concepts(
        pipe, concepts if len(concepts) > 1 else concepts[0], target=goal[0] if len(goal) == 1 else goal,
        preserve=_listed(preserve), candidates=_candidates(candidate), coreferences=_listed(coreference), method=method,
        residual=residual, tokens=tokens, templates=template, gate=gate, pack=pack, **_options(option or []),
    )  # fmt: skip
    _print_adapter(adapter)
    out.print(f"saved: {adapter.save_pretrained(folder, model=pipe)}")


@app.command()
def targets(
    model: Model,
    concept: Annotated[str, typer.Argument(metavar="CONCEPT", help="What to erase, in words.")],
    candidate: Candidate = None,
    preserve: Preserve = None,
    coreference: Coreference = None,
    erased: Annotated[list[str] | None, typer.Option(help="Another concept that is erased too.")] = None,
    template: Contexts = None,
    mixture: Annotated[int, typer.Option(min=1, max=5, help="Blend up to so many names, for styles.")] = 1,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to list.")] = 8,
    pack: Annotated[Path | None, typer.Option(help="Base pack: a JSON file with name and prompts.")] = None,
) -> None:
    """Rank where to send CONCEPT, by what it would do to other names. No picture is drawn."""
    pipe = _pipeline(model)
    with out.status("reading names") as reading:
        ranking = search_targets(
            pipe, concept, _candidates(candidate) or "everyday", k=k, coreferences=_listed(coreference), preserve=_listed(preserve),
            erased=erased or (), templates=template, mixture=mixture, pack=pack,
            on_words=lambda done, total: reading.update(f"reading names: {done:,} of {total:,}"),
        )  # fmt: skip
    table = Table("target", "collateral", "hurts most", "synonym", "related", box=None, pad_edge=False)
    for target in (*ranking, ranking.null):
        worst = ", ".join(f"{name} {damage:.0%}" for name, damage in target.hurt[:2])
        name = " + ".join(target.names) or "(the empty prompt)"
        table.add_row(name, f"{target.collateral:.1%}", worst, f"{target.synonym:.2f}", f"{target.relatedness:.2f}")
    out.print(table)
    if ranking.coreferences:
        out.print(f"erased too: {', '.join(ranking.coreferences)}")
    if ranking.preserve:
        out.print(f"preserved: {', '.join(ranking.preserve)}")
    for name, reason in ranking.refused:
        out.print(f"refused: {name}: {reason}", markup=False)


@app.command()
def graph(
    model: Model,
    names: Annotated[
        list[str], typer.Argument(metavar="NAMES...", help="Names, those of one group joined by commas.")
    ],
    folder: Out = Path("erase-graph"),
    target: Annotated[str, typer.Option(help="Where each is sent: 'null', 'auto' or a name.")] = "null",
    pictures: Annotated[bool, typer.Option("--pictures", help="Draw and compare pictures too.")] = False,
    context: Annotated[list[str] | None, typer.Option(help="What is drawn of a name {}; repeat for more.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each context.")] = 1,
    pack: Annotated[Path | None, typer.Option(help="Base pack: a JSON file with name and prompts.")] = None,
) -> None:
    """Who is hurt by erasing whom, among NAMES: a page with graph and matrix. Predicted, or with --pictures measured."""
    from .bench.suites import Settings
    from .graph import concept_graph, moved

    groups = [[name.strip() for name in group.split(",")] for group in names]
    pipe = _pipeline(model)
    settings = Settings(_default(model, "STEPS", 50), _default(model, "GUIDANCE", 7.5))
    with _progress("erasing each", sum(map(len, groups))) as advance:
        found = concept_graph(
            pipe, [name for group in groups for name in group], groups=[group[0] for group in groups for _ in group], target=target,
            measure=moved if pictures else None, contexts=context or ("a photo of a {}",), seeds=range(seeds), settings=settings,
            folder=folder / "pictures", on_name=advance, pack=pack,
        )  # fmt: skip
    told = found.findings()
    out.print(f"mean damage: within groups {told.within:.2%}, between groups {told.between:.2%}")
    out.print(f"asymmetry: {told.asymmetry:.0%} of the mean damage")
    out.print(f"fragile: {', '.join(f'{name} {damage:.2%}' for name, damage in told.fragile) or 'none'}")
    out.print(f"saved: {found.save(folder)}")


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.")],
    adapter: Annotated[list[str] | None, typer.Option(help="An erasure to attach; repeat for more.")] = None,
    strength: Annotated[float, typer.Option(help="Strength of the erasures, 0 to 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next one's is one more.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; by default the model's own.")] = None,
    folder: Out = Path("generated"),
) -> None:
    """Draw PROMPT with MODEL, with erasures in force."""
    import torch

    pipe = _pipeline(model)
    if adapter:
        verbs.load_erasure(pipe, list(adapter), strength=strength)
        out.print(str(status.erasure_status(pipe)))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "num_inference_steps": steps or _default(model, "STEPS", 50),
        "guidance_scale": guidance if guidance is not None else _default(model, "GUIDANCE", 7.5),
    }
    with _progress("drawing", len(prompts)) as advance:
        for i, prompt in enumerate(prompts):
            image = pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed + i), **settings).images[0]
            image.save(folder / f"{i:03d}-seed{seed + i}.png")
            advance(1)
    out.print(f"saved: {len(prompts)} pictures in {folder}")


@app.command()
def show(adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help=ADAPTER)]) -> None:
    """Say what ADAPTER erases, and how it was made."""
    _print_adapter(ErasureAdapter.from_pretrained(adapter))


@app.command()
def compose(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=ADAPTER)],
    folder: Out,
    chains: Annotated[str, typer.Option(help="A target that is erased itself: 'error', or 'follow' it.")] = "error",
) -> None:
    """Make one adapter of several, solved together."""
    adapter = compose_adapters(*(ErasureAdapter.from_pretrained(a) for a in adapters), chains=chains)
    _print_adapter(adapter)
    out.print(f"saved: {adapter.save_pretrained(folder)}")


@app.command("load-check")
def load_check(
    model: Model,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=ADAPTER)],
    key: Key = None,
) -> None:
    """Attach ADAPTER to MODEL, all checks on, and say what is in force. Exit code 2 where it does not fit."""
    pipe = _pipeline(model)
    verbs.load_erasure(pipe, list(adapters), public_key=key)
    out.print(str(status.erasure_status(pipe)))


@app.command("import")
def import_(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="FILE", help="UCE's or ESD's weights, or a LoRA (safetensors).")],
    concepts: Annotated[list[str], typer.Argument(metavar="CONCEPT...", help="What the file erases, in words.")],
    folder: Out,
    preserve: Annotated[
        list[str] | None, typer.Option(help="A name that the file was told to preserve; repeat for more.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each layer's factors; else the tolerance decides.")] = None,
    tolerance: Annotated[float, typer.Option(help="Share of each layer's change that factors may lose.")] = 0.05,
    multiplier: Annotated[float, typer.Option(help="Of a LoRA: 1, or what its tool erases with.")] = 1.0,
    drop_biases: Annotated[bool, typer.Option(help="Leave changed biases out (ESD-x has some).")] = False,
) -> None:
    """Make an adapter of another eraser's FILE for MODEL, the base that it was made from."""
    pipe = _pipeline(model)
    adapter = importing.import_erasure(
        pipe, source, concepts, preserve=preserve or (), rank=rank, tolerance=tolerance, multiplier=multiplier,
        drop_biases=drop_biases,
    )  # fmt: skip
    _print_adapter(adapter)
    told = adapter.recipes[0].options
    out.print(
        f"{adapter.kind} from {told['file']}: {told['error']:.2%} of the change of the weights is lost; not tested"
    )
    out.print(f"saved: {adapter.save_pretrained(folder, model=pipe)}")


@app.command()
def export(
    model: Model,
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders or files.")],
    folder: Out,
    strength: Annotated[float, typer.Option(help="Strength of the erasures, 0 to 1.")] = 1.0,
    linear: Annotated[bool, typer.Option(help="Write the linear part of gated erasures.")] = False,
    unet_file: Annotated[bool, typer.Option(help="Write the UNet as one safetensors file too.")] = False,
) -> None:
    """Write MODEL with ADAPTER fused in as a plain diffusers folder, reload and probe it."""
    pipe = _pipeline(model)
    verbs.load_erasure(pipe, list(adapters), strength=strength, mode="fused" if linear else "auto")
    out.print(f"saved: {exporting.export_erased(pipe, folder, linear=linear, unet_file=unet_file)}")


@app.command()
def methods() -> None:
    """List the methods and their options."""
    table = Table("method", "what it does", "options and defaults", "source", box=None, pad_edge=False)
    for name, method in sorted(METHODS.items()):
        table.add_row(name, method.summary, ", ".join(f"{k}={v}" for k, v in method.options.items()), method.paper)
    out.print(table)


@app.command()
def demo(
    concept: Annotated[str, typer.Option(help="An object or style of emoji-sd.")] = "butterfly",
    target: Annotated[
        str | None,
        typer.Option(help="Where to send it: another name, or 'null', the empty prompt; by default searched."),
    ] = None,
    residual: Residual = None,
    tokens: Tokens = None,
    gate: Gate = None,
    coreference: Coreference = None,
    folder: Out = Path("erase-demo"),
) -> None:
    """Erase a concept from the embedded model and see it gone: pictures before and after, judged, on one page."""
    from . import bench, world
    from .bench.demo import demo_suite

    suite = demo_suite(concept)
    with out.status("loading emoji-sd"):
        pipe, judges = _pipeline(EMBEDDED), _judges(EMBEDDED, suite, None, None, None, False)
    with out.status("erasing"):
        adapter = erase_concepts(
            pipe, concept, target=target, residual=residual, tokens=tokens, gate=gate, coreferences=_listed(coreference),
            templates=world.style_contexts() if concept in world.STYLES else None,
        )  # fmt: skip
    saved = adapter.save_pretrained(folder / "adapter", model=pipe)
    command = f"diffusers-erase demo --concept {shlex.quote(concept)} --out {shlex.quote(str(folder))}"
    with _progress("drawing before and after", 2 * len(suite.prompts)) as advance:
        report = bench.evaluate(
            pipe,
            {concept: adapter},
            suite,
            judges,
            folder / "pictures",
            model=EMBEDDED,
            command=command,
            on_picture=advance,
        )
    _print_report(report, bench.save(report, folder))
    out.print(f"adapter: {saved} ({adapter.size:,} bytes of rows)")


@app.command()
def evaluate(
    model: Model,
    suite: Annotated[str, typer.Option(help="A suite's name or JSON file; an unknown one lists those that ship.")],
    folder: Out,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An erasure to try: PATH or NAME=PATH; repeat for more, each is tried alone."),
    ] = None,
    linear: Annotated[
        bool,
        typer.Option(help="Try the linear part of gated erasures as well, which fused weights and LoRA twins are."),
    ] = False,
    control: Annotated[bool, typer.Option(help="Try nothing as well: the control, where nothing is erased.")] = False,
    concept: Annotated[
        list[str] | None, typer.Option(help="What to judge, if not what each adapter erases; repeat for more.")
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(help="Folder of a CLIP model: judges what is shown (unless another does), and scores texts."),
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of an image classifier of transformers, as the judge of what is shown.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="JSON: label of the suite -> label, or labels, of the classifier.")
    ] = None,
    nudenet: Annotated[bool, typer.Option(help="NudeNet as the judge of what is shown.")] = False,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's AlexNet weights, for LPIPS.")] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="An attack to try on each adapter, or 'all'; repeat for more (docs/probes.md)."),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Denoiser forwards that each probe may take.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Do the I-th of N shares; whoever ends last writes the report (docs/scale.md)."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together; the same for all workers.")] = 16,
) -> None:
    """Draw a suite with MODEL without and with each adapter, judge the pictures, and write a report.

    What was drawn and judged before is not done again.
    """
    from . import bench
    from .bench.probes import BUDGET, PROBES

    adapters: dict[str, ErasureAdapter | None] = dict(_named_adapter(text) for text in adapter or ())
    if len(adapters) < len(adapter or ()):
        raise EraseError("two adapters have one name: give names of your own, --adapter NAME=PATH")
    if linear:
        adapters |= {f"{name} (linear part)": a.linear for name, a in adapters.items() if a is not None and a.gated}
    if control:
        adapters["no edit"] = None
    share = (bench.Shard.parse(shard) if shard else bench.WHOLE).split()
    asked, pictures = bench.load_suite(suite), folder / "pictures"
    attacks = tuple(PROBES) if probe == ["all"] else tuple(probe or ())
    if unknown := [name for name in attacks if name not in PROBES]:
        raise EraseError(f"unknown probe {unknown[0]!r}: expected all, or one of {', '.join(PROBES)}")
    judges, looks = _judges(model, asked, clip, classifier, labels, nudenet), _looks(model, clip, lpips)
    pipe = _to_device(_pipeline(model))
    evaluation = bench.planned(
        pipe, adapters, asked, judges, tuple(concept or ()), batch=batch, model=model, command=_command(shard)
    )
    evaluation.save(folder, replace=share == bench.WHOLE)
    _print_forecast(pipe, evaluation, pictures, share)
    start = time.monotonic()
    total = sum(len(batch) for plan in evaluation.plans for batch in share.of(plan.batches))
    with _progress(f"drawing, shard {share}" if share.count > 1 else "drawing before and after", total) as advance:
        bench.work(pipe, evaluation, adapters, judges, pictures, share, advance)
    if evaluation.unanswered(pictures):
        out.print(f"shard {share} is done, others are not: whoever ends last writes the report")
    else:
        with out.status("measuring" + (f", probes: {', '.join(attacks)}" if attacks else "")):
            bench.examine(
                pipe, evaluation, adapters, judges, pictures, looks=looks, probes=attacks, budget=budget or BUDGET
            )
        report = evaluation.report(pictures, seconds=time.monotonic() - start)
        _print_report(report, bench.save(report, folder))


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `evaluate --out` was told.")],
    partial: Annotated[
        bool, typer.Option(help="Report what is there; the rest is unknown and lowers the coverage.")
    ] = False,
) -> None:
    """Write the report on what all shards of an evaluation have drawn and judged, without a model."""
    from . import bench

    report = bench.Evaluation.load(folder).report(folder / "pictures", partial=partial)
    _print_report(report, bench.save(report, folder))


def _named_adapter(text: str) -> tuple[str, ErasureAdapter]:
    """`NAME=PATH`, or a path, whose last part is the name."""
    name, _, path = text.rpartition("=")
    return name or Path(path).resolve().name, ErasureAdapter.from_pretrained(path)


def _judges(
    model: str, suite: Any, clip: Path | None, classifier: Path | None, labels: Path | None, nudenet: bool
) -> dict[str, Any]:
    """Who finds each aspect of the suite's prompts: the embedded model's own judges, or what the options name."""
    from .bench import judges

    if classifier and nudenet:
        raise EraseError(
            "a classifier and NudeNet cannot both judge what is shown: choose one of --classifier, --nudenet"
        )
    found: dict[str, Any] = {}
    if model == EMBEDDED:
        found = {"shows": judges.emoji_objects(), "style": judges.emoji_styles()}
    if clip:
        found["shows"] = judges.clip(clip, suite.labels("shows"))
    if classifier:
        found["shows"] = judges.classifier(
            classifier, None if labels is None else json.loads(labels.read_text("utf-8"))
        )
    if nudenet:
        found["shows"] = judges.nudenet()
    if not found:
        raise EraseError(
            f"nobody can judge the pictures of {model}: name a judge by --clip, --classifier or --nudenet"
        )
    return found


def _looks(model: str, clip: Path | None, lpips: Path | None) -> Any:
    """Measures beyond labels."""
    from . import world
    from .bench import Looks, measures

    own = model == EMBEDDED
    pair = measures.lpips(lpips) if lpips else measures.emoji_distance() if own else None
    features = measures.clip_features(clip) if clip else measures.emoji_features() if own else None
    texts = clip or (world.clip_path() if own else None)
    return Looks(measures.clip_score(texts) if texts else None, pair, features)


def _print_report(report: Any, page: Path) -> None:
    for trial in report.trials:
        table = Table(trial.name, "", "share", "95 % interval", "n", box=None, pad_edge=False)
        for d in trial.dimensions:
            share = d.share
            table.add_row(
                d.title,
                d.verdict,
                f"{share.value:.0%}" if share.n else "–",
                f"{share.low:.0%} – {share.high:.0%}",
                str(share.n),
            )
        out.print(table)
    out.print(f"look at: {page}")


def _to_device(pipe: Any) -> Any:
    """`pipe` on this process's GPU, where there is one; launchers number them in LOCAL_RANK."""
    import torch

    return pipe.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if torch.cuda.is_available() else pipe


def _speaks() -> bool:
    """Whether this process tells how far it is: of those that a launcher started together, the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _command(shard: str | None) -> str:
    """What was typed, without the shard: how to do all of it again."""
    words = [word for word in sys.argv[1:] if word not in (f"--shard={shard}", "--shard", shard)]
    return shlex.join(["diffusers-erase", *words])


def _print_forecast(pipe: Any, evaluation: Any, pictures: Path, share: Any) -> None:
    """How long drawing will take, if it is worth the measuring."""
    from .bench import images

    if (left := evaluation.undrawn(pictures, share)) > 4 * evaluation.batch and _speaks():
        seconds = images.pace(pipe, evaluation.plans[0])
        out.print(f"{left:,} pictures to draw, {seconds:.2f} s each: about {_time(left * seconds)}")


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A saved adapter folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="Where to: user/name.")],
    report: Annotated[Path | None, typer.Option(help="Folder of its evaluation: goes into the card.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT=FILE", help="A picture for the card; repeat for more.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the adapter, as the Hub writes it: mit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository, if there is none.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; by default main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Upload ADAPTER to the Hub. The token is that of `hf auth login`, or HF_TOKEN."""
    images = {prompt: file for prompt, _, file in (pair.rpartition("=") for pair in image or ())}
    if report or images or license:
        ErasureAdapter.from_pretrained(folder).save_pretrained(folder, report=report, images=images, license=license)
    done = push_adapter(
        folder,
        repository,
        license=license,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    out.print(f"pushed: {done}")


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="REPOSITORY", help="user/name, or user/name@revision.")],
    folder: Out,
    subfolder: Annotated[str | None, typer.Option(help="Where in the repository.")] = None,
    key: Key = None,
) -> None:
    """Check an adapter on the Hub and copy it, with card, twins and pictures."""
    adapter = pull_adapter(source, folder, subfolder=subfolder, public_key=key)
    _print_adapter(adapter)
    out.print(f"pulled: {adapter.origin} to {folder}")


@app.command()
def lock(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=ADAPTER)],
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Lock file to write.")] = Path("erasures.lock"),
    strength: Annotated[float, typer.Option(min=0, max=1, help="Strength of these erasures.")] = 1.0,
    key: Key = None,
) -> None:
    """Pin ADAPTERs in a lock file: place, commit, digest, strength. load-check and generate take the file for an ADAPTER."""
    requested = gather(adapters, strength, public_key=key)
    compose_adapters(*(one.adapter for one in requested))  # a set that cannot be loaded is not locked either
    out.print(f"locked: {len(requested)} erasures in {write_lock(file, requested)}")


@app.command()
def sign(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A saved adapter folder.")],
    key: Annotated[Path, typer.Option(help="PEM file of the private Ed25519 key.")],
    password: Annotated[str | None, typer.Option(envvar="ERASURE_KEY_PASSWORD", help="Of the key.")] = None,
) -> None:
    """Sign ADAPTER: writes erasure.sig beside it."""
    out.print(f"signed: {sign_erasure(adapter, key, password)}")


def _pipeline(model: str) -> Any:
    """The pipeline in a diffusers folder, or the embedded one."""
    if model != EMBEDDED and not Path(model).is_dir():
        raise EraseError(
            f"no model folder at {model!r}: expected a diffusers folder, or {EMBEDDED} for the embedded model"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which is when it warns
    import diffusers
    import transformers

    for host in (diffusers, transformers):
        host.utils.logging.set_verbosity_error()
        host.utils.logging.disable_progress_bar()
    if model == EMBEDDED:
        from . import world

        return world.load()
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _candidates(given: list[str] | None) -> str | Path | list[str] | None:
    """What was typed as candidates: names, or one word or folder that says where they come from."""
    if not given:
        return None
    if len(given) == 1 and given[0] in SOURCES:
        return given[0]
    return Path(given[0]) if len(given) == 1 and Path(given[0]).is_dir() else given


def _options(given: list[str]) -> dict[str, Any]:
    """Options of a method that were typed as `name=value`: values are JSON, or else plain text."""
    found: dict[str, Any] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise EraseError(f"an option of a method is NAME=VALUE, such as updates=100: got {text!r}")
        if name in inspect.signature(erase_concepts).parameters:
            raise EraseError(f"{name} is no option of a method: give it as --{name}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _listed(given: list[str] | None) -> str | list[str]:
    """Names that were typed, or the one word "auto"."""
    return "auto" if given == ["auto"] else given or []


def _default(model: str, setting: str, other: float) -> Any:
    if model != EMBEDDED:
        return other
    from . import world

    return getattr(world, setting)


def _print_adapter(adapter: ErasureAdapter) -> None:
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for recipe in adapter.recipes:
        table.add_row(*recipe.row)
    out.print(table)
    if adapter.factors is not None:
        facts = f"factors of {len(adapter.factors.pairs)} layers, {adapter.size:,} bytes"
    else:
        edit = adapter.edit
        if edit.preserved:
            out.print(f"preserved: {', '.join(edit.preserved)}")
        facts = f"base pack {edit.pack}, width {edit.width}, {len(edit.labels)} rows, {adapter.size:,} bytes"
    out.print(f"{facts}, digest {adapter.digest[:16]}")
    if adapter.saturation is not None:
        out.print(f"saturation {adapter.saturation:.2f}{too_full(adapter.saturation)}")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not _speaks()) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda n: progress.advance(bar, n)


def _fail(message: str) -> NoReturn:
    err.print(f"error: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(2)


if __name__ == "__main__":  # launchers start modules: accelerate launch --module diffusers_erase.cli evaluate ...
    app()
