"""The commented config that `fed-dpprune init` writes: every key, its default, and a word on each."""

from __future__ import annotations

from fed_dpprune import config as cfg

HEAD = """# A fed-dpprune experiment. Every key is here with its default; `fed-dpprune plan` prints what it means in numbers,
# `fed-dpprune run` does it. Override single keys with --set federation.rounds=5.
"""
CHANGED: dict[str, cfg.Value] = {"privacy.epsilon": 4.0, "privacy.delta": 1e-3}
COMMENTS: dict[str, str] = {
    "name": "names the run directory; empty: the file's name",
    "seed": "root of all public streams, and in simulation of the secret ones",
    "data.dataset": "digits, another known name, or the path of your own .npz (x_train, y_train, x_test, y_test)",
    "data.partition": "iid | dirichlet | shards | natural",
    "data.alpha": "dirichlet: smaller is more uneven",
    "data.public": "examples declared public",
    "data.test-fraction": "held-out share, for sets without a test split of their own",
    "model.name": "mlp | logistic | tanh-cnn | dp-cnn | resnet20 | wrn16-4 | torchvision:<name> | package.module:factory",
    "model.hidden": "mlp: widths of the hidden layers",
    "model.activation": "mlp: tanh | relu",
    "model.weights": "a file of weights to start from",
    "model.freeze-layers": "name patterns of layers that are held at their value",
    "federation.backend": "ray | inline (one process, for tests and small studies)",
    "federation.clients": "how many; partition = natural sets its own number",
    "federation.clients-per-round": "0: all",
    "federation.rounds": "",
    "federation.local-steps": "private steps of each client in each round; all are charged",
    "federation.min-clients": "fewer answers than this end the run (exit 3)",
    "federation.reply-timeout": "seconds to wait for a client",
    "federation.evaluate-every": "the test data is looked at in every n-th round, and in the last",
    "federation.actors": "client processes; 0: one per core",
    "federation.ray-address": "an existing Ray cluster; empty: this machine",
    "sparsity.granularity": "element | row | channel | layer",
    "sparsity.shared": "one support for all clients of a round",
    "sparsity.groups": "without a shared one: this many supports, dealt out by partition id (0: every client its own)",
    "sparsity.clip-scaling": "sqrt: clip norm times sqrt(live fraction)",
    "sparsity.lr-scaling": "client rate times (live fraction) to this power; try -0.5",
    "sparsity.rescale": "d-over-k: noised mean times d/k",
    "sparsity.order": "clip-then-mask is an ablation: it wastes the clip norm on frozen coordinates",
    "sparsity.prune.method": "once, before training: none | random | magnitude | synflow | snip | file",
    "sparsity.prune.rate": "share of the prunable parameters that goes",
    "sparsity.prune.scope": "global | layer",
    "sparsity.prune.inactive": "zero | hold (frozen at its value)",
    "sparsity.prune.exempt": "never pruned: bias, norm, head, embedding",
    "sparsity.prune.iterations": "synflow",
    "sparsity.prune.file": "a saved support, for method = file",
    "sparsity.freeze.method": "each round, of what survived: none | random | magnitude | public | change (what moved most lives)",
    "sparsity.freeze.rate": "share frozen when the ramp has ended",
    "sparsity.freeze.ramp": "constant | linear | cosine | step",
    "sparsity.freeze.ramp-end": "share of the rounds after which the rate is reached",
    "sparsity.freeze.refresh": "a new draw per run | round | step",
    "sparsity.freeze.odds": "uniform | layer-energy (more where gradients are large, judged on synthetic inputs)",
    "sparsity.drop.method": "each step, inside the round's support: none | random | magnitude",
    "sparsity.drop.rate": "",
    "privacy.epsilon": "over the whole run, for every client; or leave it empty and set noise-multiplier",
    "privacy.noise-multiplier": "std of the noise on the clipped sum / clip norm",
    "privacy.delta": "must be below 1 / size of every client",
    "privacy.clip-norm": "",
    "privacy.clipping": "flat | per-layer | automatic",
    "privacy.expected-batch": "Poisson rate of a client = expected-batch / its size",
    "privacy.sample-rate": "set it to give the rate itself",
    "privacy.accountant": "pld | rdp | prv",
    "privacy.unit": "what is protected",
    "policy.max-epsilon": "a client refuses a round that would pass it",
    "policy.min-noise-multiplier": "",
    "policy.max-sample-rate": "",
    "policy.max-steps-per-round": "",
    "policy.allow-releases": "releases beside the update",
    "policy.allow-provenance": "where a support may come from",
    "client.learning-rate": "",
    "client.momentum": "within a round",
    "client.weight-decay": "",
    "server.optimizer": "sgd | adam",
    "server.learning-rate": "1.0 with sgd: the plain mean of the clients",
    "server.momentum": "",
    "server.schedule": "constant | linear | cosine",
    "wire.uplink": "float32 | float16 | bfloat16 | int8 | int4 | level3 | level2 | sign",
    "wire.downlink": "",
    "wire.error-feedback": "",
    "wire.rounding": "of int8 and int4: nearest | stochastic (unbiased, twice the error)",
    "wire.select": "none | top-k (of the noised update, with its positions: a baseline)",
    "wire.select-rate": "share of the update that top-k leaves out",
    "wire.link": "",
    "engine.backend": "auto | reference | torch | compiled; changes speed only",
    "engine.micro-batch": "examples held in memory at once; 0: chosen",
}


def _value(value: cfg.Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def starter() -> str:
    """The file's text; `config.load` accepts it as it is."""
    lines, table = [HEAD], ""
    for key, default in cfg.DEFAULTS_FLAT.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix != table:
            table = prefix
            lines.append(f"\n[{table}]")
        text = f"{leaf} = {_value(CHANGED.get(key, default))}"
        lines.append(f"{text:<40}# {COMMENTS[key]}" if COMMENTS[key] else text)
    return "\n".join(lines) + "\n"
