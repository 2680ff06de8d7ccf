"""Does an evaluation's memory grow with its pictures? Draws and judges thousands, prints what the process holds on the way.

The pipeline is emoji-sd's text side with a tiny random UNet and VAE (64 x 64 pixels, one step): what is measured is the
machinery around the model, which is the same for every model: plan, batches, files, answers, sums. Ten thousand pictures that
were kept would be 117 MiB.

    python examples/benchmarks/many_pictures.py                     # 10,000 pictures, a minute or two
    python examples/benchmarks/many_pictures.py --pictures 2000
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffusers_erase import world
from diffusers_erase.bench.images import draw, paths, plan_for, read
from diffusers_erase.bench.metrics import Share
from diffusers_erase.bench.parts import answers, ask
from diffusers_erase.bench.suites import Prompt, Settings

QUESTION = "mean brightness"


def tiny_pipeline():
    pipe = world.load()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, cross_attention_dim=pipe.unet.config.cross_attention_dim,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe.vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, sample_size=64, norm_num_groups=4,
    ).eval()  # fmt: skip
    return pipe


def brightness(files):
    def look(batch):
        pictures = read([files[i] for i in batch])
        return [sum(picture.convert("L").tobytes()) / (255 * picture.width * picture.height) for picture in pictures]

    return look


def resident():
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    options = parser.parse_args()
    pipe = tiny_pipeline()
    words = [world.prompt(word, style) for word in world.OBJECTS for style in world.STYLES]
    prompts = [Prompt(words[i % len(words)], i) for i in range(options.pictures)]
    plan = plan_for(pipe, prompts, Settings(steps=1, guidance=1.0, height=64, width=64))
    done, start, marks = 0, time.process_time(), {}

    def report(stage):
        def on_picture(n):
            nonlocal done
            done += n
            if stage not in marks:
                marks[stage] = resident()
            if done % (options.pictures // 10 // 16 * 16 or 16) < n:
                print(f"| {stage} | {done:,} | {resident():.0f} |", flush=True)

        return on_picture

    print("| stage | pictures | resident MiB |\n|---|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        draw(pipe, plan, folder, on_picture=report("drawn"))
        drawn, done = time.process_time() - start, 0
        ask(plan, folder, QUESTION, brightness(paths(plan, folder)), on_picture=report("judged"))
        judged = time.process_time() - start - drawn
        found = answers(plan, folder, QUESTION)
        print(f"| merged | {len(found):,} | {resident():.0f} |\n")
    bright = Share.of(value > 0.5 for value in found).estimate()
    print(f"drawn {len(found) / drawn:.0f}, judged {len(found) / judged:.0f} a CPU second; bright: {bright}")
    print(f"growth from the first batch to the last: {resident() - marks['drawn']:.1f} MiB")


if __name__ == "__main__":
    main()
