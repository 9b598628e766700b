"""cottention generate: the text on stdout while it is written, figures on stderr, a mistake in one line alone."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cottention.cli.main import main
from cottention.generation import generate_text, load_model_and_tokenizer
from tests import tiny
from tests.forks import Fork, start_fork

PROMPT = "The people"
AT_LEAST_ONE = "max_new_tokens must be at least 1 (0 reads only, with --save-state)"
# A shell's background job ignores Ctrl-C, and so would its children.
_START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from cottention.cli.main import entry_point
entry_point()
"""
COMMAND = [sys.executable, "-c", _START, "generate"]


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    assert main(["generate", *map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, *words, code=2)
    assert out == ""
    assert err.startswith("cottention generate: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("cottention generate: error: ").rstrip("\n")


@pytest.fixture(scope="module")
def expected(gpt_dir: Path) -> Any:
    """What the library writes."""
    model, tokenizer = load_model_and_tokenizer(gpt_dir, "causal-lm")
    return lambda prompts, **settings: generate_text(model, tokenizer, prompts, **{"max_new_tokens": 9, **settings})


def test_one_prompt_is_echoed_and_continued(gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "--model", gpt_dir, "--prompt", PROMPT, "--max-new-tokens", 9)
    assert out == f"{PROMPT}{expected(PROMPT).texts[0]}\n"
    figures = r"read 2 tokens in \d+\.\d\d s, wrote 9 in \d+\.\d\d s \(\d+ tokens/s\), state 4,\d\d\d bytes\n"
    assert re.fullmatch(rf"(cosine attention runs as '\w+'\n)?{figures}", err)
    out, _ = run(capsys, "--model", gpt_dir, "--prompt", PROMPT, "--max-new-tokens", 9, "--no-echo")
    assert out == f"{expected(PROMPT).texts[0]}\n"


class Terminal(io.StringIO):
    """Notes what each flush shows; somebody may press Ctrl-C after some of them."""

    def __init__(self, interrupt_after: int = 10**9) -> None:
        super().__init__()
        self.flushed: list[str] = []
        self.interrupt_after = interrupt_after

    def flush(self) -> None:
        if news := self.getvalue()[sum(map(len, self.flushed)) :]:
            self.flushed.append(news)
            if len(self.flushed) == self.interrupt_after:
                raise KeyboardInterrupt


def test_the_pieces_are_flushed_as_they_come(gpt_dir: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    expected(PROMPT, max_new_tokens=30, stream=pieces.append)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", "--model", str(gpt_dir), "--prompt", PROMPT, "--max-new-tokens", "30"]) == 0
    assert terminal.flushed == [PROMPT + pieces[0], *pieces[1:], "\n"]


def test_an_interrupt_keeps_what_was_written_and_ends_in_one_line(
    gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    expected(PROMPT, max_new_tokens=30, stream=pieces.append)
    terminal = Terminal(interrupt_after=3)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", "--model", str(gpt_dir), "--prompt", PROMPT, "--max-new-tokens", "30"]) == 130
    assert terminal.getvalue() == PROMPT + "".join(pieces[:3]) + "\n"
    assert capsys.readouterr().err.splitlines()[-1] == "cottention generate: error: interrupted"


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--seed", "5", "--temperature", "1.2"], {"seed": 5, "temperature": 1.2}),
        (["--top-k", "2"], {"top_k": 2}),
        (["--top-p", "0.4"], {"top_p": 0.4}),
        (["--repetition-penalty", "1.5"], {"repetition_penalty": 1.5}),
        (["--num-beams", "3"], {"num_beams": 3, "temperature": 0.0}),
        (["--prefill-chunk", "1"], {}),
        (["--device", "cpu"], {}),
    ],
)
def test_every_flag_reaches_the_library(
    gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str], flags: list[str], settings: dict[str, Any]
) -> None:
    out, _ = run(capsys, "--model", gpt_dir, "--prompt", PROMPT, "--max-new-tokens", 30, *flags)
    assert out.rstrip("\n") == f"{PROMPT}{expected(PROMPT, max_new_tokens=30, **settings).texts[0]}".rstrip("\n")


def test_stop_strings_end_the_text(gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole = expected(PROMPT, max_new_tokens=30).texts[0]
    flags = ["--model", gpt_dir, "--prompt", PROMPT, "--max-new-tokens", 30, "--stop", "no such text", whole[9]]
    assert run(capsys, *flags)[0] == f"{PROMPT}{whole[: whole.find(whole[9])]}\n"


def test_several_prompts_and_batches(gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["The people", "", "A 東"]
    flags = ["--model", gpt_dir, "--prompt", *prompts, "--max-new-tokens", 9]
    out, _ = run(capsys, *flags)
    whole = expected(prompts).texts
    assert out == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(prompts, whole, strict=True))
    out, _ = run(capsys, *flags, "--no-echo", "--batch-size", 2)
    halves = [*expected(prompts[:2]).texts, *expected(prompts[2:], seed=1).texts]
    assert out == "".join(f"{text}\n\n" for text in halves)


def test_json_is_one_object_a_line(gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["The people", "A 東京\nor"]
    out, _ = run(capsys, "--model", gpt_dir, "--prompt", *prompts, "--max-new-tokens", 9, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    for row, prompt, text in zip(rows, prompts, expected(prompts).texts, strict=True):
        assert (row["prompt"], row["text"], row["finish_reason"]) == (prompt, text, "length")
        assert row["num_new_tokens"] == 9
        assert {"num_prompt_tokens", "tokens_per_s", "state_bytes"} <= set(row)
    assert "東京" in out
    (only,) = run(capsys, "--model", gpt_dir, "--prompt", PROMPT, "--max-new-tokens", 9, "--json")[0].splitlines()
    assert json.loads(only)["text"] == expected(PROMPT).texts[0]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_prompt_from_a_file_or_stdin(
    gpt_dir: Path,
    expected: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    prompt = " Order!\n\n東京  and "  # its own white space stays
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + f"{prompt}{ending}".encode())
    flags = ["--model", gpt_dir, "--max-new-tokens", 9, "--prompt-file"]
    shown = f"{prompt}{expected(prompt).texts[0]}\n"
    assert run(capsys, *flags, tmp_path / "prompt.txt")[0] == shown
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{prompt}{ending}".encode())))
    assert run(capsys, *flags, "-")[0] == shown


def test_every_line_of_a_file_is_a_prompt_when_asked(
    gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("The people\n\n  \r\nOrder!\r\n")
    flags = ["--model", gpt_dir, "--prompt-file", tmp_path / "prompts.txt", "--each-line", "--max-new-tokens", 9]
    rows = [json.loads(line) for line in run(capsys, *flags, "--json")[0].splitlines()]
    assert [row["prompt"] for row in rows] == ["The people", "Order!"]
    assert [row["text"] for row in rows] == expected(["The people", "Order!"]).texts


def test_an_empty_prompt_starts_a_text(gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "--model", gpt_dir, "--prompt", "", "--max-new-tokens", 9)
    assert out == f"{expected('').texts[0]}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing --model"),
        (["--model"], "argument --model: expected one argument"),
        (["--model", "GPT"], "give either --prompt TEXT or --prompt-file FILE (- reads stdin)"),
        (
            ["--model", "GPT", "--prompt", "a", "--prompt-file", "-"],
            "give either --prompt TEXT or --prompt-file FILE (- reads stdin)",
        ),
        (["--model", "GPT", "--prompt", "a", "--each-line"], "--each-line needs --prompt-file"),
        (["--model", "GPT", "--promt", "a"], "unknown option --promt; did you mean '--prompt'?"),
        (
            ["--model", "GPT", "--max-new-token", "3"],
            "unknown option --max-new-token; did you mean '--max-new-tokens'?",
        ),
        (["--model", "GPT", "--prompt", "a", "--max-new-tokens", "many"], "max_new_tokens: expected int; got 'many'"),
        (["--model", "GPT", "--prompt", "a", "--max-new-tokens", "0"], f"{AT_LEAST_ONE}; got 0"),
        (["--model", "GPT", "--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens must be at least 1; got -1"),
        (["--model", "GPT", "--prompt", "a", "--num-beams", "0"], "num_beams must be at least 1; got 0"),
        (["--model", "GPT", "--prompt", "a", "b", "--save-state", "x"], "--save-state takes one prompt; got 2"),
        (
            ["--model", "GPT", "--prompt", "", "--save-state", "x"],
            "there is nothing to read: the prompt is empty",
        ),
        (
            ["--model", "SOFTMAX", "--prompt", "a", "--save-state", "x"],
            "a state to save or load needs a cosine model, whose state has one size; got softmax",
        ),
        (
            ["--model", "SOFTMAX", "--prompt", "a", "--load-state", "x"],
            "a state to save or load needs a cosine model, whose state has one size; got softmax",
        ),
        (
            ["--model", "GPT", "--load-state", "no.state"],
            "the state no.state cannot be read: No such file or directory: no.state",
        ),
        (["--model", "GPT", "--prompt", "a", "--json-lines"], "--json-lines needs --prompt-file"),
        (
            ["--model", "GPT", "--prompt-file", "-", "--json-lines", "--each-line"],
            "--each-line and --json-lines exclude each other",
        ),
        (["--model", "GPT", "--prompt", "a", "--temperature", "-1"], "temperature must be 0 or more; got -1.0"),
        (["--model", "GPT", "--prompt", "a", "--batch-size", "0"], "batch_size must be at least 1; got 0"),
        (["--model", "GPT", "--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk must be at least 1; got 0"),
        (["--model", "GPT", "--prompt", "a\udcff"], "the prompt is not valid Unicode text (character 1)"),
        (["--model", "GPT", "--prompt-file", "no.txt"], "no.txt cannot be read: No such file or directory"),
        (["--model", "GPT", "--prompt-file", "."], ". cannot be read: Is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_on_stdout(
    gpt_dir: Path, softmax_gpt_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"GPT": str(gpt_dir), "SOFTMAX": str(softmax_gpt_dir)}
    assert mistake(capsys, *[places.get(word, word) for word in words]) == message


def test_a_binary_prompt_is_one_line(gpt_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"ab\x89PNG\r\n\x1a\n\x00")
    flags = ["--model", gpt_dir, "--prompt-file", tmp_path / "picture.png"]
    assert mistake(capsys, *flags) == f"{tmp_path / 'picture.png'} is not UTF-8 text (byte 2)"
    (tmp_path / "zeros.bin").write_bytes(b"ab\0\0")
    flags = ["--model", gpt_dir, "--prompt-file", tmp_path / "zeros.bin"]
    assert mistake(capsys, *flags) == (
        f"{tmp_path / 'zeros.bin'} is a binary file, not text (zero byte at character 2)"
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    for flag in ("--each-line", "--json-lines"):
        flags = ["--model", gpt_dir, "--prompt-file", tmp_path / "empty.txt", flag]
        assert mistake(capsys, *flags) == f"{tmp_path / 'empty.txt'} holds no text"


def test_json_lines_are_prompts(
    gpt_dir: Path,
    expected: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = ["The people\n of", "東京", ""]
    lines = f'{{"prompt": {json.dumps(prompts[0])}, "id": 7}}\n\n{json.dumps(prompts[1])}\n{{"prompt": ""}}\n'
    (tmp_path / "prompts.jsonl").write_text(lines)
    flags = ["--model", gpt_dir, "--max-new-tokens", 9, "--json", "--prompt-file"]
    rows = [json.loads(line) for line in run(capsys, *flags, tmp_path / "prompts.jsonl")[0].splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == list(zip(prompts, expected(prompts).texts, strict=True))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    again = [json.loads(line) for line in run(capsys, *flags, "-", "--json-lines")[0].splitlines()]
    assert [row["text"] for row in again] == [row["text"] for row in rows]
    for line, complaint in [
        ("{", "not JSON"),
        ('{"text": "a"}', "expected a string or an object with the text 'prompt'"),
    ]:
        (tmp_path / "bad.jsonl").write_text(f'"a"\n{line}\n')
        message = mistake(capsys, *flags, tmp_path / "bad.jsonl")
        assert message.startswith(f"{tmp_path / 'bad.jsonl'}, line 2: {complaint}")


def test_a_document_is_read_once_and_asked_many_times(
    gpt_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document, asked, file = "The people of the United States. " * 20, [" Who", " When is it"], tmp_path / "a.state"
    (tmp_path / "document.txt").write_text(document)
    flags = ["--model", gpt_dir, "--temperature", 0, "--max-new-tokens"]
    out, err = run(capsys, *flags, 0, "--prompt-file", tmp_path / "document.txt", "--save-state", file)
    assert out == ""
    num_tokens = len(tiny.bpe_tokenizer()(document)["input_ids"])
    figures = (
        rf"read {num_tokens} tokens in .* s \(\d+ tokens/s\), saved the state after {num_tokens} tokens as {file}, "
    )
    assert re.search(figures, err)
    texts = expected([document + question for question in asked], temperature=0).texts
    out, _ = run(capsys, *flags, 9, "--load-state", file, "--prompt", *asked, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == list(zip(asked, texts, strict=True))
    # On from where it stands, and from there again.
    assert run(capsys, *flags, 9, "--load-state", file)[0] == expected(document, temperature=0).texts[0] + "\n"
    more = tmp_path / "more.state"
    out, _ = run(capsys, *flags, 9, "--load-state", file, "--prompt", " Who", "--save-state", more)
    assert out == f" Who{texts[0]}\n"
    assert run(capsys, *flags, 9, "--load-state", more)[0] == texts[0] + "\n"


def test_a_wrong_model_is_one_line(
    gpt_dir: Path, bert_dir: Path, softmax_gpt_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "did you mean 'gpt'?" in mistake(capsys, "--model", gpt_dir.parent / "gpd", "--prompt", "a")
    held = f"it holds the model {gpt_dir}"
    assert mistake(capsys, "--model", gpt_dir.parent, "--prompt", "a").endswith(held)
    assert "is a BERT, which fills masks" in mistake(capsys, "--model", bert_dir, "--prompt", "a")
    assert "is a file" in mistake(capsys, "--model", gpt_dir / "config.json", "--prompt", "a")
    message = mistake(capsys, "--model", softmax_gpt_dir, "--prompt", "xx", "--max-new-tokens", 63)
    assert message.startswith("max_new_tokens must be at most 62 behind a prompt of 2 tokens")
    message = mistake(capsys, "--model", gpt_dir, "--prompt", "a", "--device", "gpu")
    assert message.startswith("device 'gpu' cannot be used here")


@pytest.fixture
def endless_dir(tmp_path: Path) -> Path:
    """A model that writes for ever."""
    import torch

    model = tiny.gpt(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.bias[0] = -1e4
    return tiny.save(tmp_path / "endless", model, tiny.bpe_tokenizer())


def started(directory: Path, *words: str) -> Fork:
    """The command in a process of its own, once it has begun to write."""
    command = ["generate", "--model", str(directory), "--prompt", PROMPT, "--max-new-tokens", "100000000", *words]
    process = start_fork("-m", "cottention", *command)
    assert process.stdout.read(len(PROMPT) + 5).startswith(PROMPT)
    return process


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_written_and_ends_in_one_line(endless_dir: Path) -> None:
    process = started(endless_dir)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(out) > 5
    assert out.endswith("\n")
    *_, last = err.splitlines()
    assert last == "cottention generate: error: interrupted"
    assert "Traceback" not in err


def test_a_reader_that_leaves_ends_it_quietly(endless_dir: Path) -> None:
    process = started(endless_dir)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141
    assert re.fullmatch(r"(cosine attention runs as '\w+'\n)?", err)


def test_a_terminal_without_the_characters_shows_their_codes() -> None:
    code = "import cottention.cli.main as cli; cli.main = lambda: print('A 東') or 0; cli.entry_point()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"A \\u6771\n", b"")
