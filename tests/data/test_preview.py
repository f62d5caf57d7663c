"""What a preview shows: every token once, the learnt ones marked."""

import io

from rich.console import Console

from posttrain.data.load import load_data
from posttrain.data.preview import length_statistics, preview, runs_of
from posttrain.data.report import Report
from posttrain.records import Group, Prompt, Rollout, Segment, Source


def shown(record, tokenizer, **kw):
    out = io.StringIO()
    preview(record, tokenizer, Console(file=out, width=200, **kw))
    return out.getvalue()


def test_every_record_type(tiny):
    [demo], _ = load_data("demos", [{"prompt": "2+2?", "completion": "[4]", "id": "d"}], tiny)
    assert shown(demo, tiny) == "demonstration d 11 tokens, 4 learnt\n<|user|>2+2?<|im_end|><|assistant|>[+[4]<|im_end|>+]\n"
    [pair], _ = load_data("pairs", [{"prompt": "a", "chosen": "x", "rejected": "y", "id": "p"}], tiny)
    assert "[+x<|im_end|>+]" in shown(pair, tiny) and "rejected p" in shown(pair, tiny)
    [prompt], _ = load_data("prompts", [{"prompt": "2+2?", "answer": "4", "id": "q"}], tiny)
    assert shown(prompt, tiny).startswith("prompt q, answer '4' 7 tokens, 0 learnt")
    policy = Segment(tuple(tiny("4")["input_ids"]), Source.policy, logprobs=(-1.0,), version=0)
    tool = Segment(tuple(tiny("out")["input_ids"]), Source.tool)
    group = Group(prompt, (Rollout("q/0", prompt, (policy, tool), reward=1.0),))
    assert "rollout q/0, reward 1.0 11 tokens, 1 learnt" in shown(group, tiny) and "[+4+]out" in shown(group, tiny)


def test_terminals_get_colours_instead_of_marks(tiny):
    [demo], _ = load_data("demos", [{"prompt": "a", "completion": "b"}], tiny)
    text = shown(demo, tiny, force_terminal=True, color_system="standard")
    assert "[+" not in text and "\x1b[1;4;32mb" in text


def test_runs_lose_no_token(tiny):
    [demo], _ = load_data("demos", [{"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]}], tiny)
    runs = runs_of(demo.segments, tiny)
    assert "".join(text for text, *_ in runs) == tiny.decode([i for s in demo.segments for i in s.ids])
    assert [flag for _, _, flag, _ in runs] == [False, True, False, True]


def test_length_statistics():
    report = Report()
    for n in (1, 15, 16, 40, 40):
        report.keep(n)
    lines = length_statistics(report).splitlines()
    assert "50% 16" in lines[0] and "max 40" in lines[0]
    assert [line.split()[:4] for line in lines[1:]] == [["0", "to", "15", "2"], ["16", "to", "31", "1"], ["32", "to", "63", "2"]]
    assert length_statistics(Report()) == "no rows" and Report().quantile(0.5) == 0
    assert Prompt("a", ()).ids == ()
