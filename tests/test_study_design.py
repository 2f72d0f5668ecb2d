"""The study file: which runs it makes, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed_dpprune.errors import BadInput, ConfigError
from fed_dpprune.study import design

BASE = '[federation]\nrounds = 3\n[privacy]\nnoise-multiplier = 1.0\n[sparsity.freeze]\nmethod = "random"\nrate = 0.5\n'


@pytest.fixture
def load(tmp_path: Path):
    (tmp_path / "base.toml").write_text(BASE)

    def write_and_load(text: str) -> design.Study:
        (tmp_path / "study.toml").write_text('base = "base.toml"\n' + text)
        return design.load(tmp_path / "study.toml")

    return write_and_load


def _labels(study: design.Study) -> list[str]:
    return [point.label for point in study.points]


def test_a_grid_is_every_combination_in_order_variants_axes_seeds(load):
    study = load(
        "seeds = [1, 2]\n[variants.a]\n[variants.b]\n[axes]\nsparsity.freeze.rate = [0.5, 0.9]\nclient.learning-rate = [1, 2]\n"
    )
    assert len(study.points) == 2 * 2 * 2 * 2
    assert _labels(study)[:3] == [
        "a_rate=0.5_learning-rate=1_seed=1",
        "a_rate=0.5_learning-rate=1_seed=2",
        "a_rate=0.5_learning-rate=2_seed=1",
    ]
    last = study.points[-1].config
    assert (last.sparsity.freeze.rate, last.client.learning_rate, last.seed) == (0.9, 2.0, 2)


def test_zip_walks_the_axes_in_step(load):
    study = load('combine = "zip"\n[axes]\nsparsity.freeze.rate = [0.5, 0.9]\nclient.learning-rate = [1, 2]\n')
    assert [(p.config.sparsity.freeze.rate, p.config.client.learning_rate) for p in study.points] == [(0.5, 1.0), (0.9, 2.0)]


def test_variants_change_the_base_and_common_keys_lie_between(load):
    study = load(
        "[common]\nfederation.rounds = 7\n[variants.dense.sparsity.freeze]\nmethod = 'none'\nrate = 0.0\n[variants.freeze]\n"
    )
    dense, freeze = (point.config for point in study.points)
    assert (dense.sparsity.freeze.method, freeze.sparsity.freeze.method) == ("none", "random")
    assert dense.federation.rounds == freeze.federation.rounds == 7


def test_a_key_that_a_variant_sets_is_not_varied_in_it(load):
    text = "[variants.dense]\nsparsity.freeze.method = 'none'\nsparsity.freeze.rate = 0.0\n[variants.freeze]\n"
    study = load(text + "[axes]\nsparsity.freeze.rate = [0.5, 0.9]\n")
    assert _labels(study) == ["dense_seed=0", "freeze_rate=0.5_seed=0", "freeze_rate=0.9_seed=0"]
    assert study.points[0].settings == {"sparsity.freeze.rate": 0.0}


def test_keys_with_the_same_last_word_are_told_apart_in_labels(load):
    (point,) = load("[axes]\nclient.learning-rate = [1]\nserver.learning-rate = [0.5]\n").points
    assert point.label == "run_client.learning-rate=1_server.learning-rate=0.5_seed=0"


def test_labels_are_folder_names(load):
    (point,) = load('[variants."odd / name"]\n[axes]\nmodel.hidden = [[64, 32]]\n').points
    assert not set(point.label) & set(" /\\[],'")
    assert point.config.name == point.label


def test_a_study_without_anything_is_the_base_with_its_seed(load):
    (point,) = load("").points
    assert (point.variant, point.seed, point.config.federation.rounds) == ("run", 0, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = [1]\n", "seed: is not a key of a study; did you mean 'seeds'"),
        ("seeds = []\n", "must be a list of whole numbers"),
        ("seeds = [1, 1]\n", "names a seed twice"),
        ("seeds = 3\n", "is not of the right kind; it is a list"),
        ("[axes]\nclient.learning-rate = 3\n", "must be a list of values"),
        ("[axes]\nseed = [3]\n", "seeds have their own key"),
        ('combine = "zip"\n[axes]\nsparsity.freeze.rate = [0.5, 0.9]\nclient.learning-rate = [1]\n', "needs lists of one length"),
        ('combine = "all"\n', "use grid or zip"),
        ('name = "../up"\n', "cannot name a folder"),
        ("[variants]\na = 1\n", "is not a table"),
        ('[variants."a b"]\n[variants.a-b]\nsparsity.freeze.rate = 0.1\n', "two different runs would be called"),
        ("x = [\n", "is not valid TOML"),
    ],
)
def test_a_faulty_study_is_bad_input_that_says_what_to_do(load, text, words):
    with pytest.raises(BadInput) as caught:
        load(text)
    assert words in str(caught.value)


def test_a_faulty_config_names_the_variant_and_the_key(load):
    with pytest.raises(ConfigError, match=r"variant bad: sparsity.freez.rate: is not a config key; did you mean"):
        load("[variants.good]\n[variants.bad]\nsparsity.freez.rate = 0.1\n")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BadInput, match="no such study file"):
        design.load(tmp_path / "none.toml")
    (tmp_path / "study.toml").write_text('base = "none.toml"\n')
    with pytest.raises(BadInput, match="relative to the study file"):
        design.load(tmp_path / "study.toml")
