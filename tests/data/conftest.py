"""Tokenizers made on the spot: characters (the tiny model's), and a byte-level BPE with merges, BOS and several templates."""

import pytest

from posttrain.testing.tiny import create_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEXT = [
    "What is 2 + 2?\nAnswer: 4.\n\nThe answer is 4 .",
    "user assistant system tool\n",
    "a\n\n\n\nb\n\n\nThe",
    'Weather in Paris: {"name": "f", "arguments": {"a": 1}}\n\n',
] * 20

PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL_CHATML = """
{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}{%- generation %}
        {%- if m.content %}{{- m.content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}{%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def unmarked(template: str) -> str:
    """The same template without generation marks."""
    return template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


def make_bpe(template: str | None = None, *, bos: bool = True, eos: str = "<|im_end|>", pad: str = "<|pad|>"):
    """A trained byte-level BPE.  ``bos``: the tokenizer adds ``<s>`` before every text, as Llama's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    raw.add_tokens(["<tool_call>", "</tool_call>"])
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def tiny():
    return create_tokenizer()


@pytest.fixture(scope="session")
def bpe():
    return make_bpe(TOOL_CHATML)


@pytest.fixture(scope="session")
def plain_bpe():
    return make_bpe(None)
