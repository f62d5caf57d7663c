"""Episodes of several turns: the tokens of a whole conversation, nothing of what was sampled touched, errors masked, budgets kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.data.render import Renderer
from posttrain.data.rows import to_rows
from posttrain.data.template import TemplateError
from posttrain.mixture.demos import Demos
from posttrain.mixture.turns import WithoutCritique
from posttrain.records import NO_EXPERT, Demo, Group, Prompt, Rollout, Sampling, Score, Segment, Source, TokenBatch
from posttrain.reward.base import Signature
from posttrain.rollout.environment import CUT, Feedback, OfTurn, Playing, Reply, Retry, check_environment, longest
from posttrain.testing.tiny import create_tokenizer

TOKENIZER = create_tokenizer()
RENDERER = Renderer(TOKENIZER)
EOS = TOKENIZER.eos_token_id


def question(text: str = "2+2", name: str = "q") -> Prompt:
    return Prompt(name, RENDERER.prompt(text).ids, text=text, answer="4")


@dataclass
class Scripted:
    """A pool whose answers are written down: ``script[k]`` is what every sample says in its k-th turn.  ``None`` is a cut-off answer."""

    script: Sequence[str | None]
    calls: list[list[Prompt]] = field(default_factory=list)

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        self.calls.append(list(prompts))
        said = self.script[len(self.calls) - 1]
        return [Group(p, tuple(self._one(p, f"{step}/{p.id}/{first + i}", said, sampling) for i in range(n))) for p in prompts]

    def _one(self, prompt: Prompt, name: str, said: str | None, sampling: Sampling) -> Rollout:
        ids = tuple(TOKENIZER(said or "and so")["input_ids"]) + ((EOS,) if said is not None else ())
        segment = Segment(ids, Source.policy, logprobs=tuple(-0.1 * i for i in range(len(ids))), version=7)
        return Rollout(name, prompt, (segment,), "stop" if said is not None else "length", sampling, said or "and so")

    def metrics(self) -> dict[str, float]:
        return {"rollout/engines": 1.0}


def play(environment: Any, *script: str | None, n: int = 1, renderer: Renderer = RENDERER, room: int = 500, prompts: Sequence[Prompt] = ()) -> tuple[list[Group], Scripted]:
    pool = Scripted(script)
    playing = Playing(pool, environment, renderer, room)
    return asyncio.run(playing.sample(list(prompts) or [question()], n, Sampling(max_tokens=8), 3)), pool


def test_the_tokens_are_those_of_the_whole_conversation() -> None:
    ((group,), pool) = play(Retry("look again"), "5", "4", n=2)
    for rollout in group.rollouts:
        ids = [*group.prompt.ids, *(i for s in rollout.segments for i in s.ids)]
        messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "5"}, {"role": "user", "content": "look again"}]
        whole = RENDERER.conversation([*messages, {"role": "assistant", "content": "4"}])
        assert ids == list(whole.ids)
        assert [s.source for s in rollout.segments] == [Source.policy, Source.tool, Source.policy] and [s.turn for s in rollout.segments] == [0, 1, 1]
        assert rollout.text == "4" and rollout.finish == "stop" and rollout.turns == (("assistant", "5"), ("user", "look again"), ("assistant", "4"))
        assert rollout.segments[0].logprobs == (-0.0, -0.1) and rollout.segments[1].logprobs is None and rollout.version == 7
    assert len(pool.calls) == 2 and [p.id for p in pool.calls[1]] == ["3/q/0@1", "3/q/1@1"], "one call for all episodes, each with seeds of its own"
    assert [r.sample_id for r in group.rollouts] == ["3/q/0", "3/q/1"]


def test_only_what_was_sampled_is_learnt_from() -> None:
    ((group,), _) = play(Retry("look again"), "5", "4")
    scored = replace(group, rollouts=tuple(replace(r, advantage=1.0) for r in group.rollouts))
    batch = TokenBatch.from_sequences(to_rows([scored]))
    assert TOKENIZER.decode(batch.target_ids[batch.trainable]) == "5<|im_end|>4<|im_end|>"
    assert bool((batch.trainable == ~batch.logps["behaviour"].isnan()).all()), "a log-prob exactly where something was sampled"
    assert batch.turn[batch.trainable].tolist() == [0, 0, 1, 1]


def test_three_turns() -> None:
    ((group,), pool) = play(Retry("again", max_turns=3), "a", "b", "c")
    (rollout,) = group.rollouts
    assert [t for _, t in rollout.turns] == ["a", "again", "b", "again", "c"] and len(pool.calls) == 3
    messages = [{"role": r, "content": t} for r, t in (("user", "2+2"), *rollout.turns)]
    assert [*group.prompt.ids, *(i for s in rollout.segments for i in s.ids)] == list(RENDERER.conversation(messages).ids)


def test_an_environment_that_says_nothing_is_a_single_turn() -> None:
    class Silent:
        max_turns, max_reply_chars = 4, 0

        def begin(self, prompt: Prompt, seed: int) -> Any:
            return self

        def reply(self, answer: str) -> Reply:
            return Reply(None)

    ((group,), pool) = play(Silent(), "5")
    plain = asyncio.run(Scripted(["5"]).sample([question()], 1, Sampling(max_tokens=8), 3))[0].rollouts[0]
    assert len(pool.calls) == 1 and replace(group.rollouts[0], turns=()) == plain
    ((group,), pool) = play(Retry(max_turns=1), "5")
    assert len(pool.calls) == 1 and replace(group.rollouts[0], turns=()) == plain


def test_a_cut_off_answer_ends_the_episode() -> None:
    ((group,), pool) = play(Retry("again"), None)
    assert group.rollouts[0].finish == "length" and len(pool.calls) == 1
    ((group,), _) = play(Retry("again"), "5", None)
    assert group.rollouts[0].finish == "length" and len(group.rollouts[0].segments) == 3


def verdict(completion: str, answer: str) -> Score:
    return Score(float(completion == answer), detail=f"{completion} is not it")


def test_feedback_of_a_verifier() -> None:
    ((group,), pool) = play(Feedback(verdict, wrong="no: {detail}"), "5", "4")
    assert group.rollouts[0].turns[1] == ("user", "no: 5 is not it") and len(pool.calls) == 2
    ((group,), pool) = play(Feedback(verdict), "4")
    assert len(pool.calls) == 1 and group.rollouts[0].finish == "stop", "a right answer ends the episode"
    ((group,), _) = play(Feedback(verdict, right="yes. again"), "4", "4")
    assert group.rollouts[0].turns[1][1] == "yes. again"


@dataclass
class Breaks:
    how: str
    max_turns = 2
    max_reply_chars = 20

    def begin(self, prompt: Prompt, seed: int) -> Any:
        return self

    async def reply(self, answer: str) -> Any:
        if self.how == "raises":
            raise KeyError("no such room")
        if self.how == "hangs":
            await asyncio.sleep(60)
        return "not a reply" if self.how == "lies" else Reply("x" * 1000, "tool")


@pytest.mark.parametrize(("how", "why"), [("raises", "KeyError: 'no such room'"), ("lies", "it returned 'not a reply' instead of a Reply"), ("hangs", "TimeoutError")])
def test_an_environment_that_fails_is_not_the_models_fault(how: str, why: str) -> None:
    pool = Scripted(["5"])
    (group,) = asyncio.run(Playing(pool, Breaks(how), RENDERER, 500, timeout_s=0.05).sample([question()], 1, Sampling(max_tokens=8), 3))
    (rollout,) = group.rollouts
    assert rollout.finish == "env_error" and why in rollout.prompt.meta["error"]


def test_a_long_reply_is_cut_with_a_mark_and_a_tool_speaks_as_a_tool() -> None:
    ((group,), _) = play(Breaks("talks"), "5", "4")
    role, said = group.rollouts[0].turns[1]
    assert role == "tool" and said == "x" * (20 - len(CUT)) + CUT
    assert "<|tool|>" + said in TOKENIZER.decode(group.rollouts[0].segments[1].ids)


def test_control_tokens_in_a_reply_are_text() -> None:
    ((group,), _) = play(Retry("<|im_end|><|assistant|>4"), "5", "4")
    ids = group.rollouts[0].segments[1].ids
    assert ids.count(EOS) == 1 and ids.count(TOKENIZER.convert_tokens_to_ids("<|assistant|>")) == 1, "the template's own, once each"


def test_an_episode_that_does_not_fit_ends() -> None:
    prompt = question()
    whole = len(prompt.ids) + 2 + 1 + len("again") + 2 + 8  # the answer and its end, <|user|> again <|im_end|> <|assistant|>, another answer
    assert len(play(Retry("again"), "5", "4", room=whole)[1].calls) == 2
    ((group,), pool) = play(Retry("again"), "5", "4", room=whole - 1)
    assert len(pool.calls) == 1 and group.rollouts[0].finish == "length"


def test_the_room_of_an_episode() -> None:
    assert longest(Retry("again", max_turns=3), 10, 8) == 10 + 8 + 2 * (5 + 64 + 8) and longest(Retry(max_turns=1), 10, 8) == 18


def test_plain_text_goes_on_as_text() -> None:
    plain = Renderer(TOKENIZER, chat=False)
    prompt = Prompt("q", plain.prompt("2+2").ids, text="2+2")
    ((group,), _) = play(Retry("\nno: "), "5", "4", renderer=plain, prompts=[prompt])
    assert TOKENIZER.decode(group.rollouts[0].segments[1].ids) == "\nno: "


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    """Templates that hide earlier reasoning do: the tokens would not be those that were sampled."""
    forgetful = create_tokenizer()
    forgetful.chat_template = (
        "{%- for m in messages -%}{%- if m['role'] != 'assistant' or loop.last -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
    renderer = Renderer(forgetful)
    prompt = Prompt("q", tuple(forgetful("<|user|>2+2<|im_end|><|assistant|>")["input_ids"]), text="2+2")
    with pytest.raises(TemplateError, match="renders earlier turns differently once a reply follows"):
        play(Retry("again"), "5", "4", renderer=renderer, prompts=[prompt])


def test_everything_else_is_the_pools_own() -> None:
    assert Playing(Scripted([]), Retry(), RENDERER, 100).metrics() == {"rollout/engines": 1.0}


def test_what_is_no_environment() -> None:
    check_environment(Retry())
    with pytest.raises(ValueError, match=r"object is no environment: it has no max_turns, max_reply_chars, begin\(prompt, seed\)"):
        check_environment(object())
    for make in (lambda: Retry(max_turns=0), lambda: Retry(" "), lambda: Feedback(verdict, max_turns=0)):
        with pytest.raises(ValueError, match="environment"):
            make()
    with pytest.raises(ValueError, match="asks for wish"):
        Feedback(lambda completion, wish: 1.0)


# -- rewards of turns, and what is made of them ------------------------------------------------------------------------------------
def test_rewards_of_turns() -> None:
    ((group,), _) = play(Retry("again"), "5", "4")
    (rollout,) = group.rollouts
    first, second, third = (OfTurn(verdict, turn) for turn in (0, 1, 2))
    assert [r(rollout).value for r in (first, second, third)] == [0.0, 1.0, 1.0]
    assert OfTurn(verdict, 2, missing=-1.0)(rollout) == -1.0
    assert OfTurn(verdict, 0)(replace(rollout, turns=())).value == 1.0, "a single turn has one answer"
    assert Signature.of("turn_1", first).wanted == ("rollout", "progress")
    with pytest.raises(ValueError, match="counts answers from 0"):
        OfTurn(verdict, -1)
    with pytest.raises(ValueError, match="one answer at a time"):
        OfTurn(lambda completions: [0.0], 0)


def scored(*pairs: tuple[float, float] | None) -> Group:
    """Two-turn episodes with their two rewards; None: it ended after the first answer, which was worth 0."""
    ((group,), _) = play(Retry("the critique"), "5", "4", n=len(pairs))
    out = []
    for rollout, pair in zip(group.rollouts, pairs, strict=True):
        if pair is None:
            rollout, pair = replace(rollout, segments=rollout.segments[:1], turns=rollout.turns[:1], finish="length"), (0.0, 0.0)
        out.append(replace(rollout, scores={"turn_1": Score(pair[0]), "turn_2": Score(pair[1])}, reward=pair[1], advantage=9.0))
    return replace(group, rollouts=tuple(out))


def test_the_last_answer_is_learnt_without_the_critique() -> None:
    group, *critiques = WithoutCritique()([scored((0.0, 1.0), (1.0, 0.0), None)], Demos(), 0, 0.0)
    assert [r.advantage for r in group.rollouts] == [pytest.approx(2 / 3), pytest.approx(-1 / 3), None], "less the mean of the first answers, all of them"
    batch = TokenBatch.from_sequences(to_rows([group]))
    one = batch.take([0])
    assert TOKENIZER.decode([*one.input_ids[:1], *one.target_ids]) == "<|user|>2+2<|im_end|><|assistant|>4<|im_end|>"
    assert TOKENIZER.decode(one.target_ids[one.trainable]) == "4<|im_end|>" and set(one.source[one.trainable].tolist()) == {int(Source.demo)}
    assert len(critiques) == 2 and all(isinstance(c, Demo) for c in critiques)
    said = TokenBatch.from_sequences(to_rows(critiques[:1]))
    assert TOKENIZER.decode(said.target_ids[said.trainable]) == "<|user|>the critique<|im_end|><|assistant|>"
    assert set(said.source[said.trainable].tolist()) == {int(Source.tool)} and "5<|im_end|>" in TOKENIZER.decode(said.input_ids)


def test_another_critique_changes_nothing_under_the_first_prompt() -> None:
    one, other = (
        WithoutCritique(critiques=False)([replace(g, rollouts=tuple(replace(r, segments=(r.segments[0], replace(r.segments[1], ids=ids), r.segments[2])) for r in g.rollouts))], Demos(), 0, 0.0)
        for g in [scored((0.0, 1.0))]
        for ids in ((5, 6), (7, 8, 9))
    )
    assert one == other


def test_all_right_at_last_still_teaches() -> None:
    """With the mean of the first answers as baseline; with that of the last ones every advantage would be 0."""
    (group, *_) = WithoutCritique()([scored((0.0, 1.0), (0.0, 1.0))], Demos(), 0, 0.0)
    assert [r.advantage for r in group.rollouts] == [1.0, 1.0]
    (group, *_) = WithoutCritique()([scored((0.0, 1.0), None)], Demos(), 0, 0.0)
    assert group.dropped is None, "one second answer is enough"
    (group,) = WithoutCritique()([scored(None, None)], Demos(), 0, 0.0)
    assert group.dropped == "no_second_answer"
    with pytest.raises(ValueError, match="has no reward 'turn_9'"):
        WithoutCritique(last="turn_9")([scored((0.0, 1.0))], Demos(), 0, 0.0)


def test_the_loss_of_both(tmp_path: Path) -> None:
    from posttrain.loss import load

    items = WithoutCritique()([scored((0.0, 1.0), (1.0, 0.0))], Demos(), 0, 0.0)
    batch = TokenBatch.from_sequences(to_rows(items))
    flat = batch.weight * 0.0 - 1.0
    weights = load("rltf").weights(batch.with_logps(current=flat))
    up, down = (float(weights[(batch.seq == i) & batch.trainable].sum()) for i in (0, 1))
    assert up > 0 > down and up == pytest.approx(-down), "the baseline is the mean of the first answers, 1/2"
    assert float(weights[batch.source == int(Source.tool)].sum()) == pytest.approx(0.1), "lambda, shared by all tokens of critiques"


class Routed(Scripted):
    """Also says which experts read the tokens: the number of the call, in its one layer; the last token was never read."""

    def _one(self, prompt: Prompt, name: str, said: str | None, sampling: Sampling) -> Rollout:
        found = super()._one(prompt, name, said, sampling)
        experts = torch.full((len(prompt.ids) + found.num_tokens, 1, 1), len(self.calls), dtype=torch.int16)
        experts[-1] = NO_EXPERT
        return replace(found, routing=experts)


def test_experts_of_an_episode_are_those_that_sampled_it() -> None:
    pool = Routed(["5", "4"])
    (group,) = asyncio.run(Playing(pool, Retry("try again"), RENDERER, 500).sample([question()], 1, Sampling(max_tokens=8), 0))
    (rollout,) = group.rollouts
    first, between, second = (len(s.ids) for s in rollout.segments)
    seen = rollout.routing[:, 0, 0].tolist()  # type: ignore[index]
    asked = len(rollout.prompt.ids)
    # the last token of the first answer was read when the second was sampled
    assert seen == [1] * (asked + first - 1) + [2] * (1 + between + second - 1) + [NO_EXPERT]
    scored = replace(rollout, scores={"first": Score(0.0), "second": Score(1.0)}, reward=1.0)
    (learnt, *_) = WithoutCritique("first", "second")([replace(group, rollouts=(scored,))], Demos(), 0, 0.0)
    assert learnt.rollouts[0].advantage is not None and learnt.rollouts[0].routing is None, "without the critique nobody has read it"
