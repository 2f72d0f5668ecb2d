"""Every built-in net: known sizes, layout without torch equal to the torch module, first weights, vectors."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpprune import config
from fed_dpprune.errors import ConfigError, DataError
from fed_dpprune.models import initial, registry, vector
from fed_dpprune.models.flat import KINDS, Layout, Tensor
from fed_dpprune.models.registry import ModelSpec

SIZES = [
    ("mlp", (64,), 9_610),
    ("mlp", (1, 28, 28), 101_770),
    ("logistic", (64,), 650),
    ("logistic", (3, 4, 5), 610),
    ("tanh-cnn", (1, 28, 28), 26_010),  # methods of random freeze at 28 x 28
    ("tanh-cnn", (3, 32, 32), 37_274),
    ("dp-cnn", (3, 32, 32), 550_570),  # arXiv 2112.00845
    ("dp-cnn", (1, 28, 28), 435_306),
    ("resnet20", (3, 32, 32), 269_722),  # He et al. 2016: 0.27 million
    ("resnet20", (1, 28, 28), 269_434),
    ("wrn16-4", (3, 32, 32), 2_748_890),  # De et al. 2022: 2.75 million
]


def spec(name: str, shape: tuple[int, ...], classes: int = 10, **changes) -> ModelSpec:
    return ModelSpec(
        **{"name": name, "hidden": (128,), "activation": "tanh", "input_shape": shape, "classes": classes, **changes}
    )


def test_the_table_is_covered():
    assert {name for name, _, _ in SIZES} == set(registry.TABLE)


@pytest.mark.parametrize(("name", "shape", "size"), SIZES)
def test_a_net_has_its_published_number_of_parameters(name, shape, size):
    assert registry.layout(spec(name, shape)).d == size


@pytest.mark.parametrize(("name", "shape", "_"), SIZES)
def test_layout_and_module_agree_on_names_shapes_and_order(name, shape, _):
    layout, module = registry.layout(spec(name, shape)), registry.build(spec(name, shape))
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [(t.name, t.shape) for t in layout.tensors]
    assert not list(module.buffers())


@pytest.mark.parametrize(("name", "shape", "_"), SIZES)
def test_a_net_gives_finite_scores_of_each_example_alone(name, shape, _):
    """No cross-example part: an example's scores do not depend on who else is in the batch."""
    layout, module = registry.layout(spec(name, shape)), registry.build(spec(name, shape))
    vector.load(module, layout, initial.draw(layout, 1))
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4, *shape)).astype(np.float32))
    for training in (False, True):
        module.train(training)
        with torch.no_grad():
            together, alone = module(x), torch.cat([module(row[None]) for row in x])
        assert together.shape == (4, 10) and torch.isfinite(together).all()
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shape", "_"), SIZES)
def test_kinds_and_fan_in_are_those_of_the_modules(name, shape, _):
    """Read off the torch modules by the rules for foreign nets: two independent ways to the same table."""
    from fed_dpprune.models import foreign

    layout = registry.layout(spec(name, shape))
    assert foreign.tensors(registry.build(spec(name, shape))) == layout.tensors
    assert {tensor.kind for tensor in layout.tensors} <= set(KINDS)
    assert [t.name for t in layout.tensors if t.head] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("hidden", "size"), [((), 650), ((5,), 385), ((7, 3), 64 * 7 + 7 + 7 * 3 + 3 + 3 * 10 + 10)])
def test_an_mlp_has_the_widths_it_was_asked_for(hidden, size):
    assert registry.layout(spec("mlp", (64,), hidden=hidden)).d == size


@pytest.mark.parametrize(("activation", "kind"), [("tanh", nn.Tanh), ("relu", nn.ReLU)])
def test_an_mlp_has_the_activation_it_was_asked_for(activation, kind):
    module = registry.build(spec("mlp", (64,), activation=activation))
    assert [type(part) for part in module] == [nn.Flatten, nn.Linear, kind, nn.Linear]


@pytest.mark.parametrize("name", ["tanh-cnn", "dp-cnn", "resnet20", "wrn16-4"])
@pytest.mark.parametrize("shape", [(64,), (88,)])
def test_a_net_for_images_refuses_features_and_names_both_keys(name, shape):
    for call in (registry.layout, registry.build):
        with pytest.raises(ConfigError, match=r"model\.name and data\.dataset.*needs images") as caught:
            call(spec(name, shape))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(("name", "shape"), [("dp-cnn", (3, 7, 7)), ("tanh-cnn", (1, 8, 8)), ("dp-cnn", (3, 32, 4))])
def test_images_that_are_too_small_are_refused(name, shape):
    with pytest.raises(ConfigError, match="does not fit"):
        registry.layout(spec(name, shape))


@pytest.mark.parametrize(
    ("given", "offered"), [("dpcnn", "dp-cnn"), ("resnet-20", "resnet20"), ("wrn", "wrn16-4"), ("vgg", "torchvision:<name>")]
)
def test_an_unknown_net_offers_the_nearest(given, offered):
    with pytest.raises(ConfigError, match=offered):
        registry.layout(spec(given, (64,)))


def test_building_leaves_torchs_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    registry.build(spec("mlp", (64,)))
    assert torch.equal(torch.rand(3), expected)


def test_layouts_and_first_weights_need_no_torch():
    names = [name for name, _, _ in SIZES]
    code = (
        "import sys; from fed_dpprune.models import registry, initial, vector, weights\n"
        f"for n in {names}:\n"
        "    s = registry.ModelSpec(n, (8,), 'tanh', (3, 32, 32), 10); l = registry.layout(s); weights.start(s, l, 0)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_spec_of_a_config_carries_every_key_of_the_table():
    model = config.Model(name="mlp", hidden=(3, 4), activation="relu", weights="a.pt", freeze_layers=("fc1",))
    assert registry.from_config(model, (64,), 10) == ModelSpec("mlp", (3, 4), "relu", (64,), 10, ("fc1",), "a.pt")


# frozen layers


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ((), []),
        (("fc1",), ["fc1.weight", "fc1.bias"]),
        (("fc*",), ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
        (("*.bias",), ["fc1.bias", "fc2.bias", "head.bias"]),
        (("fc1.weight", "head.bias"), ["fc1.weight", "head.bias"]),
    ],
)
def test_patterns_freeze_layers_and_tensors(patterns, frozen):
    layout = registry.layout(spec("mlp", (64,), hidden=(8, 8), freeze_layers=patterns))
    assert [t.name for t in layout.tensors if t.frozen] == frozen


def test_a_pattern_reaches_whole_blocks():
    layout = registry.layout(spec("resnet20", (3, 32, 32), freeze_layers=("stage1*", "conv")))
    assert {t.name.split(".")[0].split("_")[0] for t in layout.tensors if t.frozen} == {"stage1", "conv"}


def test_freezing_changes_neither_order_nor_digest_nor_first_weights():
    free, frozen = (registry.layout(spec("mlp", (64,), freeze_layers=patterns)) for patterns in ((), ("fc1",)))
    assert free.digest == frozen.digest
    np.testing.assert_array_equal(initial.draw(free, 3), initial.draw(frozen, 3))


@pytest.mark.parametrize(("patterns", "text"), [(("conv1",), "the layers are fc1, head"), (("*",), "freezes the whole net")])
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(patterns, text):
    with pytest.raises(ConfigError, match=rf"model\.freeze-layers.*{text}"):
        registry.layout(spec("mlp", (64,), freeze_layers=patterns))


# first weights


def test_first_weights_are_the_same_on_every_machine():
    values = initial.draw(registry.layout(spec("mlp", (64,))), 0)
    assert hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest() == "43ebe1ff6df802f2a996acef07adee1a"
    assert [float(value).hex() for value in values[:3]] == [
        "-0x1.7c47480000000p-5",
        "-0x1.4e52f00000000p-5",
        "-0x1.7fc5640000000p-4",
    ]
    images = initial.draw(registry.layout(spec("tanh-cnn", (1, 28, 28))), 7)
    assert hashlib.blake2b(images.tobytes(), digest_size=16).hexdigest() == "459b980fc7ddeaafb834924b98150e4a"


def test_first_weights_follow_the_seed():
    layout = registry.layout(spec("mlp", (64,)))
    np.testing.assert_array_equal(initial.draw(layout, 4), initial.draw(layout, 4))
    assert np.mean(initial.draw(layout, 4) == initial.draw(layout, 5)) < 0.01


@pytest.mark.parametrize(("name", "shape", "_"), SIZES)
def test_first_weights_are_uniform_within_their_fan_in(name, shape, _):
    layout = registry.layout(spec(name, shape))
    values = layout.split(initial.draw(layout, 0))
    for tensor in layout.tensors:
        drawn = values[tensor.name]
        if tensor.kind == "norm":
            assert np.all(drawn == (0.0 if tensor.name.endswith("bias") else 1.0))
            continue
        bound = tensor.fan_in**-0.5
        assert np.abs(drawn).max() <= bound * (1 + 1e-6)
        if tensor.size > 2_000:
            assert np.abs(drawn).max() > 0.98 * bound
            assert abs(drawn.std() / (bound / 3**0.5) - 1) < 0.05


def test_tensors_without_a_fan_in_get_small_or_zero_values():
    layout = Layout(
        (Tensor("table.weight", (50, 16), "embedding"), Tensor("token", (1, 4, 4), "other"), Tensor("shift", (5,), "other"))
    )
    values = layout.split(initial.draw(layout, 0))
    assert 0.2 < np.abs(values["table.weight"]).max() <= 0.25
    assert 0 < np.abs(values["token"]).max() <= 0.25
    assert not values["shift"].any()


# vectors


@pytest.mark.parametrize(("name", "shape", "_"), SIZES)
def test_a_vector_goes_into_a_module_and_comes_back_bit_for_bit(name, shape, _):
    layout, module = registry.layout(spec(name, shape)), registry.build(spec(name, shape))
    values = np.random.default_rng(0).normal(size=layout.d).astype(np.float32)
    values[:3] = np.array([-0.0, np.inf, 1e-42], np.float32)
    vector.load(module, layout, values)
    assert vector.read(module, layout).tobytes() == values.tobytes()
    for tensor, span in layout.spans():
        np.testing.assert_array_equal(module.get_parameter(tensor.name).detach().numpy().ravel(), values[span])


def test_what_was_read_is_a_copy_and_what_was_loaded_too():
    layout, module = registry.layout(spec("logistic", (4,))), registry.build(spec("logistic", (4,)))
    values = np.ones(layout.d, np.float32)
    vector.load(module, layout, values)
    out = vector.read(module, layout)
    values[:], out[:] = 5, 6
    assert vector.read(module, layout).tolist() == [1.0] * layout.d


def test_a_module_of_another_net_is_refused():
    layout = registry.layout(spec("mlp", (64,)))
    values = initial.draw(layout, 0)
    same_size = nn.Sequential()
    same_size.register_parameter("all", nn.Parameter(torch.zeros(layout.d)))
    swapped = registry.build(spec("mlp", (64,)))
    swapped.fc1._parameters = dict(reversed(swapped.fc1._parameters.items()))
    for other in (same_size, swapped, registry.build(spec("mlp", (64,), hidden=(8,)))):
        with pytest.raises(ValueError, match="not those of the layout"):
            vector.load(other, layout, values)
        with pytest.raises(ValueError, match="not those of the layout"):
            vector.read(other, layout)


def test_a_vector_of_another_length_is_refused():
    layout, module = registry.layout(spec("logistic", (4,))), registry.build(spec("logistic", (4,)))
    for length in (layout.d - 1, layout.d + 1):
        with pytest.raises(ValueError, match="parameters"):
            vector.load(module, layout, np.zeros(length, np.float32))


def test_a_saved_model_comes_back_bit_for_bit_with_its_names(tmp_path):
    from safetensors import safe_open

    layout = registry.layout(spec("tanh-cnn", (1, 28, 28)))
    values = initial.draw(layout, 0)
    vector.save(tmp_path / "model.safetensors", layout, values)
    assert vector.open_saved(tmp_path / "model.safetensors", layout).tobytes() == values.tobytes()
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {tensor.name for tensor in layout.tensors}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_saved_model_of_another_net_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    layout = registry.layout(spec("mlp", (64,)))
    vector.save(path, layout, initial.draw(layout, 0))
    with pytest.raises(DataError, match="another net"):
        vector.open_saved(path, registry.layout(spec("mlp", (64,), hidden=(8,))))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="safetensors"):
        vector.open_saved(path, layout)
    with pytest.raises(DataError):
        vector.open_saved(tmp_path / "none.safetensors", layout)


@pytest.mark.parametrize("stride", [1, 2])
def test_max_pooling_is_torchs_to_the_bit_with_ties_forward_and_backward(stride):
    import torch

    from fed_dpprune.models.modules import MaxPool

    x = torch.tanh(torch.randn(3, 5, 9, 9, generator=torch.Generator().manual_seed(0)))
    x[:, :, :4] = -0.5  # a constant background: every window there is a tie
    ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    got, expected = MaxPool(2, stride)(ours), torch.nn.functional.max_pool2d(theirs, 2, stride)
    weights = torch.randn_like(expected)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(got, expected)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow  # the dispatch mode alone takes seconds to load
def test_the_gradient_reaches_max_pooling_with_channels_innermost():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fed_dpprune.models.modules import MaxPool

    inside = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "max_pool2d_with_indices_backward" in str(function):
                inside.append(args[0].is_contiguous(memory_format=torch.channels_last))
            return function(*args, **(kwargs or {}))

    pooled = MaxPool(2, 1)(torch.randn(2, 4, 6, 6, requires_grad=True))
    with Watch():
        pooled.flatten(1).sum().backward()
    assert inside == [True]


def test_a_net_beyond_any_machine_is_a_mistake_of_one_line():
    with pytest.raises(ConfigError, match="has 4299948042 coordinates"):
        registry.layout(ModelSpec("mlp", (2**16, 2**16), "tanh", (64,), 10))
