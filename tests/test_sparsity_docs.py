"""docs/methods.md says what the code does: every key and criterion is there, and its example runs."""

import re
from pathlib import Path

import pytest

from fed_dpprune import config
from fed_dpprune.models import registry
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.sparsity import files
from fed_dpprune.sparsity.prune import EXEMPT_WORDS
from fed_dpprune.sparsity.support import PROVENANCES

TEXT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", [key for key in config.KEYS if key.startswith("sparsity.")])
def test_every_sparsity_key_and_every_choice_of_it_is_described(key):
    *_, table, leaf = key.split(".")
    assert re.search(rf"\b{leaf}\b", TEXT), leaf
    for choice in config._choices(key).split(" | "):
        if choice not in ("", "none"):
            assert re.search(rf"[`\"]{re.escape(choice)}[`\"]", TEXT), f"{table}.{leaf} = {choice}"


@pytest.mark.parametrize("word", [*EXEMPT_WORDS, *PROVENANCES])
def test_every_exempt_group_and_provenance_is_described(word):
    assert f"`{word}`" in TEXT


def test_the_example_runs_and_its_controls_are_controls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(code, "methods.md", "exec"), {})
    layout = registry.layout(ModelSpec("tanh-cnn", (), "tanh", (1, 28, 28), 10))
    chosen, matched, shuffled = (files.load(tmp_path / f"{n}.npz", layout) for n in ("synflow", "size-matched", "layer-shuffled"))
    assert chosen.k == matched.k == shuffled.k
    assert layout.counts(chosen.indices) == layout.counts(shuffled.indices) != layout.counts(matched.indices)
    assert len({chosen.digest, matched.digest, shuffled.digest}) == 3
