"""Train the AutoencoderKL: 64 x 64 x 3 pictures to 8 x 8 x 8 latents, whitened inside the stock class.

Reads emoji.npy and objects.npy of WORK, resumes from vae.pt, writes the folder WORK/vae. With `--decoder-minutes` the decoder of
WORK/vae goes on alone, from the latents as they are, so that a denoiser trained on them stays right; resumes from decoder.pt.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import HELD_OUT
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import Run, arguments, half, pictures

BATCH, PEAK, LATENTS = 16, 2e-3, 8
DECODER_PEAK, DECODER_NOISE = 1e-3, 0.05


def model() -> AutoencoderKL:
    widths = (24, 48, 96, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


class Pictures:
    """Three quarters of a batch from our objects, a quarter from all emoji; none of the held-out jitters."""

    def __init__(self, work):
        self.objects = np.load(work / "objects.npy", mmap_mode="r")
        self.objects = self.objects[:, :, :-HELD_OUT].reshape(-1, 64, 64, 3)
        self.emoji = np.load(work / "emoji.npy", mmap_mode="r").reshape(-1, 64, 64, 3)
        self.rng = np.random.default_rng()

    def batch(self, size: int) -> Tensor:
        sizes = (size - size // 4, size // 4)
        draws = zip((self.objects, self.emoji), sizes, strict=True)
        return pictures(np.concatenate([a[self.rng.integers(len(a), size=n)] for a, n in draws]))


def edges(x: Tensor, y: Tensor) -> Tensor:
    """L1 between the pixel differences of two pictures, across and down."""
    return F.l1_loss(x.diff(dim=-1), y.diff(dim=-1)) + F.l1_loss(x.diff(dim=-2), y.diff(dim=-2))


def loss(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """L1 on pixels and on their differences, squared error, and a weak pull of the posterior to the unit Gaussian."""
    with half():
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
    y, kl = y.float(), posterior.kl().float().mean() / x[0].numel()
    square = F.mse_loss(y, x)
    return F.l1_loss(y, x) + edges(x, y) + 2 * square + 2e-4 * kl, square


@torch.no_grad()
def whiten(vae: AutoencoderKL, x: Tensor) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and covariance 1, by folding both into its 1 x 1 convolutions.

    z' = W (z - m) with W = C^(-1/2); the decoder undoes it. The posterior's variance becomes a small constant.
    """
    vae = copy.deepcopy(vae)
    posterior = vae.encode(x).latent_dist
    z = posterior.mean.movedim(1, -1).flatten(0, -2).double()
    mean, covariance = z.mean(0), torch.cov(z.T)
    values, vectors = torch.linalg.eigh(covariance)
    print("eigenvalues of the latents:", [round(v, 3) for v in values.tolist()])
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    backward = vectors @ torch.diag(values.sqrt()) @ vectors.T

    enter, leave, n = vae.quant_conv, vae.post_quant_conv, LATENTS
    weight, bias = enter.weight.flatten(1).double(), enter.bias.double()
    noise = (forward**2 @ posterior.var.double().mean((0, 2, 3))).log()
    weight = torch.cat([forward @ weight[:n], torch.zeros_like(weight[n:])])
    enter.weight.copy_(weight[:, :, None, None])
    enter.bias.copy_(torch.cat([forward @ (bias[:n] - mean), noise]))
    weight = leave.weight.flatten(1).double()
    leave.bias.copy_(leave.bias.double() + weight @ mean)
    leave.weight.copy_((weight @ backward)[:, :, None, None])
    return vae


@torch.no_grad()
def decibels(vae: AutoencoderKL, x: Tensor) -> float:
    """PSNR of reconstructions from the posterior's mean."""
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in x.split(64)]
    return psnr(F.mse_loss(torch.cat(parts), x).item())


def psnr(square: float) -> float:
    """Decibels of a mean squared error of pictures in [-1, 1]."""
    return -10 * math.log10(square / 4)


def refine(work: Path, minutes: float, data: Pictures, held_out: Tensor) -> None:
    """Train the decoder alone on the latents that the denoiser is trained on: the posterior's mean, with a little noise."""
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    print(f"before: {decibels(vae, held_out):.2f} dB", flush=True)
    parts = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def compute() -> tuple[Tensor, Tensor]:
        x = data.batch(2 * BATCH)
        with half():
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
            y = vae.decode(z + DECODER_NOISE * torch.randn_like(z)).sample.float()
        square = F.mse_loss(y, x)
        return 0.5 * F.l1_loss(y, x) + 0.5 * edges(x, y) + 8 * square, square

    run = Run(parts, work / "decoder.pt", minutes, peak=DECODER_PEAK, warmup=50, decay=0.998, weight_decay=1e-4)
    while run.running:
        total, square = compute()
        run.descend(total, square=square.item())
    run.average.copy_to(parts)
    print(f"{run.step} steps of the decoder; held-out renders: {decibels(vae, held_out):.2f} dB")
    vae.save_pretrained(work / "vae")


def main() -> None:
    options = arguments(__doc__, minutes=40, decoder_minutes=0)
    work, data = options.work, Pictures(options.work)
    held_out = pictures(np.load(work / "objects.npy", mmap_mode="r")[:, :, -1].reshape(-1, 64, 64, 3))
    if options.decoder_minutes:
        return refine(work, options.decoder_minutes, data, held_out)
    vae = model()
    run = Run(vae, work / "vae.pt", options.minutes, peak=PEAK, warmup=50, decay=0.995, weight_decay=1e-4)
    while run.running:
        total, square = loss(vae, data.batch(BATCH))
        run.descend(total, square=square.item())
    final = whiten(run.average.copy_to(vae).eval(), data.batch(512))
    print(f"{run.step} steps; held-out renders: {decibels(final, held_out):.2f} dB")
    final.save_pretrained(work / "vae")


if __name__ == "__main__":
    main()
