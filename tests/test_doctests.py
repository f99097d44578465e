"""The "Equivalent to:" blocks of diwa.nn and diwa.ops run."""

import doctest
import importlib
import pkgutil

import pytest

import diwa.nn
import diwa.ops

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (diwa.nn, diwa.ops)
    for module in pkgutil.iter_modules(package.__path__)
]
PUBLIC = ("DenoisingMLP", "DiffusionPolicy", "GRUCell", "NoiseSchedule", "RSSM", "RewardClassifier")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_say_what_they_equal(name):
    doc = getattr(diwa.nn, name).__doc__
    assert "Equivalent to" in doc and ">>> " in doc
