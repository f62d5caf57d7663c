"""What ``posttrain --help`` says: the commands by example, the recipes and the groups there are."""

from __future__ import annotations

import textwrap

from posttrain.paths import CONFIGS, RECIPES

COMMANDS = {
    "train": "run a recipe: the stages in order, each from the last one's weights",
    "eval": "held-out accuracy of a model, with an interval",
    "export": "a checkpoint of a run as a Hugging Face folder",
    "explain": "the objective as an equation with every number, its sources, the weight it gives a token, and which settings cannot act",
    "methods": "every loss, advantage and mixture there is, with its terms",
    "doctor": "check machine, settings, memory, data and chat template before a run; starts nothing",
    "preview": "a row of the data in colour: what is learnt from, token by token",
}
GROUPS = {
    "model": "where the weights come from",
    "data": "what is learnt from, what is held out",
    "rollout": "how answers are made: sampled, or the data as it is",
    "reward": "what makes a sampled answer good",
    "advantage": "from rewards to what the loss multiplies with",
    "mixture": "which data a step uses",
    "loss": "the objective",
    "learner": "optimizer, sharding, batch",
    "critic": "a second model that says what states are worth",
    "sync": "how new weights reach the engines",
    "cluster": "this machine, its GPUs, or a Ray cluster",
    "tracking": "where metrics go beside metrics.jsonl",
}
WORDS = """\
words
  recipe=NAME           a recipe of the list below, or a path to your own YAML
  GROUP=CHOICE          another file of a group: loss=dapo, cluster=gpu
  key.key=value         any single setting: learner.lr=1e-5, data.train.path=my.jsonl, 'rollout.stop=["\\n\\n"]'
  stages.NAME.key=value the same for one stage of a recipe that has several; '~stages.NAME' leaves that stage out
  --cfg job             print every setting as composed, and do nothing
  --config-dir FOLDER   groups of your own: FOLDER/loss/mine.yaml is then loss=mine
  --traceback           show where an error came from
"""
PAGES = {
    "train": """\
posttrain train [recipe=NAME] [words]

  posttrain train recipe=quickstart                                 a small model learns on this machine, about four minutes
  posttrain train recipe=sft model.path=FOLDER data.train.path=my.jsonl
  posttrain train recipe=gsm8k_grpo model.path=FOLDER loss=dapo rollout.n=16
  posttrain train recipe=quickstart stages.grpo.steps=200           one stage's setting
  posttrain train recipe=my.yaml cluster=gpu learner.world_size=4   your own recipe, on GPUs
  posttrain train recipe=my.yaml cluster.address=HOST:6379          on a Ray cluster that is running
  posttrain train recipe=... run_dir=FOLDER resume=auto             go on after a crash, from the last whole checkpoint
  posttrain train recipe=quickstart --multirun seed=0,1,2           one run after the other; stages.grpo.learner.lr=1e-4,2e-4 works too

Settings and data are checked first; a run that cannot work ends there, before anything is started.
""",
    "eval": """\
posttrain eval [recipe=NAME] model.path=FOLDER [words]

  posttrain eval recipe=quickstart model.path=runs/NAME/export/grpo
  posttrain eval recipe=gsm8k_grpo model.path=FOLDER eval.limit=1000 eval.max_tokens=512
  posttrain eval data=gsm8k reward=number model.path=FOLDER eval.n=8 eval.temperature=0.8

The prompts are data.eval, the verifier is reward (eval.metric names one of several), as the recipe's last stage has them.
""",
    "export": """\
posttrain export run_dir=FOLDER [stage=NAME] [step=N] [out=FOLDER] [cluster.KEY=VALUE]

  posttrain export run_dir=runs/NAME                   the newest whole checkpoint of the last stage that has one
  posttrain export run_dir=runs/NAME stage=sft step=60 out=my-model
""",
    "explain": """\
posttrain explain loss=NAME | recipe=NAME [words]

  posttrain explain loss=dapo
  posttrain explain loss=grpo loss.streams.rollouts.masks.clip.high=0.28
  posttrain explain recipe=quickstart stages.grpo.learner.updates_per_batch=2
  posttrain explain loss=luffy png=weights.png

Beside the equation: its paper, what releases do differently, and the weight of a token drawn over its probability and its advantage; png=FILE draws
the same as an image, of a recipe too.
""",
    "methods": """\
posttrain methods [WORD ...]

  posttrain methods
  posttrain methods kl base           what has both words in its name, its notes or its terms
  posttrain methods 2503.14476        what comes from a paper

posttrain explain loss=NAME says more about one; docs/methods.md is the same list as a page.
""",
    "doctor": """\
posttrain doctor [recipe=NAME] [words]

  posttrain doctor                                     the machine alone
  posttrain doctor recipe=sft model.path=FOLDER data.train.path=my.jsonl
  posttrain doctor recipe=my.yaml cluster=gpu

Exit code 0 when no error was found, 2 otherwise.
""",
    "preview": """\
posttrain preview [recipe=NAME] [words]

  posttrain preview recipe=quickstart
  posttrain preview recipe=sft model.path=FOLDER data.train.path=my.jsonl data.loss_on=last_turn

Learnt tokens are bold and underlined; without colours they stand between [+ and +].
""",
}


def recipes() -> dict[str, str]:
    """Name -> its first sentence."""
    out = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text().split("\n", 1)[0].removeprefix("#").strip()
        out[path.stem] = first.split(".  ")[0].rstrip(".")
    return out


def groups() -> dict[str, list[str]]:
    """Group -> the choices it has."""
    return {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in sorted(CONFIGS.iterdir()) if folder.is_dir()}


def page(command: str | None = None) -> str:
    """The help of one command, or of all."""
    lines: list[str]
    if command is None:
        lines = [
            "posttrain: post-train a language model with one loss and swappable terms",
            "",
            "commands (posttrain COMMAND --help shows examples)",
        ]
        lines += [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
        lines += ["", "examples"]
        lines += [
            "  posttrain train recipe=quickstart                     a small model learns on this machine, about four minutes",
            "  posttrain doctor recipe=gsm8k_grpo model.path=FOLDER  what would go wrong with your model, before it does",
            "  posttrain train recipe=gsm8k_grpo model.path=FOLDER   and then the run",
            "  posttrain explain loss=dapo                           an objective as an equation",
        ]
    else:
        lines = [COMMANDS[command], "", *PAGES[command].rstrip().split("\n")]
    if command != "export":
        lines += ["", *WORDS.rstrip().split("\n"), "", "recipes"]
        lines += [f"  {name:<12} {text}" for name, text in recipes().items()]
        width = max(map(len, GROUPS))
        lines += ["", "groups and their choices"]
        for name, choices in groups().items():
            wrapped = textwrap.wrap(", ".join(choices), 100) or [""]
            lines += [f"  {name:<{width}}  {GROUPS.get(name, '')}", *(f"  {'':<{width}}    {line}" for line in wrapped)]
    return "\n".join(lines)
