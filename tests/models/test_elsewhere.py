"""A directory that we wrote opens in a process that never imported us; whoever opens it with us never runs its code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cottention import models as ours
from cottention.models import CottentionGPTConfig, CottentionGPTForCausalLM
from tests import tiny
from tests.forks import run_fork
from tests.models.helpers import bert_config, gpt_config

MODULE = "modeling_cottention.py"


HIDDEN = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "cottention":
            raise ModuleNotFoundError("No module named 'cottention'")
sys.meta_path.insert(0, Hidden())
"""


def elsewhere(code: str, cache: Path, *, installed: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has transformers and, where we are installed, could import us, but has not."""
    code = f"import sys\n{'' if installed else HIDDEN}{code}"
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return run_fork("-c", code, env=environment)


OPENING = """
import json, transformers
assert "cottention" not in sys.modules
for directory in {directories!r}:
    names = json.load(open(directory + "/config.json"))["auto_map"]
    if "cottention" not in sys.modules:
        try:
            transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except ValueError as error:
            assert "pass the argument `trust_remote_code=True`" in str(error)
        assert "cottention" not in sys.modules
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    for auto, reference in names.items():
        if auto != "AutoConfig":
            model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True)
            import cottention.models
            assert type(model) is getattr(cottention.models, reference.split(".")[1]), (auto, type(model))
            assert type(config) is type(model.config) is model.config_class
    model.save_pretrained(directory + "-again")
    model.config.save_pretrained(directory + "-config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    print(tokenizer("the people"))
write = transformers.pipeline("text-generation", model={directories!r}[0], trust_remote_code=True)
assert write("The", max_new_tokens=3, do_sample=False)[0]["generated_text"]
"""


def test_every_auto_class_opens_a_directory_where_we_were_never_imported(tmp_path: Path) -> None:
    directories = [str(tmp_path / "gpt"), str(tmp_path / "bert")]
    tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    tiny.save(tmp_path / "bert", tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())
    done = elsewhere(OPENING.format(directories=directories), tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    for directory in map(Path, directories):
        for saved in (Path(f"{directory}-again"), Path(f"{directory}-config")):
            assert saved.joinpath(MODULE).read_bytes() == directory.joinpath(MODULE).read_bytes()
            assert [path.name for path in saved.glob("*.py")] == [MODULE]
            assert settings_of(saved)["auto_map"] == settings_of(directory)["auto_map"]


REFUSALS = """
import transformers
for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
    for trusted in (True, False):
        try:
            getattr(transformers, auto).from_pretrained({directory!r}, trust_remote_code=trusted)
        except (ImportError, ValueError) as error:
            print(trusted, type(error).__name__, error)
"""


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path) -> None:
    gpt_config().save_pretrained(tmp_path)
    done = elsewhere(REFUSALS.format(directory=str(tmp_path)), tmp_path / "cache", installed=False)
    assert done.returncode == 0, done.stderr
    remedy = "cottention. Run `pip install cottention`"
    assert sum(line.startswith("True ImportError") and remedy in line for line in done.stdout.splitlines()) == 3
    assert done.stdout.count("Please pass the argument `trust_remote_code=True`") == 2
    assert "False ImportError" not in done.stdout


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def change_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write another config.json, into a directory that says no more what it should hold."""
    (directory / "MANIFEST.json").unlink(missing_ok=True)
    (directory / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("config", [gpt_config(), bert_config()], ids=["gpt", "bert"])
def test_a_config_names_every_auto_class_and_the_module_has_every_class(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    family = type(config).__name__.removesuffix("Config")
    classes = {name for name in ours.__all__ if name.startswith(family)}
    names = settings_of(tmp_path)["auto_map"]
    assert names == config.auto_map
    assert {reference.removeprefix("modeling_cottention.") for reference in names.values()} == classes
    module: dict[str, Any] = {}
    exec((tmp_path / MODULE).read_text(), module)  # noqa: S102
    assert {name for name in module if name.startswith("Cottention")} == classes


def test_the_map_is_no_setting(tmp_path: Path) -> None:
    config = gpt_config()
    assert "auto_map" not in config.to_dict()
    config.auto_map["AutoModel"] = "mine.Model"
    assert gpt_config().auto_map["AutoModel"] == "modeling_cottention.CottentionGPTModel"


def test_a_map_in_a_file_is_ignored(tmp_path: Path) -> None:
    model = CottentionGPTForCausalLM(gpt_config())
    model.save_pretrained(tmp_path)
    harm = tmp_path / "harm"
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(harm)!r})\n")
    (tmp_path / MODULE).write_text(f"import os; os.mkdir({str(harm)!r})\n")
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Thing")
    change_settings(tmp_path, {**settings_of(tmp_path), "auto_map": names})
    for trusted in (None, False, True):
        assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trusted)) is CottentionGPTConfig
        opened = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trusted)
        assert type(opened) is CottentionGPTForCausalLM
        assert opened.config.auto_map == gpt_config().auto_map
    CottentionGPTForCausalLM.from_pretrained(tmp_path)
    assert not harm.exists()


def test_a_directory_without_a_map_opens_as_before(tmp_path: Path) -> None:
    CottentionGPTForCausalLM(gpt_config()).save_pretrained(tmp_path)
    (tmp_path / MODULE).unlink()
    settings = settings_of(tmp_path)
    del settings["auto_map"]
    change_settings(tmp_path, settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model) is CottentionGPTForCausalLM
    assert model.config.auto_map["AutoModelForCausalLM"] == "modeling_cottention.CottentionGPTForCausalLM"


class OtherConfig(CottentionGPTConfig):
    model_type = "other-gpt"


class OtherGPT(CottentionGPTForCausalLM):
    config_class = OtherConfig


def test_a_class_of_somebody_else_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {**gpt_config().to_dict(), "model_type": "other-gpt"}
    config = OtherConfig(**fields)
    assert config.auto_map == {}
    OtherGPT(config).save_pretrained(tmp_path)
    assert "auto_map" not in settings_of(tmp_path)
    assert not (tmp_path / MODULE).exists()
    monkeypatch.setattr(OtherGPT, "_auto_class", None)
    OtherGPT.register_for_auto_class("AutoModelForCausalLM")
    OtherGPT(config).save_pretrained(tmp_path)
    assert settings_of(tmp_path)["auto_map"] == {"AutoModelForCausalLM": f"{__name__.rsplit('.', 1)[-1]}.OtherGPT"}
    assert (tmp_path / Path(__file__).name).exists()
    CottentionGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    assert CottentionGPTForCausalLM._auto_class is None
