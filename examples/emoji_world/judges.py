"""Train the two judges: which object (or none of ours), which style. They see renders only, never generated pictures.

Reads objects.npy, emoji.npy and emoji.json of WORK, writes WORK/judges.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import HELD_OUT, OBJECTS, STYLES
from safetensors.torch import save_file
from torch import Tensor
from training import Clock, arguments, descend, half

from diffusers_erase.world.judging import OBJECT_WIDTH, STYLE_WIDTH, Network

BATCH, PEAK, OTHERS = 128, 3e-3, 32


def unit(array: np.ndarray) -> Tensor:
    """uint8 [..., h, w, 3] to float [..., 3, h, w] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, -3).float() / 255


def unlike_ours(entry: dict) -> bool:
    """True of emoji that show none of our objects: no label or tag names one (a grinning cat is a cat)."""
    ours = set(OBJECTS) | set(OBJECTS.values()) | {word for name in OBJECTS for word in name.split()}
    words = {entry["label"], *entry["label"].split(), *entry["tags"]}
    return entry["object"] is None and not words & ours


class Renders:
    """Objects with their labels, and emoji that are none of them, split into seen and held out."""

    def __init__(self, work: Path, held_out: bool):
        jitters = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
        self.objects = np.load(work / "objects.npy", mmap_mode="r")[:, :, jitters]
        self.emoji = np.load(work / "emoji.npy", mmap_mode="r")
        entries = json.loads((work / "emoji.json").read_text())
        self.style = np.array([list(STYLES).index(entry["style"]) for entry in entries])
        others = [i for i, entry in enumerate(entries) if unlike_ours(entry)]
        last = {entries[i]["label"] for i in others[::10]}
        self.others = np.array([i for i in others if (entries[i]["label"] in last) == held_out])
        self.rng = np.random.default_rng(int(held_out))

    def draw_objects(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, objects, styles."""
        o, s, j = (self.rng.integers(n, size=size) for n in self.objects.shape[:3])
        return unit(self.objects[o, s, j]), torch.from_numpy(o), torch.from_numpy(s)

    def draw_emoji(self, size: int) -> tuple[Tensor, Tensor]:
        """Pictures of other emoji, styles."""
        i = self.rng.choice(self.others, size)
        return unit(self.emoji[i, self.rng.integers(self.emoji.shape[1], size=size)]), torch.from_numpy(self.style[i])

    def draw_nothing(self, size: int) -> Tensor:
        """Blanks, noise of several scales, and blends of two objects in equal parts."""
        quarter = size // 4
        blank = torch.rand(quarter, 3, 1, 1).expand(-1, -1, 64, 64).clone()
        blank[::2] = 1.0
        coarse = int(self.rng.choice([4, 8, 16, 32, 64]))
        noise = F.interpolate(torch.rand(quarter, 3, coarse, coarse), size=64, mode="bilinear")
        rest = size - 2 * quarter
        (a, first, _), (b, second, _) = self.draw_objects(rest), self.draw_objects(rest)
        b, share = torch.where((first == second)[:, None, None, None], b.flip(0), b), torch.rand(rest, 1, 1, 1)
        blend = torch.lerp(a, b, 0.4 + 0.2 * share)
        return torch.cat([blank, noise, blend])


def cosine_basis() -> Tensor:
    """The 8 x 8 DCT-II matrix."""
    k = torch.arange(8.0)
    basis = torch.cos(torch.pi * (k[None] + 0.5) * k[:, None] / 8) / 2
    basis[0] /= 2**0.5
    return basis


def compress(x: Tensor, steps: Tensor) -> Tensor:
    """As JPEG does: 8 x 8 cosine coefficients rounded to multiples of `steps`, coarser for high frequencies."""
    basis, (n, c, h, w) = cosine_basis(), x.shape
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    k = torch.arange(8.0)
    step = steps[:, None, None, None, None, None] * (1 + k[:, None] + k[None])
    coefficients = (basis @ blocks @ basis.T / step).round() * step
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(x.shape)


def spoil(x: Tensor) -> Tensor:
    """What a decoder or a file may do to a picture: soften, compress, shift colours, add noise, move by a pixel."""
    n = len(x)
    strength = torch.rand(n, 1, 1, 1)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    softer = F.interpolate(F.avg_pool2d(x, 2), size=64, mode="bilinear")
    kind = torch.rand(n, 1, 1, 1)
    x = torch.where(
        kind < 0.3, torch.lerp(x, soft, strength), torch.where(kind < 0.6, torch.lerp(x, softer, strength), x)
    )
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.3, compress(x, 0.01 + 0.05 * torch.rand(n)), x)
    x = (x - 0.5) * (1 + 0.3 * (torch.rand(n, 1, 1, 1) - 0.5)) + 0.5 + 0.12 * (torch.rand(n, 3, 1, 1) - 0.5)
    x = x + 0.08 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    return x.clamp(0, 1).roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))


def object_batch(renders: Renders, size: int) -> tuple[Tensor, Tensor]:
    emoji, nothing = OTHERS * size // BATCH // 2, OTHERS * size // BATCH // 2
    x, objects, _ = renders.draw_objects(size - emoji - nothing)
    x = torch.cat([x, renders.draw_emoji(emoji)[0], renders.draw_nothing(nothing)])
    return spoil(x), torch.cat([objects, torch.full((emoji + nothing,), len(OBJECTS))])


def style_batch(renders: Renders, size: int) -> tuple[Tensor, Tensor]:
    (x, _, s), (y, t) = renders.draw_objects(size // 2), renders.draw_emoji(size // 2)
    return spoil(torch.cat([x, y])), torch.cat([s, t])


@torch.no_grad()
def calibrate(network: Network, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Fold into the last layer the temperature that fits held-out pictures best; it and the accuracy."""
    logits = torch.cat([network(part) for part in x.split(256)])
    temperatures = torch.linspace(0.2, 3, 57)
    losses = torch.stack([F.cross_entropy(logits / t, y) for t in temperatures])
    best = temperatures[losses.argmin()]
    network.head.weight /= best
    network.head.bias /= best
    return best.item(), (logits.argmax(1) == y).float().mean().item()


def train(name: str, network: Network, draw, work: Path, minutes: float) -> None:
    """Train one judge, calibrate it on held-out renders, and save it."""
    seen, unseen = Renders(work, held_out=False), Renders(work, held_out=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, weight_decay=1e-2)
    clock, step = Clock(minutes, warmup=30), 0
    while clock.running:
        x, y = draw(seen, BATCH)
        with half():
            logits = network(x)
        descend(optimizer, F.cross_entropy(logits.float(), y, label_smoothing=0.05), clock.rate(step), PEAK)
        step += 1
        if step % 50 == 0:
            right = (logits.argmax(1) == y).float().mean().item()
            print(f"{name} step {step}  {clock.spent:.1f} min  right {100 * right:.1f} %", flush=True)
    network.eval()
    temperature, right = calibrate(network, *draw(unseen, 4096))
    print(f"{name}: {step} steps, {100 * right:.2f} % of 4096 spoilt held-out renders, temperature {temperature:.2f}")
    (work / "judges").mkdir(exist_ok=True)
    save_file(network.state_dict(), work / "judges" / f"{name}.safetensors")


def main() -> None:
    options = arguments(__doc__, objects_minutes=6, styles_minutes=12)  # 0: that judge stays as it is
    if options.objects_minutes:
        train("objects", Network(len(OBJECTS) + 1, OBJECT_WIDTH), object_batch, options.work, options.objects_minutes)
    if options.styles_minutes:
        train("styles", Network(len(STYLES), STYLE_WIDTH), style_batch, options.work, options.styles_minutes)


if __name__ == "__main__":
    main()
