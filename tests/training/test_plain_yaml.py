"""Settings from files of strangers: every kind of YAML that is not settings is one short line, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cottention.cli.main import main
from cottention.errors import SettingsError
from cottention.training.plain_yaml import read_yaml
from cottention.training.recipe_files import load_recipe, read_recipe_file


def laughs(first: str, indent: str = "  ") -> str:
    """Nine lists of nine of the one before: 3 * 10^8 values."""
    lines = [first + "&b0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{indent}- &b{i} [{','.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(lines) + "\n"


BAD = {
    "a section of laughs": ("arch: gpt\nmodel:\n" + laughs("  - "), "line 4: aliases are not taken; got *b0"),
    "a value of laughs": ("arch: gpt\nmodel:\n  n_layer:\n" + laughs("    - ", "    "), "aliases are not taken"),
    "sources of laughs": ("arch: gpt\ndata:\n  source:\n" + laughs("    - ", "    "), "aliases are not taken"),
    "an alias": ("arch: &a gpt\nmodel: {attention_type: *a}\n", "line 2: aliases are not taken; got *a"),
    "an alias of itself": ("arch: gpt\nmodel: &m\n  n_layer: *m\n", "aliases are not taken"),
    "a merged alias": ("arch: gpt\nmodel: &m {n_layer: 1}\ndata: {<<: *m}\n", "aliases are not taken"),
    "a merge": ("arch: gpt\nmodel:\n  <<: {n_layer: 1}\n", "no key '<<'"),
    "python": ("arch: gpt\nmodel: !!python/object/apply:os.system [exit]\n", "line 2: tags are not taken"),
    "a tagged number": ("arch: gpt\nmodel: {n_layer: !!int foo}\n", "tags are not taken; got tag:yaml.org,2002:int"),
    "a tagged float": ("arch: gpt\nmodel: {n_layer: !!float foo}\n", "tags are not taken"),
    "a tagged date": ("arch: gpt\nmodel: {n_layer: !!timestamp x}\n", "tags are not taken"),
    "binary": ("arch: gpt\nmodel: {n_layer: !!binary x}\n", "tags are not taken"),
    "a tag of one's own": ("arch: gpt\nmodel: !x {n_layer: 1}\n", "tags are not taken"),
    "a name that is a number": ("arch: gpt\n1: x\n", "line 2: a name must be a word; got 1"),
    "a name that is nothing": ("arch: gpt\n~: x\n", "line 2: a name must be a word; got None"),
    "a name that is true": ("arch: gpt\nmodel: {yes: 1}\n", "a name must be a word; got True"),
    "a name that is a list": ("arch: gpt\n? [a]\n: 1\n", "a name must be a word"),
    "a name that is a mapping": ("arch: gpt\n? {a: 1}\n: 1\n", "a name must be a word"),
    "a name given twice": ("arch: gpt\nmodel: {n_layer: 1}\nmodel: {n_layer: 2}\n", "line 3: 'model' is given twice"),
    "brackets": ("arch: gpt\nmodel: " + "[" * 5000 + "]" * 5000 + "\n", "line 2: nested deeper than 8"),
    "braces": ("arch: gpt\nmodel: " + "{a: " * 5000 + "}" * 5000 + "\n", "nested deeper than 8"),
    "indented": ("arch: gpt\n" + "".join(f"{' ' * i}a:\n" for i in range(300)), "nested deeper than 8"),
    "an open bracket": ("arch: gpt\nmodel: [1, 2\n", "expected ',' or ']'"),
    "brackets without end": ("[" * 200_000, "nested deeper than 8"),
    "a long number": ("arch: gpt\nmodel: {n_layer: " + "9" * 4000 + "}\n", "a number of 4000 digits"),
    "a long number of base 16": ("arch: gpt\nmodel: {n_layer: 0x" + "f" * 4000 + "}\n", "a number of 4002 digits"),
    "a long word": ("arch: " + "x" * 5000 + "\n", "a value of 5000 characters"),
    "too long": ("arch: gpt\n# " + "x" * (1 << 18) + "\n", "larger than 256 KiB"),
    "two documents": ("arch: gpt\n---\narch: bert\n", "expected a single document"),
    "a list": ("- arch\n- gpt\n", "got a list"),
    "nothing": ("", "got nothing"),
    "arch a list": ("arch: [gpt]\n", "must say `arch: gpt` or `arch: bert`; got ['gpt']"),
    "arch a mapping": ("arch: {gpt: bert}\n", "must say `arch: gpt` or `arch: bert`"),
    "a section that is a long list": ("arch: gpt\nmodel: [" + "word, " * 9000 + "]\n", "got ['word', 'word'"),
    "a section that is a word": ("arch: gpt\nmodel: gpt\n", "got 'gpt'"),
    "zero bytes": ("arch: gpt\nmodel: \0\n", "special characters are not allowed"),
    "a tab": ("arch: gpt\nmodel:\n\tn_layer: 1\n", "line 3: while scanning"),
}


@pytest.mark.parametrize("case", BAD)
def test_yaml_that_is_no_recipe_is_one_short_line_at_once(tmp_path: Path, case: str) -> None:
    content, expected = BAD[case]
    path = tmp_path / "r.yaml"
    path.write_text(content)
    begun = time.process_time()
    with pytest.raises(SettingsError) as error:
        read_recipe_file(path)
    message = str(error.value)
    assert time.process_time() - begun < 5
    assert expected in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))


@pytest.mark.parametrize("case", ["a section of laughs", "python", "a name that is nothing", "brackets"])
def test_the_command_says_so_in_one_line_and_makes_no_directory(tmp_path: Path, case: str, capsys) -> None:
    content, expected = BAD[case]
    (tmp_path / "r.yaml").write_text(content)
    assert main(["pretrain", "gpt", "--config", str(tmp_path / "r.yaml"), "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert expected in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["2001-99-99", "2001-01-01", "[1]", "{a: 1}", "x", "1.5", ".inf", "on"])
def test_a_value_of_another_type_is_one_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"arch: gpt\nmodel: {{n_layer: {value}}}\n")
    with pytest.raises(SettingsError, match="n_layer") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"arch: gpt # \xff\n")
    with pytest.raises(SettingsError, match="byte 0xff is not UTF-8"):
        read_recipe_file(tmp_path / "r.yaml")


def test_settings_of_a_finetuning_are_read_as_strictly(tmp_path: Path, capsys) -> None:
    path = tmp_path / "s.yaml"
    for content, expected in ((laughs("epochs:\n  - "), "aliases are not taken"), ("1: 2\n", "a name must be a word")):
        path.write_text(content)
        command = ["finetune", "--model", str(tmp_path), "--task", "rte", "--config", str(path)]
        assert main([*command, "--output-dir", str(tmp_path / "o")]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1


def test_a_section_is_no_second_config(tmp_path: Path, capsys) -> None:
    (tmp_path / "r.yaml").write_text(laughs("n_layer:\n  - "))
    command = ["pretrain", "gpt", "--output-dir", str(tmp_path / "run"), "--model"]
    for value in (str(tmp_path / "r.yaml"), "{n_layer: 1}"):
        assert main([*command, value]) == 2
        assert "--model" in capsys.readouterr().err


def test_what_recipes_hold_is_read_as_it_always_was(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# a comment\narch: gpt\nmodel: {n_layer: 0x10, dropout: .5, rotary_dim: ~}\n"
        "data:\n  source: ['a b.txt', \"c\"]\n"
    )
    content = read_yaml(path, "it")
    assert content["model"] == {"n_layer": 16, "dropout": 0.5, "rotary_dim": None}
    assert content["data"]["source"] == ["a b.txt", "c"]
