"""Masks, references, regularisers and the terms of scalar heads at their boundaries, one number at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, preference, reference, regularizer, value
from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Linear
from posttrain.records import Row, TokenBatch

NAN = math.nan
E = math.e


def answer(*current: float, advantage: float = 1.0, source: str = "policy", finish: str = "stop", **more: Any) -> Row:
    """A prompt of one token and an answer; what has one number per token of the answer, or one for all, is a column."""
    columns = {name: more.pop(name) for name in list(more) if name in ("old", "base", "behaviour", "entropy", "value", "teacher")}
    n = len(current)
    given = {name: [NAN, *(x if isinstance(x, (list, tuple)) else [x] * n)] for name, x in columns.items()}
    logps = {"current": [NAN, *current], **given}
    return Row([1] * (n + 1), ["prompt", *[source] * n], logps=logps, advantage=advantage, finish=finish, **more)  # type: ignore[arg-type]


def batch(*rows: Row, **more: Any) -> TokenBatch:
    return TokenBatch.from_sequences(rows, **{"dtype": torch.float64, "fresh": False, **more})


def objective(regularizers: Any = None, **stream: Any) -> Objective:
    four = {"likelihood": likelihood.Token(), "reference": reference.Current(), "advantage": advantage.Column(), "aggregation": aggregate.TokenMean()}
    return Objective({"s": Stream(**{"source": ("policy",), **four, **stream})}, regularizers or {}, name="small")


def view_of(*rows: Row, progress: float = 0.0, dtype: torch.dtype = torch.float64, **stream: Any) -> TokenView:
    return objective(**stream).views(batch(*rows, progress=progress, dtype=dtype))["s"]


def factors(term: Any, *rows: Row, **more: Any) -> list[float]:
    """What a mask multiplies every token by."""
    view = view_of(*rows, **more)
    pushed = view.select(view.batch.advantage)
    found = torch.exp(term.log_factor(view, pushed)) if hasattr(term, "log_factor") else term.factor(view, pushed)
    return found[view.on].tolist()


def moved(ratio: float, advantage: float = 1.0, to: str = "old") -> Row:
    """One token of probability 1 whose ratio to the policy ``to`` is exactly ``ratio``."""
    return answer(0.0, advantage=advantage, **{to: -math.log(ratio)})  # type: ignore[arg-type]


def pushes(term: Any, ratio: float, to: str = "old") -> list[float]:
    """The factors of a token that has moved by ``ratio``, for advantages of 1/2, 0 and -1/2."""
    return [factors(term, moved(ratio, a, to))[0] for a in (0.5, 0.0, -0.5)]


# -- what a ratio's two ends say -------------------------------------------------------------------------------------------------------
def test_a_mask_of_a_ratio_says_what_it_reads() -> None:
    ends = [mask.Cap(to="old"), mask.Cap(to="behaviour", over="old"), mask.Cap(to="self", over="base")]
    assert [m.needs for m in ends] == [{"old"}, {"behaviour", "old"}, {"base"}]
    assert [m.live for m in ends] == [True, False, True]
    assert [mask.Cap(level=level).coupling for level in (None, "token")] == ["token"] * 2
    assert [mask.Cap(level=level).coupling for level in ("sequence", "sequence_geometric")] == ["sequence"] * 2
    assert [m.ratio for m in ends] == ["pi/pi_old", "pi_old/pi_behaviour", "pi_base/pi"]
    assert mask.Cap(level="sequence").ratio == "pi/pi_old per sequence"
    assert likelihood.Token().coupling == "token" and not likelihood.Token().live
    assert all(likelihood.Token(ratio=r).coupling == "sequence" and likelihood.Token(ratio=r).live for r in ("sequence", "sequence_geometric"))


def test_a_bound_may_be_a_schedule_beside_a_number() -> None:
    """Only plain numbers can be compared when a term is made; a schedule is read at the step's progress."""
    def falling(start: float, end: float) -> Linear:
        return Linear(start, end)

    for kind in (mask.Cap, mask.Truncate, mask.Reject):
        kind(min=falling(0.9, 0.1), max=1.5)
        kind(min=0.5, max=falling(4.0, 2.0))
        kind(min=falling(0.9, 0.1), max=falling(4.0, 2.0))
        with pytest.raises(ValueError, match=r"max=0\.9 is the largest ratio itself"):
            kind(min=falling(0.9, 0.1), max=0.9)
        with pytest.raises(ValueError, match=r"min=1\.2 is the smallest ratio itself"):
            kind(min=1.2, max=falling(4.0, 2.0))
    mask.ProbabilityBand(min=falling(0.9, 0.1), max=0.5)
    mask.ProbabilityBand(min=0.5, max=falling(0.9, 0.1))
    mask.RatioClip(low=falling(0.2, 0.1))
    mask.RatioClip(low=0.2, high=falling(3.0, 0.1))
    mask.SoftGate(tau_pos=falling(1.0, 2.0), tau_neg=falling(1.0, 2.0))
    mask.Divergence(low=falling(2.0, 0.1), high=falling(2.0, 0.1))
    mask.TopEntropy(share=falling(1.0, 0.1))
    cap = mask.Cap(max=falling(4.0, 2.0), to="old")
    assert [factors(cap, moved(8.0), progress=p)[0] for p in (0.0, 0.5, 1.0)] == pytest.approx([4 / 8, 3 / 8, 2 / 8])


@pytest.mark.parametrize(
    ("term", "what"),
    [(mask.Cap(max=Linear(2.0, -1.0)), "max of mask.Cap is -1"), (mask.RatioClip(low=Linear(0.2, 2.0)), "1 - low of mask.RatioClip is -1")],
)
def test_a_scheduled_bound_below_zero_is_an_error_where_it_is_read(term: Any, what: str) -> None:
    factors(term, moved(1.0))
    with pytest.raises(ValueError, match=f"{what}.*cannot be below 0"):
        factors(term, moved(1.0), progress=1.0)


def test_likelihoods_read_the_plain_policy_or_the_end_of_an_answer() -> None:
    view = view_of(answer(-1.0, -2.0))
    for term in (likelihood.Token(), likelihood.Score()):
        assert term.temperature == 1.0 and term.derivative(view).tolist() == [1.0, 1.0]
    assert likelihood.Score() == likelihood.Score("end") and likelihood.Score("before") != likelihood.Score("marked")
    with pytest.raises(ValueError, match="at='here' does not exist"):
        likelihood.Score("here")  # type: ignore[arg-type]


# -- clips and caps ----------------------------------------------------------------------------------------------------------------------
def test_a_clip_starts_beyond_its_bound_and_only_against_the_push() -> None:
    """Ratios of 1.5 and 1/2 lie on the bounds of a half, and are kept."""
    clip = mask.RatioClip(low=0.25, high=0.5)
    assert [pushes(clip, r) for r in (1.5, 1.51, 0.75, 0.74, 4.0, 0.01)] == [[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]]
    assert pushes(mask.RatioClip(low=0.0, high=0.0), 1.0) == [1, 1, 1]
    assert [pushes(mask.RatioClip(low=1.0, high=math.inf), r) for r in (1e9, 1e-9)] == [[1, 1, 1], [1, 1, 1]]
    assert (mask.RatioClip().low, mask.RatioClip().high, mask.RatioClip().to, mask.RatioClip().over) == (0.2, 0.2, "old", "self")


def test_the_second_clip_drops_what_is_above_c_and_bad() -> None:
    assert [pushes(mask.DualClip(c=3.0), r) for r in (3.0, 3.01, 0.01)] == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert [pushes(mask.DualClip(), r) for r in (2.99, 3.01)] == [[1, 1, 1], [1, 1, 0]]


def test_the_second_clip_must_lie_beyond_the_first_on_the_same_ratio() -> None:
    def both(dual: mask.DualClip, other: Any) -> Objective:
        return objective(masks={"clip": other, "dual": dual})

    half = {"low": 0.1, "high": 0.5}
    with pytest.raises(ValueError, match=r"c=1.5 must be above 1 \+ high=1.5 of the mask 'clip'"):
        both(mask.DualClip(c=1.5), mask.RatioClip(**half))
    with pytest.raises(ValueError, match=r"c=1\.2 must be above"):
        both(mask.DualClip(c=1.2), mask.RatioClip(low=Linear(0.1, 0.2), high=0.5))
    both(mask.DualClip(c=1.51), mask.RatioClip(**half))
    for other in ({"to": "base"}, {"to": "old", "over": "behaviour"}, {"level": "sequence"}):
        both(mask.DualClip(c=1.2), mask.RatioClip(**half, **other))  # type: ignore[arg-type]
    both(mask.DualClip(c=1.2, to="behaviour", over="old"), mask.RatioClip(**half))
    both(mask.DualClip(c=1.2), mask.RatioClip(low=0.1, high=Linear(0.5, 0.6)))
    both(mask.DualClip(c=Linear(1.2, 1.3)), mask.RatioClip(**half))
    both(mask.DualClip(c=1.2), mask.Cap())


def test_the_range_of_a_clip_is_read_at_its_own_level() -> None:
    """A clip that names its level is on that scale, whatever the likelihood's; a schedule is nobody's scale."""
    geometric, token = likelihood.Token(ratio="sequence_geometric"), likelihood.Token()
    objective(likelihood=geometric, masks={"clip": mask.RatioClip(level="token")})
    objective(likelihood=token, masks={"clip": mask.RatioClip(3e-4, 4e-4, level="sequence_geometric")})
    objective(likelihood=token, masks={"clip": mask.RatioClip(Linear(0.001, 0.002), Linear(0.001, 0.002))})
    objective(likelihood=geometric, masks={"clip": mask.RatioClip(low=1.0, high=math.inf)})
    for like, clip in ((geometric, mask.RatioClip(3e-4, 4e-4, level="token")), (token, mask.RatioClip(level="sequence_geometric"))):
        with pytest.raises(ValueError, match="is a range for"):
            objective(likelihood=like, masks={"clip": clip})
    with pytest.raises(ValueError, match="ratios up to 2 would be kept; write 0 for 1"):
        objective(masks={"clip": mask.RatioClip(high=1.0)})


def test_a_cap_holds_the_ratio_between_its_bounds() -> None:
    """The factor times the ratio is the ratio held between 1/2 and 2; at the defaults only above 5."""
    for ratio, held in ((8.0, 2.0), (2.0, 2.0), (1.3, 1.3), (0.5, 0.5), (0.1, 0.5)):
        assert factors(mask.Cap(max=2.0, min=0.5), moved(ratio))[0] * ratio == pytest.approx(held)
        assert factors(mask.Truncate(max=2.0, min=0.5, over="self", to="old"), moved(ratio))[0] * ratio == pytest.approx(held)
        assert factors(mask.Truncate(max=2.0, min=0.5, over="self", to="old", apply="weight"), moved(ratio))[0] == pytest.approx(held)
    assert [factors(mask.Cap(), moved(r))[0] * r for r in (20.0, 5.0, 0.01)] == pytest.approx([5.0, 5.0, 0.01])
    rows = [answer(0.0, old=-1.0, behaviour=-1.0 - math.log(r)) for r in (6.0, 2.0, 0.01)]
    assert [factors(mask.Truncate(), row)[0] for row in rows] == pytest.approx([1 / 3, 1.0, 1.0])


def test_what_is_rejected() -> None:
    """From a half to five, ends included, the old policy over the one that sampled."""
    rows = [answer(0.0, old=0.0, behaviour=-math.log(r)) for r in (0.49, 0.5, 1.0, 5.0, 5.1)]
    assert [factors(mask.Reject(), row)[0] for row in rows] == [0, 1, 1, 1, 0]
    wide, low = mask.Reject(0.0, math.inf), mask.Reject(0.0, 1.0)
    assert [factors(wide, row)[0] for row in rows] == [1] * 5 and [factors(low, row)[0] for row in rows] == [1, 1, 1, 0, 0]
    assert [factors(mask.Reject(1.0, 1.0), row)[0] for row in rows] == [0, 0, 1, 0, 0]
    refused = (({"min": -0.1}, "min=-0.1 must be at least 0"), ({"level": "word"}, "level='word' does not exist"), ({"to": "old"}, "is always 1"))
    for wrong, said in refused:
        with pytest.raises(ValueError, match=said):
            mask.Reject(**wrong)  # type: ignore[arg-type]


def test_a_band_of_probabilities_keeps_its_ends() -> None:
    rows = [answer(math.log(p) if p else -math.inf) for p in (0.0, 0.25, 0.5, 1.0)]
    assert [factors(mask.ProbabilityBand(0.25, 0.5), row)[0] for row in rows] == [0, 1, 1, 0]
    assert [factors(mask.ProbabilityBand(), row)[0] for row in rows] == [1, 1, 1, 1]
    assert [factors(mask.ProbabilityBand(min=0.5), row)[0] for row in rows] == [0, 0, 1, 1]


def test_answers_are_dropped_for_how_they_ended() -> None:
    rows = [answer(-1.0, -1.0, finish="length"), answer(-1.0, finish="stop"), answer(-1.0, finish="aborted")]
    assert factors(mask.DropTruncated(), *rows) == [0, 0, 1, 1]
    assert factors(mask.DropTruncated(("stop", "aborted")), *rows) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"reasons=\['length', 'long'\] must come from"):
        mask.DropTruncated(("length", "long"))


# -- smooth gates ------------------------------------------------------------------------------------------------------------------------
def test_a_soft_gate_is_one_at_one_and_fades_at_its_own_rate() -> None:
    """4 s (1 - s) with s = sigmoid(tau (r - 1)); good and bad ones each with their tau."""
    def gate(x: float) -> float:
        s = 1 / (1 + math.exp(-x))
        return 4 * s * (1 - s)

    assert pushes(mask.SoftGate(), 1.0) == pytest.approx([1, 1, 1])
    assert pushes(mask.SoftGate(tau_pos=2.0, tau_neg=3.0), 1.5) == pytest.approx([gate(1.0), gate(1.5), gate(1.5)])
    assert pushes(mask.SoftGate(), 3.0) == pytest.approx([gate(2.0), gate(2.1), gate(2.1)])
    for wrong in ({"tau_pos": 0.0}, {"tau_neg": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be above 0"):
            mask.SoftGate(**wrong)  # type: ignore[arg-type]


def test_a_log_ratio_is_clipped_before_the_mean() -> None:
    """Log-ratios 1 and 0: up to 1/2 they have the mean 1/4 instead of 1/2; the clipped token is dropped, the other has exp(1/4) / r."""
    term = mask.InnerClip(low=0.25, high=0.5)
    def both(a: float, d: float) -> list[float]:
        return factors(term, answer(-1.0, -1.0, old=[-1.0 - d, -1.0], advantage=a), likelihood=likelihood.Token(ratio="sequence_geometric"))

    assert both(0.5, 1.0) == pytest.approx([0.0, math.exp(0.25 - 0.5)])
    assert [both(*free) for free in ((-0.5, 1.0), (0.0, 1.0), (0.0, -1.0))] == [pytest.approx([1.0, 1.0])] * 3
    assert both(-0.5, -1.0) == pytest.approx([0.0, math.exp(-0.125 + 0.5)])
    assert both(0.5, -1.0) == pytest.approx([1.0, 1.0])
    ones = [answer(0.0, old=-d, advantage=a) for d, a in ((0.4, 1.0), (0.41, 1.0), (-0.4, -1.0), (-0.41, -1.0))]
    assert [factors(mask.InnerClip(), row)[0] for row in ones] == [1, 0, 1, 0]


def test_a_taper_of_answers_has_its_peak_between_its_numbers() -> None:
    """exp(lam + k log W - lam W): (2, 3) for advantages from 0 on, (3, 2) below; W of the whole answer to the old policy."""
    w = 1.5
    up, down = math.exp(3 + 2 * math.log(w) - 3 * w), math.exp(2 + 3 * math.log(w) - 2 * w)
    assert pushes(mask.GammaTaper(), w) == pytest.approx([up, up, down])
    two = answer(-1.0, -1.0, old=[-1.0 - math.log(1.2), -1.0 - math.log(1.25)])
    assert factors(mask.GammaTaper(), two) == pytest.approx([up, up])
    pair = mask.GammaTaper(pos=(0.5, 0.25), neg=(0.5, 0.75))
    assert pushes(pair, w) == pytest.approx([math.exp(0.25 + 0.5 * math.log(w) - 0.25 * w)] * 2 + [math.exp(0.75 + 0.5 * math.log(w) - 0.75 * w)])
    assert mask.GammaTaper(pos=[2, 3]) == mask.GammaTaper() and hash(mask.GammaTaper(pos=[2, 3])) == hash(mask.GammaTaper())  # type: ignore[arg-type]
    for wrong in ((0.0, 1.0), (1.0, 0.0), (1.0,), (1.0, 1.0, 1.0), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="two numbers above 0"):
            mask.GammaTaper(neg=wrong)  # type: ignore[arg-type]


def test_bad_answers_weigh_what_is_left_of_their_probability() -> None:
    taper = mask.NegativeTaper()
    assert [pushes(taper, r, "behaviour") for r in (0.25, 4.0)] == [pytest.approx([1, 1, 0.25]), pytest.approx([1, 1, 1])]
    assert [pushes(mask.NegativeTaper(max=m), 4.0, "behaviour") for m in (2.0, 0.0)] == [pytest.approx([1, 1, 2]), [1, 1, 0]]
    two = answer(-1.0, -1.0, behaviour=[-1.0 + math.log(2), -1.0 + math.log(3)], advantage=-1.0)
    assert factors(taper, two) == pytest.approx([1 / 6, 1 / 6])


# -- divergences -----------------------------------------------------------------------------------------------------------------------
def between(p: float, q: float, a: float, **settings: Any) -> float:
    return factors(mask.Divergence(**settings), answer(math.log(p) if p else -math.inf, behaviour=math.log(q) if q else -math.inf, advantage=a))[0]


def test_a_probability_may_move_up_by_high_and_down_by_low() -> None:
    tv = {"kind": "tv", "low": 0.125, "high": 0.25}
    up, down = [(0.75, 0.5), (0.76, 0.5), (0.76, -0.5), (0.76, 0.0)], [(0.375, -0.5), (0.374, -0.5), (0.374, 0.5), (0.1, 0.0)]
    cases = [(p, 0.5, a) for p, a in up + down]
    assert [between(*c, **tv) for c in cases] == [1, 0, 1, 1, 1, 0, 1, 1]
    assert [between(*c, **tv, one_sided=False) for c in cases] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert [between(p, 0.5, a) for p, a in ((0.69, 1.0), (0.71, 1.0), (0.31, -1.0), (0.29, -1.0), (0.71, -1.0))] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(("p", "q"), [(0.75, 0.5), (0.25, 0.5), (0.9, 0.3), (0.001, 0.2), (0.5, 0.0), (0.5, 1.0), (0.2, 0.9)])
def test_the_divergence_of_one_token_against_the_rest(p: float, q: float) -> None:
    """Kept at q log(q/p) + (1-q) log((1-q)/(1-p)) and above, dropped below."""
    exact = sum(x * math.log(x / y) for x, y in ((q, p), (1 - q, 1 - p)) if x)
    push = 0.5 if p > q else -0.5
    for bound, kept in ((exact * 1.0001, 1), (exact * 0.9999, 0)):
        side = {"high": bound, "low": 1e9} if p > q else {"low": bound, "high": 1e9}
        assert between(p, q, push, kind="kl", **side) == kept and between(p, q, -push, kind="kl", **side) == 1


def test_a_token_that_has_become_certain_is_far_and_not_infinitely_far() -> None:
    """From one half to 1: log(1/2)/2 + log(0.5 / 1e-8)/2 = 8.5; a probability that is 1 and a little more, as kernels round, is the same."""
    far = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-8)
    for p in (1.0, 1.0 + 1e-7):
        assert between(p, 0.5, 1.0, kind="kl", high=far - 0.01) == 0 and between(p, 0.5, 1.0, kind="kl", high=far + 0.01) == 1
    for q in (1.0, 1.0 + 1e-7):
        assert between(0.5, q, -1.0, kind="kl", low=math.log(2) - 0.01) == 0 and between(0.5, q, -1.0, kind="kl", low=math.log(2) + 0.01) == 1


# -- counts over answers, groups and steps ----------------------------------------------------------------------------------------------
def test_a_group_lives_by_one_token_of_one_answer() -> None:
    rows = [
        answer(-1.0, advantage=0.0, group="a"), answer(-1.0, -1.0, advantage=[0.0, 0.0, 1.0], group="a"), answer(-1.0, advantage=0.0, group="b"),
        answer(-1.0, -1.0, advantage=0.0, group="b"), answer(-1.0, advantage=0.0), answer(-1.0, advantage=-0.5),
    ]  # fmt: skip
    assert factors(mask.DropDeadGroups(), *rows) == [1, 1, 1, 0, 0, 0, 0, 1]
    pair = [answer(-1.0, advantage=a, pair="p", side=side) for a, side in ((1.0, "chosen"), (0.0, "rejected"))]
    assert factors(mask.DropDeadGroups(), *pair) == [1, 0]
    assert factors(mask.DropDeadGroups(), answer(-1.0, advantage=1.0, group="a"), answer(-1.0, advantage=0.0, group="a")) == [1, 1]


def test_the_least_certain_tokens_are_counted_up() -> None:
    """ceil(share * n): of five tokens a fifth is one, a little more two; ties are kept; 0.1 + 0.2, which is more than 0.3, of ten is 3."""
    def kept(share: float, *entropy: float) -> list[float]:
        return factors(mask.TopEntropy(share), answer(*[-1.0] * len(entropy), entropy=list(entropy)))

    assert kept(0.2, 1.0, 5.0, 3.0, 2.0, 4.0) == [0, 1, 0, 0, 0] and kept(0.21, 1.0, 5.0, 3.0, 2.0, 4.0) == [0, 1, 0, 0, 1]
    assert kept(1.0, 1.0, 5.0, 3.0) == [1, 1, 1] and kept(0.01, 1.0, 5.0, 3.0) == [0, 1, 0] and kept(0.3, 2.0, 2.0, 1.0) == [1, 1, 0]
    assert kept(1e-12, 1.0, 2.0) == [0, 1]
    assert sum(kept(0.1 + 0.2, *[float(i) for i in range(10)])) == 3
    assert sum(factors(mask.TopEntropy(), answer(*[-1.0] * 10, entropy=[float(i) for i in range(10)]))) == 2
    apart = [answer(-1.0, -1.0, entropy=[1.0, 9.0]), answer(-1.0, source="demo", entropy=99.0), answer(-1.0, -1.0, entropy=[2.0, 3.0])]
    assert factors(mask.TopEntropy(0.5), *apart) == [0, 1, 0, 1], "other sources are not counted"


def test_what_two_opinions_may_differ_by() -> None:
    """log-ratios 1 and -1/2: k2 1/2 and 1/8, abs 1 and 1/2, k3 e - 2 and exp(-1/2) - 1/2; per token, mean, sum and worst."""
    row = answer(-1.0, -1.0, old=[-1.0, -1.0], behaviour=[-2.0, -0.5])

    def kept(statistic: str, bound: float, per: str) -> list[float]:
        return factors(mask.Disagreement(statistic, bound, per), row)  # type: ignore[arg-type]

    for statistic, (a, b) in {"k2": (0.5, 0.125), "abs": (1.0, 0.5), "k3": (E - 2, math.exp(-0.5) - 0.5)}.items():
        for at, up in ((-1e-9, 0), (1e-9, 1)):
            assert kept(statistic, a + at, "token") == [up, 1] and kept(statistic, b + at, "token") == [0, up]
            assert kept(statistic, max(a, b) + at, "worst") == [up, up] and kept(statistic, a + b + at, "sum") == [up, up]
            assert kept(statistic, (a + b) / 2 + at, "mean") == [up, up]
    assert kept("abs", 1.0, "token") == [1, 1] and kept("k2", 0.5, "worst") == [1, 1]
    assert factors(mask.Disagreement(), answer(-1.0, -1.0, old=-1.0, behaviour=[-1.0, -3.0])) == [1, 0], "token by token"
    ratios = [answer(0.0, old=0.0, behaviour=-math.log(r)) for r in (1.4, 1.7)]
    assert [factors(mask.Disagreement(), r)[0] for r in ratios] == [1, 0], "1.4 - 1 - log 1.4 is 0.064, 1.7 - 1 - log 1.7 is 0.17"


def test_the_second_moment_is_brought_within_its_bound() -> None:
    """Log-ratios 0.1, 0.2, 0.4 and 1: cut at 0.2 their squares have the mean (0.01 + 3 * 0.04) / 4 = 0.0325, at 0.4 (0.05 + 2 * 0.16) / 4."""
    d = [0.1, 0.4, -0.2, 1.0]

    def kept(tau: float, rule: str = "capped", tokens: str = "all", sign: float = 1.0) -> list[float]:
        return factors(mask.SecondMoment(tau, rule, tokens), answer(*[-1.0] * 4, old=[-1.0 - x for x in d], advantage=sign))  # type: ignore[arg-type]

    smallest, two, three = [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]
    assert [kept(t) for t in (0.0099, 0.0101, 0.0324, 0.0326, 0.0924, 0.0926)] == [[0] * 4, smallest, smallest, two, two, three]
    assert [kept(t) for t in (0.3024, 0.3026)] == [three, [1] * 4], "the whole of it is 1.21 / 4"
    # up to the bound alone: 0.01, 0.05 / 2, 0.21 / 3, 1.21 / 4
    assert [kept(t, "remaining") for t in (0.0099, 0.0249, 0.0251, 0.0699, 0.0701)] == [[0] * 4, smallest, two, two, three]
    # up is harmful for a good answer: 0.1, 0.4 and 1; for a bad one -0.2 alone
    assert [kept(t, tokens="harmful") for t in (0.0099, 0.0101, 0.1101)] == [[0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]]
    assert [kept(t, tokens="harmful", sign=-0.5) for t in (0.039, 0.041)] == [[1, 1, 0, 1], [1, 1, 1, 1]]
    assert kept(0.0, tokens="harmful", sign=0.0) == [1, 1, 1, 1]
    standard = [factors(mask.SecondMoment(), answer(-1.0, old=-1.0 - x)) for x in (0.19, 0.21, -0.21)]
    assert standard == [[1], [0], [1]], "0.04 on average, of harmful ones"
    row = answer(*[-1.0] * 3, old=[-1.1, -1.25, -1.4])
    assert factors(mask.SecondMoment(), row) == [1, 0, 0], "cut at 0.25 their moment is 0.045, though that of the two that remain is 0.036"


def test_a_bad_answer_is_left_where_the_policy_has_gone_far() -> None:
    for delta, far in ((0.5, 0.5), (0.25, 0.25)):
        row = [answer(-1.0, -1.0, behaviour=[-1.0 + 2 * x, -1.0], advantage=a) for a in (-0.5, 0.0, 0.5) for x in (far, far + 0.01, -far - 1)]
        assert [factors(mask.StaleNegative(delta), r)[0] for r in row] == [1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert [factors(mask.StaleNegative(), answer(-1.0, behaviour=-1.0 + x, advantage=-1.0))[0] for x in (0.49, 0.51)] == [1, 0]


def test_the_second_moment_counts_tokens_that_have_left_one_and_no_others() -> None:
    """Log-ratios of 0.3 alone have the moment 0.09; tokens at ratio 1 push nowhere and must not thin it."""
    d = [0.3, 0.0, 0.0, 0.0]
    assert factors(mask.SecondMoment(), answer(*[-1.0] * 4, old=[-1.0 - x for x in d])) == [0, 1, 1, 1]
    assert factors(mask.SecondMoment(0.25), answer(-1.0, old=-1.5)) == [1], "a moment at its bound is within it"
    rows = [answer(-1.0, -1.0, old=[-1.5, -1.0]), answer(-1.0, -1.0, old=-1.25), answer(-1.0, source="demo", old=-9.0)]
    assert factors(mask.SecondMoment(0.1), *rows) == [0, 1, 1, 1], "1/4 and twice 1/16 have the mean 1/8"
    assert factors(mask.SecondMoment(0.1, tokens="all"), *rows) == [1, 1, 1, 1], "and with a 0 beside them 3/32"


# -- references ------------------------------------------------------------------------------------------------------------------------
def told(term: Any, logp: float, weight: float = 3.0, **more: Any) -> tuple[float, float]:
    """The factor of a token, and what it adds to the reported objective."""
    view = view_of(answer(logp), **more)
    own = term.objective(view, torch.full_like(view.logp, weight)) if hasattr(term, "objective") else torch.tensor([NAN])
    return float(torch.exp(term.log_ratio(view))), float(own)


def test_factors_of_the_policy_itself() -> None:
    """At p = 1/4 and a weight of 3; a weight of 0 adds nothing to the objective, even where the log-prob is infinite."""
    quarter = math.log(0.25)
    assert told(reference.Current(), quarter) == (1.0, pytest.approx(3 * quarter)) and told(reference.Unit(), quarter)[0] == pytest.approx(0.25)
    assert told(reference.Uncertainty(), quarter) == (pytest.approx(3 / 16), pytest.approx(3 * quarter))
    assert told(reference.Power(), quarter) == (pytest.approx(0.25), pytest.approx(3.0))
    assert told(reference.Power(0.5), quarter) == (pytest.approx(0.5), pytest.approx(6.0))
    assert told(reference.Power(-0.5, most=1.5), quarter) == (pytest.approx(1.5), pytest.approx(-6.0))
    assert told(reference.Power(-0.5, most=2.5), quarter)[0] == pytest.approx(2.0)
    assert told(reference.Power(0.0), quarter) == (pytest.approx(1.0), pytest.approx(3 * quarter))
    for term in (reference.Current(), reference.Power(0.0), reference.Uncertainty()):
        assert told(term, quarter, 1.0)[1] == pytest.approx(quarter) and told(term, -math.inf, 0.0)[1] == 0.0
    assert [told(reference.Uncertainty(), x)[0] for x in (0.0, 1e-7)] == [0.0, 0.0], "a probability of 1 and a little more, as kernels round"


def test_a_power_below_zero_needs_a_bound_whenever_it_is_read() -> None:
    for refused in (-0.5, -1e-9):
        with pytest.raises(ValueError, match="is negative, so p\\*\\*a has no bound"):
            reference.Power(refused)
    for most in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"most={most} bounds the factor, so it must be above 0"):
            reference.Power(1.0, most=most)
    falling = reference.Power(Linear(1.0, -1.0))
    assert told(falling, math.log(0.25), progress=0.25)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="a=-1 is negative"):
        told(falling, math.log(0.25), progress=1.0)
    assert told(reference.Power(Linear(1.0, -1.0), most=3.0), math.log(0.25), progress=1.0)[0] == pytest.approx(3.0)


def test_a_saturating_factor() -> None:
    """p = 0.3 beside gamma = 0.1: the share is 3/4 and the rest 1/4; the objective is the weight over the rest, A p / (p + gamma)."""
    p = math.log(0.3)
    assert told(reference.Saturating(), p) == (pytest.approx(3 / 16), pytest.approx(12.0))
    assert told(reference.Saturating(detached=True), p) == (pytest.approx(3 / 4), pytest.approx(3.0))
    assert told(reference.Saturating(gamma=0.3), p)[0] == pytest.approx(0.25)
    assert told(reference.Saturating(gamma=Linear(0.3, 0.1)), p, progress=1.0)[0] == pytest.approx(3 / 16)
    assert told(reference.Saturating(gamma=3.0), math.log(0.5))[0] == pytest.approx(3 * 0.5 / 3.5**2)
    with pytest.raises(ValueError, match=r"gamma is 0\.0 at progress 1; it must stay above 0"):
        told(reference.Saturating(gamma=Linear(0.3, 0.0)), p, progress=1.0)
    named = reference.Named()
    assert (named.to, named.live, named.needs) == ("old", True, {"old"})


# -- regularisers ----------------------------------------------------------------------------------------------------------------------
def kl(row: Row, **settings: Any) -> tuple[list[float], list[float], list[float]]:
    """A penalty's derivative, its value as reported, and what the derivative is of, per token."""
    term, view = regularizer.KL(**settings), view_of(row)
    return tuple(x[view.on].tolist() for x in (term.gradient(view), term.value(view), term.penalty(view)))  # type: ignore[return-value]


def test_estimators_of_the_kl_at_a_ratio_of_two() -> None:
    """d = log 2 to base; the ratio to the old policy is 3."""
    d, row = math.log(2), answer(0.0, base=-math.log(2), old=-math.log(3))
    of = {"k1": (1.0, d), "k2": (d, d * d / 2), "k3": (0.5, d - 0.5), "k3_of_to": (1.0, 1 - d)}
    for name, (slope, k) in of.items():
        assert kl(row, estimator=name, force=True) == ([pytest.approx(slope)], [pytest.approx(k)], [pytest.approx(k)])
        if name != "k3_of_to":
            assert kl(row, estimator=name, ratio="token") == ([pytest.approx(3 * (slope + k))], [pytest.approx(k)], [pytest.approx(3 * k)])
            assert kl(row, estimator=name, ratio="prefix", force=True) == ([pytest.approx(3 * slope)], [pytest.approx(k)], [pytest.approx(3 * k)])
    assert kl(row) == kl(row, estimator="k3", to="base", ratio="none", level="token") and regularizer.KL().coef == 0.001
    for refused in ({"ratio": "none"}, {"ratio": "prefix"}):
        with pytest.raises(ValueError, match="k1 as a loss has a gradient of expectation 0"):
            regularizer.KL("k1", **refused)
    with pytest.raises(ValueError, match="level='answer' does not exist"):
        regularizer.KL(level="answer")  # type: ignore[arg-type]


def test_the_kl_of_answers_and_of_prefixes() -> None:
    """Ratios to base of 2 and 4, to the old policy of 2 and 3: the answer's sum is 3 log 2, the prefixes have the ratios 2 and 6."""
    two = math.log(2)
    row = answer(0.0, 0.0, base=[-two, -2 * two], old=[-two, -math.log(3)])
    slope, k, penalty = kl(row, estimator="k2", level="sequence")
    assert slope == pytest.approx([3 * two] * 2) and k == pytest.approx([4.5 * two**2] * 2) and penalty == pytest.approx([2.25 * two**2] * 2)
    assert kl(row, estimator="k2", ratio="prefix")[0] == pytest.approx([2 * two, 6 * 2 * two])
    assert kl(row, estimator="k2", ratio="prefix")[2] == pytest.approx([2 * two**2 / 2, 6 * 4 * two**2 / 2])
    one = answer(0.0, base=-two)
    assert kl(one, estimator="k2", level="sequence")[2] == pytest.approx([two**2 / 2])
    settings = ({}, {"level": "sequence"}, {"ratio": "prefix"}, {"ratio": "token", "over": "behaviour"}, {"to": "self", "ratio": "token"})
    terms = [regularizer.KL(**s) for s in settings]  # type: ignore[arg-type]
    assert [t.coupling for t in terms] == ["token", "sequence", "sequence", "token", "token"]
    assert [t.needs for t in terms] == [{"base"}, {"base"}, {"base", "old"}, {"base", "behaviour"}, {"old"}]


def test_a_log_ratio_beyond_the_limit_has_no_gradient_and_is_counted() -> None:
    """Log-ratios 1, 1.5, -1.5, 2 and -2 with a limit of 1.5, which is itself inside; held there, the estimates are those of 1.5."""
    d = [1.0, 1.5, -1.5, 2.0, -2.0]
    row = answer(*[-1.0] * 5, base=[-1.0 - x for x in d])
    assert kl(row, estimator="k2", max_log_ratio=1.5) == ([1.0, 1.5, -1.5, 0.0, 0.0], [0.5, *[1.125] * 4], [0.5, *[1.125] * 4])
    assert kl(row, estimator="k2")[0] == d
    view = view_of(row, answer(-1.0, base=9.0, source="demo"), answer(-1.0, base=-1.0))
    assert regularizer.KL(max_log_ratio=1.5).metrics(view) == {"clamped": (2.0, 6.0)} and regularizer.KL().metrics(view) == {}


def test_a_penalty_s_derivative_is_its_gradient() -> None:
    """With the ratio of the prefix held fixed; beyond a limit, and beside an answer without tokens."""
    rows = [answer(-0.5, -1.0, -0.25, base=[-1.0, -0.75, -0.5], old=[-0.75, -1.0, -0.5]), answer(-2.0, base=-0.5, old=-1.5)]
    settings: list[dict[str, Any]] = [{"estimator": k, "ratio": r} for k in ("k1", "k2", "k3") for r in ("none", "token", "prefix")]
    settings += [{"estimator": "k3_of_to"}, {"estimator": "k2", "max_log_ratio": 0.4}, *({"estimator": k, "level": "sequence"} for k in ("k2", "k3"))]
    views: list[tuple[Any, TokenView]] = [(regularizer.KL(**s, force=True), view_of(*rows)) for s in settings]
    pairs = [*sides(("p", "chosen", [1.5, 0.5])), empty(pair="p", side="rejected"), *sides(("q", "chosen", [0.5]), ("q", "rejected", [-1.0]))]
    for term, view in [*views, (regularizer.PairCentre(), view_of(*pairs, **SCALAR))]:
        leaf = view.logp.clone().requires_grad_()
        (slope,) = torch.autograd.grad(term.penalty(replace(view, logp=leaf))[view.on].sum(), leaf)
        torch.testing.assert_close(slope[view.on], term.gradient(view)[view.on])


def test_streams_are_named_by_a_word_or_by_a_list() -> None:
    for term in (regularizer.KL, regularizer.FullKL, regularizer.JensenShannon, regularizer.Entropy, regularizer.PairCentre):
        assert [term(streams=s).streams for s in ("s", ["s", "demos"], ("demos",), None)] == [("s",), ("s", "demos"), ("demos",), None]
        assert hash(term(streams=["rollouts"])) == hash(term(streams="rollouts")) and term(streams=["s"]) == term(streams="s")


def test_what_regularisers_are_by_default() -> None:
    assert regularizer.FullKL().column == "kl_reverse:base" and regularizer.JensenShannon().column == "jsd_0.5:teacher"
    coefs = [term().coef for term in (regularizer.FullKL, regularizer.JensenShannon, regularizer.Entropy, regularizer.PairCentre)]
    assert coefs == [0.001, 1.0, 0.001, 0.01]


# -- pairs -------------------------------------------------------------------------------------------------------------------------------
def sides(*rows: tuple[str, str, list[float]], **more: Any) -> list[Row]:
    return [answer(*numbers, pair=pair, side=side, sample_id=f"{pair} {side}", **more) for pair, side, numbers in rows]


def empty(**more: Any) -> Row:
    return Row(ids=[1, 1], sources=["prompt", "policy"], trainable=[False, False], logps={"current": [NAN, -1.0], "base": [NAN, -1.0]}, **more)


SCALAR = {"likelihood": likelihood.Score(), "aggregation": aggregate.PairSum()}


def test_two_numbers_are_kept_around_zero() -> None:
    """Sums of 2 + 1 and 0.5 - 1; a side of several columns is their sum, and a penalty is spread evenly over all of them."""
    term = regularizer.PairCentre()
    view = view_of(*sides(("p", "chosen", [1.5, 0.5]), ("p", "rejected", [1.0]), ("q", "chosen", [0.5]), ("q", "rejected", [-1.0])), **SCALAR)
    assert term.gradient(view).tolist() == pytest.approx([6, 6, 6, -1, -1]) and term.value(view).tolist() == pytest.approx([9, 9, 9, 0.25, 0.25])
    assert term.penalty(view).tolist() == pytest.approx([9 / 4, 9 / 4, 9 / 2, 1 / 8, 1 / 8])
    half = view_of(*sides(("p", "chosen", [1.5, 0.5])), empty(pair="p", side="rejected"), **SCALAR)
    assert term.penalty(half)[half.on].tolist() == pytest.approx([2.0, 2.0]), "a side without columns takes no share"
    with pytest.raises(ValueError, match="regulariser PairCentre needs preference pairs, but sample 'alone' is in none"):
        term.gradient(view_of(*sides(("p", "chosen", [1.0]), ("p", "rejected", [1.0])), answer(1.0, sample_id="alone"), **SCALAR))


def test_scores_of_answers_and_differences_within_pairs() -> None:
    rows = sides(("p", "chosen", [-1.0, -3.0]), ("q", "rejected", [-2.0]), ("p", "rejected", [-0.5]), ("q", "chosen", [-0.25] * 3), base=-1.0)
    view = view_of(*rows, answer(-7.0, base=-1.0), paired=True)
    both = torch.tensor([1.0, 0.0, 2.0, 3.0, 3.0, 3.0, 3.0, 9.0], dtype=torch.float64)
    scores = {"logp_sum": [-4, -2, -0.5, -0.75, 0], "logp_mean": [-2, -2, -0.5, -0.25, 0]}
    scores |= {"log_ratio_sum": [-2, -1, 0.5, 2.25, 0], "log_ratio_mean": [-1, -1, 0.5, 0.75, 0]}
    for score, expected in scores.items():
        assert preference.sequence_score(view, score, "base").tolist() == pytest.approx(expected)
    assert preference.sequence_score(view, "logp_sum", "base", both).tolist() == pytest.approx([-1, -4, -1.5, -2.25, 0])
    assert preference.sequence_score(view, "log_ratio_mean", "base", both).tolist() == pytest.approx([0, -2, 1.5, 2.25, 0])
    assert preference.pair_difference(view, torch.tensor([4.0, 1.0, 1.5, 7.0, 9.0])).tolist() == [2.5, 6.0, 2.5, 6.0, 0.0]
    alone = view_of(answer(-1.0), answer(-1.0))
    assert preference.pair_difference(alone, torch.tensor([4.0, 1.0])).tolist() == [0.0, 0.0]
    nothing = objective().views(batch(*rows).take([]))["s"]
    assert preference.pair_difference(nothing, torch.zeros(0)).tolist() == []


def test_a_pair_without_a_margin_is_named_by_its_first_sample() -> None:
    view = view_of(*sides(("p", "chosen", [-1.0]), ("p", "rejected", [-1.0]), ("q", "chosen", [-1.0]), ("q", "rejected", [-1.0])))
    with pytest.raises(FloatingPointError, match="the pair of sample 'q chosen' has no margin, its score here is -inf"):
        preference.pair_difference(view, torch.tensor([1.0, 2.0, -math.inf, -math.inf]))


def test_pairs_must_be_whole() -> None:
    """Every answer of the stream in a pair, each pair with both sides; what is wrong is named, once with its side."""
    whole = sides(("p", "chosen", [-1.0]), ("p", "rejected", [-1.0]))
    twice = sides(*[("q", side, [-1.0]) for side in ("rejected", "chosen", "rejected")])
    preference.require_pairs(view_of(*whole), "a term")
    preference.require_pairs(view_of(*whole, answer(-1.0, source="demo")), "a term")
    preference.require_pairs(view_of(whole[0], empty(pair="p", side="rejected")), "a term")
    for rows, said in (
        ([*whole, answer(-1.0, sample_id="alone", group="g")], "a term needs preference pairs, but sample 'alone' is in none"),
        ([empty(sample_id="nothing"), *whole], "sample 'nothing' is in none"),
        ([*whole, *sides(("q", "chosen", [-1.0]))], "the pair of sample 'q chosen' has 0 rejected answers here instead of 1"),
        ([*whole, *sides(("q", "rejected", [-1.0]))], "the pair of sample 'q rejected' has 0 chosen answers here instead of 1"),
        ([*whole, *twice], "the pair of sample 'q rejected' has 2 rejected answers here instead of 1"),
    ):
        with pytest.raises(ValueError, match=said):
            preference.require_pairs(view_of(*rows), "a term")


def test_a_reward_is_read_where_it_is_needed_and_only_there() -> None:
    rows = [*(answer(-1.0, rewards={"score": x}) for x in (0.5, 2.0)), *(answer(-1.0, sample_id=name) for name in ("third", "fourth"))]
    view, some = view_of(*rows), torch.tensor([True, False, False, False])
    assert preference.reward_column(view, "score", some, "a term").tolist() == [0.5, 0.0, 0.0, 0.0]
    assert preference.reward_column(view, "other", ~(some | True), "a term").tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="a term reads the reward 'other'; the batch has score"):
        preference.reward_column(view, "other", some, "a term")
    with pytest.raises(ValueError, match="a term reads the reward 'score', which is nan on sample 'third'"):
        preference.reward_column(view, "score", ~some, "a term")
    single = objective().views(batch(*rows), torch.zeros(4))["s"]
    assert preference.reward_column(single, "score", some, "a term").dtype == torch.float32, "in the precision of the numbers it meets"


def test_labels_are_probabilities_or_sides() -> None:
    rows = [*sides(("p", "chosen", [-1.0]), ("p", "rejected", [-1.0])), answer(-1.0, sample_id="alone"), answer(-1.0, sample_id="another")]
    view, of_pair = view_of(*rows), torch.tensor([True, True, False, False])
    assert preference.label_column(view, "side", of_pair, "label").tolist() == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="label=side, but sample 'alone' is in no pair"):
        preference.label_column(view, "side", of_pair | True, "label")
    given = view_of(*[answer(-1.0, sample_id=str(y), rewards={"label": y}) for y in (0.0, 1.0, 0.25, 1.5, -0.5)])
    first = torch.tensor([True, True, True, False, False])
    assert preference.label_column(given, "label", first, "label").tolist() == [0.0, 1.0, 0.25, 0.0, 0.0]
    last = torch.tensor([True, True, True, False, True])
    for which, said in ((first | True, "label=label is 1.5 on sample '1.5'"), (last, "label=label is -0.5 on sample '-0.5'")):
        with pytest.raises(ValueError, match=f"{said}; it is a probability"):
            preference.label_column(given, "label", which, "label")


def test_a_temperature_is_on_the_scale_of_its_score() -> None:
    for score, betas in {"logp_sum": (1.99, 0.01, Linear(-1.0, 9.0)), "logp_mean": (0.2, 10.0), "value": (0.01, 10.0)}.items():
        for beta in betas:
            preference.check_beta("a term", beta, score, True)
    for score, beta in (("logp_sum", 9.0), ("logp_mean", 0.01)):
        preference.check_beta("a term", beta, score, False)
    for comparable, score, beta, said in (
        (True, "logp_sum", 2.0, "beta=2.0 is on the scale of a mean .* or score=logp_mean"),
        (True, "logp_mean", 0.199, "beta=0.199 is on the scale of a sum .* or score=logp_sum"),
        (False, "value", 0.0, "a term: beta=0.0 must be above 0"),
        (True, "logp_sum", -1.0, "must be above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            preference.check_beta("a term", beta, score, comparable)


def test_sums_and_means_belong_to_their_aggregations() -> None:
    def check(score: str, aggregation: Any, head: Any = None, side: Any = None, **more: Any) -> None:
        stream = Stream(("policy",), head or likelihood.Token(), reference.Current(), advantage.Column(), aggregation, side=side)
        preference.check_stream("a term", score, stream, **more)

    for aggregation in (aggregate.PairSum(), aggregate.SequenceMeanTokenSum(), aggregate.TokenMean()):
        check("logp_sum", aggregation)
    for aggregation in (aggregate.PairTokenMean(), aggregate.SequenceMeanTokenMean(), aggregate.TokenMean()):
        check("logp_mean", aggregation)
    check("value", aggregate.PairSum(), likelihood.Score())
    check("logp_sum", aggregate.PairSum(), side="chosen")
    check("logp_sum", aggregate.PairSum(), both_sides=True)
    for score, aggregation, more, said in (
        ("logp_mean", aggregate.PairSum(), {}, "score=logp_mean is a mean over tokens, but PairSum sums"),
        ("logp_mean", aggregate.SequenceMeanTokenSum(), {}, "but SequenceMeanTokenSum sums"),
        ("logp_sum", aggregate.PairTokenMean(), {}, "score=logp_sum is a sum over tokens, but PairTokenMean takes"),
        ("logp_sum", aggregate.SequenceMeanTokenMean(), {}, "but SequenceMeanTokenMean takes"),
        ("value", aggregate.PairSum(), {}, "score=value is what a scalar head gives"),
        ("logp_sum", aggregate.PairSum(), {"head": likelihood.Score()}, "score=value is what a scalar head gives"),
        ("logp_sum", aggregate.PairSum(), {"side": "rejected", "both_sides": True}, "compares answers, but the stream has side=rejected"),
    ):
        with pytest.raises(ValueError, match=said):
            check(score, aggregation, **more)


# -- scalar heads ------------------------------------------------------------------------------------------------------------------------
def head(*rows: Row, term: Any) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """What pulls at every number of the stream, and what is reported."""
    view = view_of(*rows, likelihood=likelihood.Score(), aggregation=aggregate.SequenceMeanTokenSum())
    return term.values(view)[view.on].tolist(), term.objective(view)


def test_numbers_are_drawn_towards_labels() -> None:
    """Numbers 0, log 3 and -log 3 are the probabilities 1/2, 3/4 and 1/4."""
    three = math.log(3)
    rows = [answer(0.0, three, rewards={"label": 1.0}), answer(-three, rewards={"label": 0.5}), answer(5.0, source="demo", rewards={"label": 7.0})]
    pull, found = head(*rows, term=value.Towards())
    assert pull == pytest.approx([0.5, 0.25, 0.25])
    assert found["value_loss"] == (pytest.approx(-math.log(0.5) - math.log(0.75) - 0.5 * math.log(0.25) - 0.5 * math.log(0.75)), 3.0)
    assert found["accuracy"] == (2.0, 3.0), "0 is no yes, log 3 is one, and a half is a no"
    given = [answer(r, rewards={"label": y}) for r, y in ((0.5, 0.75), (0.5, 0.25), (-0.5, 0.25), (0.25, 1.0))]
    assert head(*given, term=value.Towards())[1]["accuracy"] == (3.0, 4.0)
    pull, found = head(*[answer(*x, rewards={"label": y}) for x, y in (([0.5, 2.0], 3.0), ([-1.0], -2.0))], term=value.Towards(f="squared"))
    assert pull == pytest.approx([5.0, 2.0, -2.0]) and found == {"value_loss": (pytest.approx(6.25 + 1.0 + 1.0), 3.0)}
    with pytest.raises(ValueError, match="f='hinge' does not exist; choose logistic or squared"):
        value.Towards(f="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"advantage\.Towards\.label=label is 3 on sample 'high'"):
        head(answer(0.0, rewards={"label": 3.0}, sample_id="high"), term=value.Towards())
    with pytest.raises(ValueError, match=r"advantage\.Towards\.label reads the reward 'label', which is nan on sample 'none'"):
        head(answer(0.0, rewards={"label": 3.0}), answer(0.0, sample_id="none"), term=value.Towards(f="squared"))


def test_labels_of_tokens_stand_in_the_advantage_column() -> None:
    assert value.Towards(label=None).reads_column and not value.Towards().reads_column
    ends = [answer(0.0, 0.0, advantage=[NAN, 0.0, 1.0]), answer(0.0, source="demo", advantage=5.0)]
    assert head(*ends, term=value.Towards(label=None))[0] == [-0.5, 0.5]
    with pytest.raises(ValueError, match=r"a label of sample 'second' is 1\.25; f=logistic takes labels from 0 to 1"):
        rows = [answer(0.0), answer(0.0, 0.0, advantage=[NAN, 0.5, 1.25], sample_id="second"), answer(0.0, advantage=-3.0)]
        head(*rows, term=value.Towards(label=None))
    with pytest.raises(ValueError, match=r"a label of sample 'below' is -0\.25"):
        head(answer(0.0, advantage=-0.25, sample_id="below"), term=value.Towards(label=None))
    assert head(answer(0.5, advantage=-2.0), term=value.Towards(f="squared", label=None))[0] == [-5.0]


def test_a_critic_moves_at_most_so_far_from_what_it_said() -> None:
    """V_old = 0, the return 1, clip 1/4: below it the pull is 1 - V; from there on the clamped error, 9/16, is larger, and nothing pulls."""
    rows = [answer(v, value=0.0, advantage=1.0) for v in (0.125, 0.25, 0.5, -0.5)]
    rows += [answer(0.5, value=0.0, advantage=-1.0), answer(9.0, source="demo", value=0.0)]
    pull, found = head(*rows, term=value.Return(0.25))
    assert pull == [0.875, 0.75, 0.0, 1.5, -1.5]
    plain = [0.875**2, 0.75**2, 0.5**2, 1.5**2, 1.5**2]
    assert found["value_error"] == (pytest.approx(sum(plain)), 5.0) and found["value_clipped"] == (1.0, 5.0)
    assert found["value_loss"] == (pytest.approx(0.5 * (sum(plain) - 0.5**2 + 0.75**2)), 5.0)
    assert head(answer(0.5, 0.5, value=0.0, advantage=1.0), term=value.Return(0.25))[1]["value_clipped"] == (2.0, 2.0)
    pull, found = head(*rows, term=value.Return(None))
    assert pull == [0.875, 0.75, 0.5, 1.5, -1.5] and found["value_clipped"] == (0.0, 5.0)
    assert found["value_loss"] == (pytest.approx(0.5 * sum(plain)), 5.0)
    assert value.Return(None).needs == frozenset() and value.Return(values_from="critic").needs == {"critic"}
    two = [answer(v, -1.0, value=[1.0, -1.0], advantage=[NAN, a, 0.0]) for v, a in ((1.19, 2.0), (1.21, 2.0), (0.81, 0.0), (0.79, 0.0))]
    assert [p == 0.0 for p in head(*two, term=value.Return())[0][::2]] == [False, True, False, True], "0.2 by default"
    for refused in (0.0, -0.2):
        with pytest.raises(ValueError, match=f"clip={refused} must be above 0, or null for no clipping"):
            value.Return(refused)
    later = value.Return(clip=Linear(0.25, 1.0))
    view = view_of(*rows, progress=1.0, likelihood=likelihood.Score(), aggregation=aggregate.SequenceMeanTokenSum())
    assert later.values(view)[view.on].tolist() == [0.875, 0.75, 0.5, 1.5, -1.5]
