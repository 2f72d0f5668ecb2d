from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from fed_dpprune.errors import ConfigError, DataError
from fed_dpprune.models import initial, registry, vector, weights
from fed_dpprune.models.registry import ModelSpec

SPEC = ModelSpec("mlp", (8,), "tanh", (6,), 4)
LAYOUT = registry.layout(SPEC)
VALUES = np.arange(LAYOUT.d, dtype=np.float32)


def named() -> dict[str, np.ndarray]:
    return {name: part.copy() for name, part in LAYOUT.split(VALUES).items()}


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(part) for name, part in named().items()}


def start(path: Path | str, spec: ModelSpec = SPEC, seed: int = 0) -> weights.Start:
    return weights.start(replace(spec, weights=str(path)), registry.layout(spec), seed)


def test_without_a_file_the_draw_is_the_start():
    begun = weights.start(SPEC, LAYOUT, 3)
    assert begun.source == "" and begun.fresh == ()
    np.testing.assert_array_equal(begun.vector, initial.draw(LAYOUT, 3))


def test_a_saved_model_is_a_start(tmp_path):
    vector.save(tmp_path / "m.safetensors", LAYOUT, VALUES)
    begun = start(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(begun.vector, VALUES)
    assert begun.fresh == ()


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_module.{name}": value for name, value in state.items()},
        lambda state: {name: value.double() for name, value in state.items()},
        lambda state: {name: value.bfloat16().float() if value.max() < 200 else value for name, value in state.items()},
        lambda state: {**state, "steps": torch.tensor(7), "extra.weight": torch.zeros(2)},
    ],
)
def test_a_checkpoint_of_torch_is_a_start(tmp_path, suffix, wrap):
    path = tmp_path / f"m.{suffix}"
    torch.save(wrap(tensors()), path)
    np.testing.assert_array_equal(start(path).vector, VALUES)


def test_a_head_of_other_classes_is_drawn_afresh_and_reported(tmp_path):
    torch.save(tensors(), tmp_path / "m.pt")
    other = replace(SPEC, classes=7)
    begun, layout = start(tmp_path / "m.pt", other, 5), registry.layout(other)
    parts, drawn = layout.split(begun.vector), layout.split(initial.draw(layout, 5))
    np.testing.assert_array_equal(parts["fc1.weight"], named()["fc1.weight"])
    np.testing.assert_array_equal(parts["head.weight"], drawn["head.weight"])
    np.testing.assert_array_equal(parts["head.bias"], drawn["head.bias"])
    assert begun.fresh == ("head.weight", "head.bias")


def test_half_a_head_is_no_head(tmp_path):
    state = tensors()
    del state["head.bias"]
    torch.save(state, tmp_path / "m.pt")
    begun = start(tmp_path / "m.pt")
    np.testing.assert_array_equal(LAYOUT.split(begun.vector)["head.weight"], LAYOUT.split(initial.draw(LAYOUT, 0))["head.weight"])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda state: state.pop("fc1.bias"), "fc1.bias of shape .* is missing"),
        (lambda state: state.update({"fc1.weight": torch.zeros(8, 5)}), r"fc1.weight of shape .* has shape \(8, 5\)"),
        (lambda state: state["fc1.weight"].fill_(float("nan")), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path, spoil, text):
    state = tensors()
    spoil(state)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(DataError, match=rf"model\.weights = .*{text}"):
        start(tmp_path / "m.pt")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("plain_pickle", [True, False])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path, plain_pickle, suffix):
    marker, path = tmp_path / "ran", tmp_path / f"m.{suffix}"
    state = {**tensors(), "payload": Bomb(marker)}
    if plain_pickle:
        path.write_bytes(pickle.dumps({"payload": Bomb(marker)}, protocol=2))
    else:
        torch.save(state, path)
    with pytest.raises(DataError, match=r"not opened|checkpoint"):
        start(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if not plain_pickle else pickle.loads(path.read_bytes())
    assert marker.exists()  # the file was indeed malicious


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(registry.build(SPEC), tmp_path / "m.pt")
    with pytest.raises(DataError, match="save a state_dict"):
        start(tmp_path / "m.pt")


@pytest.mark.parametrize("blob", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_rubbish_is_one_line(tmp_path, blob, suffix):
    (tmp_path / f"m.{suffix}").write_bytes(blob)
    with pytest.raises(DataError) as caught:
        start(tmp_path / f"m.{suffix}")
    assert "\n" not in str(caught.value)


def test_a_tensor_alone_is_no_state_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "m.pt")
    with pytest.raises(DataError, match="not a state_dict"):
        start(tmp_path / "m.pt")


def test_safetensors_of_half_precision_are_widened(tmp_path):
    halves = {name: (part % 512).astype(np.float16) for name, part in named().items()}
    safetensors.numpy.save_file(halves, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(start(tmp_path / "m.safetensors").vector, VALUES % 512)


def test_a_missing_file_and_a_wrong_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        start(tmp_path / "none.pt")
    with pytest.raises(ConfigError, match=r"model\.weights"):
        start(tmp_path / "m.pickle")
    with pytest.raises(ConfigError, match="needs a net of torchvision"):
        start("torchvision")
