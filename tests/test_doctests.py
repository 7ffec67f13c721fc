"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import emoji
import unime_st

MODULES = sorted(
    module.name
    for package in (unime_st, emoji)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)
FINDER = doctest.DocTestFinder(exclude_empty=True)
WITH_EXAMPLES = {}  # module -> its docstrings with examples


def examples(name):
    if name not in WITH_EXAMPLES:
        found = FINDER.find(importlib.import_module(name))
        WITH_EXAMPLES[name] = [test for test in found if test.examples]
    return WITH_EXAMPLES[name]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    for test in examples(name):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries == sum(len(test.examples) for test in examples(name))
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_there_are_examples():
    """Else the test above passes on nothing."""
    counts = {name: len(examples(name)) for name in MODULES if not name.endswith("__main__")}
    assert sum(counts.values()) > 40
    for layer in (
        "functional",
        "identity.content",
        "columns",
        "prompts",
        "losses.distill_kl",
        "samplers.false_negative_aware",
    ):
        assert counts[f"unime_st.{layer}"] > 0, layer
