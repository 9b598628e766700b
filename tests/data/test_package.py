"""The names of `cottention.data`: all there, made when they are first used."""

from __future__ import annotations

import json

import pytest

import cottention.data
from tests.subprocesses import run_python


def test_every_public_name_is_there():
    assert len(cottention.data.__all__) == 18
    for name in cottention.data.__all__:
        assert getattr(cottention.data, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'load_corpora'"):
        _ = cottention.data.load_corpora  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_no_library():
    ran = run_python("import cottention.data, json, sys; print(json.dumps(sorted(sys.modules)))")
    heavy = {"datasets", "numpy", "pyarrow", "tokenizers", "torch", "transformers"}
    assert heavy & set(json.loads(ran.stdout)) == set()
