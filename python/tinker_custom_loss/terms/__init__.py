"""The built-in terms, one idea a file. ``CATALOGUE`` maps the name of each to its function.

Every one of them takes ``reduction`` and a weight mask, and reports the number of tokens it saw,
so that nobody has to guess whether a number is a sum or a mean.
"""

from .entropy import entropy
from .kl import kl
from .l2 import l2
from .nll import nll
from .term import Term, term

CATALOGUE: dict[str, Term] = {t.__name__: t for t in (nll, l2, entropy, kl)}

__all__ = ["CATALOGUE", "Term", "entropy", "kl", "l2", "nll", "term"]
