"""Ridge edit on a base pack: this project's default.

UCE's closed form with what it lacks: a background moment instead of λI alone, hard rows for the start token and the
empty prompt, mean rows over templates for several token roles, and a strength that is a residual instead of a weight.
"""

import torch

from ..edits import Edit
from ..errors import EraseError
from ..solve import holding
from ..task import Task, method


@method("ridge", paper="UCE (arXiv 2308.14761) generalised; docs/maths.md", target="auto")
def ridge(task: Task, *, preserve_residual: float = 0.1) -> Edit:
    """Closed-form edit against a background of other prompts, calibrated to a residual.

    Args:
        preserve_residual: how far a preserved state may still follow the edit, as a share of what it would without being
            preserved (alone): its strength is q = (1/preserve_residual − 1) / (p G pᵀ).
    """
    if not 0 < preserve_residual < 1:
        raise EraseError(f"preserve_residual is a share between 0 and 1, such as 0.1: got {preserve_residual}")
    assert task.residual is not None  # None is for methods that fix it
    pack = task.pack()
    labels, keys, offsets = task.rows(task.tokens, task.templates)
    names, preserved = task.preserved_rows(task.tokens, task.templates)
    C = torch.cat([keys, preserved])
    U = pack.pull(C)
    q = holding(C, U, preserve_residual)
    moving = torch.arange(len(C)) < len(keys)
    edit = Edit(
        labels=(*labels, *names),
        keys=C,
        offsets=torch.cat([offsets, torch.zeros_like(preserved)]),
        strengths=torch.where(moving, torch.ones_like(q), q),
        pulled=U,
        pack=pack.name,
        pack_digest=pack.digest,
    )
    return edit.to(torch.float32).calibrated(task.residual)  # calibrated as stored
