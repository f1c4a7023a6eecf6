"""Steps in parts, made up: datums in groups, compositions of the catalogue, partitions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st

from naive_terms import ALTERNATIVES, CASES
from tinker_custom_loss import Composer
from tinker_custom_loss.terms import CATALOGUE
from tinker_custom_loss.terms.reduction import REDUCTIONS

MEANS = [
    {"fn": name, "weight": weight, "reduction": reduction}
    for name, weight, reduction in [
        ("nll", 1.0, "token_mean"),
        ("focal", 0.1, "sequence_mean_token_mean"),
        ("l2", 0.01, "sequence_mean_token_sum"),
    ]
]

ANY_SHAPE = [case for case in CASES if case.shapes is not ALTERNATIVES and case.name != "margin"]


def made_up(sizes, alternatives, seed=0):
    """Datums in groups, whose numbers of members and of tokens are ``sizes``; and logprobs."""
    random = torch.Generator().manual_seed(seed)

    def numbers(shape):
        return torch.rand(shape, generator=random, dtype=torch.float64)

    def likely(shape):
        x = numbers(shape)
        return torch.log_softmax(2 * x, -1) - 0.2 if len(shape) == 2 else -3 * x - 0.1

    data, logprobs = [], []
    for group, (members, tokens) in enumerate(sizes):
        shape = (tokens, 2) if alternatives else (tokens,)
        for member in range(members):
            picked = (numbers(shape[:1]) * 3).floor().long()
            inputs = {
                "target_tokens": np.zeros(shape, dtype=np.int64),
                "weights": torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)[picked],
                "group": 10 * group + 3,
                "chosen": int(member == 0),
                "reference_logprobs": likely(shape),
                "teacher_logprobs": likely(shape),
                "logprobs": likely(shape),
                "old_logprobs": likely(shape),
                "advantages": numbers(shape) * 4 - 2,
            }
            data.append(SimpleNamespace(loss_fn_inputs=inputs))
            logprobs.append(likely(shape))
    return data, logprobs


@dataclasses.dataclass
class Split:
    """A composition over made-up datums, and a partition of their indices."""

    cases: list
    reductions: list
    weights: list
    sizes: list
    alternatives: bool
    parts: list

    @property
    def composer(self):
        base, *others = zip(self.cases, self.reductions, self.weights, strict=True)
        return Composer(
            base[0].name,
            [
                {
                    "fn": case.name,
                    "name": f"term {i}",
                    "weight": weight,
                    "params": case.params,
                    "reduction": reduction,
                }
                for i, (case, reduction, weight) in enumerate(others)
            ],
            base_params={**base[0].params, "reduction": base[1]},
        )


@st.composite
def splits(draw):
    alternatives = draw(st.booleans())
    cases = draw(
        st.lists(st.sampled_from(CASES if alternatives else ANY_SHAPE), min_size=3, max_size=6)
    )
    sizes = draw(st.lists(st.tuples(st.integers(2, 3), st.integers(1, 4)), min_size=2, max_size=4))
    members = [group for group, (count, _) in enumerate(sizes) for _ in range(count)]
    whole_groups = any(CATALOGUE[case.name].scope == "group" for case in cases)
    units = members if whole_groups else range(len(members))
    which = {unit: draw(st.integers(0, 2)) for unit in sorted({*units})}
    order = draw(st.permutations(range(len(members))))
    parts = [[i for i in order if which[units[i]] == part] for part in range(3)]
    return Split(
        cases,
        [draw(st.sampled_from(REDUCTIONS)) for _ in cases],
        [draw(st.floats(-2, 2)) for _ in cases],
        sizes,
        alternatives,
        [part for part in parts if part],
    )
