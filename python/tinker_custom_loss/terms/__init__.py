"""The catalogue: one equation a file, each written through the public decorator :func:`term`.

``CATALOGUE`` maps the name of each to its term. What all of them take and report alike, see
:class:`Term`.
"""

from .cispo import cispo
from .dft import dft
from .dro import dro
from .elastic_net import elastic_net
from .entropy import entropy
from .focal import focal
from .gmpo import gmpo
from .groups import Groups
from .gspo import gspo
from .importance_sampling import importance_sampling
from .kl import kl
from .l1 import l1
from .l2 import l2
from .label_smoothing import label_smoothing
from .margin import margin
from .nll import nll
from .ppo import ppo
from .proximal import proximal
from .reduction import Sequences
from .reinforce import reinforce
from .sapo import sapo
from .term import Term, term
from .unlikelihood import unlikelihood

CATALOGUE: dict[str, Term] = {
    each.__name__: each
    for each in (
        # likelihood
        nll, dft, focal, unlikelihood, label_smoothing, margin,
        # policy
        importance_sampling, ppo, cispo, dro, gspo, gmpo, sapo, reinforce,
        # regularizers
        kl, entropy, proximal, l1, l2, elastic_net,
    )
}  # fmt: skip

__all__ = [
    "CATALOGUE",
    "Groups",
    "Sequences",
    "Term",
    "cispo",
    "dft",
    "dro",
    "elastic_net",
    "entropy",
    "focal",
    "gmpo",
    "gspo",
    "importance_sampling",
    "kl",
    "l1",
    "l2",
    "label_smoothing",
    "margin",
    "nll",
    "ppo",
    "proximal",
    "reinforce",
    "sapo",
    "term",
    "unlikelihood",
]
