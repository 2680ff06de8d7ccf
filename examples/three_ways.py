"""The same three lines of user code, as functions, through ErasureLoaderMixin, through enable(pipe) and through enable().

    python examples/three_ways.py

All are one implementation: the pictures are equal. On the embedded model, two steps, a few seconds.
"""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusers_erase import ErasureLoaderMixin, disable, enable, erase, load_erasure, unload_erasure, world


class MyPipeline(ErasureLoaderMixin, StableDiffusionPipeline):
    """A pipeline class of one's own: the mixin comes first and needs no constructor."""


def draw(pipe):
    seeded = torch.Generator().manual_seed(0)
    prompt = world.prompt("cat", world.STYLES[0])
    return pipe(prompt, num_inference_steps=2, guidance_scale=world.GUIDANCE, generator=seeded).images[0]


def with_functions(pipe, adapter):
    load_erasure(pipe, adapter)
    picture = draw(pipe)
    unload_erasure(pipe)
    return picture


def with_methods(pipe, adapter):
    pipe.load_erasure(adapter)
    picture = draw(pipe)
    pipe.unload_erasure()
    return picture


def again(pipe, kind=StableDiffusionPipeline):
    """Another pipeline object on the same modules."""
    other = kind(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


pipe = world.load()
adapter = erase(pipe, "cat", target="dog")
before = draw(pipe)
pictures = {"functions": with_functions(pipe, adapter)}

pictures["ErasureLoaderMixin"] = with_methods(again(pipe, MyPipeline), adapter)

one = again(pipe)
enable(one)  # this pipeline only
pictures["enable(pipe)"] = with_methods(one, adapter)

enable()  # every pipeline of this process, until disable()
pictures["enable()"] = with_methods(again(pipe), adapter)
disable()

for way, picture in pictures.items():
    assert np.array_equal(picture, pictures["functions"]), way
    print(f"{way}: the same picture")
assert not np.array_equal(before, pictures["functions"])
assert np.array_equal(before, draw(pipe))
print("unloaded: the picture from before, bit for bit")
