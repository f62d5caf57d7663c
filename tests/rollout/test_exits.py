"""A chain left early: where, what the engine reads there, what the records hold, and what is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from posttrain.build import Engines
from posttrain.cli import _build, _compose
from posttrain.data.render import Renderer
from posttrain.data.rows import to_rows
from posttrain.mixture.demos import Demos
from posttrain.records import NO_EXPERT, Demo, Group, Prompt, Rollout, Sampling, Segment, Source, TokenBatch
from posttrain.rollout.exits import Blocks, Exits, Tokens, cut, go_on, tokens_of
from posttrain.rollout.prefix import WithPrefix
from posttrain.rollout.strategy import Dynamic, Fixed, StepInfo
from posttrain.testing.tiny import create_tokenizer

TOKENIZER = create_tokenizer()
RENDERER = Renderer(TOKENIZER)
EOS = TOKENIZER.eos_token_id
INFO = StepInfo(0, 0, 1)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def decode(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def question(name: str = "q") -> Prompt:
    return Prompt(name, RENDERER.prompt("2+2").ids, text="2+2", answer="4")


def chain(text: str, finish: Any = "stop", name: str = "0/q/0", **more: Any) -> Rollout:
    ids = ids_of(text) + ((EOS,) if finish == "stop" else ())
    return Rollout(name, question(), (Segment(ids, Source.policy, logprobs=tuple(-0.1 * i for i in range(len(ids))), version=3),), finish, text=text, **more)


def exits(limit: int = 500, max_tokens: int = 8, n: int = 1, **settings: Any) -> Exits:
    return Exits(**{"text": "=>", **settings}).bound(n).with_tokenizer(TOKENIZER, max_tokens, limit)


@dataclass
class Pool:
    """``chain`` for a prompt as it is, and ``answers`` in turn, by their number in the group, where an answer is forced."""

    chain: str
    answers: Sequence[str] = ("4",)
    finish: Any = "stop"
    read: list[tuple[str, int, int, int]] = field(default_factory=list)
    decode = staticmethod(decode)

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        self.read += [(TOKENIZER.decode(p.ids), n, first, sampling.max_tokens) for p in prompts]
        groups, seen = [], Counter[str]()
        for p in prompts:
            rollouts = []
            for _ in range(n):
                number = first + seen[p.id]
                seen[p.id] += 1
                text = self.answers[number % len(self.answers)] if p.ids[-2:] == ids_of("=>") else self.chain
                rollouts.append(replace(chain(text, self.finish, f"{step}/{p.id}/{number}"), prompt=p, sampling=sampling))
            groups.append(Group(p, tuple(rollouts)))
        return groups

    def metrics(self) -> dict[str, float]:
        return {}


class Judge:
    """Whether the answer is 4; nobody can say of an answer that is empty."""

    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        return {"seen": float(sum(len(g.rollouts) for g in groups))}

    async def score(self, groups: Sequence[Group], step: int, progress: float) -> list[Group]:
        return [replace(g, rollouts=tuple(replace(r, reward=None if r.text == "?" else float(r.text.endswith("4")), advantage=1.0) for r in g.rollouts)) for g in groups]


def run(strategy: Any, pool: Pool, step: int = 0, prompts: int = 1) -> tuple[list[Group], dict[str, float]]:
    names = iter(range(100))
    sampler = type("S", (), {"next": lambda self, count: [next(names) % prompts for _ in range(count)]})()
    stage = Engines(pool, Judge(), sampler, [question(f"q{i}") for i in range(prompts)], strategy, Sampling(max_tokens=32), prompts, 10)
    return asyncio.run(stage.collect(step))


# -- the group ------------------------------------------------------------------------------------------------------------------
def test_a_chain_and_its_exits_are_one_group() -> None:
    pool = Pool("ab\ncd\n4", ("4", "5"))
    groups, report = run(exits(exits=None, at=Blocks("\n"), start=True), pool, prompts=2)
    whole, begun = TOKENIZER.decode(question().ids), [t for t, *_ in pool.read[2:]]
    assert begun == [f"{whole}{part}=>" for part in ("", "ab\n", "ab\ncd\n")] * 2
    assert pool.read[0] == (whole, 1, 0, 32) and {tuple(r[1:]) for r in pool.read[2:]} == {(1, 1, 8)}, "one call for all exits, with a length of their own"
    for group in groups:
        assert group.prompt.ids == question().ids and all(r.prompt.ids == question().ids for r in group.rollouts)
        first = group.rollouts[0]
        assert [r.left for r in group.rollouts] == [None, *((first.sample_id, k) for k in (0, 3, 6))]
        assert [r.reward for r in group.rollouts] == [1.0, 0.0, 1.0, 0.0] and len({r.sample_id for r in group.rollouts}) == 4
    assert report["rollout/generated"] == 8 and report["seen"] == 8


def test_what_was_sampled_stays_and_the_words_are_not_learnt() -> None:
    groups, _ = run(exits(exits=None, at=Blocks("\n")), Pool("ab\ncd\n4"))
    early = groups[0].rollouts[1]
    assert [(s.source, decode(s.ids), s.turn) for s in early.segments] == [(Source.policy, "ab\n", 0), (Source.tool, "=>", 1), (Source.policy, "4", 1)]
    assert early.segments[0].logprobs == groups[0].rollouts[0].segments[0].logprobs[:3] and early.version == 3
    assert early.text == "4" and early.turns == (("assistant", "ab\n"), ("user", "=>"), ("assistant", "4"))
    batch = TokenBatch.from_sequences(to_rows(groups)[1:2])
    assert TOKENIZER.decode(batch.target_ids[batch.trainable]) == "ab\n4<|im_end|>"
    assert bool((batch.trainable == ~batch.logps["behaviour"].isnan()).all()), "a log-prob exactly where something was sampled"


def test_a_reward_may_see_the_words() -> None:
    groups, _ = run(exits(exits=None, at=Blocks("\n"), judged="words_and_answer"), Pool("ab\n4"))
    assert [r.text for r in groups[0].rollouts] == ["ab\n4", "=>4"]


def test_several_answers_at_a_place_and_several_chains() -> None:
    groups, _ = run(exits(exits=None, at=Blocks("\n"), start=True, samples=3, n=2), Pool("ab\n4"))
    left = [r.left for r in groups[0].rollouts]
    assert left == [None, None, *[(f"0/q0/{c}", place) for c in (0, 1) for place in (0, 3) for _ in range(3)]]
    assert [r.sample_id for r in groups[0].rollouts] == [f"0/q0/{i}" for i in range(14)]


# -- where ----------------------------------------------------------------------------------------------------------------------
def test_random_places_are_distinct_in_order_and_the_same_again() -> None:
    one, two = exits(exits=5), exits(exits=5, seed=1)
    rollout = chain("x" * 40)
    places = one.places(rollout, 0)
    assert places == sorted(set(places)) and len(places) == 5 and min(places) >= 1 and max(places) <= 40
    assert places == one.places(rollout, 0) != one.places(rollout, 1) and places != two.places(rollout, 0)
    seen = [k for step in range(400) for k in one.places(rollout, step)]
    assert {*seen} == {*range(1, 41)} and abs(sum(seen) / len(seen) - 20.5) < 1.0, "uniform over the chain"
    assert exits(exits=100).places(chain("abc"), 0) == [1, 2, 3] and exits(start=True).places(chain("abc"), 0)[0] == 0


def test_a_block_ends_behind_its_delimiter_however_tokens_lie() -> None:
    """Of a tokenizer whose tokens are words, and one of whose tokens holds a delimiter and more."""
    words = ["one", "\n\n", "two", "\n", "\n", "\n", "three.\n\nfour", "\n\n"]

    def read(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids)

    assert Blocks()(range(8), read) == [2, 5, 7], "runs are one delimiter; what ends with the chain is no exit"
    assert Blocks("zzz")(range(8), read) == [] and Tokens()(range(4), read) == [1, 2, 3]
    assert [tokens_of(range(8), n, read) for n in (0, 1, 3, 4, 5)] == [0, 1, 1, 2, 2]


def test_exits_stay_before_the_chains_own_answer() -> None:
    rollout = chain("ab</think>cd")
    assert exits(exits=None, until="</think>").places(rollout, 0) == [1, 2]
    assert exits(exits=None, until="</never>").places(rollout, 0) == list(range(1, 13))
    assert exits(exits=None, until="ab", start=True).places(rollout, 0) == [0]


def test_exits_are_never_inside_given_tokens() -> None:
    given = Segment(ids_of("abc"), Source.prefix)
    tool = Segment(ids_of("xyz"), Source.tool, trainable=False)
    own = chain("def").segments[0]
    rollout = replace(chain(""), segments=(given, own, tool, replace(own, turn=1)))
    assert exits(exits=None).places(rollout, 0) == [4, 5, 6, 7, 11, 12, 13]
    assert exits(exits=None).places(replace(rollout, segments=(given,)), 0) == [], "nothing was sampled"


def test_a_chain_behind_a_prefix_is_cut_behind_it() -> None:
    asked, shown = question("q0"), Segment(ids_of("abcd4"), Source.demo)
    demo = Demo("d", (Segment(asked.ids, Source.prompt, trainable=False), shown), prompt=asked)
    inner = WithPrefix(lambda draw, progress: 0.4, samples=None)
    strategy = exits(exits=None, at=Tokens(), inner=inner).with_demos(Demos([demo]))
    assert strategy.needs_demos and not exits().needs_demos
    groups, _ = run(strategy, Pool("xy"))
    assert [r.left for r in groups[0].rollouts] == [None, ("0/q0/0", 3), ("0/q0/0", 4)]
    assert [s.source.name for s in groups[0].rollouts[1].segments] == ["prefix", "policy", "tool", "policy"]


# -- hostile ----------------------------------------------------------------------------------------------------------------------
def test_a_chain_without_a_delimiter_is_one_block() -> None:
    groups, _ = run(exits(exits=None, at=Blocks("\n\n"), start=True), Pool("abc4"))
    assert [r.left for r in groups[0].rollouts] == [None, ("0/q0/0", 0)]
    with pytest.raises(RuntimeError, match=r"none of 1 groups could be used.*1 no_exit"):
        run(exits(exits=None, at=Blocks("\n\n")), Pool("abc4"))


def test_words_and_answer_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"text has 2 tokens and its answer may have 8, which leaves nothing of the engine's 10;.*raise rollout\.max_model_len"):
        exits(limit=10)
    asked = len(question().ids)
    assert exits(limit=asked + 10 + 3, exits=None).places(chain("abcdefg"), 0) == [1, 2, 3], "only places from where it fits"
    assert exits(limit=asked + 10 - 1, exits=None, start=True).places(chain("abcdefg"), 0) == []


def test_chains_that_never_were_have_no_exits() -> None:
    assert exits().places(chain("abc", "env_error"), 0) == exits().places(chain("abc", "aborted"), 0) == []
    assert exits().places(replace(chain("abc"), segments=()), 0) == [] and exits(exits=None).places(chain("abc", "length"), 0) == [1, 2]
    assert exits().places(chain(""), 0) == [], "a chain of one token"


def test_the_inner_strategy_decides_on_the_chains() -> None:
    strategy = exits(inner=Dynamic(2, cooldown=2, resting={"q": 3}), n=2)
    group = Group(question(), tuple(replace(chain("4", name=f"0/q/{i}"), reward=1.0) for i in range(2)))
    left = replace(chain("5"), sample_id="0/q/2", reward=0.0, left=("0/q/0", 1))
    assert strategy.admit(replace(group, rollouts=(*group.rollouts, left)), INFO) == "no_variance"
    assert Exits().bound(2).admit(replace(group, rollouts=(*group.rollouts, left)), INFO) is None and Exits().bound(2).admit(group, INFO) == "no_exit"
    assert strategy.state_dict()["resting"] and strategy.skip(question(), INFO) == "cooldown" and Exits().state_dict() == {}
    assert strategy.observe(replace(group, rollouts=(*group.rollouts, left)), INFO) == []


@pytest.mark.parametrize("setting", [{"exits": 0}, {"samples": 0}, {"answer_tokens": 0}, {"text": " "}, {"until": ""}, {"judged": "all"}])
def test_impossible_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rollout\.strategy\."):
        Exits(**setting)
    with pytest.raises(ValueError, match="delimiter"):
        Blocks("")


# -- pieces -----------------------------------------------------------------------------------------------------------------------
def test_cutting_keeps_everything_that_is_known_of_a_token() -> None:
    parts = (Segment((1, 2), Source.policy, 0, (-1.0, -2.0), 5), Segment((3, 4), Source.policy, 0, (-3.0, -4.0), 6, (True, False), inputs=(7, 8)))
    assert cut(parts, 0) == () and cut(parts, 9) == parts
    assert cut(parts, 3) == (parts[0], Segment((3,), Source.policy, 0, (-3.0,), 6, (True,), inputs=(7,)))


def test_experts_are_those_that_read_a_token_when_it_was_sampled() -> None:
    asked = question()
    length = len(asked.ids)
    first = torch.full((length + 3, 1, 1), 1, dtype=torch.int16)
    first[-1] = NO_EXPERT
    begin = exits(exits=None).begin(replace(chain("ab"), routing=first), 1)
    later = torch.full((length + 1 + 2 + 2, 1, 1), 2, dtype=torch.int16)
    (rollout,) = go_on(Group(asked, (replace(chain("4"), routing=later),)), begin).rollouts
    assert rollout.routing is not None and rollout.routing.flatten().tolist() == [1] * (length + 1) + [2] * 4


@pytest.mark.parametrize(("name", "n"), [("exits", 1), ("blocks", 4)])
def test_the_files_compose(name: str, n: int) -> None:
    from omegaconf import OmegaConf

    built = _build(OmegaConf.to_container(_compose("train", [f"rollout={name}"]), resolve=True), "")["rollout"]
    assert built["n"] == n and isinstance(built["strategy"], Exits) and built["strategy"].inner == Fixed()
    assert built["strategy"].text.endswith("\n</think>\n\n") and built["strategy"].exits == {"exits": 8, "blocks": None}[name]
    assert built["strategy"].forced_tokens(TOKENIZER, 8) == len(built["strategy"].text) + 8
