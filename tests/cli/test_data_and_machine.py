"""Data, models and machines that cannot serve: found before anything starts, in one message."""

from __future__ import annotations

import errno
import gzip
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from posttrain import checkpoint, cluster, folder
from posttrain import run as runs
from posttrain.config import ConfigError
from posttrain.preflight import reachable
from tests.cli.conftest import Said

Fails = Callable[..., str]
Rows = Callable[..., Path]
UNMARKED = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
HIDING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|assistant|>...{% else %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]


# -- data ----------------------------------------------------------------------------------------------------------------------------
def test_a_missing_column_names_what_is_there(fails: Fails, model: Path, rows: Rows) -> None:
    path = rows({"question": "2+2?", "response": "4"})
    message = fails("train", "recipe=sft", f"model.path={model}", f"data.train.path={path}")
    assert re.search(
        r"data.train: row 0 cannot be read as a demonstration.*the row has: question, response; try columns=\{prompt: question", message
    )
    message = fails("train", "recipe=sft", f"model.path={model}", f"data.train.path={path}", "data.train.columns={prompt: quesion}")
    assert "has no column 'quesion' (columns.prompt=quesion); it has: question, response" in message


def test_an_empty_data_set(fails: Fails, model: Path, rows: Rows) -> None:
    assert "data.train is empty" in fails("train", "recipe=sft", f"model.path={model}", f"data.train.path={rows()}")
    blank = rows({"prompt": "a", "completion": ""})
    message = fails("train", "recipe=sft", f"model.path={model}", f"data.train.path={blank}")
    assert "data.train has no usable row" in message and "1 rows read, 0 kept; 1 dropped (empty_answer)" in message


def test_usable_rows_may_come_late(posttrain: Callable[..., Said], model: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.preflight.ROWS", 2)
    path = rows(*[{"prompt": "a", "completion": ""}] * 2, {"prompt": "a", "completion": "b"})
    said = posttrain("train", "recipe=sft", f"model.path={model}", f"data.train.path={path}")
    assert "a cluster was started" in said.err, "the run goes on: its rows are read when the stage begins"


def test_a_missing_file_names_its_neighbours(fails: Fails, model: Path, rows: Rows) -> None:
    there = rows({"prompt": "a", "completion": "b"})
    message = fails("train", "recipe=sft", f"model.path={model}", f"data.train.path={there.with_name('row.jsonl')}")
    assert "no such data file" in message and "in that folder: rows.jsonl" in message
    assert "unknown key data.train.pth; did you mean data.train.path?" in fails(
        "train", "recipe=sft", f"model.path={model}", f"data.train.pth={there}"
    )


def test_a_damaged_file(fails: Fails, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert "bad.jsonl, line 2" in fails("train", "recipe=sft", f"model.path={model}", "data.train.path=bad.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 500)[:-20])
    assert "cut.jsonl.gz" in fails("train", "recipe=sft", f"model.path={model}", "data.train.path=cut.jsonl.gz")


def test_a_template_without_an_assistant_marker(fails: Fails, model: Path, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "unmarked.jinja").write_text(UNMARKED)
    path = rows({"messages": CHAT})
    given = ["train", "recipe=sft", f"model.path={model}", f"data.train.path={path}"]
    message = fails(*given, "model.chat_template=unmarked.jinja")
    assert "assistant message 0 cannot be told from the rest" in message and "put {% generation %} before" in message
    (tmp_path / "hiding.jinja").write_text(HIDING)
    message = fails(*given, "model.chat_template=hiding.jinja")
    assert "is rendered differently once later messages follow" in message and "loss_on=last_turn" in message
    assert "model.chat_template=none.jinja: there is no such file" in fails(*given, "model.chat_template=none.jinja")


def test_a_tokenizer_without_a_template(fails: Fails, model_without_template: Path, rows: Rows) -> None:
    message = fails("train", "recipe=sft", f"model.path={model_without_template}", f"data.train.path={rows({'messages': CHAT})}")
    assert "the tokenizer has no chat template; give one with model.chat_template (a file)" in message


def test_a_prompt_longer_than_its_limit(fails: Fails, model: Path, rows: Rows) -> None:
    path = rows({"prompt": "a" * 300, "answer": "1"})
    given = ["train", "recipe=grpo", f"model.path={model}", f"data.train.path={path}", "reward=number", "rollout.max_tokens=8"]
    message = fails(*given, "data.max_prompt_tokens=100")
    assert "the prompt of row 0" in message and "more than max_prompt_tokens=100" in message


def test_a_prompt_longer_than_the_context(fails: Fails, model: Path, rows: Rows) -> None:
    prompt, demo = rows({"prompt": "a", "answer": "1"}), rows({"prompt": "a", "completion": "b" * 300}, name="demos.jsonl")
    message = fails(
        "train",
        "recipe=grpo",
        f"model.path={model}",
        f"data.train.path={prompt}",
        "reward=number",
        "data.max_prompt_tokens=200",
        "rollout.max_tokens=100",
    )
    assert "the model's context is 256 tokens, but data.max_prompt_tokens=200 and answers of 100 need 301" in message
    message = fails("train", "recipe=sft", f"model.path={model}", f"data.train.path={demo}")
    assert "more than the model's context of 256; set data.max_length=256" in message
    message = fails("eval", "recipe=quickstart", f"model.path={model}", "eval.max_tokens=999")
    assert "the model's context is 256 tokens" in message


def test_experts_of_a_model_that_has_none(fails: Fails, model: Path, rows: Rows) -> None:
    words = ["train", "recipe=grpo", f"model.path={model}", f"data.train.path={rows({'prompt': 'a', 'answer': '1'})}", "reward=number", "data.max_prompt_tokens=9", "rollout.max_tokens=8"]
    assert f"learner.routing=engine replays the experts of a mixture, and the settings of {model} name none; set learner.routing=own" in fails(*words, "learner.routing=engine")


def test_words_that_force_an_answer_need_room(fails: Fails, model: Path, rows: Rows) -> None:
    path = rows({"prompt": "a", "answer": "1"})
    given = ["train", "recipe=grpo", f"model.path={model}", f"data.train.path={path}", "reward=number", "loss=s_grpo", "advantage=serial", "rollout=exits", "rollout.n=1"]
    given += ["data.max_prompt_tokens=100", "rollout.max_tokens=50", "rollout.strategy.answer_tokens=20"]
    message = fails(*given, "rollout.strategy.text='" + "a" * 90 + "'")
    assert "the model's context is 256 tokens, but data.max_prompt_tokens=100 and answers of 50 need 261 with 110 of forced answers" in message
    message = fails(*given, "rollout.max_model_len=160", "rollout.strategy.text='" + "a" * 140 + "'")
    assert "rollout.max_model_len=160 leaves no room for the words that force an answer and the answer (160 tokens)" in message


def test_the_second_stage_is_looked_at_too(fails: Fails) -> None:
    message = fails("train", "recipe=quickstart", "stages.grpo.data.max_prompt_tokens=3")
    assert message.startswith("stage grpo: data.") and "max_prompt_tokens=3" in message


# -- models --------------------------------------------------------------------------------------------------------------------------
def test_a_model_that_does_not_exist(fails: Fails, model: Path, tmp_path: Path) -> None:
    given = ["train", "recipe=quickstart"]
    assert "model.path=/nowhere/model: there is no such folder" in fails(*given, "model.path=/nowhere/model")
    assert "init_from=./nowhere: there is no such folder" in fails(*given, "init_from=./nowhere")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no model (no config.json)" in fails(*given, "model.path=empty")
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "the folder holds no *.safetensors file" in fails(*given, "model.path=bare")
    shutil.copytree(model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "the folder holds no tokenizer (tokenizer.json)" in fails(*given, f"model.path={tmp_path / 'mute'}")


def test_code_of_a_model_is_not_run(fails: Fails, model: Path, rows: Rows, tmp_path: Path) -> None:
    copy = tmp_path / "evil"
    shutil.copytree(model, copy)
    settings = json.loads((copy / "config.json").read_text()) | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nfrom transformers import Qwen3Config as Config\n")
    data = rows({"prompt": "a", "completion": "b"})
    message = fails("train", "recipe=sft", f"model.path={copy}", f"data.train.path={data}")
    assert message.startswith(f"model.path={copy}: the model brings code of its own, which is not run; model.trust_remote_code=true")
    assert not (tmp_path / "run").exists()


def test_a_name_that_the_hub_does_not_know(fails: Fails, posttrain: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    message = fails("train", "recipe=quickstart", "model.path=somebody/something")
    assert "model.path=somebody/something is neither a folder here" in message and message.endswith("We couldn't connect to the hub")
    said = posttrain("doctor", "recipe=quickstart", "model.path=somebody/something")
    assert said.code == 2 and "ERROR   model.path=somebody/something is neither a folder here" in said.out


# -- machines ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("word", ["cluster=gpu", "cluster.device=cuda"])
def test_gpus_where_there_are_none(fails: Fails, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    message = fails("train", "recipe=quickstart", word)
    assert "the run asks for 2 GPUs and this machine has 0; use cluster=cpu" in message
    assert "asks for 1 GPUs" in fails("eval", "recipe=quickstart", word)


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """A port where somebody accepts, and says ``answer``; ``None`` says nothing for as long as the test takes."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(24)
                if answer is None:
                    over.wait(20)
                else:
                    link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


def test_a_cluster_address_where_nothing_answers(fails: Fails) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    for command in ("train", "eval"):
        message = fails(command, "recipe=quickstart", f"cluster.address=127.0.0.1:{free}")
        assert (
            f"cluster.address=127.0.0.1:{free}: no Ray cluster answers there (Connection refused); start one with 'ray start --head'"
            in message
        )
    assert "write HOST:PORT" in fails("train", "recipe=quickstart", "cluster.address=somewhere")


def test_a_port_in_use_by_something_else(fails: Fails) -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert "that port is in use by something that is not Ray" in fails("train", "recipe=quickstart", f"cluster.address={address}")
    with listener(None) as address, pytest.raises(ConfigError, match=r"no Ray cluster answers there within 0\.2 s"):
        reachable(address, timeout_s=0.2)


def test_what_speaks_like_ray_passes() -> None:
    with listener(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as address:
        reachable(address)
    reachable("auto")


# -- disks ---------------------------------------------------------------------------------------------------------------------------
def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere/file")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def stages(_: Any, there: Any, *__: Any) -> None:
        async def fill(folder: Path) -> None:
            (folder / "half").write_text("x")
            full()

        await checkpoint.write(there.of("checkpoints", "sft"), 20, fill, {})

    monkeypatch.setattr(cluster, "session", lambda *_: nullcontext())
    monkeypatch.setattr(runs, "_stages", stages)
    message = fails("train", "recipe=quickstart", "run_dir=mine")
    assert "the checkpoint of step 20 could not be written" in message and "No space left on device" in message
    assert "Free some disk space or set run_dir to another disk" in message and "resume=auto" in message
    assert list((tmp_path / "mine" / "checkpoints" / "sft").iterdir()) == []
    assert "could not be written" in (tmp_path / "mine" / "summary.json").read_text()


def test_a_disk_that_is_full_when_a_stage_ends(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stages(_: Any, there: Any, *__: Any) -> None:
        there.finish_stage("sft", {})

    monkeypatch.setattr(cluster, "session", lambda *_: nullcontext())
    monkeypatch.setattr(runs, "_stages", stages)
    monkeypatch.setattr(folder, "write_json", full)
    message = fails("train", "recipe=quickstart", "run_dir=mine")
    assert (
        message
        == "no space left on the disk: somewhere/file; free some, or set run_dir to another disk; a run goes on with the same command and resume=auto"
    )


def test_what_ends_a_run_says_from_where_it_goes_on(posttrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def stages(_: Any, there: Any, *__: Any) -> None:
        async def fill(folder: Path) -> None:
            (folder / "weights").write_text("x")

        await checkpoint.write(there.of("checkpoints", "grpo"), 20, fill, {})
        (there.root / "error.txt").mkdir()  # as on a full disk: what is written beside the error must not hide it
        raise RuntimeError("the learner died")

    monkeypatch.setattr(cluster, "session", lambda *_: nullcontext())
    monkeypatch.setattr(runs, "_stages", stages)
    said = posttrain("train", "recipe=quickstart", "run_dir=mine")
    assert said.code == 1 and "the learner died" in said.err and "Traceback" not in said.err
    assert "the same command with run_dir=mine resume=auto goes on from mine/checkpoints/grpo/step_00000020" in said.err


def test_a_folder_where_nothing_may_be_written(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = fails("train", "recipe=quickstart", "run_dir=file/mine")
    assert "file/mine" in message
