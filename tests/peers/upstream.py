"""Imports transformers' common tests (see unpack.py) and tells them our class names.

Their files say `from .generation.test_utils import …`, so the folder is imported as a package under a name of ours.
What the source distributions lack is stood in for by empty classes: the mixins of generation and of exporting, each
of which has tests of its own here, and the pipelines', which are not used.

    class TestGPT(upstream.ModelTesterMixin, upstream.TrainingTesterMixin, unittest.TestCase): ...
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

import cottention.models
from tests.peers.unpack import unpacked_tests

_PACKAGE = "transformers_tests"
# What the tests that we have import of files that the distributions of 5.0 to 5.24 lack.
STAND_INS: dict[str, dict[str, Any]] = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    # Settings of every config, each with another value than its default.
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
}


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(f"{_PACKAGE}.{name}" if name else _PACKAGE)
    module.__dict__.update(contents)
    sys.modules[module.__name__] = module
    return module


def _import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs are not ours to mend
        return import_module(f"{_PACKAGE}.{name}")


if not unpacked_tests().is_dir():
    pytest.skip("transformers' tests are not here: `make test-peers` fetches them", allow_module_level=True)
pytest.importorskip("parameterized", reason="`make test-peers` installs it")

_module("", __path__=[str(unpacked_tests())])
for _name, _contents in STAND_INS.items():
    _module(_name.partition(".")[0], __path__=[])
    _module(_name, **_contents)

_common = _import("test_modeling_common")
ModelTesterMixin = _common.ModelTesterMixin
TrainingTesterMixin = _import("test_training_mixin").TrainingTesterMixin
ConfigTester = _import("test_configuration_common").ConfigTester

_get_values = _common.get_values


def _get_values_with_ours(names: Any) -> list[str]:
    """The class names of an Auto table and those of ours that belong there, as Llama's and BERT's do."""
    known = _get_values(names)
    stock = {
        name: name.replace("CottentionGPT", "Llama").replace("Cottention", "") for name in cottention.models.__all__
    }
    return [*known, *(ours for ours, theirs in stock.items() if theirs in known)]


_common.get_values = _get_values_with_ours
