"""Files to records: kinds, limits, counts, and messages; the real GSM8K files where they are at hand are read by the recipes' tests."""

import json

import pytest

from posttrain.data.files import DataError
from posttrain.data.load import SourceSpec, load_data
from posttrain.data.render import Renderer
from posttrain.data.rows import to_rows
from posttrain.records import Source, TokenBatch
from tests.data.conftest import TOOL_CHATML, make_bpe

QA = [{"question": "2+2?", "answer": "I add.\n#### 4"}, {"question": "3+3?", "answer": "I <<3+3=6>>add.\n#### 6"}]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learnt(demo, tokenizer):
    return tokenizer.decode([i for s in demo.segments for i, t in zip(s.ids, s.trainable, strict=True) if t])


def test_prompts_with_a_mapping_and_with_the_adapter(tmp_path, tiny):
    path = write(tmp_path / "a.jsonl", QA)
    raw, _ = load_data("prompts", {"path": path, "columns": {"prompt": "question", "answer": "answer"}}, tiny)
    assert raw[0].answer == QA[0]["answer"] and raw[0].text == "2+2?"
    prompts, report = load_data("prompts", {"path": path, "adapter": "gsm8k"}, tiny, name="data.train")
    assert [p.answer for p in prompts] == ["4", "6"] and prompts[0].meta["question"] == "2+2?"
    assert list(prompts[0].ids) == tiny.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert (report.name, report.read, report.kept) == ("data.train", 2, 2)
    again, _ = load_data("prompts", {"path": path, "adapter": "gsm8k"}, tiny)
    assert [p.id for p in again] == [p.id for p in prompts] and prompts[0].id != prompts[1].id


def test_demos_carry_the_id_of_their_prompt(tmp_path, tiny):
    spec = {"path": write(tmp_path / "a.jsonl", QA), "adapter": "gsm8k"}
    prompts, _ = load_data("prompts", spec, tiny)
    demos, report = load_data("demos", spec, tiny)
    assert [d.prompt.id for d in demos] == [p.id for p in prompts] and demos[0].prompt.ids == prompts[0].ids
    assert learnt(demos[1], tiny) == "I add.\n#### 6<|im_end|>" and demos[1].prompt.answer == "6"
    assert report.trainable_tokens == sum(len("I add.\n#### 4") + 1 for _ in demos)
    batch = TokenBatch.from_sequences(to_rows(demos))
    assert int(batch.trainable.sum()) == report.trainable_tokens and set(batch.source[batch.trainable].tolist()) == {Source.demo}


def test_system_and_template_of_the_run_and_of_the_source(tiny):
    prompts, _ = load_data("prompts", {"source": [{"prompt": "x"}], "system": "own"}, tiny, system="run", prompt_template="{prompt}!")
    assert tiny.decode(prompts[0].ids) == "<|system|>own<|im_end|><|user|>x!<|im_end|><|assistant|>"


def test_messages_give_prompts_and_demos(tiny):
    demos, report = load_data("demos", [{"messages": TALK}, {"messages": TALK[:1]}, {"messages": []}], tiny)
    assert learnt(demos[0], tiny) == "hello<|im_end|>so long<|im_end|>" and [s.turn for s in demos[0].segments][-1] == 1
    assert report.dropped == {"no_trainable_tokens": 1, "empty": 1} and report.kept == 1
    last, _ = load_data("demos", [{"messages": TALK}], tiny, loss_on="last_turn")
    assert learnt(last[0], tiny) == "so long<|im_end|>"
    prompts, _ = load_data("prompts", [{"messages": TALK}], tiny)
    assert tiny.decode(prompts[0].ids).endswith("<|user|>bye<|im_end|><|assistant|>") and prompts[0].text == "bye"
    assert prompts[0].messages == tuple(TALK[:-1])


def test_text_rows_and_plain_tokenizers(plain_bpe):
    demos, _ = load_data("demos", [{"text": "The answer is 4."}], plain_bpe)
    assert learnt(demos[0], plain_bpe) == "The answer is 4.<|im_end|>" and demos[0].prompt is None
    demos, report = load_data(
        "demos", [{"prompt": "What is", "completion": " 4", "finish": "length"}, {"prompt": "a", "completion": " "}], plain_bpe
    )
    assert learnt(demos[0], plain_bpe) == " 4" and report.events["cut_off_answer"] == 1 and report.dropped == {"empty_answer": 1}
    with pytest.raises(DataError, match="data: the tokenizer has no chat template"):
        load_data("demos", [{"messages": TALK}], plain_bpe)


@pytest.mark.parametrize("truncation", ["error", "drop", "end"])
def test_nothing_is_cut_silently(tiny, truncation):
    rows = [{"prompt": "p", "completion": "x" * n} for n in (3, 30)]
    if truncation == "error":
        with pytest.raises(
            DataError, match=r"row 1 \(id \w+\) has 35 tokens, more than max_length=20; raise the limit, or set truncation=drop"
        ):
            load_data("demos", rows, tiny, max_length=20)
        return
    demos, report = load_data("demos", rows, tiny, max_length=20, truncation=truncation)
    report.check()
    if truncation == "drop":
        assert report.dropped == {"too_long": 1} and report.truncated == 0 and len(demos) == 1
    else:
        assert report.truncated == 1 and report.dropped == {} and report.lengths == [8, 20]
        assert learnt(demos[1], tiny) == "x" * 16, "cut at the end, and no end-of-turn token invented"
    assert f"{report.dropped['too_long']} dropped (too_long)" in str(report) or "1 truncated" in str(report)


def test_a_cut_that_leaves_nothing_to_learn_drops_the_row(tiny):
    demos, report = load_data(
        "demos", [{"prompt": "p" * 30, "completion": "x"}, {"prompt": "p", "completion": "x"}], tiny, max_length=20, truncation="end"
    )
    assert len(demos) == 1 and report.dropped == {"no_trainable_tokens": 1}


def test_long_prompts_are_an_error_or_dropped_but_never_cut(tiny):
    rows = [{"prompt": "short", "id": "a"}, {"prompt": "p" * 40, "id": "b"}]
    for truncation in ("error", "end"):
        with pytest.raises(DataError, match=r"data\.train: the prompt of row 1 \(id b\) has 43 tokens, more than max_prompt_tokens=16"):
            load_data("prompts", rows, tiny, max_prompt_tokens=16, truncation=truncation, name="data.train")
    prompts, report = load_data("prompts", rows, tiny, max_prompt_tokens=16, truncation="drop")
    assert [p.id for p in prompts] == ["a"] and report.dropped == {"too_long": 1}
    with pytest.raises(DataError, match=r"no usable row \(data: 2 rows read, 0 kept; 2 dropped \(too_long\)\)"):
        load_data("prompts", rows, tiny, max_prompt_tokens=3, truncation="drop")


def test_worlds_are_sources(tiny):
    from posttrain.data.worlds import Arithmetic

    world = Arithmetic(num=5)
    prompts, report = load_data("prompts", {"source": world, "limit": 3}, tiny)
    demos, _ = load_data("demos", world, tiny)
    assert len(prompts) == report.read == 3 and len(demos) == 5
    assert prompts[0].env == world.name and prompts[0].level in world.levels and prompts[0].id == demos[0].prompt.id == demos[0].id


def test_repeated_ids_are_told_apart_and_counted(tiny):
    prompts, report = load_data("prompts", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], tiny)
    assert [p.id for p in prompts] == ["1", "1#2"] and report.events["repeated_ids"] == 1


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("prompts", {"path": "/no/such/file.jsonl"}, r"data\.train: no such data file"),
        ("prompts", [], r"data\.train is empty: list holds no rows"),
        ("prompts", {"pth": "x"}, r"unknown key data\.train\.pth; did you mean data\.train\.path"),
        ("prompts", {"split": "x"}, r"data\.train needs exactly one of data\.train\.path"),
        ("prompts", None, r"data\.train is not set"),
        ("prompts", [{"question": "x"}], r"row 0 cannot be read as a prompt.*try columns=\{prompt: question\}"),
        ("demos", [{"prompt": "x", "answer": "y"}], r"row 0 cannot be read as a demonstration.*try columns=\{completion: answer\}"),
        ("pairs", [{"prompt": "x", "chosen": "y"}], r"no column 'rejected'"),
        ("demos", [{"prompt": "x", "completion": "y", "weight": float("nan")}], "weights must be finite"),
        ("pairs", [{"prompt": "x", "chosen": "y", "rejected": "z", "weight": -1}], "weights must be finite"),
        ("prompts", {"source": [{"prompt": "x"}], "adapter": "gsm9k"}, "unknown adapter 'gsm9k'; known: gsm8k"),
        ("rows", [{"prompt": "x"}], "unknown kind 'rows'"),
        ("pairs", [{"prompt": "x", "chosen": "y", "rejected": []}], "must both be text or both be lists"),
    ],
)
def test_messages_name_the_setting(tiny, kind, source, message):
    with pytest.raises(DataError, match=message):
        load_data(kind, source, tiny, name="data.train")


def test_file_order_and_renderer_settings_reach_the_records(tmp_path, tiny):
    spec = SourceSpec(
        path=write(tmp_path / "a.jsonl", QA), columns={"prompt": "question", "completion": "answer"}, chat=False, add_eos=False
    )
    demos, _ = load_data("demos", spec, tiny)
    assert tiny.decode([i for s in demos[0].segments for i in s.ids]) == QA[0]["question"] + QA[0]["answer"]


# -- pairs ---------------------------------------------------------------------------------------------------------------
def sides(pair, tokenizer):
    return tokenizer.decode(pair.chosen.prompt.ids), learnt(pair.chosen, tokenizer), learnt(pair.rejected, tokenizer)


def assistant(text):
    return {"role": "assistant", "content": text}


USER = {"role": "user", "content": "2+2?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": "2+2?", "chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")]},
        {"chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")]},
    ],
)
def test_pair_forms_agree(tiny, row):
    pairs, report = load_data("pairs", [row], tiny)
    assert sides(pairs[0], tiny) == ("<|user|>2+2?<|im_end|><|assistant|>", "4<|im_end|>", "5<|im_end|>")
    assert (report.read, report.trainable_tokens) == (1, 4)
    batch = TokenBatch.from_sequences(to_rows(pairs))
    assert batch.side.tolist() == [1, -1] and batch.pair.tolist() == [0, 0]
    assert pairs[0].chosen.prompt.ids == Renderer(tiny).prompt("2+2?").ids


def test_pairs_compare_only_what_follows_the_common_turns(tiny):
    before = [USER, assistant("4"), {"role": "user", "content": "sure?"}]
    pairs, _ = load_data("pairs", [{"chosen": [*before, assistant("yes")], "rejected": [*before, assistant("no")]}], tiny)
    assert sides(pairs[0], tiny)[1:] == ("yes<|im_end|>", "no<|im_end|>")
    longer, _ = load_data("pairs", [{"chosen": [USER, assistant("4")], "rejected": [USER, assistant("4"), USER, assistant("5")]}], tiny)
    assert sides(longer[0], tiny)[1:] == ("4<|im_end|>", "4<|im_end|>5<|im_end|>")


def test_plain_pairs_without_prompt_share_their_beginning(plain_bpe, bpe):
    row = {"chosen": "Human: What is 2 + 2?\n\nAssistant: The answer is 4.", "rejected": "Human: What is 2 + 2?\n\nAssistant: The ant"}
    for tokenizer in (plain_bpe, bpe):
        [pair], _ = load_data("pairs", [row], tokenizer)
        assert sides(pair, tokenizer) == ("<s>Human: What is 2 + 2?\n\nAssistant: The", " answer is 4.<|im_end|>", " ant<|im_end|>")


def test_pairs_without_contrast_are_dropped_and_counted(tiny):
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "x"},
        {"prompt": "a", "chosen": "x", "rejected": ""},
        {"prompt": "a", "chosen": "x" * 9 + "y", "rejected": "x" * 9 + "z"},
        {"prompt": "p" * 20, "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
    ]
    pairs, report = load_data("pairs", rows, tiny, max_length=10, truncation="end")
    assert len(pairs) == 1 and report.dropped == {"identical": 2, "empty_answer": 1, "no_trainable_tokens": 1}
    with pytest.raises(DataError, match=r"the chosen side of row 2 .*max_length=10"):
        load_data("pairs", rows, tiny, max_length=10)


def test_gsm8k_pairs_count_questions_without_contrast(tiny):
    def row(*marks):
        return {"question": "Q", **{f"m{i}": {"is_correct": ok, "solution": f"s{i}"} for i, ok in enumerate(marks)}}

    pairs, report = load_data("pairs", {"source": [row(True, False), row(True, True)], "adapter": "gsm8k_pairs"}, tiny)
    assert sides(pairs[0], tiny)[1:] == ("s0<|im_end|>", "s1<|im_end|>")
    assert (report.read, report.kept, report.dropped) == (2, 1, {"no_contrast": 1})


def test_tools_column_reaches_the_template(tmp_path):
    tokenizer = make_bpe(TOOL_CHATML)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    row = {"messages": json.dumps([USER, call, {"role": "tool", "content": "7"}, assistant("7")]), "tools": json.dumps([{"name": "f"}])}
    demos, _ = load_data("demos", write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert tokenizer.decode([i for s in demos[0].segments for i in s.ids]).startswith('<|im_start|>system\nTools:\n{"name": "f"}')
    assert learnt(demos[0], tokenizer) == '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|im_end|>7<|im_end|>'
    assert any(s.source is Source.tool for s in demos[0].segments)


def test_labels_scores_and_margins_reach_the_rows(tiny):
    demos, _ = load_data("demos", [{"prompt": "a", "completion": "b", "label": False, "score": 2}], tiny)
    (row,) = to_rows(demos)
    assert row.rewards == {"label": 0.0, "score": 2.0}
    given = {"prompt": "a", "chosen": "b", "rejected": "c", "label": 0.8, "strength": 3, "score_chosen": 5, "score_rejected": 1.5}
    columns = {"margin": "strength", "chosen_score": "score_chosen", "rejected_score": "score_rejected"}
    pairs, _ = load_data("pairs", {"source": [given], "columns": columns}, tiny)
    chosen, rejected = to_rows(pairs)
    assert chosen.rewards == {"score": 5.0, "margin": 3.0, "label": 0.8}
    assert rejected.rewards == {"score": 1.5, "margin": 0.0}
