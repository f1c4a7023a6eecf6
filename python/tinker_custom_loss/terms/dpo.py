"""Direct preference optimization: the chosen answer must gain more on its reference."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from .groups import Groups
from .ranges import Positive, Range
from .term import term

__all__ = ["dpo"]

Kind = Literal["sigmoid", "ipo", "hinge", "robust", "length_normalized"]


@term(scope="group", inputs=("reference_logprobs",))
def dpo(
    logprob: Tensor,
    reference: Tensor,
    *,
    groups: Groups,
    beta: Positive = 0.1,
    kind: Kind = "sigmoid",
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimization: ``-log σ(βm)``, ``m = Δ_chosen - Δ_rejected``.

    ``Δ = Σ_t (ℓ-r)`` of a datum, over its tokens with a weight. One value for every pair of a
    chosen and a rejected datum of a group; with ``ε = label_smoothing``:

    - ``"sigmoid"`` (default): ``-(1-ε)·log σ(βm) - ε·log σ(-βm)`` (Rafailov et al. 2023;
      conservative DPO, Mitchell 2023).
    - ``"ipo"``: ``(m - 1/(2β))²`` with means in place of the sums Δ, as its authors confirm (Azar
      et al. 2023).
    - ``"hinge"``: ``max(0, 1 - βm)`` (SLiC, Zhao et al. 2023).
    - ``"robust"``: ``(-(1-ε)·log σ(βm) + ε·log σ(-βm)) / (1-2ε)``, unbiased if a share ε of the
      labels is flipped (Chowdhury et al. 2024).
    - ``"length_normalized"``: sigmoid, with means in place of the sums Δ.

    Args:
        reference: key of r, the reference logprobs.
        label_smoothing: ε, at least 0 and below ½; of sigmoid, length_normalized and robust.

    Metrics: ``margin`` is ``βm``, ``accuracy`` 1 where it is above 0; reduced like the values.
    Unit: nats. A datum with a token at ℓ = -inf makes the value infinite if it is chosen, else 0.
    """
    if label_smoothing and kind in ("ipo", "hinge"):
        raise ValueError(f'label_smoothing has no meaning for the kind "{kind}"; leave it at 0')
    over = groups.sequences
    gain = (over.mean if kind in ("ipo", "length_normalized") else over.sum)(logprob - reference)
    chosen, rejected = groups.pairs
    m = gain[chosen] - gain[rejected]
    x = beta * m
    metrics = {"margin": x, "accuracy": (x > 0).to(x.dtype)}
    if kind == "ipo":
        return (m - 1 / (2 * beta)).square(), metrics
    if kind == "hinge":
        return (1 - x).clamp(min=0), metrics
    if label_smoothing == 0:
        return -logsigmoid(x), metrics
    sign = -1 if kind == "robust" else 1
    values = -(1 - label_smoothing) * logsigmoid(x) - sign * label_smoothing * logsigmoid(-x)
    return values / (1 - 2 * label_smoothing if kind == "robust" else 1), metrics
