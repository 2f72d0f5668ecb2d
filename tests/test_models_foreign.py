"""Nets of torchvision and of users: made private-ready, or refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpprune.errors import ConfigError, DataError
from fed_dpprune.models import foreign, initial, layout_cache, registry, vector, weights
from fed_dpprune.models.flat import Work
from fed_dpprune.models.registry import ModelSpec

MODULE = """
import torch
from torch import nn

def small(input_shape, classes):
    c, h, w = input_shape
    return nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Dropout(0.5),
                         nn.Flatten(), nn.Linear(32 * h * w, classes))

class Sneaky(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass

def sneaky(input_shape, classes):
    return nn.Sequential(nn.Flatten(), Sneaky(12), nn.Linear(12, classes))

def words(input_shape, classes):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 5))
            self.table = nn.Embedding(9, 5)
            self.norm = nn.LayerNorm(5)
            self.head = nn.Linear(5, classes)
            self.again = self.head
        def forward(self, x):
            return self.head(self.norm(self.table(x.long().clamp(0, 8)).mean(1) + self.token))
    return Tied().double()

def wrong_scores(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes + 1))

def wrong_input(input_shape, classes):
    return nn.Linear(99, classes)

def no_module(input_shape, classes):
    return 3

def broken(input_shape, classes):
    raise KeyError("oops")
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))
    yield
    sys.modules.pop("own_nets", None)


def spec(name: str, shape: tuple[int, ...] = (3, 2, 2), classes: int = 4, **changes) -> ModelSpec:
    return ModelSpec(name, (), "tanh", shape, classes, **changes)


def build(name: str, **changes) -> nn.Module:
    one = spec(name, **changes)
    layout, module = registry.layout(one), registry.build(one)
    vector.load(module, layout, initial.draw(layout, 0))
    return module


def test_batch_norm_becomes_group_norm_and_randomness_goes():
    kinds = [type(part) for part in build("own_nets:small")]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.Identity, nn.Flatten, nn.Linear]
    assert not build("own_nets:small")[2].inplace


def test_an_examples_scores_do_not_depend_on_the_rest_of_its_batch():
    net = build("own_nets:small").train()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(row[None]) for row in x]), rtol=1e-4, atol=1e-6)


def test_a_norm_over_the_batch_in_disguise_is_refused():
    with pytest.raises(ConfigError, match=r"model\.name.*cannot be trained privately.*Sneaky"):
        registry.layout(spec("own_nets:sneaky"))


def test_every_kind_of_tensor_is_known_and_shared_ones_count_once():
    layout = registry.layout(spec("own_nets:words", (6,)))
    assert [(t.name, t.kind, t.fan_in, t.head) for t in layout.tensors] == [
        ("token", "other", 0, False),
        ("table.weight", "embedding", 0, False),
        ("norm.weight", "norm", 0, False),
        ("norm.bias", "norm", 0, False),
        ("head.weight", "weight", 5, True),
        ("head.bias", "bias", 5, True),
    ]
    assert all(p.dtype == torch.float32 for p in registry.build(spec("own_nets:words", (6,))).parameters())


def test_layers_of_a_users_net_can_be_frozen():
    layout = registry.layout(spec("own_nets:words", (6,), freeze_layers=("table", "token")))
    assert [t.name for t in layout.tensors if t.frozen] == ["token", "table.weight"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_nets:wrong_scores", r"one example gives \(1, 5\), not \(1, 4\)"),
        ("own_nets:wrong_input", "does not fit inputs"),
        ("own_nets:no_module", "returned int"),
        ("own_nets:broken", "KeyError"),
        ("own_nets:absent", "absent"),
        ("no_such_package:net", "No module named"),
    ],
)
def test_a_mistake_in_a_users_net_is_one_line(name, text):
    with pytest.raises(ConfigError, match=text) as caught:
        registry.layout(spec(name))
    assert "model.name" in caught.value.what and "\n" not in str(caught.value)


def test_a_users_net_is_asked_again_every_time(tmp_path):
    before = registry.layout(spec("own_nets:small")).d
    sys.modules.pop("own_nets")
    # Of another length: Python takes bytecode as fresh by the source's size and its time in whole seconds.
    (tmp_path / "own_nets.py").write_text(MODULE.replace("32", "128"))
    assert registry.layout(spec("own_nets:small")).d != before


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_a_torchvision_net_is_private_ready_and_fits_the_data(shape):
    one = spec("torchvision:resnet18", shape, 10)
    layout, module = registry.layout(one), registry.build(one)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [(t.name, t.shape) for t in layout.tensors]
    assert layout.d == (11_181_642 if shape[0] == 3 else 11_175_370)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    assert [t.name for t in layout.tensors if t.head] == ["fc.weight", "fc.bias"]
    assert module(torch.zeros(2, *shape)).shape == (2, 10)


def test_a_torchvision_layout_is_remembered_without_torch(monkeypatch):
    one = spec("torchvision:squeezenet1_1", (3, 32, 32))
    first = registry.layout(one)
    code = (
        "import sys; from fed_dpprune.models import registry\n"
        f"l, work = registry.described(registry.{one!r})\n"
        "print(l.digest, work.multiply_adds, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [first.digest, str(registry.described(one)[1].multiply_adds), "False"]


@pytest.mark.parametrize("blob", ["", "{", "[1]", '[{"name": "x"}]', '{"tensors": []}', '{"tensors": [], "work": {"x": 1}}'])
@pytest.mark.parametrize("work", [Work(12, 7), None])
def test_a_damaged_memory_is_made_again(blob, work):
    one = spec("torchvision:squeezenet1_1", (3, 32, 32))
    made = foreign.tensors(nn.Linear(3, 4)), work
    path = layout_cache._path(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(blob)
    assert layout_cache.parts(one, lambda: made) == made
    assert layout_cache.parts(one, lambda: ((), None)) == made


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("torchvision:no_such_net", (3, 32, 32), "no classifier"),
        ("torchvision:fcn_resnet50", (3, 32, 32), "no classifier"),
        ("torchvision:resnet18", (64,), "needs images"),
        ("torchvision:alexnet", (3, 32, 32), "does not fit"),
    ],
)
def test_a_torchvision_net_that_does_not_fit_is_refused(name, shape, text):
    with pytest.raises(ConfigError, match=text):
        registry.layout(spec(name, shape))


def test_torchvisions_own_weights_start_a_net_or_say_where_to_put_them(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    one = spec("torchvision:squeezenet1_1", (3, 32, 32), weights="torchvision")
    layout = registry.layout(one)
    with pytest.raises(DataError, match=r"put squeezenet1_1-\w+\.pth into"):
        weights.start(one, layout, 0)
    with pytest.raises(ConfigError, match="IMAGENET1K_V1"):
        weights.start(spec("torchvision:squeezenet1_1", weights="torchvision:NO_SUCH"), layout, 0)

    from torchvision import models

    published = models.squeezenet1_1().state_dict()
    entry = models.get_model_weights("squeezenet1_1").DEFAULT
    (tmp_path / "cache" / "weights").mkdir(parents=True, exist_ok=True)
    torch.save(published, tmp_path / "cache" / "weights" / entry.url.rpartition("/")[2])
    begun = weights.start(one, layout, 0)
    parts = layout.split(begun.vector)
    np.testing.assert_array_equal(parts["features.0.weight"], published["features.0.weight"].numpy())
    assert begun.fresh == ("classifier.1.weight", "classifier.1.bias")


def test_building_a_foreign_net_is_repeatable_and_leaves_torchs_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = (registry.build(spec("own_nets:small")).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- how large a net is, before it is built ---------------------------------------------------------------------------

PUBLISHED = {"resnet50": 25_557_032, "convnext_large": 197_767_336, "regnet_y_128gf": 644_812_894, "swin_t": 28_288_354}


def imagenet(name: str, size: int = 224) -> ModelSpec:
    return ModelSpec(f"torchvision:{name}", (), "tanh", (3, size, size), 1000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_size_of_a_torchvision_net_is_known_without_its_memory(name, monkeypatch):
    layout_cache._counts.clear()
    devices = []
    finish = foreign._with_channels

    def look(module, channels):
        devices.extend(p.device.type for p in module.parameters() if p.numel() > 2**16)
        return finish(module, channels)

    monkeypatch.setattr(foreign, "_with_channels", look)
    assert registry.coordinates(imagenet(name)) == PUBLISHED[name]
    assert set(devices) == {"meta"}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:squeezenet1_1", *registry.TABLE])
def test_the_size_told_beforehand_is_the_layouts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    spec = ModelSpec(name, (5, 6), "tanh", (3, 32, 32), 10)
    assert registry.coordinates(spec) == registry.layout(spec).d


def test_a_users_factory_is_not_called_to_be_measured():
    assert registry.coordinates(ModelSpec("no_such_module:net", (), "tanh", (3,), 2)) is None


def test_a_net_that_does_not_fit_is_found_out_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    spec, calls = imagenet("convnext_tiny", 28), []
    monkeypatch.setattr(foreign, "_torchvision", lambda spec, make=foreign._torchvision: calls.append(1) or make(spec))
    texts = []
    for ask in (registry.coordinates, registry.coordinates, registry.layout, registry.layout):
        with pytest.raises(ConfigError, match="does not fit") as refusal:
            ask(spec)
        texts.append(str(refusal.value))
    assert len(calls) == 1 and len(set(texts)) == 1


def test_a_net_whose_code_asserts_its_input_is_a_misfit_of_one_line():
    with pytest.raises(ConfigError, match="does not fit"):
        registry.coordinates(imagenet("vit_b_16", 28))
    with pytest.raises(ConfigError, match="does not fit"):
        registry.coordinates(ModelSpec("torchvision:vit_b_16", (), "tanh", (3, 32, 48), 10))
