"""A text that was read is gone on from as if it had just been read, and by the model that read it alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cottention.errors import CheckpointError, CottentionError
from cottention.generation import generate_text, load_state, read_text, save_state
from cottention.ops import CosineState
from tests import tiny
from tests.damage import HARMS

DOCUMENT = "The people of the United States serve crème brûlée to the people. " * 5
QUESTIONS = [" Who serves", "", " In 東"]


def ids_of(text: str) -> list[int]:
    return tiny.bpe_tokenizer()(text)["input_ids"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.gpt()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "document.state"
    save_state(path, read_text(model, tiny.bpe_tokenizer(), DOCUMENT), model, tiny.bpe_tokenizer())
    return path


def write(model: Any, prompts: Any, **settings: Any) -> list[str]:
    settings = {"max_new_tokens": 20, "temperature": 0, **settings}
    return generate_text(model, tiny.bpe_tokenizer(), prompts, **settings).texts


@pytest.mark.parametrize(
    ("chunk", "settings"),
    [
        (1, {}),
        (7, {"temperature": 1.0, "seed": 3}),
        (7, {"repetition_penalty": 1.8}),
        (64, {"num_beams": 3}),
        (4096, {"num_beams": 3, "repetition_penalty": 1.8, "stop_strings": ["e"]}),
    ],
)
def test_a_loaded_state_is_gone_on_from_as_the_text_itself(
    model: Any, tmp_path: Path, chunk: int, settings: dict[str, Any]
) -> None:
    tokenizer, path = tiny.bpe_tokenizer(), tmp_path / "document.state"
    save_state(path, read_text(model, tokenizer, DOCUMENT, prefill_chunk=chunk), model, tokenizer)
    state = load_state(path, model, tokenizer)
    assert state.num_tokens == len(ids_of(DOCUMENT))
    whole = [DOCUMENT + question for question in QUESTIONS]
    assert [ids_of(text) for text in whole] == [ids_of(DOCUMENT) + ids_of(question) for question in QUESTIONS]
    expected = write(model, whole, **settings)
    assert write(model, QUESTIONS, state=state, prefill_chunk=chunk, **settings) == expected
    # Nothing of the state was used up.
    assert write(model, QUESTIONS, state=state, **settings) == expected


def test_a_state_goes_on_reading(model: Any, saved: Path) -> None:
    tokenizer = tiny.bpe_tokenizer()
    state = load_state(saved, model, tokenizer)
    for part in (" And", " tea for", " the people"):
        state = read_text(model, tokenizer, part, state=state)
    whole = read_text(model, tokenizer, DOCUMENT + " And tea for the people")
    assert (state.num_tokens, state.tail) == (whole.num_tokens, whole.tail)
    assert torch.equal(state.occurred, whole.occurred)
    for mine, theirs in zip(state.cache.states, whole.cache.states, strict=True):
        assert isinstance(mine, CosineState)
        assert isinstance(theirs, CosineState)
        torch.testing.assert_close(mine.kv, theirs.kv)
        assert torch.equal(mine.seen, theirs.seen)


def test_a_text_of_one_token_has_a_state(model: Any, tmp_path: Path) -> None:
    tokenizer = tiny.bpe_tokenizer()
    save_state(tmp_path / "one", read_text(model, tokenizer, "T"), model, tokenizer)
    assert write(model, "", state=load_state(tmp_path / "one", model, tokenizer)) == write(model, "T")


def test_the_file_has_one_size_and_is_not_code(model: Any, saved: Path, tmp_path: Path) -> None:
    tokenizer = tiny.bpe_tokenizer()
    save_state(tmp_path / "long", read_text(model, tokenizer, DOCUMENT * 20), model, tokenizer)
    assert abs((tmp_path / "long").stat().st_size - saved.stat().st_size) < 64  # a number's digits in the metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["document.state", "long"]
    save_state(saved, read_text(model, tokenizer, "Another text."), model, tokenizer)
    assert load_state(saved, model, tokenizer).num_tokens == len(ids_of("Another text."))


def test_a_state_of_something_else_is_refused_in_one_line(model: Any, saved: Path) -> None:
    tokenizer = tiny.bpe_tokenizer()
    others = {
        "its config differs": (tiny.gpt(n_positions=32), tokenizer),
        "its weights differ": (tiny.gpt(), tokenizer),
        "its tokenizer differs": (model, tiny.wordpiece_tokenizer()),
    }
    with torch.no_grad():
        others["its weights differ"][0].transformer.h[1].attn.norm_const[0, 1] += 1e-3
    for difference, (other, its_tokenizer) in others.items():
        with pytest.raises(CheckpointError) as caught:
            load_state(saved, other, its_tokenizer)
        assert str(caught.value) == f"{saved} is the state of another model: {difference} from this model's"
    with pytest.raises(CottentionError, match="needs a cosine model, whose state has one size; got softmax"):
        load_state(saved, tiny.gpt("softmax"), tokenizer)
    # The same model opened again is the same.
    load_state(saved, tiny.gpt(), tokenizer)


def test_a_file_that_is_no_whole_state_is_one_line(model: Any, saved: Path, tmp_path: Path) -> None:
    content, tokenizer = saved.read_bytes(), tiny.bpe_tokenizer()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            load_state(saved, model, tokenizer)
        assert str(caught.value).startswith(f"the state {saved} cannot be read: ")
        assert "\n" not in str(caught.value)
    saved.write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(saved, model, tokenizer)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path, model, tokenizer)
    save_file({"a": torch.zeros(1)}, saved)
    with pytest.raises(CheckpointError, match="is not a saved state"):
        load_state(saved, model, tokenizer)


def test_a_state_with_other_tensors_is_one_line(model: Any, saved: Path) -> None:
    with safe_open(saved, "pt") as file:  # pyright: ignore[reportArgumentType]
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change in ({"tail": torch.zeros(0, dtype=torch.int64)}, {"layers.1.kv": torch.zeros(1, 2, 16, 15)}):
        save_file({**tensors, **change}, saved, metadata=metadata)
        with pytest.raises(CheckpointError, match="is damaged: its tensors are not those of a state of this model"):
            load_state(saved, model, tiny.bpe_tokenizer())


def test_what_cannot_be_read_or_written_is_one_line(model: Any, tmp_path: Path) -> None:
    tokenizer = tiny.bpe_tokenizer()
    with pytest.raises(CottentionError, match="there is nothing to read: the prompt is empty"):
        read_text(model, tokenizer, "")
    with pytest.raises(CottentionError, match="prefill_chunk must be at least 1; got 0"):
        read_text(model, tokenizer, "a", prefill_chunk=0)
    state = read_text(model, tokenizer, "a text")
    with pytest.raises(CheckpointError, match=r"cannot write the state .*: .*"):
        save_state(tmp_path / "no" / "folder", state, model, tokenizer)
    with pytest.raises(CottentionError, match="needs a cosine model"):
        write(tiny.gpt("softmax"), "a", state=state)


@pytest.mark.parametrize("harm", HARMS)
def test_one_bit_or_some_zeros_are_noticed(harm: Any, model: Any, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for seed in range(8):
        (tmp_path / "harmed").write_bytes(content)
        harm(tmp_path / "harmed", random.Random(seed))
        with pytest.raises(CheckpointError, match="harmed"):
            load_state(tmp_path / "harmed", model, tiny.bpe_tokenizer())


@pytest.mark.parametrize(
    ("where", "reason"), [("/proc/x", "No such file or directory"), ("/dev/full", "No space left on device")]
)
def test_a_disk_that_cannot_be_written_is_one_line(where: str, reason: str, model: Any) -> None:
    state = read_text(model, tiny.bpe_tokenizer(), "a text")
    with pytest.raises(CheckpointError, match=f"cannot write the state {where}: {reason}"):
        save_state(where, state, model, tiny.bpe_tokenizer())
