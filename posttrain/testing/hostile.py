"""Texts a model may write that have broken verifiers before.  A verifier must give each a score, soon, without an exception.

Use it on your own: ``for text in HOSTILE: assert my_reward(completion=text, answer="4") == 0``.  None of the texts holds the answer.
"""

HOSTILE: tuple[str, ...] = (
    "",
    " \n\t ",
    "x" * 1_000_000,
    "\x00",
    "ok\x00\x00ok",
    "\ud800 lone surrogate",
    "\u202eright to left\u202c",
    "{" * 300 + "}" * 299,
    "\\boxed{" * 300,
    "\\boxed{" + "{" * 500 + "}" * 400,
    "(" * 300,
    "9**9**9**9",
    "__import__('os').system('echo harm')",
    "'; rm -rf / #",
    "$(echo harm)",
    "<answer>",
    "</answer><answer>",
    "<think>...</think",
    "<answer>your answer here",
    "{answer}",
    "1 2 3 5 6 7 8 9 10 11",
    ">>>>>>>>",
    ",,,,=====",
    "nan",
    "inf",
    "1e999999999",
    "%s%s%s%n",
    "\N{ARABIC-INDIC DIGIT FIVE}\N{SUPERSCRIPT TWO}",
)
