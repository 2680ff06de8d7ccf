"""AGE, Adaptive Guided Erasure ("Fantastic Targets for Concept Erasure", Bui et al., ICLR 2025, arXiv 2501.18950).

    weights:  min_θ ‖x̂_θ(z_c, c) − (x̂₀(z_c, t) + η (x̂₀(z_c, t) − x̂₀(z_c, c)))‖² + λ ‖x̂_θ(z_t, t) − x̂₀(z_t, t)‖²
    target:   max_π ‖x̂_θ(z_c, c) − x̂₀(z_c, t)‖² + λ ‖x̂_θ(z_t, t) − x̂₀(z_t, t)‖²              t: what π chooses among the candidates

The target's first term moves it away from what the concept has become (no synonym), its second to what erasing hurts most (a
close relative). In the released code both frozen predictions of the target's step carry no gradient to π, so that its first term
does nothing; `released=True` does as it does. Other deviations: see esd.py; a draw of π for each item of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import mse_loss

from ..errors import EraseError
from ..train import Choice, Draw, Learned, Lesson, Player, trained


@dataclass(frozen=True)
class Game:
    """Both sides' losses."""

    lesson: Lesson
    target: Choice
    eta: float
    keep: float
    released: bool

    def weights_loss(self, draw: Draw) -> Tensor:
        lesson, target = self.lesson, self.target(draw).detach()
        concept = lesson.pick(lesson.concept, draw)
        erase = lesson.missed(draw, concept, target, self.eta)
        return erase + self.keep * lesson.hurt(draw, target) + lesson.keeping(draw)

    def target_loss(self, draw: Draw) -> Tensor:
        lesson, target = self.lesson, self.target(draw)
        concept = lesson.pick(lesson.concept, draw)
        hurt = lesson.hurt(draw, target, through_both=not self.released)
        return self.away(draw, concept, target) + self.keep * hurt

    def away(self, draw: Draw, concept: Tensor, target: Tensor) -> Tensor:
        """How far the target lies from what the concept has become."""
        lesson, noisy = self.lesson, self.lesson.sample(concept, draw)
        became = lesson.clean(noisy, lesson.trained(noisy, concept)).detach()
        return mse_loss(lesson.clean(noisy, lesson.frozen(noisy, target, grad=not self.released)), became)


@trained("age", paper="https://arxiv.org/abs/2501.18950")
def age(
    lesson: Lesson,
    *,
    candidates: str | Sequence[str] = "neighbours",
    count: int = 20,
    eta: float = 1.0,
    keep: float = 1.0,
    temperature: float = 0.1,
    hard: bool = True,
    top: int = 5,
    choice_rate: float = 1e-2,
    released: bool = False,
) -> Learned:
    """Min–max game of the weights and a target among candidates, which is learned by Gumbel-softmax; the target is in the recipe.

    Args:
        candidates: names that may be the target; `"neighbours"` are the `count` words nearest to the concept.
        keep: weight λ of the target's preservation.
        temperature, hard, top: of the Gumbel-softmax; the paper's 0.1 and hard for objects, 2 and soft for styles.
        choice_rate: learning rate of the target.
        released: the target's step as in the released code.
    """
    if lesson.task.targets:
        raise EraseError("method 'age' finds its target itself: leave target out, and give candidates")
    target = Choice(lesson, lesson.candidates(candidates, count), temperature, hard, top)
    game = Game(lesson, target, eta, keep, released)
    factors = lesson.train(
        Player("weights", game.weights_loss),
        Player("target", game.target_loss, [target.logits], choice_rate, ascends=True),
    )
    weights = target.weights()
    return Learned(factors, tuple(weights), {"candidates": target.names, "targets": weights})
