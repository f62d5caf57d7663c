"""Packing is a partition: nothing lost, nothing repeated, limits kept, coupled sets whole, ranks level."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.pack import Packer, empty_like
from posttrain.records import Row, StreamTotals, TokenBatch


def row(length, name, group=None, pair=None, side=None):
    n = length + 1
    return Row(ids=list(range(n)), sources=["prompt"] + ["policy"] * length, logps={"behaviour": [-0.5] * n}, group=group, pair=pair,
               side=side, sample_id=str(name), rewards={"r": 1.0})  # fmt: skip


@st.composite
def batches(draw):
    rows = []
    for g in range(draw(st.integers(0, 5))):
        rows += [row(draw(st.integers(0, 40)), f"g{g}.{i}", group=g) for i in range(draw(st.integers(1, 5)))]
    for p in range(draw(st.integers(0, 4))):
        rows += [row(draw(st.integers(1, 40)), f"p{p}.{s}", pair=p, side=s) for s in ("chosen", "rejected")]
    rows += [row(draw(st.integers(0, 60)), f"s{i}") for i in range(draw(st.integers(0 if rows else 1, 6)))]
    return TokenBatch.from_sequences(draw(st.permutations(rows)))


PACKERS = st.builds(Packer, micro_batch_tokens=st.integers(1, 120), world_size=st.integers(1, 4), updates_per_batch=st.integers(1, 4))
COUPLINGS = st.sampled_from(["token", "sequence", "group", "batch"])


def sets_of(step):
    """Independent of the packer: sample names by the prefix that the rows above were given."""
    names = step.whole.sample_ids
    return {key: {i for i, n in enumerate(names) if n.split(".")[0] == key} for key in {n.split(".")[0] for n in names}}


@settings(max_examples=60, deadline=None)
@given(batches(), PACKERS, COUPLINGS, st.integers(0, 3))
def test_plan_is_a_partition_within_limits(batch, packer, coupling, seed):
    plan = packer.plan(batch, coupling, seed)
    assert sorted(n for step in plan for n in step.whole.sample_ids) == sorted(batch.sample_ids)
    assert 1 <= len(plan) <= packer.updates_per_batch
    for step in plan:
        lengths = step.whole.lengths.tolist()
        parts = list(step.parts())
        assert len(step.ranks) == packer.world_size
        assert {len(rank) for rank in step.ranks} == {step.num_micro_batches}
        assert parts == [step.ranks[i % packer.world_size][i // packer.world_size] for i in range(len(parts))]
        assert sorted(i for part in parts for i in part) == list(range(step.whole.num_sequences))
        for part in parts:
            assert sum(lengths[i] for i in part) <= packer.micro_batch_tokens or len(part) == 1
        assert any(parts[-packer.world_size :]), "a whole round of empty micro-batches"
        stats = step.stats
        assert stats.micro_batches == len(parts) and stats.empty == sum(not p for p in parts)
        assert stats.oversize == sum(n > packer.micro_batch_tokens for n in lengths)
        assert stats.oversize or stats.fill <= 1
        assert stats.imbalance == pytest.approx(
            max(sum(lengths[i] for p in r for i in p) for r in step.ranks)
            / max(step.whole.num_tokens / packer.world_size, 1 / packer.world_size)
        )


@settings(max_examples=60, deadline=None)
@given(batches(), PACKERS, COUPLINGS)
def test_coupled_sets_stay_whole_where_they_fit_and_cut_tells_the_truth(batch, packer, coupling):
    plan = packer.plan(batch, coupling)
    homes: dict[str, int] = {}
    for number, step in enumerate(plan):
        where = {i: m for m, part in enumerate(step.parts()) for i in part}
        lengths = step.whole.lengths.tolist()
        sets = sets_of(step)
        for key in sets:
            assert homes.setdefault(key, number) == number, "a coupled set was cut across optimizer steps"
        split = {key for key, members in sets.items() if len({where[i] for i in members}) > 1}
        if coupling == "group":
            too_big = {key for key, members in sets.items() if sum(lengths[i] for i in members) > packer.micro_batch_tokens}
            assert split <= too_big
            assert step.cut == any(len(sets[key]) > 1 for key in too_big)
        elif coupling == "batch":
            assert step.cut == (len(where) > 1 and step.whole.num_tokens > packer.micro_batch_tokens)
            assert step.cut or len(set(where.values())) == 1
        else:
            assert not step.cut


@settings(max_examples=25, deadline=None)
@given(batches(), PACKERS, COUPLINGS)
def test_micro_batches_hold_the_columns_of_their_sequences(batch, packer, coupling):
    for step in packer.plan(batch, coupling):
        filled = step.whole.with_logps(current=torch.arange(step.whole.num_tokens, dtype=torch.float32)).replace(
            totals={"a": StreamTotals(3)}
        )
        micro = step.micro_batches(filled)
        assert len(micro) == step.num_micro_batches * packer.world_size
        seen = torch.cat([m.logps["current"][m.source != 5] for m in micro])
        assert sorted(seen.tolist()) == list(range(step.whole.num_tokens))
        assert all(m.totals == filled.totals for m in micro)


def test_same_arguments_same_plan_and_the_seed_decides_who_meets_whom():
    rows = [row(5, f"{g}.{i}", group=g) for g in range(12) for i in range(3)]
    plan = Packer(40, 2, updates_per_batch=3).plan
    ids = lambda p: [s.whole.sample_ids for s in p]  # noqa: E731
    assert ids(plan(rows, "group", 0)) == ids(plan(rows, "group", 0))
    assert ids(plan(rows, "group", 0)) != ids(plan(rows, "group", 1))
    assert [s.ranks for s in plan(rows, "group", 0)] == [s.ranks for s in plan(rows, "group", 0)]
    assert ids(Packer(40).plan(rows, "group", 0)) == ids(Packer(40).plan(rows, "group", 1)) == [tuple(r.sample_id for r in rows)]


def test_ragged_remainder_and_mixed_kinds_are_dealt_evenly():
    rows = [row(4, f"{g}.{i}", group=g) for g in range(7) for i in range(2)] + [row(4, f"s{i}") for i in range(5)]
    plan = Packer(1000, updates_per_batch=3).plan(rows, "group", 5)
    groups = [len({n.split(".")[0] for n in s.whole.sample_ids if "." in n}) for s in plan]
    singles = [sum("." not in n for n in s.whole.sample_ids) for s in plan]
    assert sorted(groups) == [2, 2, 3] and sorted(singles) == [1, 2, 2]
    assert sorted(g + s for g, s in zip(groups, singles, strict=True)) == [4, 4, 4]


def test_fewer_sets_than_updates_gives_fewer_steps():
    plan = Packer(100, updates_per_batch=5).plan([row(4, f"{g}.{i}", group=g) for g in range(2) for i in range(4)])
    assert len(plan) == 2 and all(s.whole.num_sequences == 4 for s in plan)


def test_only_the_first_step_is_fresh_and_totals_are_per_step():
    batch = TokenBatch.from_sequences([row(4, i) for i in range(6)]).replace(totals={"policy": StreamTotals(24)})
    two = Packer(100, updates_per_batch=2).plan(batch)
    assert [s.whole.fresh for s in two] == [True, False] and [s.whole.totals for s in two] == [None, None]
    [one] = Packer(100).plan(batch)
    assert one.whole.fresh and one.whole.totals == {"policy": StreamTotals(24)}
    assert [s.whole.fresh for s in Packer(100, updates_per_batch=2).plan(batch.replace(fresh=False))] == [False, False]


def test_work_is_spread_over_ranks_even_when_one_micro_batch_would_hold_it():
    [step] = Packer(1000, world_size=2).plan([row(10, i) for i in range(8)])
    assert [[len(part) for part in rank] for rank in step.ranks] == [[4], [4]]
    assert step.stats.imbalance == 1.0 and step.stats.empty == 0


def test_longest_first_fit_fills_the_room():
    [step] = Packer(100).plan([row(n, n) for n in (60, 50, 50, 40)])
    assert step.num_micro_batches == 2 and step.stats.fill == 1.0
    [step] = Packer(100).plan([row(n, i) for i, n in enumerate((44, 30, 26, 24, 22, 21, 19, 14))])
    assert step.num_micro_batches == 2 and step.stats.fill == 1.0, "the tight packing must stand when the level one does not fit"


def test_oversize_sequences_go_alone_and_are_counted():
    [step] = Packer(10).plan([row(25, "long"), row(3, "a"), row(4, "b")])
    assert sorted(len(p) for p in step.parts()) == [1, 2] and step.stats.oversize == 1


def test_rank_with_nothing_gets_an_empty_batch_that_can_be_run():
    [step] = Packer(10, world_size=3).plan([row(3, "only")])
    micro = step.micro_batches()
    assert len(micro) == 3 and step.stats.empty == 2
    nothing = micro[1]
    assert nothing.num_tokens == 1 and nothing.num_sequences == 1 and not nothing.trainable.any()
    assert nothing.cu_seqlens.tolist() == [0, 1] and nothing.take([0]).num_tokens == 1
    assert math.isnan(nothing.logps["behaviour"].item()) and set(nothing.rewards) == {"r"}
    wide = TokenBatch.from_sequences([row(3, "x")], dtype=torch.float64, progress=0.5).replace(totals={"s": StreamTotals(1)})
    small = empty_like(wide)
    assert small.advantage.dtype == torch.float64 and small.progress == 0.5 and small.totals == wide.totals
    pickle.loads(pickle.dumps(step))


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="micro_batch_tokens is 0"):
        Packer(0)
    with pytest.raises(ValueError, match="nothing to pack"):
        Packer().plan([])
    with pytest.raises(ValueError, match="unknown coupling 'pair'"):
        Packer().plan([row(3, 0)], "pair")
