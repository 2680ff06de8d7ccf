"""UCE, Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761), as released in April 2025.

    W' = (λW + s_e Σ W tᵢ cᵢᵀ + s_p Σ W pⱼ pⱼᵀ)(λI + s_e Σ cᵢcᵢᵀ + s_p Σ pⱼpⱼᵀ)⁻¹

Every target value is W times a text state, so W' = W T with one T for all layers: rows (c, t − c, s_e) and (p, 0, s_p) on
the pack H = λI. One deviation: the release sends an empty target to the start token, an outlier; here it is the mean
content row of the empty prompt.
"""

import math

import torch

from ..edits import IDENTITY, Edit, Pack
from ..errors import EraseError
from ..task import Task, method


@method("uce", paper="https://arxiv.org/abs/2308.14761", tokens="last", templates=("{}",), residual=None)
def uce(task: Task, *, lamb: float = 0.5, erase_scale: float = 1.0, preserve_scale: float = 1.0) -> Edit:
    """Published UCE: last subject token of the bare name, H = λI, no hard rows, preserved names softly.

    Tokens, templates and the strength are the paper's own and cannot be chosen; the residual that results is recorded.
    """
    if not all(0 < weight < math.inf for weight in (lamb, erase_scale, preserve_scale)):
        raise EraseError(
            f"lamb, erase_scale and preserve_scale are positive: got {lamb}, {erase_scale}, {preserve_scale}"
        )
    lamb = float(lamb)  # 1 and 1.0 are one pack
    labels, keys, offsets = task.rows(task.tokens, task.templates)
    names, preserved = task.preserved_rows(task.tokens, task.templates)
    C = torch.cat([keys, preserved])
    pack = Pack(name=f"{IDENTITY}-{lamb:g}", digest=f"{IDENTITY}-{lamb!r}", ridge=lamb, width=C.shape[1])
    return Edit(
        labels=(*labels, *names),
        keys=C,
        offsets=torch.cat([offsets, torch.zeros_like(preserved)]),
        strengths=torch.tensor([erase_scale] * len(keys) + [preserve_scale] * len(preserved), dtype=torch.float64),
        pulled=pack.pull(C),
        pack=pack.name,
        pack_digest=pack.digest,
    )
