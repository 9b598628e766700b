"""What `import cottention` promises: light, complete, and known to transformers whichever comes first."""

from __future__ import annotations

import io
import logging
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cottention
from cottention import _register
from cottention.errors import CottentionError, SettingsError, check_known_keys, did_you_mean
from cottention.logging import get_logger, log_once, setup_cli_logging
from tests.forks import run_fork
from tests.subprocesses import run_python
from tests.test_torch_only import ATTEND

_KNOWS_THE_MODELS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import torch
config = AutoConfig.for_model("cottention-gpt", vocab_size=11, n_embd=8, n_head=2, n_layer=1, n_positions=16)
model = AutoModelForCausalLM.from_config(config)
assert type(model).__module__.startswith("cottention."), type(model)
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 11)
assert type(AutoModel.from_config(AutoConfig.for_model(
    "cottention-bert", vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
))).__name__ == "CottentionBertModel"
"""


def test_import_loads_neither_torch_nor_transformers():
    run_python("""
        import cottention
        cottention.__version__, dir(cottention)
        heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_every_public_name_can_be_imported_and_is_listed():
    for name in cottention.__all__:
        assert getattr(cottention, name) is not None
        assert name in dir(cottention)


def test_a_name_is_the_one_of_its_home():
    import cottention.ops

    assert cottention.cosine_attention is cottention.ops.cosine_attention


def test_subpackages_are_attributes_without_an_import():
    ran = run_fork("-c", "import cottention; cottention.ops.cosine_attention")
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cottention' has no attribute 'cosine_atention'"):
        cottention.cosine_atention  # noqa: B018


def test_version_is_the_installed_one():
    assert cottention.__version__ == metadata.version("cottention")


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import cottention, transformers", "import cottention.models.gpt.modeling_gpt"])
def test_transformers_knows_the_models_in_either_order(imports):
    run_python(f"{imports}\n{_KNOWS_THE_MODELS}")


def test_transformers_that_was_imported_first_knows_the_models():
    ran = run_fork("-c", f"from transformers import AutoModel; import cottention\n{_KNOWS_THE_MODELS}")
    assert ran.returncode == 0, ran.stderr


def test_without_wrapt_the_operation_runs_and_models_are_known_once_they_are_registered_by_hand():
    run_python(
        f"import cottention, transformers\n{ATTEND}\n"
        f"import cottention.models\ncottention.models.register_auto_classes()\n{_KNOWS_THE_MODELS}",
        hidden=["wrapt"],
    )


def test_peft_adapts_in_our_models_what_it_adapts_in_stock_ones():
    constants: Any = ModuleType("peft.utils.constants")
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = {"bert": ["query"], "gptj": ["q_proj"], "t5": ["q"]}
    constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = {"bert": ["key"], "cottention-bert": ["mine"]}
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING = {"bloom": len}
    constants.bert = "gptj"
    _register._register_targets(constants)
    assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING == {
        "bert": ["query"],
        "cottention-bert": ["query"],
        "gptj": ["q_proj"],
        "cottention-gpt": ["q_proj"],
        "t5": ["q"],
    }
    assert constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING == {"bert": ["key"], "cottention-bert": ["mine"]}
    untouched = constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    assert untouched == {"bloom": len}


@pytest.mark.parametrize("first", ["cottention", "peft.utils.constants"])
def test_peft_is_told_in_either_order_and_never_imported(first: str, tmp_path: Path):
    folder = tmp_path / "peft" / "utils"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "constants.py").write_text('TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = {"gptj": ["q_proj"]}\n')
    run_python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import {first}
assert ("peft" in sys.modules) == {first != "cottention"}
import cottention
import peft.utils.constants as constants
assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["cottention-gpt"] == ["q_proj"]
""")


def test_importing_both_packages_loads_no_torch():
    run_python("""
        import cottention, transformers
        assert "torch" not in sys.modules
    """)


def test_a_transformers_that_lacks_our_base_classes_stays_importable_and_says_so(tmp_path: Path):
    auto = tmp_path / "transformers/models/auto"
    auto.mkdir(parents=True)
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '3.0'\n")
    (auto / "configuration_auto.py").write_text("class AutoConfig: pass\n")
    (auto / "modeling_auto.py").write_text("class AutoModel: pass\n")
    code = f"""
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
import cottention
import transformers
assert transformers.__version__ == "3.0"
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel
"""
    ran = run_fork("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert "configuration_gpt is not registered with transformers: No module named" in ran.stderr
    assert "modeling_gpt is not registered with transformers: No module named" in ran.stderr


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [
        ("hiden_size", "; did you mean 'hidden_size'?"),
        ("hidden-size", "; did you mean 'hidden_size'?"),
        ("Hidden_Size", "; did you mean 'hidden_size'?"),
        ("zebra", ""),
    ],
)
def test_a_misspelled_name_gets_the_closest_one(given, suggestion):
    assert did_you_mean(given, ["hidden_size", "num_heads"]) == suggestion


def test_an_unknown_key_is_named_with_its_place():
    check_known_keys(["lr"], ["lr", "steps"], "recipe section 'training'")
    with pytest.raises(SettingsError, match=r"recipe section 'training' has no key 'stps'; did you mean 'steps'\?"):
        check_known_keys(["lr", "stps"], ["lr", "steps"], "recipe section 'training'")


def test_a_user_mistake_is_a_value_error():
    assert issubclass(SettingsError, CottentionError)
    assert issubclass(CottentionError, ValueError)


def test_log_once_says_a_thing_once(caplog: pytest.LogCaptureFixture):
    logger = get_logger("test_log_once")
    with caplog.at_level(logging.INFO, logger="cottention"):
        for device in ("cpu", "cpu", "cuda"):
            log_once(logger, "runs on %s", device)
    assert [record.getMessage() for record in caplog.records] == ["runs on cpu", "runs on cuda"]


def test_loggers_live_below_the_package():
    assert get_logger("cottention.ops").name == "cottention.ops"
    assert get_logger("elsewhere").name == "cottention.elsewhere"
    assert get_logger("cottention").name == "cottention"


@pytest.mark.parametrize(("verbose", "said"), [(False, "news\n"), (True, "cottention.x: news\ncottention.x: detail\n")])
def test_the_command_line_logs_to_stderr(monkeypatch, verbose, said):
    root = logging.getLogger("cottention")
    before = (root.handlers[:], root.level, root.propagate)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    try:
        setup_cli_logging(verbose)
        setup_cli_logging(verbose)
        get_logger("cottention.x").info("news")
        get_logger("cottention.x").debug("detail")
    finally:
        root.handlers[:], root.level, root.propagate = before
    assert stderr.getvalue() == said
