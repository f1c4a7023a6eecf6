"""The catalogue: one equation a file, each written through the public decorator :func:`term`.

``CATALOGUE`` maps the name of each to its term. What all of them take and report alike, see
:class:`Term`.
"""

from .bradley_terry import bradley_terry
from .cispo import cispo
from .consistency import consistency
from .cpo import cpo
from .dft import dft
from .distill import distill
from .dpo import dpo
from .dro import dro
from .elastic_net import elastic_net
from .entropy import entropy
from .focal import focal
from .gmpo import gmpo
from .groups import Groups
from .gspo import gspo
from .importance_sampling import importance_sampling
from .kl import kl
from .kto import kto
from .l1 import l1
from .l2 import l2
from .label_smoothing import label_smoothing
from .margin import margin
from .nll import nll
from .orpo import orpo
from .ppo import ppo
from .proximal import proximal
from .ranges import Range
from .reduction import Sequences
from .reinforce import reinforce
from .sapo import sapo
from .simpo import simpo
from .term import Term, term
from .unlikelihood import unlikelihood

CATALOGUE: dict[str, Term] = {
    each.__name__: each
    for each in (
        # likelihood
        nll, dft, focal, unlikelihood, label_smoothing, margin,
        # policy
        importance_sampling, ppo, cispo, dro, gspo, gmpo, sapo, reinforce,
        # preference
        dpo, simpo, orpo, cpo, bradley_terry, kto,
        # distillation
        distill,
        # regularizers
        kl, entropy, proximal, l1, l2, elastic_net, consistency,
    )
}  # fmt: skip

__all__ = [
    "CATALOGUE",
    "Groups",
    "Range",
    "Sequences",
    "Term",
    "bradley_terry",
    "cispo",
    "consistency",
    "cpo",
    "dft",
    "distill",
    "dpo",
    "dro",
    "elastic_net",
    "entropy",
    "focal",
    "gmpo",
    "gspo",
    "importance_sampling",
    "kl",
    "kto",
    "l1",
    "l2",
    "label_smoothing",
    "margin",
    "nll",
    "orpo",
    "ppo",
    "proximal",
    "reinforce",
    "sapo",
    "simpo",
    "term",
    "unlikelihood",
]
