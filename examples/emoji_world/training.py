"""What every training script shares: the work folder, pictures as tensors, and a timed run that resumes from its checkpoint."""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def arguments(description: str, **minutes: float) -> argparse.Namespace:
    """`--work`, `--threads` and one option per stage for its minutes of training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("emoji-world-work"))
    parser.add_argument("--threads", type=int, default=1)
    for name, default in minutes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def pictures(array: np.ndarray) -> Tensor:
    """uint8 [..., h, w, 3] to float [..., 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, -3).float() / 127.5 - 1


def half():
    """bf16 autocast: two to three times faster than fp32 on CPUs with avx512_bf16."""
    return torch.autocast("cpu", torch.bfloat16)


class Clock:
    """A budget of minutes, resumable: warm-up for `warmup` steps, then a cosine from 1 to `floor` over the budget."""

    def __init__(self, minutes: float, spent: float = 0.0, warmup: int = 100, floor: float = 0.02):
        self.minutes, self.warmup, self.floor = minutes, warmup, floor
        self.start = time.time() - 60 * spent

    @property
    def spent(self) -> float:
        return (time.time() - self.start) / 60

    @property
    def running(self) -> bool:
        return self.spent < self.minutes

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at `step` and now."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent / self.minutes)))
        return min(1.0, (step + 1) / self.warmup) * max(self.floor, cosine)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, peak: float) -> None:
    """One clipped step at `rate * peak`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate * peak
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Average:
    """Exponential moving average of a module's parameters, warming up to `decay`."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.values = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> nn.Module:
        for parameter, value in zip(module.parameters(), self.values, strict=True):
            parameter.copy_(value)
        return module


def save(path: Path, **state) -> None:
    """Write `state` so that a crash never leaves half a file."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


class Run:
    """A run of `minutes` that goes on where it was killed: optimizer, average, step and minutes spent lie in one checkpoint.

    `while run.running: run.descend(loss)`; with a `decay` of 0 the average is the module itself.
    """

    def __init__(
        self, module: nn.Module, checkpoint: Path, minutes: float, *, peak: float, warmup: int = 100,
        decay: float = 0.0, tell: int = 100, save_every: float = 4.0, **adam,
    ):  # fmt: skip
        self.module, self.checkpoint, self.peak = module, checkpoint, peak
        self.tell, self.save_every = tell, save_every
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak, **adam)
        self.average = Average(module, decay)
        self.step, self.saved, self.recent = 0, 0.0, []
        if checkpoint.exists():
            state = torch.load(checkpoint)
            module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.saved = state["step"], state["spent"]
            self.average.values, self.average.steps = state["average"], self.step
        self.clock = Clock(minutes, self.saved, warmup)
        self.running = self.clock.running  # asked once a step, so that the last one is always saved

    def descend(self, loss: Tensor, **told: float) -> bool:
        """One step, printed now and then with what is `told` of it; True if a checkpoint was written after it."""
        descend(self.optimizer, loss, self.clock.rate(self.step), self.peak)
        self.average.update(self.module)
        self.recent.append({"loss": loss.item(), **told})
        self.step += 1
        if self.step % self.tell == 0:
            means = {name: np.mean([r[name] for r in self.recent]) for name in self.recent[0]}
            shown = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            print(f"step {self.step}  {self.clock.spent:.1f} min  {shown}", flush=True)
            self.recent.clear()
        self.running = self.clock.running
        if self.clock.spent <= self.saved + self.save_every and self.running:
            return False
        self.saved = self.clock.spent
        save(
            self.checkpoint, model=self.module.state_dict(), optimizer=self.optimizer.state_dict(),
            average=self.average.values, step=self.step, spent=self.saved,
        )  # fmt: skip
        return True
