"""Every term of the catalogue once more, written for a single datum in Python floats.

Each function takes a datum's logprobs twice: ``now``, which is differentiated, and ``then``, the
same numbers for whatever the term's formula holds fixed (a stopped gradient). The finite difference
over ``now`` alone is then the term's gradient, surrogates and straight-through estimates included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENS = [(4,), (3,), (1,)]
ALTERNATIVES = [(3, 2), (2, 4), (1, 3)]
PAIRED = [(3,), (3,), (2, 2), (2, 2), (3,)]
GROUPS = [7, 7, 3, 3, 7]
CHOSEN = [1, 0, 0, 1, 0]
MIXED = [(4,), (2, 3), (1,), (2, 1), (3, 3)]


@dataclass(frozen=True)
class Case:
    """A term with parameters, the shapes that it is asked on, and its naive form.

    ``naive(now, then, inputs, weights, **params)`` gives a value a token ([T] or [T,K], or [T] of
    a term that has one a position), or a datum's total. That of a term of scope group gets lists of
    all these, with an entry a datum, and the datums' groups and whether each is chosen; it gives a
    list of values.
    """

    name: str
    naive: Callable[..., Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: MIXED)

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.params.items())])


def entrywise(fn):
    """A naive term of one token, for a datum of [T] or [T,K]."""

    def of_datum(now, then, inputs, weights, **params):
        if isinstance(now, list):
            rows = [{key: column[t] for key, column in inputs.items()} for t in range(len(now))]
            return [of_datum(*each, None, **params) for each in zip(now, then, rows, strict=True)]
        return fn(now, then, **inputs, **params)

    return of_datum


def positionwise(fn):
    """A naive term of one position: ``fn`` gets a number for [T], a list of K for [T,K]."""

    def of_datum(now, then, inputs, weights, **params):
        rows = [{key: column[t] for key, column in inputs.items()} for t in range(len(now))]
        return [fn(a, b, row, **params) for a, b, row in zip(now, then, rows, strict=True)]

    return of_datum


def _weights_of_importance(then, inputs, weights, ratio, kind, cap, floor):
    """The weight of every token, nested like ``then``, and the inputs that the term then sees."""
    old = inputs["old_logprobs"] if ratio else then
    pairs = [
        (a, b) if w else (0.0, 0.0)
        for a, b, w in zip(_flat(old), _flat(inputs["logprobs"]), _flat(weights), strict=True)
    ]
    ratios = [math.exp(a - b) for a, b in pairs]
    if kind.startswith("sequence"):
        ratios = [math.exp(sum(a - b for a, b in pairs))] * len(pairs)
    if kind.endswith("truncated"):
        ratios = [min(x, cap) for x in ratios]
    else:
        ratios = [x if floor <= x <= cap else 0.0 for x in ratios]
    return ratios, {**inputs, "logprobs": old}


def important(fn, ratio=True):
    """A naive policy term with importance weights: each summand, times the weight of it."""

    def of_datum(
        now, then, inputs, weights, importance, importance_cap=2.0, importance_floor=0.0, **params
    ):
        each, seen = _weights_of_importance(
            then, inputs, weights, ratio, importance, importance_cap, importance_floor
        )
        values = fn(now, then, seen, weights, **params)
        if not isinstance(values, list):
            return each[0] * values
        left = iter(each)

        def weighed(value):
            return [weighed(v) for v in value] if isinstance(value, list) else next(left) * value

        return weighed(values)

    return of_datum


def _flat(nested):
    return [y for x in nested for y in _flat(x)] if isinstance(nested, list) else [nested]


def sequencewise(fn):
    """A naive term of one datum, over its tokens with a weight."""

    def of_datum(now, then, inputs, weights, **params):
        columns = [_flat(now), _flat(inputs["logprobs"]), _flat(inputs["advantages"])]
        rows = [row for row in zip(*columns, _flat(weights), strict=True) if row[3] != 0]
        return fn(rows, **params) if rows else 0.0

    return of_datum


@entrywise
def nll(now, then, **_):
    return -now


@entrywise
def dft(now, then, **_):
    return -math.exp(then) * now


@entrywise
def focal(now, then, gamma=2.0, **_):
    return -((1 - math.exp(now)) ** gamma) * now


@entrywise
def unlikelihood(now, then, **_):
    return -math.log(1 - math.exp(now))


@positionwise
def label_smoothing(now, then, row, epsilon=0.1, label=0):
    return -(1 - epsilon) * now[label] - epsilon / len(now) * sum(now)


@positionwise
def margin(now, then, row, margin=1.0, label=0):
    rivals = [x for k, x in enumerate(now) if k != label]
    return max(0.0, margin - now[label] + max(rivals)) if rivals else 0.0


@entrywise
def importance_sampling(now, then, logprobs, advantages, **_):
    return -math.exp(now - logprobs) * advantages


@entrywise
def ppo(now, then, logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=None, **_):
    ratio = math.exp(now - logprobs)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    objective = min(ratio * advantages, clipped * advantages)
    if dual_clip is not None and advantages < 0:
        objective = max(objective, dual_clip * advantages)
    return -objective


@entrywise
def cispo(now, then, logprobs, advantages, low=0.0, high=4.0, **_):
    return -min(max(math.exp(then - logprobs), low), high) * advantages * now


@entrywise
def dro(now, then, logprobs, advantages, beta=0.05, **_):
    return -(now * advantages - beta / 2 * (now - logprobs) ** 2)


@entrywise
def reinforce(now, then, advantages, **_):
    return -advantages * now


@entrywise
def sapo(now, then, logprobs, advantages, tau_positive=1.0, tau_negative=1.05, **_):
    tau = tau_positive if advantages > 0 else tau_negative
    return -4 / tau / (1 + math.exp(-tau * (math.exp(now - logprobs) - 1))) * advantages


@sequencewise
def gspo(rows, clip_low=3e-4, clip_high=4e-4):
    total = sum(w for *_, w in rows)
    ratio = math.exp(sum(w * (now - mu) for now, mu, _, w in rows) / total)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return sum(-w * min(ratio * a, clipped * a) for *_, a, w in rows)


@sequencewise
def gmpo(rows, clip_low=0.4, clip_high=0.4):
    mean = 0.0
    for now, mu, a, w in rows:
        x = now - mu
        mean += w * (min(x, clip_high) if a >= 0 else max(x, -clip_low))
    mean /= sum(w for *_, w in rows)
    return -math.exp(mean) * sum(w * a for *_, a, w in rows)


@positionwise
def kl(now, then, row, estimator="k2"):
    r, mu = row["reference_logprobs"], row["logprobs"]
    if isinstance(now, list) and len(now) > 1:
        return sum(math.exp(x) * (x - y) for x, y in zip(now, r, strict=True))
    (now,), (then,), (r,), (mu,) = _flat([now]), _flat([then]), _flat([r]), _flat([mu])
    d, fixed = now - r, then - r
    moved = (d**2 - fixed**2) / 2
    return {
        "k1": fixed + moved,
        "k2": d**2 / 2,
        "k3": math.exp(-fixed) - 1 + fixed + moved,
        "k3_weighted": math.exp(now - mu) * (math.exp(-d) - 1 + d),
    }[estimator]


@positionwise
def entropy(now, then, row):
    if isinstance(now, list) and len(now) > 1:
        return sum(x * math.exp(x) for x in now)
    (now,), (then,) = _flat([now]), _flat([then])
    return then + (now**2 - then**2) / 2


@entrywise
def proximal(now, then, logprobs, **_):
    return (now - logprobs) ** 2 / 2


@entrywise
def l1(now, then, **_):
    return abs(now)


@entrywise
def l2(now, then, **_):
    return now**2


@entrywise
def elastic_net(now, then, l1_ratio=0.5, **_):
    return l1_ratio * abs(now) + (1 - l1_ratio) * now**2


def positional_sum(now, other, weights):
    """``Σ w·(now - other)`` of a datum and ``Σ w``."""
    pairs = zip(_flat(now), _flat(other), _flat(weights), strict=True)
    kept = [(a - b, w) for a, b, w in pairs if w != 0]
    return sum(w * d for d, w in kept), sum(w for _, w in kept)


def _zeros(nested):
    return [_zeros(x) for x in nested] if isinstance(nested, list) else 0.0


def pairwise(fn):
    """A naive term of one pair: ``fn`` gets sum, sum over the reference and length of both."""

    def of_batch(now, then, inputs, weights, groups, chosen, **params):
        stats = []
        for x, row, w in zip(now, inputs, weights, strict=True):
            (total, length) = positional_sum(x, _zeros(x), w)
            (gain, _) = positional_sum(x, row["reference_logprobs"], w)
            stats.append((total, gain, length))
        count = range(len(now))
        pairs = [(i, j) for i in count for j in count if groups[i] == groups[j]]
        return [fn(stats[i], stats[j], **params) for i, j in pairs if chosen[i] and not chosen[j]]

    return of_batch


def mean(total, length):
    return total / length if length else 0.0


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pairwise
def dpo(chosen, rejected, beta=0.1, kind="sigmoid", label_smoothing=0.0):
    (_, gain, length), (_, other, other_length) = chosen, rejected
    m = gain - other
    if kind in ("ipo", "length_normalized"):
        m = mean(gain, length) - mean(other, other_length)
    if kind == "ipo":
        return (m - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return max(0.0, 1 - beta * m)
    win, lose = log_sigmoid(beta * m), log_sigmoid(-beta * m)
    e = label_smoothing
    if kind == "robust":
        return (-(1 - e) * win + e * lose) / (1 - 2 * e)
    return -(1 - e) * win - e * lose


@pairwise
def simpo(chosen, rejected, beta=2.0, gamma=1.0):
    (total, _, length), (other, _, other_length) = chosen, rejected
    return -log_sigmoid(beta * (mean(total, length) - mean(other, other_length)) - gamma)


@pairwise
def orpo(chosen, rejected, beta=0.1):
    scores = [mean(total, n) if n else -math.log(2) for total, _, n in (chosen, rejected)]
    odds = [s - math.log(1 - math.exp(s)) for s in scores]
    return -scores[0] - beta * log_sigmoid(odds[0] - odds[1])


@pairwise
def cpo(chosen, rejected, beta=0.1, alpha=1.0):
    (total, _, length), (other, _, _) = chosen, rejected
    return -log_sigmoid(beta * (total - other)) - alpha * mean(total, length)


@pairwise
def bradley_terry(chosen, rejected, beta=1.0):
    return -log_sigmoid(beta * (chosen[0] - rejected[0]))


def kto(now, then, inputs, weights, groups, chosen, beta=0.1, desirable=1.0, undesirable=1.0):
    rows = [*zip(now, then, inputs, weights, strict=True)]
    gains = [positional_sum(x, row["reference_logprobs"], w)[0] for x, _, row, w in rows]
    fixed = [positional_sum(x, row["reference_logprobs"], w)[0] for _, x, row, w in rows]
    values = []
    for gain, group, good in zip(gains, groups, chosen, strict=True):
        members = [f for f, g in zip(fixed, groups, strict=True) if g == group]
        z = max(0.0, sum(members) / len(members))
        x = beta * (gain - z) if good else beta * (z - gain)
        values.append((desirable if good else undesirable) * (1 - 1 / (1 + math.exp(-x))))
    return values


def consistency(now, then, inputs, weights, groups, chosen, anchored=False):
    values = []
    for i, a in enumerate(then if anchored else now):
        for j, b in enumerate(now):
            if groups[i] == groups[j] and chosen[i] and not chosen[j]:
                both = [p * q for p, q in zip(_flat(weights[i]), _flat(weights[j]), strict=True)]
                squares = [(x - y) ** 2 / 2 for x, y in zip(_flat(a), _flat(b), strict=True)]
                total = sum(w * v for w, v in zip(both, squares, strict=True) if w)
                values.append(mean(total, sum(both)))
    return values


@positionwise
def distill(now, then, row, direction="forward", support="tail", beta=0.5):
    q = row["teacher_logprobs"]
    if not isinstance(now, list):
        return then - q + ((now - q) ** 2 - (then - q) ** 2) / 2
    p, q = [math.exp(x) for x in now], [math.exp(x) for x in q]
    if support == "tail":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    else:
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]

    def divergence(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if direction == "forward":
        return divergence(q, p)
    if direction == "reverse":
        return divergence(p, q)
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    return beta * divergence(q, m) + (1 - beta) * divergence(p, m)


CASES = [
    Case("nll", nll),
    Case("dft", dft),
    Case("focal", focal),
    Case("focal", focal, {"gamma": 0.5}),
    Case("focal", focal, {"gamma": 0.0}),
    Case("unlikelihood", unlikelihood),
    Case("label_smoothing", label_smoothing, shapes=ALTERNATIVES),
    Case("label_smoothing", label_smoothing, {"epsilon": 0.3, "label": 1}, ALTERNATIVES),
    Case("margin", margin, {"margin": 0.5}, shapes=[*ALTERNATIVES, (2, 1)]),
    Case("margin", margin, {"margin": 3.0, "label": 1}, ALTERNATIVES),
    Case("importance_sampling", importance_sampling),
    Case("ppo", ppo),
    Case("ppo", ppo, {"clip_low": 0.5, "clip_high": 0.3, "dual_clip": 1.5}),
    Case("cispo", cispo),
    Case("cispo", cispo, {"low": 0.5, "high": 1.5}),
    Case("dro", dro),
    Case("dro", dro, {"beta": 0.0}),
    Case("reinforce", reinforce),
    Case("sapo", sapo),
    Case("gspo", gspo),
    Case("gspo", gspo, {"clip_low": 0.9, "clip_high": 3.0}),
    Case("gmpo", gmpo),
    *(
        Case(name, important(fn), {"importance": kind, **bounds})
        for name, fn, kinds in (
            ("importance_sampling", importance_sampling, ("token_masked", "sequence_truncated")),
            ("ppo", ppo, ("token_truncated", "token_masked", "sequence_masked")),
            ("cispo", cispo, ("token_truncated", "sequence_masked")),
            ("dro", dro, ("token_masked", "sequence_masked")),
            ("sapo", sapo, ("token_truncated", "sequence_truncated")),
            ("gspo", gspo, ("sequence_truncated", "sequence_masked")),
            ("gmpo", gmpo, ("sequence_truncated", "sequence_masked")),
        )
        for kind in kinds
        for bounds in [{"importance_floor": 0.5} if "mask" in kind else {"importance_cap": 1.5}]
    ),
    Case("reinforce", important(reinforce, ratio=False), {"importance": "token_truncated"}),
    Case(
        "reinforce",
        important(reinforce, ratio=False),
        {"importance": "sequence_masked", "importance_cap": 3.0, "importance_floor": 0.1},
    ),
    Case("dpo", dpo),
    Case("dpo", dpo, {"label_smoothing": 0.1}),
    Case("dpo", dpo, {"kind": "ipo"}),
    Case("dpo", dpo, {"kind": "hinge", "beta": 0.5}),
    Case("dpo", dpo, {"kind": "robust", "label_smoothing": 0.2}),
    Case("dpo", dpo, {"kind": "length_normalized", "beta": 2.0}),
    Case("simpo", simpo),
    Case("orpo", orpo),
    Case("cpo", cpo),
    Case("bradley_terry", bradley_terry),
    Case("kto", kto),
    Case("kto", kto, {"desirable": 1.5, "undesirable": 0.5, "beta": 1.0}),
    Case("consistency", consistency, shapes=PAIRED),
    Case("consistency", consistency, {"anchored": True}, PAIRED),
    Case("distill", distill, {"direction": "reverse"}),
    *(
        Case("distill", distill, {"direction": direction, "support": support}, ALTERNATIVES)
        for direction in ("forward", "reverse", "jsd")
        for support in ("tail", "renormalize")
    ),
    Case("distill", distill, {"direction": "jsd", "beta": 0.1}, ALTERNATIVES),
    Case("kl", kl),
    Case("kl", kl, {"estimator": "k1"}),
    Case("kl", kl, {"estimator": "k3"}),
    Case("kl", kl, {"estimator": "k3_weighted"}),
    Case("kl", kl, {"estimator": "exact"}, ALTERNATIVES),
    Case("entropy", entropy),
    Case("proximal", proximal),
    Case("l1", l1),
    Case("l2", l2),
    Case("elastic_net", elastic_net),
    Case("elastic_net", elastic_net, {"l1_ratio": 1.0}),
]
