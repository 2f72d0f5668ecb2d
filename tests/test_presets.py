"""Every preset of a paper's method on tiny data: it loads, plans, runs two rounds, and its supports have the paper's counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small_run import rounds, run, summary

from fed_dpprune import config as cfg
from fed_dpprune.federation import pretrain as pretraining
from fed_dpprune.federation.facts import prepare

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*-[0-9][0-9][0-9][0-9].[0-9][0-9][0-9][0-9][0-9]-*.toml"))
SHAPES = {"fashion-mnist": (28, 28), "cifar10": (32, 32, 3), "cifar10-jpeg": (32, 32, 3)}
PAPER = re.compile(r"\d{4}\.\d{5}")
PUBLIC_SHAPE = (28, 28)  # of another set than the private one: MNIST


@dataclass(frozen=True)
class Paper:
    """The counts of a paper's schedule, worked out here from its text, not by the code under test.

    Attributes:
        parameters: d.
        survivors: Coordinates that may ever move.
        live: (slot 0, 1, ..., slots) -> coordinates that move in a step of that slot; a slot is a round here.
    """

    parameters: int
    survivors: int
    live: Callable[[int, int], int]


def left(count: int, rate: float) -> int:
    return count - int(rate * count)


def random_freeze(d: int) -> Paper:
    """2112.00845, Algorithm 1: in slot s of E, the first int(0.9 s / (E - 1) d) of a permutation of all d are frozen."""
    return Paper(d, d, lambda slot, slots: d - int(0.9 * slot / (slots - 1) * d))


def prune_drop(weights: int, biases: int) -> Paper:
    """2306.11754: 0.8 of the weights go for ever, then every step drops half of all that survived."""
    survivors = left(weights, 0.8) + biases
    return Paper(weights + biases, survivors, lambda slot, slots: left(survivors, 0.5))


def freeze(weights: int, others: int, held: int = 0) -> Paper:
    """2303.04612, mode one: 0.9 of the weights rest in every step; `held` parameters of whole layers rest as well."""
    live = left(weights, 0.9) + others
    return Paper(weights + others + held, live, lambda slot, slots: live)


def select(d: int) -> Paper:
    """2303.04612, mode two: every step leaves 0.9 of all parameters out."""
    return Paper(d, d, lambda slot, slots: left(d, 0.9))


# Weights and biases of DP-CNN (550,570), of the tanh CNN (26,010; its first layer: 1,024 and 16), and of a ResNet-18 with
# ten classes, whose norm layers (9,600) and head (5,130) are not pruned.
DP_CNN, TANH_CNN = (549_984, 586), (25_920, 90)
EXPECTED = {
    "random-freeze-2112.00845-cifar10": random_freeze(550_570),
    "random-freeze-2112.00845-cifar10-jpeg": random_freeze(550_570),
    "random-freeze-2112.00845-fashion-mnist": random_freeze(26_010),
    "prune-drop-2306.11754-cifar10": prune_drop(*DP_CNN),
    "prune-drop-2306.11754-fashion-mnist": prune_drop(*TANH_CNN),
    "freeze-2303.04612-cifar10": freeze(*DP_CNN),
    "freeze-2303.04612-fashion-mnist": freeze(*TANH_CNN),
    "select-2303.04612-cifar10": select(550_570),
    "select-2303.04612-fashion-mnist": select(26_010),
    "finetune-2303.04612-cifar10": freeze(11_166_912, 9_600 + 5_130),
    "finetune-2303.04612-fashion-mnist": freeze(25_920 - 1_024, 90 - 16, held=1_040),
}


def make_set(path: Path, shape: tuple[int, ...], rows: int) -> str:
    generator = np.random.default_rng(0)
    np.savez(
        path,
        x_train=generator.integers(0, 256, (rows, *shape), dtype=np.uint8),
        y_train=np.arange(rows) % 10,
        x_test=generator.integers(0, 256, (10, *shape), dtype=np.uint8),
        y_test=np.arange(10),
    )
    return str(path)


def tiny(preset: str, folder: Path, **changes: cfg.Value) -> cfg.Config:
    """The preset on forty made-up pictures: everything that decides a support is the preset's own."""
    conf = cfg.load(CONFIGS / f"{preset}.toml")
    private = make_set(folder / "private.npz", SHAPES[conf.data.dataset], 40)
    public = ""
    if conf.data.public:
        own = conf.data.public.startswith(conf.data.dataset + "[")
        public = f"{private}[30:40]" if own else make_set(folder / "public.npz", PUBLIC_SHAPE, 20)
    clients = min(2, conf.federation.clients)
    flat: dict[str, cfg.Value] = {
        "data.dataset": private,
        "data.public": public,
        "data.partition": "iid",
        "federation.backend": "inline",
        "federation.clients": clients,
        "federation.min-clients": clients,
        "federation.local-steps": 1,
        "privacy.epsilon": "",
        "privacy.noise-multiplier": 1.0,
        "privacy.accountant": "rdp",
        "privacy.delta": 1e-3,
        "privacy.expected-batch": 4,
        **changes,
    }
    return cfg.build({**cfg.to_flat(conf), **flat})


def with_weights(preset: str, conf: cfg.Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> cfg.Config:
    """The weights that a fine-tuning preset starts from: pretrained by our command, or a file in torchvision's form."""
    if not conf.model.weights:
        return conf
    if conf.model.weights == "torchvision":
        import torch
        from torchvision import models

        weights = folder / "imagenet.pt"
        torch.save(models.resnet18().state_dict(), weights)
    else:
        monkeypatch.setattr(pretraining, "LEAST_STEPS", 1)
        weights = pretraining.pretrain(conf, folder / "pretrained.safetensors").path
    return cfg.build({**cfg.to_flat(conf), "model.weights": str(weights)})


def test_there_is_a_preset_for_every_method_and_each_has_a_twin_that_runs_here():
    assert set(PRESETS) == set(EXPECTED)
    methods = {preset.rpartition("-cifar10")[0] for preset in PRESETS if preset.endswith("-cifar10")}
    assert {f"{method}-fashion-mnist" for method in methods} == {p for p in PRESETS if p.endswith("-fashion-mnist")}


@pytest.mark.parametrize("preset", PRESETS)
def test_its_first_comment_tells_the_command_what_it_takes_and_what_comes_out(preset):
    comment = (CONFIGS / f"{preset}.toml").read_text(encoding="utf-8").partition("\n\n")[0]
    assert any(line.endswith(f"fed-dpprune run configs/{preset}.toml") for line in comment.splitlines()[:2])
    words = " ".join(comment.replace("#", " ").split())
    assert f"arXiv {PAPER.findall(preset)[0]}" in words
    assert re.search(r"hours|minutes", words)
    assert re.search(r"accuracy 0\.\d{3} on the test images|Not run (to its end )?by us, so no accuracy is promised", words)
    assert cfg.load(CONFIGS / f"{preset}.toml").name == preset


def test_the_published_hyper_parameters_are_those_of_the_preset():
    conf = cfg.load(CONFIGS / "random-freeze-2112.00845-cifar10.toml")
    assert (conf.federation.rounds, conf.sparsity.freeze.rate, conf.sparsity.freeze.ramp) == (48, 0.9, "linear")
    assert (conf.privacy.epsilon, conf.privacy.delta, conf.privacy.accountant) == (3.0, 1e-5, "rdp")
    assert (conf.privacy.expected_batch, conf.privacy.clip_norm) == (1000, 1.0)
    assert (conf.client.learning_rate, conf.client.momentum) == (1.0, 0.0)
    assert conf.federation.rounds * conf.federation.local_steps == 48 * 50_000 // 1000


def test_the_jpeg_preset_differs_in_its_data_alone():
    plain, jpeg = (cfg.to_flat(cfg.load(CONFIGS / f"random-freeze-2112.00845-{d}.toml")) for d in ("cifar10", "cifar10-jpeg"))
    assert {key for key in plain if plain[key] != jpeg[key]} == {"name", "data.dataset"}


def test_the_ramp_gives_the_papers_figures():
    live = EXPECTED["random-freeze-2112.00845-cifar10"].live
    assert [550_570 - live(slot, 48) for slot in (0, 1, 2)] == [0, 10_542, 21_085]
    assert live(47, 48) == 55_057


@pytest.mark.parametrize("preset", PRESETS)
def test_over_its_own_number_of_rounds_its_plan_has_the_papers_counts(preset, tmp_path):
    conf = tiny(preset, tmp_path, **{"model.weights": ""})
    paper, slots = EXPECTED[preset], conf.federation.rounds
    _, plan = prepare(conf)
    assert (plan.parameters, plan.survivors) == (paper.parameters, paper.survivors)
    assert list(plan.live_by_round) == [paper.live(slot, slots) for slot in range(slots)]


def two_rounds(preset: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = with_weights(preset, tiny(preset, folder, **{"federation.rounds": 2}), folder, monkeypatch)
    paper = EXPECTED[preset]
    outcome, _ = run(conf, folder / "run")
    assert outcome.status == "complete", outcome.error
    counts = summary(folder / "run")["sparsity"]
    assert [row["live"] for row in rounds(folder / "run")] == [paper.live(slot, 2) for slot in (0, 1)]
    assert (counts["parameters"], counts["live_after_pruning"]) == (paper.parameters, paper.survivors)
    assert "private" not in counts["provenance"]


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "finetune-2303.04612-cifar10"])
def test_two_rounds_move_as_many_coordinates_as_the_paper_says(preset, tmp_path, monkeypatch):
    two_rounds(preset, tmp_path, monkeypatch)


@pytest.mark.slow
def test_two_rounds_of_a_resnet18_from_torchvisions_weights(tmp_path, monkeypatch):
    two_rounds("finetune-2303.04612-cifar10", tmp_path, monkeypatch)
