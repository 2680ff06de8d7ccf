"""Who tells what a picture shows: two small classifiers, trained on renders only, never on generated pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusers_erase.errors import EraseError
from diffusers_erase.hub import read_tensors

OTHER = "other"
"""What the object judge answers for anything that is none of our objects."""


class Network(nn.Sequential):
    """A small convolutional classifier of 64 x 64 pictures in [0, 1]: logits."""

    def __init__(self, classes: int, width: int):
        widths = [width, 2 * width, 4 * width, 5 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, 2, 2), nn.BatchNorm2d(width), nn.ReLU()]
        for before, after in zip(widths[:1] + widths, widths, strict=False):
            stride = 1 if before == after else 2
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], classes))

    @property
    def head(self) -> nn.Linear:
        last = self[-1]
        assert isinstance(last, nn.Linear)
        return last


OBJECT_WIDTH, STYLE_WIDTH = 32, 16
SEAL_BOX = (50, 50, 62, 62)
"""Top, left, bottom and right of the red seal that many pictures in the `ink` style carry and no caption names."""


class Judge:
    """Names the object and the style of pictures, with calibrated probabilities."""

    def __init__(self, objects: tuple[str, ...], styles: tuple[str, ...], object_net: Network, style_net: Network):
        self.object_names, self.style_names = (*objects, OTHER), styles
        self.object_net, self.style_net = object_net.eval(), style_net.eval()

    @classmethod
    def load(cls, folder: Path, objects: tuple[str, ...], styles: tuple[str, ...]) -> "Judge":
        """The judge whose weights lie in `folder`."""
        networks = Network(len(objects) + 1, OBJECT_WIDTH), Network(len(styles), STYLE_WIDTH)
        for name, network in zip(("objects", "styles"), networks, strict=True):
            network.load_state_dict(read_tensors(folder / f"{name}.safetensors")[0])
        return cls(objects, styles, *networks)

    @torch.no_grad()
    def probabilities(self, images: Tensor | list[Image.Image]) -> tuple[Tensor, Tensor]:
        """P(object) [n, objects + 1], the last column for anything else, and P(style) [n, styles]."""
        parts = as_tensor(images).split(256)
        objects = torch.cat([self.object_net(p).softmax(1) for p in parts])
        return objects, torch.cat([self.style_net(p).softmax(1) for p in parts])

    def objects(self, images: Tensor | list[Image.Image]) -> list[str]:
        """The likeliest object of each picture, or "other"."""
        return [self.object_names[i] for i in self.probabilities(images)[0].argmax(1).tolist()]

    def styles(self, images: Tensor | list[Image.Image]) -> list[str]:
        """The likeliest style of each picture."""
        return [self.style_names[i] for i in self.probabilities(images)[1].argmax(1).tolist()]

    def sealed(self, images: Tensor | list[Image.Image]) -> list[bool]:
        """Whether each picture carries the red seal in its corner.

        A rule, not a network, made for the black and white `ink` style; in others a red object may reach into the corner.
        """
        top, left, bottom, right = SEAL_BOX
        red, green, blue = as_tensor(images)[:, :, top:bottom, left:right].unbind(1)
        share = (red - torch.maximum(green, blue) > 0.25).float().mean((1, 2))
        return (share > 0.3).tolist()


def as_tensor(images: Tensor | list[Image.Image]) -> Tensor:
    """Pictures as float [n, 3, 64, 64] in [0, 1]."""
    if not isinstance(images, Tensor):
        arrays = [np.asarray(image.convert("RGB")) for image in images]
        images = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 255
    if images.shape[1:] != (3, 64, 64):
        raise EraseError(f"the judge reads 64 x 64 RGB pictures, [n, 3, 64, 64]; got {tuple(images.shape)}")
    return images.float()
