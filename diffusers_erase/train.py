"""One training loop for the methods that learn: a LoRA on cross-attention, without pictures, against the frozen model.

What is trained is a working copy of the pipeline's UNet, its own modules over the same tensors, so the pipe stays as it was. Latents
are sampled by the model as it is at that moment; the frozen model's answers are its own with its LoRA switched off. All that
is random follows from (seed, update, player, item): a run that was interrupted, or divided into parts and over processes,
draws the same.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .edits import contains, names_of
from .errors import EraseError
from .factors import Factors, Pair, probe
from .sites import POOLED, TEXT, latent_shape, matrix, text_arguments, text_layers, text_readers, working_copy
from .task import METHODS, Method, Task
from .text import States

LAYERS = {"attn2": ("to_q", "to_k", "to_v", "to_out.0"), "kv": ("to_k", "to_v")}
"""Linear layers of each cross-attention that a choice of `layers` trains."""

FIXED = {"residual": None, "tokens": "", "gate": None, "pack": None}
"""Arguments of `erase` that speak of rows: a method that trains has none."""

UNRECORDED = ("checkpoint", "every")
"""Options that say where a run is kept, not what it does."""

NAME = "learned"


@dataclass(frozen=True)
class Training:
    """Options that all methods share which train. Results are the same for one seed, on one kind of machine."""

    updates: int = 200
    """In each, every player takes one step."""
    batch: int = 8
    """Latents of a step, over all parts and processes."""
    rate: float = 1e-3
    """Learning rate of the LoRA (Adam)."""
    rank: int = 4
    layers: str = "attn2"
    """`attn2`: queries, keys, values and output of every cross-attention; `kv`: keys and values."""
    steps: int = 20
    """Of the sampler (DDIM) that latents are taken from."""
    guidance: float = 3.0
    """Of that sampler; 1 for none, in half the time."""
    seed: int = 0
    accumulation: int = 1
    """Parts of a batch that are computed one after the other."""
    precision: str | None = None
    """accelerate's mixed precision, `no`, `fp16` or `bf16`; None for what the process was launched with."""
    checkpoint: str | Path | None = None
    """Folder of this run: written on the way, and gone on from."""
    every: int = 50
    """Updates between two checkpoints."""

    def __post_init__(self):
        for name in ("updates", "batch", "rank", "steps", "accumulation", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EraseError(f"{name} is a whole number of at least 1: got {value!r}")
        if not (0 < self.rate < math.inf and 1 <= self.guidance < math.inf):
            raise EraseError(f"rate is positive and guidance at least 1: got {self.rate} and {self.guidance}")
        if self.layers not in LAYERS or self.precision not in (None, "no", "fp16", "bf16"):
            raise EraseError(
                f"layers are 'attn2' or 'kv', precision is 'no', 'fp16' or 'bf16': got {self.layers!r}, {self.precision!r}"
            )


@dataclass(frozen=True)
class Learned:
    """What a method that trains has found."""

    factors: Factors
    targets: tuple[str, ...] = ()
    """Where it chose to send the concept; empty where it was told."""
    told: dict[str, Any] = field(default_factory=dict)
    """For the recipe: options in force, losses, weights of the targets."""


def trained(name: str, *, paper: str, **own: Any) -> Callable[[Callable[..., Learned]], Callable[..., Learned]]:
    """Register the decorated function, from a `Lesson` to what it `Learned`, as the method `name`.

    Its options are those of `Training`, with the defaults `own` where the paper has others, and its own keywords.
    """
    shared = asdict(Training(**own))

    def register(learn: Callable[..., Learned]) -> Callable[..., Learned]:
        @wraps(learn)
        def run(task: Task, pipe: Any, **options: Any) -> Learned:
            told = {key: value for key, value in options.items() if key not in UNRECORDED}
            lesson = Lesson(pipe, task, Training(**{key: options.pop(key) for key in shared}), {"method": name} | told)
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller works in
                learned = learn(lesson, **options)
            return replace(learned, told=json.loads(json.dumps(told | learned.told | {"loss": lesson.summary})))

        METHODS[name] = Method(name, paper, run, FIXED, training=shared)
        return run

    return register


@dataclass(frozen=True)
class Player:
    """One side of a game: in each update it takes one step on its parameters."""

    name: str
    loss: Callable[["Draw"], Tensor]
    parameters: Sequence[nn.Parameter] = ()
    """The LoRA's where none are given."""
    rate: float | None = None
    ascends: bool = False


class Draw:
    """What chance decides in one part of a step: how far to sample for all, a context and noise for each item."""

    def __init__(self, step: int, items: Sequence[torch.Generator], contexts: int, shape: Sequence[int]):
        self.step, self.items = step, items
        self.context = self.integers(contexts)
        self.noise = torch.stack([torch.randn(*shape, generator=item) for item in items])

    def integers(self, count: int) -> list[int]:
        """One of `range(count)` for each item."""
        return [int(torch.randint(count, (1,), generator=item)) for item in self.items]

    def gumbel(self, count: int) -> Tensor:
        """Standard Gumbel noise `[b, count]`."""
        uniform = torch.stack([torch.rand(count, generator=item, dtype=torch.float64) for item in self.items])
        return -(-uniform.clamp_min(1e-12).log()).log().float()


class Noisy(NamedTuple):
    """Latents on their way through the sampler."""

    latents: Tensor
    """`[b, c, h, w]`."""
    time: int


class Lesson:
    """One task, the model that learns it and the frozen one: what the methods that train are written in.

    A prompt's text states are one flat row `[f]` here: `[tokens, d]`, and where a family has it the pooled `[p]`.

    Raises:
        EraseError: this model cannot be trained as asked.

    Example:
        >>> draw = lesson.draw(update=0, player="weights")
        >>> concept = lesson.pick(lesson.concept, draw)
        >>> noisy = lesson.sample(concept, draw)
        >>> (lesson.trained(noisy, concept) - lesson.frozen(noisy, concept)).abs().max()  # nothing is learned yet
        tensor(0.)
    """

    def __init__(self, pipe: Any, task: Task, training: Training, asked: dict[str, Any]):
        self.task, self.training = task, training
        reader = next(iter(text_readers(pipe).values()))
        self.accelerator = _accelerator(training)
        self.device = self.accelerator.device
        self.unet: Any = working_copy(reader)
        self.paths = sorted(text_layers(self.unet, LAYERS[training.layers]))
        self.base = tuple(probe(matrix(self.unet.get_submodule(path).weight)) for path in self.paths)
        self.lora = _lora(self.unet, self.paths, training)
        self.unet.to(self.device)
        self.scheduler = _scheduler(pipe.scheduler, training.steps)
        self.losses: dict[str, list[float]] = {}
        quiet = copy(pipe)
        if not self.accelerator.is_main_process:
            quiet.set_progress_bar_config(disable=True)
        self.progress = quiet.progress_bar
        names = [task.concept, task.coreferences, task.targets, task.preserve, task.templates]
        self.identity = json.dumps([asked | {"updates": 0}, names, self.base], sort_keys=True, default=str)
        self.empty = self._flat(task.encoder.encode([""]))
        self.concept = self.prompts((task.concept, *task.coreferences))
        self.target = (
            self.prompts(task.targets).mean(0, keepdim=True)
            if task.targets
            else self.empty.expand_as(self.concept[:1])
        )
        self.preserved = self.prompts(task.preserve) if task.preserve else None

    # --- text ---

    def prompts(self, names: Sequence[str]) -> Tensor:
        """Text states `[n, contexts, f]` of names in every context of the task."""
        contexts = self.task.templates
        texts = [context.replace("{}", name) for name in names for context in contexts]
        return self._flat(self.task.encoder.encode(texts)).unflatten(0, (len(names), len(contexts)))

    def pick(self, states: Tensor, draw: Draw) -> Tensor:
        """For each item one of the names of `states` `[n, contexts, f]`, in its context: `[b, f]`."""
        return states[draw.integers(len(states)), draw.context].to(self.device)

    def candidates(self, given: str | Sequence[str], count: int) -> tuple[str, ...]:
        """`given` names, checked; of `"neighbours"` the `count` words nearest to the concept that name nothing that is erased."""
        encoder, erased = self.task.encoder, (self.task.concept, *self.task.coreferences, *self.task.erased)
        if not isinstance(count, int) or count < 2:
            raise EraseError(
                f"count is how many neighbours are candidates, a whole number of at least 2: got {count!r}"
            )
        if given == "neighbours":
            given = encoder.nearest_words(self.task.concept, encoder.words_beside(erased), count)
        elif isinstance(given, (str, Path)):
            raise EraseError(
                f"candidates of a method that trains are a list of names, or 'neighbours': got {str(given)!r}"
            )
        names = names_of(given)
        for name in names:
            encoder.check_name(name)
            if any(contains(name, part) for part in erased):
                raise EraseError(f"{name!r} is to be erased: take it out of the candidates")
        if len(names) < 2:
            raise EraseError(f"a search needs at least two candidates: got {', '.join(names) or 'none'}")
        return names

    # --- the model ---

    def trained(self, noisy: Noisy, states: Tensor) -> Tensor:
        """What the model in training answers, `[b, c, h, w]`, in float32."""
        with self.accelerator.autocast():
            found = self.unet(
                noisy.latents.to(self.unet.dtype), noisy.time, **self._arguments(states), return_dict=False
            )
        return found[0].float()

    def frozen(self, noisy: Noisy, states: Tensor, *, grad: bool = False) -> Tensor:
        """What the model answers that the pipe holds; with `grad` it can be differentiated by the text states."""
        with nullcontext() if grad else torch.no_grad(), self._switched_off():
            return self.trained(noisy, states)

    @torch.no_grad()
    def sample(self, states: Tensor, draw: Draw) -> Noisy:
        """Latents that the model in training reaches from the draw's noise after its number of steps."""
        latents, guidance, scheduler = draw.noise.to(self.device), self.training.guidance, self.scheduler
        both = torch.cat([self.empty.to(states).expand_as(states), states])
        for time in scheduler.timesteps[: draw.step].tolist():
            if guidance > 1:
                without, answer = self.trained(Noisy(latents.repeat(2, 1, 1, 1), time), both).chunk(2)
                answer = without + guidance * (answer - without)
            else:
                answer = self.trained(Noisy(latents, time), states)
            latents = scheduler.step(answer, time, latents).prev_sample
        return Noisy(latents, int(scheduler.timesteps[draw.step]))

    def clean(self, noisy: Noisy, answer: Tensor) -> Tensor:
        """The picture x̂₀ that an answer means at this noise, by the scheduler's kind of prediction."""
        level = self.scheduler.alphas_cumprod[noisy.time].to(answer)
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return level.sqrt() * noisy.latents - (1 - level).sqrt() * answer
        return answer if kind == "sample" else (noisy.latents - (1 - level).sqrt() * answer) / level.sqrt()

    def led(self, noisy: Noisy, concept: Tensor, target: Tensor, eta: float) -> Tensor:
        """ESD's goal, the frozen model's answer to the target led away from the concept: t + η(t − c)."""
        c, t = self.frozen(noisy, concept), self.frozen(noisy, target)
        return t + eta * (t - c)

    def drift(self, noisy: Noisy, states: Tensor, *, through_both: bool = False) -> Tensor:
        """Mean square of how far x̂₀ of the model in training has moved from the frozen model's."""
        before = self.clean(noisy, self.frozen(noisy, states, grad=through_both))
        return nn.functional.mse_loss(self.clean(noisy, self.trained(noisy, states)), before)

    def missed(self, draw: Draw, concept: Tensor, target: Tensor, eta: float) -> Tensor:
        """Mean square of how far x̂₀ of the concept is from ESD's goal (`led`): what AP and AGE erase by."""
        noisy = self.sample(concept, draw)
        goal = self.clean(noisy, self.led(noisy, concept, target, eta))
        return nn.functional.mse_loss(self.clean(noisy, self.trained(noisy, concept)), goal)

    def hurt(self, draw: Draw, states: Tensor, *, through_both: bool = False) -> Tensor:
        """`drift` of a prompt on latents that are sampled for it; no gradient goes through the sampling."""
        return self.drift(self.sample(states, draw), states, through_both=through_both)

    def keeping(self, draw: Draw) -> Tensor | float:
        """What the preserved names are `hurt`; 0 where there are none."""
        return 0.0 if self.preserved is None else self.hurt(draw, self.pick(self.preserved, draw))

    # --- the loop ---

    def draw(self, update: int, player: str, part: int = 0) -> Draw:
        """What chance decides in one part of a player's step, in this process."""
        size = self.training.batch // (self.training.accumulation * self.accelerator.num_processes)
        first = (self.accelerator.process_index * self.training.accumulation + part) * size
        seed = (self.training.seed, update, player)
        step = int(torch.randint(self.training.steps, (1,), generator=_generator(*seed)))
        items = [_generator(*seed, item) for item in range(first, first + size)]
        return Draw(step, items, len(self.task.templates), latent_shape(self.unet))

    def train(self, *players: Player) -> Factors:
        """Let the players take their steps in turn, `updates` times; gives what the LoRA has become.

        Raises:
            EraseError: a loss that is not finite, or a checkpoint of another run.
        """
        players = tuple(replace(player, parameters=player.parameters or self.lora) for player in players)
        rates = [self.training.rate if player.rate is None else player.rate for player in players]
        if not all(0 < rate < math.inf for rate in rates):
            raise EraseError(f"learning rates are positive: got {', '.join(map(str, rates))}")
        sides = [
            self.accelerator.prepare(torch.optim.Adam(player.parameters, lr=rate))
            for player, rate in zip(players, rates, strict=True)
        ]
        start = self._resume(players, sides)
        with self.progress(total=self.training.updates) as bar:
            bar.update(start)
            for update in range(start, self.training.updates):
                for player, optimizer in zip(players, sides, strict=True):
                    self._step(player, optimizer, update)
                bar.update()
                if (update + 1) % self.training.every == 0 or update + 1 == self.training.updates:
                    self._keep(players, sides, update + 1)
        return self._factors()

    @property
    def summary(self) -> dict[str, list[float]]:
        """Of each player, the mean loss of the first and of the last tenth of the updates."""
        tenth = max(1, self.training.updates // 10)
        return {
            name: [float(f"{sum(part) / len(part):.4g}") for part in (seen[:tenth], seen[-tenth:])]
            for name, seen in self.losses.items()
        }

    def _step(self, player: Player, optimizer: Any, update: int) -> None:
        parts, accelerator = self.training.accumulation, self.accelerator
        for parameter in (*self.lora, *player.parameters):
            parameter.grad = None
        loss = torch.zeros((), device=self.device)
        for part in range(parts):
            found = player.loss(self.draw(update, player.name, part)) / parts
            accelerator.backward(-found if player.ascends else found)
            loss += found.detach()
        value = float(accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            raise EraseError(
                f"the loss of the {player.name} is {value} at update {update}: train at a smaller rate, or in float32 or bfloat16"
            )
        if accelerator.num_processes > 1:
            for parameter in player.parameters:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        optimizer.step()
        self.losses.setdefault(player.name, []).append(value)

    @property
    def _file(self) -> Path | None:
        """Where this run is kept: each concept has a file of its own."""
        name = re.sub(r"\W+", "-", self.task.concept.lower())
        return None if self.training.checkpoint is None else Path(self.training.checkpoint) / f"{name}.pt"

    def _keep(self, players: Sequence[Player], sides: Sequence[Any], done: int) -> None:
        """Write the run as it is now; the file appears whole or not at all."""
        if (file := self._file) is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        state = {"identity": self.identity, "done": done, "losses": self.losses}
        state |= {"parameters": [[p.detach().cpu() for p in player.parameters] for player in players]}
        self.accelerator.save(state | {"optimizers": [side.state_dict() for side in sides]}, part)
        if self.accelerator.is_main_process:
            os.replace(part, file)
        self.accelerator.wait_for_everyone()

    def _resume(self, players: Sequence[Player], sides: Sequence[Any]) -> int:
        """Take up the run in the checkpoint's folder; gives the updates that are done."""
        if (file := self._file) is None or not file.is_file():
            return 0
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity or state["done"] > self.training.updates:
            raise EraseError(
                f"{file} holds {state['done']} updates of another run (other concept, options or model): give each run its own folder"
            )
        with torch.no_grad():
            for player, kept in zip(players, state["parameters"], strict=True):
                for parameter, value in zip(player.parameters, kept, strict=True):
                    parameter.copy_(value)
        for side, kept in zip(sides, state["optimizers"], strict=True):
            side.load_state_dict(kept)
        self.losses = state["losses"]
        return state["done"]

    def _factors(self) -> Factors:
        pairs = {}
        for path in self.paths:
            found: Any = self.unet.get_submodule(path)
            down, up = (part[NAME].weight.detach().float().cpu() for part in (found.lora_A, found.lora_B))
            pairs[path] = Pair(down.contiguous(), (up * found.scaling[NAME]).contiguous())
        return Factors(pairs, self.base)

    # --- details ---

    def _flat(self, states: States) -> Tensor:
        self._tokens = states.rows.shape[1:]
        return torch.cat([states.rows.flatten(1), *([] if states.pooled is None else [states.pooled])], dim=1)

    def _arguments(self, states: Tensor) -> dict[str, Any]:
        size = math.prod(self._tokens)
        rows, pooled = states[:, :size].unflatten(1, self._tokens), states[:, size:]
        return text_arguments(self.unet, {TEXT: rows, POOLED: pooled})

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()


class Choice:
    """One of several names by Gumbel-softmax: y = softmax((π + g)/τ) over their text states, with π to be learned.

    Args:
        hard: take the largest y alone, with the gradient of the soft one (straight through); else the `top` largest.
    """

    def __init__(self, lesson: Lesson, names: Sequence[str], temperature: float, hard: bool, top: int = 5):
        if not 0 < temperature < math.inf or not isinstance(top, int) or top < 1:
            raise EraseError(
                f"temperature is positive and top a whole number of at least 1: got {temperature} and {top}"
            )
        self.names, self.temperature, self.hard, self.top = tuple(names), temperature, hard, min(top, len(names))
        self.states = lesson.prompts(names)
        self.logits = nn.Parameter(torch.full((len(names),), 1 / len(names), device=lesson.device))

    def __call__(self, draw: Draw) -> Tensor:
        """Text states `[b, f]`, each item's names mixed in its context."""
        noise = draw.gumbel(len(self.names)).to(self.logits)
        soft = self._kept(((self.logits + noise) / self.temperature).softmax(-1))
        return torch.einsum("bn,nbf->bf", soft, self.states[:, draw.context].to(soft))

    def weights(self) -> dict[str, float]:
        """The names that have been chosen and their shares, the largest first."""
        shares = self._kept((self.logits.detach() / self.temperature).softmax(-1)[None])[0]
        order = shares.argsort(descending=True, stable=True).tolist()
        return {self.names[i]: round(float(shares[i]), 4) for i in order if shares[i] > 0}

    def _kept(self, soft: Tensor) -> Tensor:
        """`[b, n]` with all but the largest entries at 0, summing to 1."""
        kept = soft.topk(1 if self.hard else self.top, dim=-1).indices
        mask = torch.zeros_like(soft).scatter_(-1, kept, 1.0)
        if self.hard:
            return mask + (soft - soft.detach())
        return soft * mask / (soft * mask).sum(-1, keepdim=True)


def _accelerator(training: Training) -> Any:
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision=training.precision)
    except ValueError as error:
        raise EraseError(
            f"accelerate does not train with precision {training.precision!r} in this process: leave it out, or start another "
            f"({str(error).splitlines()[0]})"
        ) from error
    parts = training.accumulation * accelerator.num_processes
    if training.batch % parts:
        raise EraseError(
            f"a batch of {training.batch} cannot be divided into {training.accumulation} parts in each of "
            f"{accelerator.num_processes} processes: make it a multiple of {parts}"
        )
    return accelerator


def _lora(unet: Any, paths: Sequence[str], training: Training) -> list[nn.Parameter]:
    """Put a LoRA that changes nothing yet on these layers; gives its parameters, in float32 whatever the model's."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # PEFT draws first values from the global random state; ours replace them
        unet.add_adapter(LoraConfig(r=training.rank, lora_alpha=training.rank, target_modules=list(paths)), NAME)
    found = []
    for path in paths:
        down, up = (part[NAME].weight for part in (unet.get_submodule(path).lora_A, unet.get_submodule(path).lora_B))
        drawn = torch.rand(down.shape, generator=_generator(training.seed, path)) * 2 - 1
        down.data = (drawn / math.sqrt(down.shape[1])).to(down.device)
        up.data = up.data.float().zero_()
        found += [down, up]
    return found


def _scheduler(own: Any, steps: int) -> Any:
    """DDIM at the noise levels and with the kind of prediction of the pipeline's scheduler."""
    from diffusers import DDIMScheduler

    if not hasattr(own, "alphas_cumprod"):
        raise EraseError(
            f"training samples by DDIM, whose noise levels a {type(own).__name__} does not have: use a model of noise or v prediction"
        )
    scheduler: Any = DDIMScheduler.from_config(own.config, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(steps)
    if (
        scheduler.config.prediction_type == "epsilon"
        and float(scheduler.alphas_cumprod[scheduler.timesteps].min()) < 1e-6
    ):
        raise EraseError(
            "this scheduler starts from pure noise (zero SNR), where a prediction of noise says nothing of the picture: give the "
            "pipeline the scheduler that its model was trained with"
        )
    return scheduler


def _generator(*seed: object) -> torch.Generator:
    digest = hashlib.sha256(json.dumps(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
