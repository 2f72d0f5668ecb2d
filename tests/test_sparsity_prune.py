"""Pre-pruning: exact counts over the table of criteria, exemptions, provenance, files."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fed_dpprune.config import Prune
from fed_dpprune.data.dataset import Examples
from fed_dpprune.errors import BadInput, ConfigError
from fed_dpprune.models import initial, registry
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.sparsity import files, prune
from fed_dpprune.sparsity.criteria import table
from fed_dpprune.sparsity.criteria.table import CriterionContext, criterion
from fed_dpprune.sparsity.groups import group_ids
from fed_dpprune.sparsity.support import PROVENANCES, Support, frozen_count, smallest

MLP = ModelSpec("mlp", (24, 16), "tanh", (12,), 4)
CNN = ModelSpec("tanh-cnn", (), "tanh", (1, 28, 28), 10)


def _public(spec, count=24):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(count, *spec.input_shape)).astype(np.float32)
    return Examples(x, draw.integers(0, spec.classes, count))


def context(spec=MLP, **keys):
    layout = registry.layout(spec)
    found = CriterionContext(layout, initial.draw(layout, 3), lambda: registry.build(spec), spec.input_shape, 3, _public(spec))
    return replace(found, **keys)


def _prune(method="magnitude", rate=0.6, **keys):
    return Prune(method=method, rate=rate, **{"iterations": 5, **keys})


@pytest.mark.parametrize("name", table.MODULES)
def test_every_criterion_scores_every_coordinate_and_repeats_itself(name):
    judge, given = criterion(name), context()
    scores = judge.scores(given)
    assert judge.name == name
    assert judge.needs in table.NEEDS
    assert judge.provenance in PROVENANCES[:3]
    assert scores.dtype == np.float64
    assert scores.shape == (given.layout.d,)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    assert np.unique(scores).size > given.layout.d / 2
    assert np.array_equal(scores, judge.scores(context()))


@pytest.mark.parametrize("name", table.MODULES)
def test_no_criterion_changes_the_weights_it_is_given(name):
    given = context()
    before = given.weights.copy()
    criterion(name).scores(given)
    assert np.array_equal(given.weights, before)


def test_an_unknown_criterion_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="synflow"):
        criterion("sinflow")


def test_random_and_magnitude_need_no_torch():
    code = (
        "import sys; import numpy as np; from fed_dpprune import config; from fed_dpprune.models.flat import Layout, Tensor;"
        "from fed_dpprune.sparsity import prune, odds, controls, files;"
        "from fed_dpprune.sparsity.criteria.table import CriterionContext;"
        "c = CriterionContext(Layout((Tensor('w', (9, 9)),)), np.ones(81, np.float32), None, (9,), 0);"
        "k = [prune.pre_prune(config.Prune(method=m, rate=0.5), c).k for m in ('none', 'random', 'magnitude')];"
        "assert k == [81, 41, 41], k; assert 'torch' not in sys.modules"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rate", [0.0, 0.31, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", ["random", "magnitude", "synflow", "snip"])
def test_the_count_is_exact_and_known_beforehand(method, scope, rate):
    given, settings = context(), _prune(method, rate, scope=scope)
    survivors = prune.pre_prune(settings, given)
    assert survivors.k == prune.survivors_count(settings, given.layout)
    sizes = [t.size if t.kind == "weight" else 0 for t in given.layout.tensors]
    lost = frozen_count(rate, sum(sizes)) if scope == "global" else sum(frozen_count(rate, size) for size in sizes)
    assert survivors.k == given.layout.d - lost
    if scope == "layer":
        expected = [t.size - frozen_count(rate, s) for t, s in zip(given.layout.tensors, sizes, strict=True)]
        assert given.layout.counts(survivors.indices) == expected


@pytest.mark.parametrize("method", ["random", "magnitude", "snip"])
def test_a_higher_rate_keeps_a_subset(method):
    survivors = [prune.pre_prune(_prune(method, rate), context()) for rate in (0.2, 0.5, 0.9)]
    survivors[1].within(survivors[0])
    survivors[2].within(survivors[1])


def test_the_best_scores_survive():
    given = context()
    survivors = prune.pre_prune(_prune("magnitude", 0.5), given)
    weights = prune.prunable(given.layout, ("bias", "norm"))
    positions = np.flatnonzero(weights)
    order = np.argsort(-np.abs(given.weights[positions]), kind="stable")
    kept = np.sort(positions[order[: positions.size - frozen_count(0.5, positions.size)]])
    assert np.array_equal(survivors.indices, np.union1d(kept, np.flatnonzero(~weights)))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_tied_scores_are_cut_at_the_exact_count_from_the_back(scope):
    layout = Layout((Tensor("a", (10,)), Tensor("b", (6,))))
    tied = CriterionContext(layout, np.ones(16, np.float32), lambda: None, (1,), 0)
    live = prune.pre_prune(_prune("magnitude", 0.5, scope=scope), tied).indices.tolist()
    assert live == ([0, 1, 2, 3, 4, 5, 6, 7] if scope == "global" else [0, 1, 2, 3, 4, 10, 11, 12])


def test_synflow_on_tied_weights_keeps_the_exact_count():
    given = context()
    survivors = prune.pre_prune(_prune("synflow", 0.77), replace(given, weights=np.full(given.layout.d, 0.5, np.float32)))
    assert survivors.k == prune.survivors_count(_prune("synflow", 0.77), given.layout)


@pytest.mark.parametrize("granularity", ["row", "channel", "layer"])
@pytest.mark.parametrize("method", ["random", "magnitude", "synflow"])
def test_groups_of_prunable_coordinates_go_whole_and_are_counted_exactly(method, granularity):
    given, settings = context(), _prune(method, 0.4, exempt=("bias", "norm", "head"))
    survivors = prune.pre_prune(settings, given, granularity)
    mask = prune.prunable(given.layout, settings.exempt)
    ids = group_ids(given.layout, granularity)
    groups, living = np.unique(ids[mask]), np.unique(ids[survivors.mask & mask])
    assert living.size == groups.size - frozen_count(0.4, groups.size)
    assert np.array_equal(survivors.mask & mask, np.isin(ids, living) & mask)
    assert survivors.k <= prune.survivors_count(settings, given.layout, granularity)


@pytest.mark.parametrize(
    ("exempt", "names"),
    [
        (("bias", "norm"), {"fc1.weight", "fc2.weight", "head.weight"}),
        (("bias", "head"), {"fc1.weight", "fc2.weight"}),
        (("head",), {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
    ],
)
def test_exempt_groups_survive_whole(exempt, names):
    given = context()
    mask = prune.prunable(given.layout, exempt)
    found = {tensor.name for tensor, span in given.layout.spans() if mask[span].any()}
    assert found == names
    assert all(mask[span].all() for tensor, span in given.layout.spans() if tensor.name in names)
    survivors = prune.pre_prune(_prune("random", 0.9, exempt=exempt), given)
    assert survivors.mask[~mask].all()


def test_an_unknown_exempt_word_and_a_net_with_nothing_to_prune_are_refused():
    layout = context().layout
    with pytest.raises(ConfigError, match=r"sparsity\.prune\.exempt"):
        prune.prunable(layout, ("biases",))
    biases = Layout((Tensor("b", (5,), "bias"),))
    with pytest.raises(ConfigError, match="no tensor"):
        prune.survivors_count(_prune("random", 0.5), biases)


def test_layers_frozen_by_name_neither_survive_nor_count_as_pruned():
    spec = replace(CNN, freeze_layers=(registry.layout(CNN).tensors[0].name,))
    given = context(spec)
    survivors = prune.pre_prune(_prune("random", 0.5), given)
    held = given.layout.tensors[0].size
    assert survivors.indices[0] >= held
    assert survivors.k == prune.survivors_count(_prune("random", 0.5), given.layout)
    gone = prune.pruned(survivors, given.layout)
    assert gone.k + survivors.k + held == given.layout.d
    assert gone.indices[0] >= held
    assert prune.trainable(given.layout).k == given.layout.d - held


def test_without_a_method_everything_trainable_survives():
    assert prune.pre_prune(Prune(), context()).k == prune.survivors_count(Prune(), context().layout) == context().layout.d


def test_tensors_that_pruning_emptied_are_named():
    layout = Layout((Tensor("a", (4,)), Tensor("b", (4,)), Tensor("c", (4,), frozen=True)))
    assert prune.emptied(Support(np.array([0, 1]), 12), layout) == ["b"]


# Provenance


def test_scores_from_labelled_data_need_public_data():
    for name in ("snip", "gradient"):
        for nothing in (None, _public(MLP, 0)):
            with pytest.raises(ConfigError, match="public") as caught:
                criterion(name).scores(context(public=nothing))
            assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"data\.public"):
        prune.pre_prune(_prune("snip"), context(public=None))


def test_provenance_is_the_weakest_of_criterion_and_weights():
    expected = {"random": "random", "magnitude": "public", "synflow": "public", "snip": "public"}
    for method, claim in expected.items():
        assert prune.pre_prune(_prune(method), context(weights_provenance="public")).provenance == claim
    assert prune.pre_prune(_prune("magnitude"), context()).provenance == "data-free"
    assert prune.pre_prune(_prune("synflow"), context()).provenance == "data-free"


@pytest.mark.parametrize("method", ["magnitude", "synflow", "snip"])
def test_a_support_chosen_by_privately_learnt_weights_is_refused(method):
    with pytest.raises(ConfigError, match="private"):
        prune.pre_prune(_prune(method), context(weights_provenance="private"))


def test_a_random_support_does_not_care_where_the_weights_come_from():
    assert prune.pre_prune(_prune("random"), context(weights_provenance="private")).provenance == "random"


# SNIP


def test_snip_is_the_absolute_product_of_weight_and_summed_gradient():
    import torch
    import torch.nn.functional as F

    given = context()
    model = registry.build(MLP).double()
    for parameter, (_, span) in zip(model.parameters(), given.layout.spans(), strict=True):
        parameter.data = torch.from_numpy(given.weights[span].astype(np.float64)).reshape(parameter.shape)
    x, y = given.public.take(np.arange(len(given.public)))
    F.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y), reduction="sum").backward()
    product = np.concatenate([(p * p.grad).abs().detach().numpy().ravel() for p in model.parameters()])
    assert criterion("snip").scores(given) == pytest.approx(product, rel=1e-4, abs=1e-6)


def test_snip_adds_up_its_batches(monkeypatch):
    from fed_dpprune.sparsity.criteria import gradient

    whole = criterion("snip").scores(context())
    monkeypatch.setattr(gradient, "BATCH", 7)
    assert criterion("snip").scores(context()) == pytest.approx(whole, rel=1e-4, abs=1e-6)


# Files


@pytest.mark.parametrize("name", ["s.npz", "s.safetensors"])
def test_a_support_survives_the_way_to_a_file_and_back(tmp_path, name):
    given = context()
    survivors = prune.pre_prune(_prune("synflow"), given)
    files.save(tmp_path / name, survivors, given.layout)
    settings = Prune(method="file", file=str(tmp_path / name))
    again = prune.pre_prune(settings, given)
    assert again.digest == survivors.digest
    assert again.provenance == survivors.provenance
    assert prune.survivors_count(settings, given.layout) == survivors.k


def test_a_file_does_not_thaw_a_frozen_layer(tmp_path):
    given = context()
    files.save(tmp_path / "s.npz", prune.trainable(given.layout), given.layout)
    first, *rest = given.layout.tensors
    frozen = Layout((replace(first, frozen=True), *rest))
    settings = Prune(method="file", file=str(tmp_path / "s.npz"))
    assert prune.pre_prune(settings, replace(given, layout=frozen)).indices[0] == first.size


@pytest.mark.parametrize("name", ["s.npz", "s.safetensors"])
def test_a_support_learnt_from_private_data_is_refused(tmp_path, name):
    layout = context().layout
    files.save(tmp_path / name, Support(np.arange(3), layout.d, "private"), layout)
    settings = Prune(method="file", file=str(tmp_path / name))
    for refused in (lambda: prune.pre_prune(settings, context()), lambda: prune.survivors_count(settings, layout)):
        with pytest.raises(ConfigError, match="private"):
            refused()


@pytest.mark.parametrize("name", ["s.npz", "s.safetensors"])
def test_a_support_of_another_net_is_refused(tmp_path, name):
    layout = context().layout
    files.save(tmp_path / name, prune.trainable(layout), layout)
    turned = Layout((replace(layout.tensors[0], name="other"), *layout.tensors[1:]))
    with pytest.raises(ConfigError, match="another net"):
        files.load(tmp_path / name, turned)
    with pytest.raises(ValueError, match="layout"):
        files.save(tmp_path / name, Support(np.arange(3), 3), layout)


def test_a_file_that_is_missing_damaged_or_of_no_known_kind_is_one_line(tmp_path):
    layout = context().layout
    good = tmp_path / "good.npz"
    files.save(good, prune.trainable(layout), layout)
    (tmp_path / "half.npz").write_bytes(good.read_bytes()[:200])
    (tmp_path / "odd.safetensors").write_bytes(b"not at all")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mask=np.array([{"a": 1}], dtype=object), facts=np.zeros(3))
    np.savez(tmp_path / "list.npz", mask=np.zeros(3, np.uint8), facts=np.frombuffer(b"[1]", dtype=np.uint8))
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name in (
        "list.npz",
        "array.npz",
        "missing.npz",
        "half.npz",
        "odd.safetensors",
        "empty.npz",
        "other.npz",
        "pickled.npz",
        "good.pt",
    ):
        with pytest.raises(BadInput, match=r"sparsity\.prune\.file") as caught:
            files.load(tmp_path / name, layout)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no support file"):
        files.save(tmp_path / "s.pt", prune.trainable(layout), layout)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"provenance": "trust-me"}, "where its support came from"),
        ({"provenance": None}, "where its support came from"),
        ({"d": "7"}, "another net"),
        ({"support": "00"}, "digest"),
    ],
)
def test_a_file_whose_facts_do_not_fit_is_refused(tmp_path, change, why):
    import json

    layout = context().layout
    files.save(tmp_path / "s.npz", prune.trainable(layout), layout)
    with np.load(tmp_path / "s.npz") as stored:
        mask, facts = stored["mask"], json.loads(stored["facts"].tobytes())
    np.savez(tmp_path / "t.npz", mask=mask, facts=np.frombuffer(json.dumps({**facts, **change}).encode(), dtype=np.uint8))
    with pytest.raises(ConfigError, match=why):
        files.load(tmp_path / "t.npz", layout)
    np.savez(tmp_path / "u.npz", mask=mask[:-1], facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8))
    with pytest.raises(ConfigError, match="wrong size"):
        files.load(tmp_path / "u.npz", layout)


def test_a_support_changed_in_one_bit_is_refused(tmp_path):
    import json

    layout = context().layout
    files.save(tmp_path / "s.npz", Support(smallest(np.arange(layout.d), 5), layout.d), layout)
    with np.load(tmp_path / "s.npz") as stored:
        mask, facts = stored["mask"].copy(), json.loads(stored["facts"].tobytes())
    mask[-1] ^= 1
    np.savez(tmp_path / "s.npz", mask=mask, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8))
    with pytest.raises(ConfigError, match="digest"):
        files.load(tmp_path / "s.npz", layout)


@pytest.mark.parametrize("granularity", ["element", "row", "channel", "layer"])
@pytest.mark.parametrize("method", ["none", "random"])
def test_what_needs_no_net_is_drawn_without_one(method, granularity):
    given, settings = context(), _prune(method, 0.6 if method == "random" else 0.0, scope="layer")
    alone = prune.drawn(settings, given.layout, 3, granularity)
    assert np.array_equal(alone.indices, prune.pre_prune(settings, given, granularity).indices)


def test_what_scores_a_net_is_not_drawn_without_one():
    with pytest.raises(ValueError, match="scores a net"):
        prune.drawn(_prune("synflow"), context().layout, 3)
