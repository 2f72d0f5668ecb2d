"""What `federated_round.py` compares with: code that does not belong to this project's package.

`serve_flower` is what a user writes today: Flower's own simulation and FedAvg, the dense weights both ways, and in every
client and round a new net, data loader and `opacus.PrivacyEngine`, whose epsilon is asked for before the weights go back.
In the peer's favour: the data set is loaded once per actor and kept as tensors. `serve_loop` is the same federated
averaging without privacy, messages or ledger, in one process: the floor.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PARTS = ("compute_s", "epsilon_s", "serialise_s", "client_s")


@dataclass(frozen=True)
class Work:
    """One round's work, the same for every system.

    Attributes:
        model: `tanh-cnn` or `dp-cnn`.
        data: An .npz with x_train (uint8, N x 28 x 28) and y_train.
        parts: An .npz with `rows` and `edges`: the training rows of all clients, one after the other.
        clients: How many, all asked in every round.
        local_steps: Private steps of a client and round.
        batch: Expected examples of a step.
        noise_multiplier: Std of the noise over the clip norm.
        clip_norm: Of one example's gradient.
        delta: Of the claim.
        learning_rate: Of the clients.
        actors: Client processes.
    """

    model: str
    data: str
    parts: str
    clients: int = 10
    local_steps: int = 2
    batch: int = 120
    noise_multiplier: float = 1.0
    clip_norm: float = 1.0
    delta: float = 1e-5
    learning_rate: float = 0.25
    actors: int = 2


def tanh_cnn() -> nn.Sequential:
    """The net of Opacus' MNIST example with tanh: 26,010 weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten()),
        *(nn.Linear(32 * 4 * 4, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def dp_cnn() -> nn.Sequential:
    """The net of Papernot et al. (arXiv 2007.14191) for one channel and 28 x 28 pixels."""
    blocks: list[nn.Module] = []
    for inputs, width in ((1, 32), (32, 64), (64, 128)):
        blocks += [nn.Conv2d(inputs, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, width, 3, padding=1), nn.Tanh()]
        blocks.append(nn.MaxPool2d(2))
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 3 * 3, 128), nn.Tanh(), nn.Linear(128, 10))


NETS: dict[str, Callable[[], nn.Sequential]] = {"tanh-cnn": tanh_cnn, "dp-cnn": dp_cnn}


@lru_cache(maxsize=1)
def _client_data(work: Work) -> list[TensorDataset]:
    """Every client's examples as tensors in [-1, 1]; once per process."""
    with np.load(work.data) as file:
        x, y = file["x_train"], file["y_train"].astype(np.int64)
    with np.load(work.parts) as file:
        parts = np.split(file["rows"], file["edges"][1:-1])
    images = (torch.from_numpy(x).float().unsqueeze(1) - 127.5) / 127.5
    return [TensorDataset(images[rows], torch.from_numpy(y[rows])) for rows in parts]


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._begun = self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Give the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
        self.seconds["client_s"] = now - self._begun


def build_ours(name: str) -> nn.Module:
    """The same net as this project builds it."""
    from fed_dpprune.models import registry

    return registry.build(registry.ModelSpec(name, (), "tanh", (1, 28, 28), 10))


def flower_client(work: Work, build: Callable[[], nn.Module], *, epsilon: bool) -> ClientApp:
    """The peer's client: everything is made anew in each call, as examples of Flower and Opacus do."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from opacus import PrivacyEngine

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        data = _client_data(work)[int(context.node_config["partition-id"])]
        watch = Stopwatch()
        net = build()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        watch.lap("serialise_s")
        net.train()
        engine = PrivacyEngine()
        private, optimizer, loader = engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=work.learning_rate),
            data_loader=DataLoader(data, batch_size=work.batch, shuffle=True),
            noise_multiplier=work.noise_multiplier,
            max_grad_norm=work.clip_norm,
        )
        criterion = nn.CrossEntropyLoss()
        for x, y in islice(loader, work.local_steps):
            optimizer.zero_grad()
            criterion(private(x), y).backward()
            optimizer.step()
        watch.lap("compute_s")
        metrics: dict[str, float | int] = {"num-examples": len(data)}
        if epsilon:
            metrics["epsilon"] = engine.get_epsilon(work.delta)
            watch.lap("epsilon_s")
        arrays = ArrayRecord(net.state_dict())
        watch.lap("serialise_s")
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics | watch.seconds)})
        return Message(content, reply_to=message)

    return app


def _summed(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """The clients' seconds, all together."""
    return MetricRecord({part: sum(float(c["metrics"][part]) for c in contents) for part in PARTS})  # type: ignore[index,arg-type]


class _TimedFedAvg(FedAvg):
    """FedAvg that notes how long it aggregates and what the clients said of their time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: dict[str, float] = {}

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """As FedAvg."""
        begun = time.perf_counter()
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seconds = {part: float(metrics[part]) for part in PARTS} if metrics else {}  # type: ignore[arg-type]
        self.seconds["server_s"] = time.perf_counter() - begun
        return arrays, metrics


def serve_flower(
    work: Work, rounds: int, reached: Callable[[dict[str, float]], None], *, epsilon: bool, our_net: bool = False
) -> None:
    """Run the peer.

    Args:
        work: What to do.
        rounds: How often.
        reached: Called after each round with the seconds of its parts; the next round waits for it.
        epsilon: Whether clients ask for their epsilon.
        our_net: Whether the net is this project's module, whose max pooling is faster, instead of torch's own layers.
    """
    from flwr.simulation import run_simulation

    build: Callable[[], nn.Module] = partial(build_ours, work.model) if our_net else NETS[work.model]

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        everyone = {"fraction_train": 1.0, "fraction_evaluate": 0.0, "min_train_nodes": work.clients}
        strategy = _TimedFedAvg(**everyone, min_available_nodes=work.clients, train_metrics_aggr_fn=_summed)

        def after(number: int, arrays: ArrayRecord) -> None:
            if number:
                reached(strategy.seconds)

        start = ArrayRecord(build().state_dict())
        config = ConfigRecord({"lr": work.learning_rate})
        strategy.start(grid, start, num_rounds=rounds, train_config=config, evaluate_fn=after)

    run_simulation(
        server_app=server,
        client_app=flower_client(work, build, epsilon=epsilon),
        num_supernodes=work.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": work.actors, "include_dashboard": False},
        },
    )


def serve_loop(work: Work, rounds: int, reached: Callable[[dict[str, float]], None]) -> None:
    """Federated averaging without privacy in one process, on this project's net: one net for all clients, plain SGD.

    Batches are Poisson, as everywhere; the mean is over the batch. Freed memory stays with the process, as in ours: the
    ratio to ours is the price of privacy and messages alone. See `serve_flower` for the arguments.
    """
    from fed_dpprune.data.npz import load_file
    from fed_dpprune.dpsgd.allocator import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    data = load_file(Path(work.data), "rows")
    with np.load(work.parts) as file:
        parts = np.split(file["rows"], file["edges"][1:-1])
    net = build_ours(work.model)
    weights = [p.detach().clone() for p in net.parameters()]
    draw = np.random.default_rng(0)
    for _ in range(rounds):
        watch = Stopwatch()
        total = [torch.zeros_like(w) for w in weights]
        for rows in parts:
            _one_client(net, weights, data.train, rows, work, draw)
            for sum_, parameter in zip(total, net.parameters(), strict=True):
                sum_ += parameter.detach()
        weights = [t / len(parts) for t in total]
        watch.lap("compute_s")
        reached(watch.seconds)


def _one_client(net: nn.Module, weights: list[Tensor], train: Any, rows: Any, work: Work, draw: np.random.Generator) -> None:
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), weights, strict=True):
            parameter.copy_(value)
    for _ in range(work.local_steps):
        x, y = train.take(rows[draw.random(len(rows)) < work.batch / len(rows)])
        loss = nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= work.learning_rate * gradient
