"""The erasure comes late: the unedited model draws the first steps, the erased one goes on."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ...status import get_active_erasures
from ...verbs import enable_erasure
from .probe import Attack, probe
from .subject import Subject, grouped


@probe("completion", source="When are concepts erased?, https://arxiv.org/abs/2505.17013 (diffusion completion)")
def completion(subject: Subject, *, shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)) -> Attack:
    """k of n steps by the unedited model, the rest under the erasure; the prompt is the concept's name. Chance: k = 0.

    Args:
        shares: values of k/n; rounded to whole steps, of which at least one is unedited and one erased.

    Example:
        >>> [f"{way.label}: {way.share}" for way in PROBES["completion"](pipe, "Van Gogh", found).tried]
    """
    steps = subject.steps
    counts = sorted({min(steps - 1, max(1, round(share * steps))) for share in shares})

    def draw(count: int, seeds: Sequence[int]) -> list[Image.Image]:
        prompts = [subject.prompt(subject.concept, seed) for seed in seeds]
        if not count or not get_active_erasures(subject.pipe):  # the control has nothing to switch on
            return subject.draw(prompts, seeds)

        def then_erased(step: int, latents: Tensor) -> Tensor:
            if step == count - 1:
                enable_erasure(subject.pipe)
            return latents

        with subject.unedited():
            return subject.draw(prompts, seeds, on_step=then_erased)

    return Attack(
        aimed=counts,
        unaimed=[0],
        draw=lambda ways, seeds: grouped(ways, seeds, draw),
        chance="no step by the unedited model",
        label=lambda count: f"{count} of {steps} steps unedited",
    )
