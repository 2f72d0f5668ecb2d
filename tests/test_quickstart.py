"""The main job, end to end: the quickstart on Ray as a user runs it, and the same bits without Ray."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_run

from fed_dpprune import config as cfg
from fed_dpprune.federation import run as running
from fed_dpprune.federation.facts import prepare

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
SEEDS = (1, 2, 3, 4, 5)


@dataclass
class Done:
    """A finished process and its run directory."""

    out: Path
    process: subprocess.CompletedProcess[str]
    seconds: float


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory) -> Done:
    """The one run of the default tests that starts Ray."""
    folder = tmp_path_factory.mktemp("ray")
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "fed_dpprune.cli", "run", str(QUICKSTART), "--out", "out"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    return Done(folder / "out", process, time.monotonic() - started)


@pytest.fixture(scope="module")
def inline(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("inline") / "out"
    assert small_run.run(cfg.load(QUICKSTART, ["federation.backend=inline"]), out)[0].status == "complete"
    return out


@pytest.mark.ray
def test_the_quickstart_ends_well_and_quietly(on_ray):
    assert on_ray.process.returncode == 0, on_ray.process.stderr
    assert on_ray.process.stderr == ""
    lines = on_ray.process.stdout.splitlines()
    assert any(line.startswith("complete after 20 of 20 rounds") for line in lines)
    assert any("starting Ray" in line for line in lines)
    assert not any(word in on_ray.process.stdout for word in ("INFO", "WARNING", "(pid=", "DeprecationWarning", "Traceback"))


@pytest.mark.ray
def test_the_quickstart_learns_at_a_quarter_of_the_bytes_within_its_budget(on_ray):
    made = small_run.summary(on_ray.out)
    assert made["accuracy"]["last"] >= 0.86
    assert made["bytes"]["uplink"]["ratio"] <= 0.25
    assert made["privacy"]["epsilon_max"] <= 4.0
    assert made["privacy"]["delta"] == 1e-3


@pytest.mark.ray
def test_the_quickstart_writes_what_the_contract_says(on_ray):
    small_run.assert_contract(on_ray.out)
    assert (on_ray.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (on_ray.out / "log.txt").stat().st_size > 0
    assert len(small_run.rounds(on_ray.out)) == 20
    assert len(small_run.clients(on_ray.out)) == 200
    made = small_run.summary(on_ray.out)
    assert (made["status"], made["privacy"]["noise_source"]) == ("complete", "seeded-simulation")
    assert made["time"]["overhead_per_round_s"] is not None


@pytest.mark.ray
def test_the_quickstart_is_what_its_plan_said(on_ray):
    _, plan = prepare(cfg.load(QUICKSTART))
    made = small_run.summary(on_ray.out)
    assert made["bytes"]["uplink"]["payload"] == plan.uplink.payload
    assert made["bytes"]["downlink"]["payload"] == plan.downlink.payload
    assert made["privacy"]["epsilon_max"] == pytest.approx(plan.epsilon_max, abs=1e-9)


@pytest.mark.ray
def test_ray_and_inline_give_the_same_bits(on_ray, inline):
    for ray, plain in zip(small_run.result(on_ray.out), small_run.result(inline), strict=True):
        assert ray == plain


@pytest.mark.slow
def test_one_actor_gives_the_same_bits_too(inline, tmp_path):
    command = [sys.executable, "-m", "fed_dpprune.cli", "run", str(QUICKSTART), "--out", "out", "--set", "federation.actors=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    for ray, plain in zip(small_run.result(tmp_path / "out"), small_run.result(inline), strict=True):
        assert ray == plain


@pytest.fixture(scope="module")
def by_seed(tmp_path_factory) -> dict[int, float]:
    """Last-round accuracy of the quickstart by seed, without Ray."""
    found = {}
    for seed in SEEDS:
        conf = cfg.load(QUICKSTART, ["federation.backend=inline", f"seed={seed}"])
        found[seed] = small_run.run(conf, tmp_path_factory.mktemp("seed") / "out")[0].summary["accuracy"]["last"]
    return found


@pytest.mark.slow
def test_the_presets_own_seed_reaches_089(by_seed):
    assert by_seed[cfg.load(QUICKSTART).seed] >= 0.89


@pytest.mark.slow
def test_the_median_of_five_seeds_is_090_and_none_is_below_086(by_seed):
    assert statistics.median(by_seed.values()) >= 0.90, by_seed
    assert min(by_seed.values()) >= 0.86, by_seed


@pytest.mark.slow
def test_an_inline_round_costs_at_most_20_ms_beyond_its_clients(tmp_path):
    """The best of three: another process may hold the machine for a moment."""
    conf = cfg.load(QUICKSTART, ["federation.backend=inline"])
    overheads = []
    for attempt in range(3):
        outcome = running.execute(conf, tmp_path / str(attempt))
        overheads.append(outcome.summary["time"]["overhead_per_round_s"])
        if overheads[-1] <= 0.02:
            break
    assert min(overheads) <= 0.02, overheads
