"""ESD, Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345): its variants on cross-attention.

    min_θ ‖ε_θ(z, c) − (ε₀(z, t) + η (ε₀(z, t) − ε₀(z, c)))‖²        z sampled by the model in training, t the empty prompt

esd-x trains all of cross-attention (`layers="attn2"`), esd-x-strict keys and values (`layers="kv"`). The release of 2025 writes
the same with η + 1 around ε₀(z, c). Deviations: a LoRA instead of full weights; prompts in contexts instead of the bare name
(`templates=("{}",)` for that); where a model predicts something else than ε, the same in what it predicts.
"""

from torch import Tensor
from torch.nn.functional import mse_loss

from ..train import Draw, Learned, Lesson, Player, trained


@trained("esd", paper="https://arxiv.org/abs/2303.07345")
def esd(lesson: Lesson, *, eta: float = 1.0) -> Learned:
    """Train the concept's prediction onto the target's, led away from the concept by negative guidance.

    Args:
        eta: how far beyond the target, away from the concept. Preserved names, which the paper does not have, are kept by
            their drift.
    """

    def loss(draw: Draw) -> Tensor:
        concept, target = lesson.pick(lesson.concept, draw), lesson.pick(lesson.target, draw)
        noisy = lesson.sample(concept, draw)
        goal = lesson.led(noisy, concept, target, eta)
        return mse_loss(lesson.trained(noisy, concept), goal) + lesson.keeping(draw)

    return Learned(lesson.train(Player("weights", loss)))
