"""Pretraining on public data: it learns, it is repeatable, it refuses what it should, and its file starts a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fed_dpprune import cli
from fed_dpprune import config as cfg
from fed_dpprune.data import registry as datasets
from fed_dpprune.errors import BadInput, ConfigError
from fed_dpprune.federation import pretrain as pretraining
from fed_dpprune.federation.pretrain import Epoch, destination, pretrain
from fed_dpprune.models import initial, registry, weights
from fed_dpprune.models.spec import from_config

KEYS = {
    "data.public": "digits[0:600]",
    "model.hidden": [16],
    "privacy.epsilon": 4.0,
    "privacy.delta": 1e-4,
    "seed": 3,
}


def config(**changes: object) -> cfg.Config:
    return cfg.build({**KEYS, **{key.replace("__", "."): value for key, value in changes.items()}})


def spec(conf: cfg.Config):
    labels = datasets.labels(conf.data, conf.seed)
    return from_config(conf.model, labels.input_shape, labels.classes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps: 540 rows make nine batches a pass."""
    monkeypatch.setattr(pretraining, "LEAST_STEPS", 90)


def test_it_learns_and_says_how_well_on_rows_it_was_not_trained_on(tmp_path):
    heard: list[Epoch] = []
    done = pretrain(config(), tmp_path / "w.safetensors", on_epoch=heard.append)
    assert (done.trained_on, done.held_out) == (540, 60)
    assert [epoch.number for epoch in heard] == list(range(1, 11))  # 90 steps of nine a pass
    assert {epoch.epochs for epoch in heard} == {10}
    assert heard[-1].accuracy == done.accuracy > 0.5
    assert heard[-1].loss < heard[0].loss


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    files = [pretrain(config(seed=seed), tmp_path / f"{n}.safetensors").path.read_bytes() for n, seed in enumerate((3, 3, 4))]
    assert files[0] == files[1] != files[2]


def test_private_rows_outside_the_public_slice_do_not_matter(tmp_path, monkeypatch):
    first = pretrain(config(), tmp_path / "a.safetensors").path.read_bytes()
    load = datasets.load

    def spoiled(data: cfg.Data, seed: int):
        whole = load(data, seed)
        if data.public:  # the private side: its features become noise
            whole.train.x[:] = np.random.default_rng(0).normal(size=whole.train.x.shape)
        return whole

    monkeypatch.setattr(datasets, "load", spoiled)
    assert pretrain(config(), tmp_path / "b.safetensors").path.read_bytes() == first


def test_held_out_rows_are_not_trained_on():
    rows = datasets.load(cfg.Data(dataset="digits"), 3).train
    training, held_out = pretraining._parts(rows, config())
    seen = {row.tobytes() for row in training.x}
    assert len(training) + len(held_out) == len(rows)
    assert sum(row.tobytes() in seen for row in held_out.x) <= 1  # digits holds a pair of equal pictures, at most


def test_the_file_has_the_layouts_names_and_starts_a_run(tmp_path):
    path = pretrain(config(), tmp_path / "w.safetensors").path
    started = config(model__weights=str(path))
    layout = registry.layout(spec(started))
    named = safetensors.numpy.load_file(path)
    assert {name: value.shape for name, value in named.items()} == {t.name: t.shape for t in layout.tensors}
    begun = weights.start(spec(started), layout, seed=99)
    assert begun.fresh == ()
    for tensor, span in layout.spans():
        assert np.array_equal(begun.vector[span], named[tensor.name].reshape(-1))


def test_layers_that_the_private_run_holds_are_trained_here(tmp_path):
    layout = registry.layout(spec(config()))
    first = layout.tensors[0].name.split(".")[0]
    held = config(**{"model.freeze-layers": [first]})
    named = safetensors.numpy.load_file(pretrain(held, tmp_path / "w.safetensors").path)
    begun = initial.draw(layout, held.seed)
    for tensor, span in layout.spans():
        assert not np.array_equal(named[tensor.name].reshape(-1), begun[span])


def test_earlier_weights_are_not_read_but_replaced_by_force(tmp_path):
    path = tmp_path / "w.safetensors"
    fresh = pretrain(config(), path).path.read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        pretrain(config(), path)
    assert path.read_bytes() == fresh
    again = config(model__weights=str(path))
    assert pretrain(again, path, force=True).path.read_bytes() == fresh


def test_without_public_data_it_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.public: is empty"):
        pretrain(config(data__public=""), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_too_few_public_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.public"):
        pretrain(config(data__public="digits[0:3]"), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("weights_key", "out", "expected"),
    [
        ("", None, "runs/my-weights.safetensors"),
        ("runs/a.safetensors", None, "runs/a.safetensors"),
        ("runs/a.safetensors", "b.safetensors", "b.safetensors"),
    ],
)
def test_where_the_weights_go(weights_key, out, expected):
    conf = config(model__weights=weights_key)
    assert destination(conf, Path("configs/my.toml"), None if out is None else Path(out)) == Path(expected)


def test_names_that_no_run_could_read_or_that_are_not_ours_to_write_are_refused():
    with pytest.raises(ConfigError, match=r"^model\.weights"):
        destination(config(model__weights="torchvision"), Path("my.toml"), None)
    with pytest.raises(BadInput, match="--out"):
        destination(config(), Path("my.toml"), Path("weights.pt"))


def test_the_command_writes_says_where_and_refuses_with_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my.toml"
    file.write_text(cfg.to_toml(config(name="mine")))
    assert cli.main(["pretrain", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "pass 10/10  held-out accuracy" in shown
    assert "--set model.weights=runs/mine-weights.safetensors" in shown
    assert (tmp_path / "runs" / "mine-weights.safetensors").is_file()
    assert cli.main(["pretrain", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["pretrain", str(file), "--force", "--set", "data.public="]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fed-dpprune: data.public: is empty")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model.weights": "runs/none.safetensors"}, "model.weights = runs/none.safetensors: no such file"),
        ({"model.weights": "none.bin"}, "model.weights: 'none.bin' is not a weights file"),
        ({"sparsity.prune.method": "file", "sparsity.prune.file": "none.npz"}, "sparsity.prune.file: there is no file none.npz"),
    ],
)
def test_a_run_without_the_file_it_starts_from_ends_with_exit_2_before_it_writes(tmp_path, capsys, monkeypatch, keys, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(cfg.to_toml(config(**keys)))
    assert cli.main(["run", "my.toml", "--out", "out", "--backend", "inline"]) == 2
    assert capsys.readouterr().err.startswith(f"fed-dpprune: {named}")
    assert [path.name for path in tmp_path.iterdir()] == ["my.toml"]
