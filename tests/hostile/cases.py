"""Hostile inputs by kind: each case writes itself into a folder and names the command that opens it.

Every folder holds a GPT (`gpt`), a BERT (`bert`), a stopped run with checkpoints (`run`, recipe `run.yaml`) and a text.

    for name, case in all_cases().items(): words = case(folder)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.data.test_tokenizer_files import HOSTILE as HOSTILE_TOKENIZERS
from tests.data.test_tokenizer_files import write as write_tokenizer
from tests.hostile.warm import CANARY

Case = Callable[[Path], list[str]]

GENERATE = ["generate", "--model", "gpt", "--prompt", "The people", "--max-new-tokens", "2"]
FILL = ["fill-mask", "--model", "bert", "The [MASK]"]
PRETRAIN = ["pretrain", "gpt", "--config", "run.yaml", "--output-dir", "run"]
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 50_000 + "1" + "}" * 50_000
LONG_NUMBER = "1" * 5000
# Contents that are no file of settings, whatever it should hold.
TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "half": '{"a": ',
    "list": "[]",
    "list of one": "[1]",
    "null": "null",
    "number": "5",
    "string": '"x"',
    "true": "true",
    "nothing in it": "{}",
    "deep list": DEEP,
    "deep in a field": '{"model_type": ' + DEEP + "}",
    "deep object": DEEP_OBJECT,
    "long number": '{"n_layer": ' + LONG_NUMBER + "}",
    "minus": '{"n_layer": -' + LONG_NUMBER + "}",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": '{"a": "ä"}'.encode("latin-1"),
    "bom": b"\xef\xbb\xbf{}",
    "zeros": b"\0" * 100,
    "surrogate": '{"model_type": "\\ud800"}',
    "large": b" " * (17 << 20),
}
# Enough where a reader is shared with another place that all of them are tried in.
SOME = {name: TEXTS[name] for name in ("empty", "list", "null", "nothing in it", "deep list", "long number", "zeros")}
VALUES: dict[str, Any] = {
    "list": [],
    "object": {},
    "string": "x",
    "number": 5,
    "negative": -1,
    "fraction": 0.5,
    "huge": 2**70,
    "infinite": float("inf"),
    "nan": float("nan"),
    "null": None,
    "true": True,
    "nested": [[[]]],
}
CONFIG_FIELDS = [
    "model_type",
    "architectures",
    "attention_type",
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "rotary_dim",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "norm_const_init",
    "original_init",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "auto_map",
    "layer_types",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "quantization_config",
    "_attn_implementation",
    "attn_implementation",
    "transformers_weights",
    "configuration_files",
    "fusion_config",
    "per_layer_config",
    "rope_scaling",
    "rope_parameters",
    "pruned_heads",
    "torchscript",
    "gradient_checkpointing",
    "task_specific_params",
    "sliding_window",
    "base_model_tp_plan",
]
GENERATION_FIELDS = [
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
    "num_beams",
    "temperature",
    "top_k",
    "do_sample",
    "cache_implementation",
    "stop_strings",
    "forced_eos_token_id",
    "suppress_tokens",
    "transformers_version",
    "use_cache",
    "renormalize_logits",
    "watermarking_config",
    "compile_config",
    "sequence_bias",
    "bad_words_ids",
]
TOKENIZER_FIELDS = [
    "tokenizer_class",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "added_tokens_decoder",
    "chat_template",
    "auto_map",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "extra_special_tokens",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "additional_special_tokens",
    "vocab_file",
    "tokenizer_file",
    "backend",
    "fast_tokenizer_files",
]


class Runs:
    """Unpickled, it makes the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    kinds = {
        "config": configs(),
        "generation config": generation_configs(),
        "tokenizer": tokenizers(),
        "weights": weights(),
        "published": published(),
        "recipe": recipes(),
        "finetune settings": settings(),
        "checkpoint": checkpoints(),
        "lines": json_lines(),
        "state": states(),
        "source": sources(),
        "name": names(),
        "words": command_lines(),
    }
    return {f"{kind}: {name}": case for kind, cases in kinds.items() for name, case in cases}


def wrong(fields: list[str], of_each: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field with some values of VALUES, all of them in turn."""
    names = list(VALUES)
    for number, field in enumerate(fields):
        for turn in range(of_each):
            name = names[(number * of_each + turn * 5) % len(names)]
            yield f"{field} {name}", {field: VALUES[name]}


def replaced(path: str, content: str | bytes, words: list[str]) -> Case:
    """The file with this content."""

    def write(folder: Path) -> list[str]:
        file = folder / path
        file.unlink(missing_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return words

    return write


def changed(path: str, fields: dict[str, Any], words: list[str]) -> Case:
    """The JSON file with these fields."""

    def write(folder: Path) -> list[str]:
        file = folder / path
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | fields))
        return words

    return write


def configs() -> Iterator[tuple[str, Case]]:
    for name, text in TEXTS.items():
        yield name, replaced("gpt/config.json", text, GENERATE)
    for name, fields in wrong(CONFIG_FIELDS, 2):
        yield name, changed("gpt/config.json", fields, GENERATE)
    for name, fields in wrong(["model_type", "hidden_size", "type_vocab_size", "hidden_act", "classifier_dropout"]):
        yield f"bert {name}", changed("bert/config.json", fields, FILL)
    for name, fields in wrong(["position_embedding_type", "rotary_dim", "norm_first"], 2):
        yield f"bert {name}", changed("bert/config.json", fields, FILL)
    for name, fields in {
        "a kernel": {"_attn_implementation": "kernels-community/flash-attn"},
        "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "code": {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}},
        "a Hub repository's code": {"auto_map": {"AutoModelForCausalLM": "owner/evil--evil.Evil"}},
        "too many layers": {"n_layer": 10**9},
        "too many layers still": {"n_layer": 200_000},
        "too wide": {"n_embd": 1 << 24, "n_head": 1},
        "too many tokens": {"vocab_size": 1 << 24},
        "too many labels": {"num_labels": 10**9, "id2label": None},
        "too many kinds of layers": {"layer_types": ["linear_attention", "full_attention"] * 200_000},
        "a window without end": {"layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 10**18},
        "layers of another model": {"layer_types": ["linear_attention", "full_attention"]},
    }.items():
        yield name, changed("gpt/config.json", fields, GENERATE)


def generation_configs() -> Iterator[tuple[str, Case]]:
    for name, text in SOME.items():
        yield name, replaced("gpt/generation_config.json", text, GENERATE)
    for name, fields in wrong(GENERATION_FIELDS, 2):
        yield name, changed("gpt/generation_config.json", fields, GENERATE)


def tokenizers() -> Iterator[tuple[str, Case]]:
    def hostile(parts: dict[str, Any]) -> Case:
        def write(folder: Path) -> list[str]:
            write_tokenizer(folder / "gpt", **parts)
            return GENERATE

        return write

    for name, parts in HOSTILE_TOKENIZERS.items():
        yield name, hostile(parts)
    for name, text in SOME.items():
        yield f"json {name}", replaced("gpt/tokenizer.json", text, GENERATE)
        yield f"settings {name}", replaced("gpt/tokenizer_config.json", text, FILL if "deep" in name else GENERATE)
    for name, fields in wrong(TOKENIZER_FIELDS, 2):
        yield name, changed("gpt/tokenizer_config.json", fields, GENERATE)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens", "padding"):
        for name, fields in wrong([part], 4):
            yield f"part {name}", changed("gpt/tokenizer.json", fields, GENERATE)


def weights() -> Iterator[tuple[str, Case]]:
    def header(content: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(content) if length is None else length) + content

    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for name, content in {
        "empty": b"",
        "short": b"abc",
        "no header": header(b""),
        "header longer than the file": header(b"{}", 1 << 40),
        "header of all memory": header(b"{}", (1 << 63) - 1),
        "header no JSON": header(b"not"),
        "header a list": header(b"[]"),
        "header deep": header(DEEP.encode()),
        "header of nothing": header(b"{}"),
        "unknown dtype": header(json.dumps({"a": {**one, "dtype": "F33"}}).encode()) + b"\0" * 4,
        "negative shape": header(json.dumps({"a": {**one, "shape": [-1]}}).encode()) + b"\0" * 4,
        "huge shape": header(json.dumps({"a": {**one, "shape": [1 << 62, 4]}}).encode()) + b"\0" * 4,
        "offsets outside": header(json.dumps({"a": {**one, "data_offsets": [0, 400]}}).encode()) + b"\0" * 4,
        "offsets backwards": header(json.dumps({"a": {**one, "data_offsets": [4, 0]}}).encode()) + b"\0" * 4,
        "another tensor": header(json.dumps({"a": one}).encode()) + b"\0" * 4,
        "pickle": pickle.dumps(Runs()),
    }.items():
        yield name, replaced("gpt/model.safetensors", content, GENERATE)

    def index(weight_map: Any) -> Case:
        def write(folder: Path) -> list[str]:
            (folder / "gpt" / "model.safetensors").rename(folder / "outside.safetensors")
            (folder / "gpt" / "link.safetensors").symlink_to(folder / "outside.safetensors")
            content = {"metadata": {}, "weight_map": weight_map}
            (folder / "gpt" / "model.safetensors.index.json").write_text(json.dumps(content))
            return GENERATE

        return write

    for name, weight_map in {
        "outside": {"a": "../outside.safetensors"},
        "absolute": {"a": "/etc/passwd"},
        "link": {"a": "link.safetensors"},
        "list": [],
        "null": None,
        "numbers": {"a": 5},
        "lists": {"a": []},
        "itself": {"a": "model.safetensors.index.json"},
        "missing": {"a": "none.safetensors"},
        "empty name": {"a": ""},
    }.items():
        yield f"index {name}", index(weight_map)
    for name, text in SOME.items():

        def write(folder: Path, text: str | bytes = text) -> list[str]:
            (folder / "gpt" / "model.safetensors").unlink()
            return replaced("gpt/model.safetensors.index.json", text, GENERATE)(folder)

        yield f"index text {name}", write
    for name, make in {
        "fifo": os.mkfifo,
        "folder": os.mkdir,
        "link to zero": lambda path: path.symlink_to("/dev/zero"),
        "link to nothing": lambda path: path.symlink_to("nowhere"),
        "link to itself": lambda path: path.symlink_to(path),
    }.items():
        for file in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):

            def put(folder: Path, file: str = file, make: Callable[[Path], Any] = make) -> list[str]:
                (folder / "gpt" / file).unlink(missing_ok=True)
                make(folder / "gpt" / file)
                return GENERATE

            yield f"{file} a {name}", put


def published() -> Iterator[tuple[str, Case]]:
    """Checkpoints of stock classes with pickled weights, through `convert`."""
    config = {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "vocab_size": 290,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
    }

    def convert(kind: str, files: dict[str, str | bytes]) -> Case:
        def write(folder: Path) -> list[str]:
            (folder / "source").mkdir()
            for file, content in {"config.json": json.dumps(config), **files}.items():
                (folder / "source" / file).write_bytes(content.encode() if isinstance(content, str) else content)
            return ["convert", kind, "source", "result"]

        return write

    code = pickle.dumps(Runs())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")
    contents: dict[str, bytes] = {
        "code": code,
        "code in a zip": zipped.getvalue(),
        "empty": b"",
        "half": code[:5],
        "no tensors": pickle.dumps({"a": 5}),
        "a list": pickle.dumps([1]),
        "garbage": bytes(range(256)) * 20,
        "a zip of nothing": b"PK\x05\x06" + b"\0" * 18,
    }
    for name, content in contents.items():
        for kind in ("official", "softmax"):
            yield f"{kind} {name}", convert(kind, {"pytorch_model.bin": content})
    yield "config.pt code", convert("official", {"pytorch_model.bin": b"", "config.pt": code})
    yield "tokenizer.pt code", convert("official", {"pytorch_model.bin": b"", "tokenizer.pt": code})
    for name, text in SOME.items():
        yield f"config {name}", convert("softmax" if len(name) % 2 else "official", {"config.json": text})
    for name, fields in wrong(
        ["model_type", "architectures", "n_layer", "n_embd", "vocab_size", "rotary_dim", "rotary", "dtype"]
    ):
        yield name, convert("official", {"config.json": json.dumps(config | fields), "pytorch_model.bin": b""})
    for name, text in SOME.items():
        yield f"index {name}", convert("official", {"pytorch_model.bin.index.json": text})


RECIPES: dict[str, str | bytes] = {
    "a date": "arch: gpt\nmodel: {n_layer: 2001-99-99}\n",
    "a good date": "arch: gpt\nmodel: {n_layer: 2001-01-01}\n",
    "no int": "arch: gpt\nmodel: {n_layer: !!int foo}\n",
    "no float": "arch: gpt\noptimizer: {learning_rate: !!float foo}\n",
    "no time": "arch: gpt\nmodel: {n_layer: !!timestamp x}\n",
    "no bool": "arch: gpt\nmodel: {original_init: !!bool x}\n",
    "binary": "arch: gpt\nmodel: {n_layer: !!binary x}\n",
    "a set": "arch: gpt\nmodel: !!set {a, b}\n",
    "pairs": "arch: gpt\nmodel: !!pairs [a: 1]\n",
    "ordered": "arch: gpt\nmodel: !!omap [a: 1]\n",
    "key number": "arch: gpt\n1: x\n",
    "key null": "arch: gpt\n~: x\n",
    "key list": "arch: gpt\n? [a, b]\n: x\n",
    "key object": "arch: gpt\n? {a: b}\n: x\n",
    "key true": "arch: gpt\ntrue: x\n",
    "key date": "arch: gpt\n2001-01-01: x\n",
    "key in a section": "arch: gpt\nmodel:\n  1: x\n",
    "key null in a section": "arch: gpt\nmodel:\n  ~: x\n",
    "deep": f"arch: gpt\nmodel: {'[' * 5000}{']' * 5000}\n",
    "deep and open": f"arch: gpt\nmodel: {'[' * 5000}\n",
    "deep objects": f"arch: gpt\nmodel: {'{a: ' * 5000}\n",
    "deep lines": "arch: gpt\n" + "".join(f"{' ' * n}a:\n" for n in range(1500)),
    "long number": f"arch: gpt\nmodel: {{n_layer: {LONG_NUMBER}}}\n",
    "long fraction": f"arch: gpt\noptimizer: {{learning_rate: 1e{LONG_NUMBER}}}\n",
    "sexagesimal": f"arch: gpt\nmodel: {{n_layer: {':'.join(['59'] * 900)}}}\n",
    "arch list": "arch: [gpt]\n",
    "arch object": "arch: {gpt: 1}\n",
    "arch number": "arch: 5\n",
    "arch null": "arch: ~\n",
    "code": "arch: gpt\nmodel: !!python/object/apply:os.system ['touch canary']\n",
    "code in a value": "arch: gpt\nmodel: {n_layer: !!python/object/new:os.system ['touch canary']}\n",
    "a name": "arch: gpt\nmodel: {n_layer: !!python/name:os.system}\n",
    "unknown tag": "arch: gpt\nmodel: !evil x\n",
    "two documents": "arch: gpt\n---\narch: bert\n",
    "no anchor": "arch: gpt\nmodel: *nowhere\n",
    "itself": "arch: gpt\nmodel: &a\n  n_layer: *a\n",
    "merge": "arch: gpt\nmodel:\n  <<: 5\n",
    "merge list": "arch: gpt\nmodel:\n  <<: [5]\n",
    "tab": "arch: gpt\nmodel:\n\tn_layer: 5\n",
    "bracket": "arch: gpt\nmodel: [1,2\n",
    "quote": 'arch: gpt\nmodel: "\n',
    "control": "arch: gpt\nmodel: \x07\n",
    "zero": "arch: gpt\nmodel: a\0b\n",
    "latin-1": "arch: gpt\nmodel: ä\n".encode("latin-1"),
    "utf-16": "arch: gpt\n".encode("utf-16"),
    "novel": "It was the best of times: it was\nthe worst of times\n",
    "nan": "arch: gpt\noptimizer: {learning_rate: .nan}\n",
    "infinite": "arch: gpt\noptimizer: {learning_rate: .inf}\n",
    "huge": "arch: gpt\nmodel: {n_layer: 1000000000}\ndata: {source: text.txt}\n",
    "wide": "arch: gpt\nmodel: {n_embd: 1000000000, n_head: 1, rotary_dim: 2}\ndata: {source: text.txt}\n",
    "zero byte source": 'arch: gpt\ndata: {source: "a\\0b"}\n',
    "surrogate source": 'arch: gpt\ndata: {source: "a\\uDC80"}\n',
    "source list of lists": "arch: gpt\ndata: {source: [[a]]}\n",
    "source number": "arch: gpt\ndata: {source: 5}\n",
    "betas of one": "arch: gpt\noptimizer: {betas: [0.9]}\n",
    "betas of words": "arch: gpt\noptimizer: {betas: [a, b]}\n",
    "betas a word": "arch: gpt\noptimizer: {betas: x}\n",
    "section list": "arch: gpt\nmodel: [1]\n",
    "section text": "arch: gpt\nmodel: x\n",
}


def recipes() -> Iterator[tuple[str, Case]]:
    words = ["pretrain", "gpt", "--config", "hostile.yaml", "--output-dir", "new"]
    for name, text in RECIPES.items():
        yield name, replaced("hostile.yaml", text, words)
    for name, text in SOME.items():
        if name != "nothing in it":  # which is the published run
            yield f"text {name}", replaced("hostile.yaml", text, words)
            yield f"in the run {name}", replaced("run/recipe.yaml", text, PRETRAIN)
    for make in (os.mkfifo, os.mkdir):

        def put(folder: Path, make: Callable[[Path], Any] = make) -> list[str]:
            make(folder / "hostile.yaml")
            return words

        yield make.__name__, put


def settings() -> Iterator[tuple[str, Case]]:
    words = ["finetune", "--model", "bert", "--task", "rte", "--data", "bert", "--config", "hostile.yaml"]
    for name in (
        "a date",
        "no int",
        "key number",
        "key null",
        "key list",
        "deep",
        "long number",
        "code",
        "itself",
        "bracket",
    ):
        text = str(RECIPES[name]).replace("arch: gpt\n", "")
        yield name, replaced("hostile.yaml", text, words)
    for name, text in SOME.items():
        yield f"text {name}", replaced("hostile.yaml", text, words)


def checkpoints() -> Iterator[tuple[str, Case]]:
    """A checkpoint with the right hashes of wrong content: the run goes on from the one before, or says why not."""

    def forged(file: str, content: str | bytes) -> Case:
        def write(folder: Path) -> list[str]:
            newest = sorted((folder / "run" / "checkpoints").glob("checkpoint-*"), key=lambda path: len(path.name))[-1]
            (newest / file).write_bytes(content.encode() if isinstance(content, str) else content)
            if file != "MANIFEST.json":
                manifest = json.loads((newest / "MANIFEST.json").read_text())
                data = (newest / file).read_bytes()
                manifest[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                (newest / "MANIFEST.json").write_text(json.dumps(manifest))
            return PRETRAIN

        return write

    for file in ("run_state.json", "trainer_state.json", "MANIFEST.json", "config.json", "generation_config.json"):
        for name, text in SOME.items():
            yield f"{file} {name}", forged(file, text)
    code = pickle.dumps(Runs())
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        for name, content in {
            "code": code,
            "empty": b"",
            "a list": pickle.dumps([1]),
            "none": pickle.dumps(None),
        }.items():
            yield f"{file} {name}", forged(file, content)
    for name, content in {"empty": b"", "short": b"abc", "code": code}.items():
        yield f"model.safetensors {name}", forged("model.safetensors", content)


def json_lines() -> Iterator[tuple[str, Case]]:
    for name, text in SOME.items():
        content = text if isinstance(text, bytes) else text.replace("\n", " ") + "\n"
        generate = ["generate", "--model", "gpt", "--max-new-tokens", "1", "--prompt-file", "x.jsonl"]
        yield f"prompts {name}", replaced("x.jsonl", content, generate)
        yield f"embed {name}", replaced("x.jsonl", content, ["embed", "--model", "bert", "x.jsonl"])
        yield f"pairs {name}", replaced("x.txt", content, ["next-sentence", "--model", "bert", "--file", "x.txt"])


def states() -> Iterator[tuple[str, Case]]:
    for name, content in {**SOME, "pickle": pickle.dumps(Runs()), "header": struct.pack("<Q", 1 << 60)}.items():
        yield name, replaced("x.state", content, [*GENERATE, "--load-state", "x.state"])


def sources() -> Iterator[tuple[str, Case]]:
    for file in ("x.jsonl", "x.parquet", "x.txt.gz", "x.jsonl.zst", "x.txt"):
        for name in ("half", "deep list", "zeros", "utf-16", "list", "long number"):
            yield (
                f"{file} {name}",
                replaced(file, TEXTS[name], ["data", "build", "gpt", file, "--output-dir", "corpus"]),
            )
    for name in (
        "*" * 3000,
        "[" * 3000,
        "x" * 5000,
        "/proc/self/mem",
        "..",
        "~nobody/x",
        "\udcff\udcfe",
        "%s%n",
        "a/" * 2000,
    ):
        words = ["data", "build", "gpt", name, "--output-dir", "corpus"]
        yield f"named {name[:20]!a}", lambda _folder, words=words: words


def names() -> Iterator[tuple[str, Case]]:
    """Names that are not UTF-8, and such prompts."""

    def moved(old: str, new: str, words: list[str]) -> Case:
        def move(folder: Path) -> list[str]:
            (folder / old).rename(folder / new)
            return words

        return move

    name = "\udcffgpt\udcfe"
    yield "model", moved("gpt", name, ["generate", "--model", name, "--prompt", "x", "--max-new-tokens", "1"])
    yield "source", moved("text.txt", f"{name}.txt", ["data", "build", "gpt", f"{name}.txt", "--output-dir", "corpus"])
    build = ["data", "build", "gpt", "text.txt", "--output-dir"]
    yield "corpus", lambda _folder: [*build, name]
    yield "corpus with a zero byte", lambda _folder: [*build, "a\0b"]
    yield "run", lambda _folder: [*PRETRAIN[:-1], name]
    yield "run's text", moved("text.txt", name, [*PRETRAIN[:-1], "new", "--data.source", name])
    yield "state", lambda _folder: [*GENERATE, "--save-state", name]
    yield "prompt", lambda _folder: [*GENERATE[:-3], name, "--max-new-tokens", "1"]
    yield "stop", lambda _folder: [*GENERATE, "--stop", name]
    yield "mask", lambda _folder: ["fill-mask", "--model", "bert", f"[MASK] {name}"]
    yield "pair", lambda _folder: ["next-sentence", "--model", "bert", name, "x"]
    yield "task", lambda _folder: ["finetune", "--model", "bert", "--task", name, "--data", "bert"]
    yield "recipe", lambda _folder: ["pretrain", "gpt", "--config", name]
    yield "converted", lambda _folder: ["convert", "softmax", "gpt", name]
    yield "long", lambda _folder: ["generate", "--model", "x" * 5000, "--prompt", "x"]
    yield "long run", lambda _folder: [*PRETRAIN[:-1], "y" * 5000]


def command_lines() -> Iterator[tuple[str, Case]]:
    lines = [
        [""],
        [" "],
        ["generate", ""],
        ["pretrain", "gpt", ""],
        ["pretrain", ""],
        ["doctor", " "],
        ["convert", "official", "", ""],
        ["data", "build", "gpt", "", "--output-dir", ""],
        ["embed", "", "--model", ""],
        ["fill-mask", "", "--model", "bert"],
        [*GENERATE, "--device", "gpu"],
        [*GENERATE, "--device", ""],
        [*GENERATE, "--device", "cpu:99999999999999999999"],
        [*GENERATE, "--top-k", LONG_NUMBER],
        [*GENERATE, "--temperature", "nan"],
        [*GENERATE, "--seed", str(2**70)],
        [*GENERATE, "--seed", "-1"],
        [*GENERATE, "--prefill-chunk", "0"],
        [*GENERATE, "--num-beams", "-3"],
        [*GENERATE, "--batch-size", "-3"],
        [*GENERATE, "--top-p", "inf"],
        ["pretrain", "gpt", "--model.n_layer", DEEP[:5000]],
        ["pretrain", "gpt", "--model", DEEP[:5000]],
        ["pretrain", "gpt", "--model", "{"],
        ["pretrain", "gpt", "--model.n_layer", "!!python/object/apply:os.system ['touch canary']"],
        ["pretrain", "gpt", "--model.n_layer", "2001-99-99"],
        ["pretrain", "gpt", "--data.source", "!!int foo"],
        ["pretrain", "gpt", "--config"],
        ["pretrain", "gpt", "--config", "/dev/null"],
        ["pretrain", "gpt", "--config", "."],
        ["finetune", "--model", "bert", "--task", "rte", "--seeds", LONG_NUMBER],
        ["finetune", "--model", "bert", "--task", "rte", "--learning-rate", "x"],
        ["finetune", "--model", "bert", "--task", ","],
        ["evaluate", "glue", "--runs", "", ""],
        ["bench", "attention", "--lengths", "x"],
        ["quickstart", "--minutes", "nan"],
    ]
    for number, words in enumerate(lines):
        yield f"{number} {words[0]} {' '.join(words)[-40:]}", lambda _folder, words=words: words
