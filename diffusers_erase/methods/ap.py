"""AP, Adversarial Preservation (Bui et al., NeurIPS 2024, arXiv 2410.15618).

    weights:    min_θ ‖x̂_θ(z_c, c) − (x̂₀(z_c, t) + η (x̂₀(z_c, t) − x̂₀(z_c, c)))‖² + λ ‖x̂_θ(z_a, a) − x̂₀(z_a, a)‖²
    adversary:  max_π ‖x̂_θ(z_a, a) − x̂₀(z_a, a)‖²              a: what π chooses among the candidates

ESD that keeps whatever name it hurts most at that moment. Deviations: see esd.py.
"""

from collections.abc import Sequence

from torch import Tensor

from ..train import Choice, Draw, Learned, Lesson, Player, trained


@trained("ap", paper="https://arxiv.org/abs/2410.15618")
def ap(
    lesson: Lesson,
    *,
    candidates: str | Sequence[str] = "neighbours",
    count: int = 20,
    eta: float = 1.0,
    keep: float = 1.0,
    temperature: float = 2.0,
    hard: bool = True,
    choice_rate: float = 1e-2,
) -> Learned:
    """ESD that preserves the candidate which is hurt most, found by Gumbel-softmax in alternating steps.

    Args:
        candidates: names that may be hurt; `"neighbours"` are the `count` words nearest to the concept.
        keep: weight λ of what is preserved.
        temperature, hard: of the Gumbel-softmax.
        choice_rate: learning rate of the adversary.
    """
    adversary = Choice(lesson, lesson.candidates(candidates, count), temperature, hard)

    def erased_and_kept(draw: Draw) -> Tensor:
        concept, target = lesson.pick(lesson.concept, draw), lesson.pick(lesson.target, draw)
        erase = lesson.missed(draw, concept, target, eta)
        return erase + keep * lesson.hurt(draw, adversary(draw).detach()) + lesson.keeping(draw)

    factors = lesson.train(
        Player("weights", erased_and_kept),
        Player(
            "adversary", lambda draw: lesson.hurt(draw, adversary(draw)), [adversary.logits], choice_rate, ascends=True
        ),
    )
    return Learned(factors, told={"candidates": adversary.names, "hurt most": adversary.weights()})
