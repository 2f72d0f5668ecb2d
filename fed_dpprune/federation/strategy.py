"""The server's side of a run: `Server.run` is the loop, one numbered step a line.

The loop is our own and not a subclass of Flower's Strategy: its `start` has no early stop, sums replies in order of
arrival and samples cohorts from a global generator, and each of these would break an invariant (docs/architecture.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.comm.codecs.table import codec
from fed_dpprune.comm.link import RoundTime, parse_link, round_time
from fed_dpprune.comm.meter import Meter
from fed_dpprune.comm.meter import Parcel as Metered
from fed_dpprune.comm.validate import UpdateBound, check_update
from fed_dpprune.errors import BadInput, FedDPPruneError, RunStopped, WireError
from fed_dpprune.federation import aggregate, messages, uplink
from fed_dpprune.federation.broadcast import METERED, Broadcast
from fed_dpprune.federation.fingerprint import fingerprint
from fed_dpprune.federation.host import HostGrid, new_message
from fed_dpprune.federation.inline import InlineGrid
from fed_dpprune.federation.messages import Reply
from fed_dpprune.federation.observer import Observer
from fed_dpprune.federation.start import Start, Vector
from fed_dpprune.federation.supports import Supports, shipped_part
from fed_dpprune.federation.terms import REPLY_CODES, RoundTerms, config_digest
from fed_dpprune.models.flat import Layout
from fed_dpprune.plan import FLOAT32, EpsilonBook, Plan
from fed_dpprune.privacy import statement
from fed_dpprune.privacy.policy import REFUSAL_CODES, ClientPolicy
from fed_dpprune.records import ClientCounts, ClientRecord, RoundRecord
from fed_dpprune.sparsity.recipe import RoundSupport, group
from fed_dpprune.sparsity.support import Support, union

_log = logging.getLogger(__name__)

NEAR_POLL_S, FAR_POLL_S = 0.005, 0.2
MEET_S, REJOIN_S = 120.0, 3.0
FAILURES = ("internal-error", "ledger-failed")  # may have come after the charge; every other refusal comes before it


class Interrupted(Exception):
    """The user asked the run to end."""


@dataclass(frozen=True)
class World:
    """What the server knows before the first message.

    Attributes:
        config: The validated config.
        layout: Coordinate order.
        begin: The pruned model and the survivors.
        evaluate: Weights to (accuracy, loss) on held-out data.
        odds: Weights and round to inclusion odds per tensor; None for uniform ones.
        scores: Weights to scores of all coordinates from public data; None where no support is chosen by them.
        notes: What a reader of the results must be told of data and weights.
    """

    config: cfg.Config
    layout: Layout
    begin: Start
    evaluate: Callable[[Vector], tuple[float, float]]
    odds: Callable[[Vector, int], tuple[int, ...]] | None = None
    scores: Callable[[Vector], NDArray[np.float64]] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Order:
    """One round as sent: supports and terms by client.

    Attributes:
        round: Counts from 1.
        live: The support of each client of the cohort; one object where it is shared.
        terms: What each is asked.
        version: The model's, at the start of the round.
        odds: Inclusion odds per tensor, where the draw uses them.
        shipped: What is sent of the support, where clients cannot draw it.
        strays: Replies that count for nobody, in words.
    """

    round: int
    live: dict[int, RoundSupport]
    terms: dict[int, RoundTerms]
    version: int
    odds: tuple[int, ...]
    shipped: Support | None
    strays: list[str] = field(default_factory=list)

    def moved(self, clients: Collection[int]) -> Support:
        """What these clients' updates may move together."""
        distinct = {id(self.live[c]): self.live[c].support for c in sorted(clients)}
        return next(iter(distinct.values())) if len(distinct) == 1 else union(list(distinct.values()))


@dataclass(frozen=True)
class Answer:
    """What became of one client in one round; `values` are there only when the update was accepted."""

    status: str
    reason: str = ""
    values: NDArray[np.float32] | None = None


class Recorder:
    """What the server writes after each round; `federation/run.py` has the one with a run directory."""

    def round(self, record: RoundRecord, clients: list[ClientRecord], server: Server) -> None:
        """A round is over."""


class Server:
    """One run.

    Args:
        world: Config, model, evaluation.
        plan_for: Nominal sizes (by partition id), and whether cohorts are drawn beforehand, to the plan; called once the
            clients are known.
        grid: Carries the messages; a `HostGrid` where this host holds the clients' ledger.
        host: Makes that host's grid once the clients have said that they need one; None where it is given already.
        observer: Hears of progress.
        recorder: Writes.
        stop: Set to ask the run to end at the next chance.
        run: Identity of the run.
    """

    def __init__(
        self,
        world: World,
        plan_for: Callable[[tuple[int, ...], bool], Plan],
        grid: Grid,
        observer: Observer,
        recorder: Recorder,
        stop: threading.Event,
        run: str,
        host: Callable[[Grid, tuple[int, ...]], HostGrid] | None = None,
    ) -> None:
        config = world.config
        self.world, self.config, self.layout = world, config, world.layout
        self._plan_for, self._grid, self._host = plan_for, grid, host
        self._observer, self._recorder, self._stop, self.run_id = observer, recorder, stop, run
        self.broadcast = Broadcast(config, world.layout, world.begin)
        self.optimizer = aggregate.ServerOptimizer(config.server, world.layout.d, config.federation.rounds)
        self.meter = Meter()
        self._supports = Supports(config, world.layout, world.begin.survivors, config.seed)
        self._link = parse_link(config.wire.link)
        self.steps: dict[int, int] = {}
        self._step_shares: list[float] = []
        self._clock = time.perf_counter()
        self.provenances: set[str] = set()
        self.done = 0
        self.nodes: dict[int, int] = {}
        self._met: set[int] = set()
        self._greeted: set[str] = set()
        self.plan: Plan
        self.book: EpsilonBook

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Run the rounds that are left.

        Raises:
            RunStopped: Too few clients answered; everything up to there is recorded.
            Interrupted: `stop` was set.
        """
        self.meet()  # 1. who is there, and how large they say they are
        self._observer.note(statement.heading(self.plan.delta, self.plan.accountant))
        self._observer.phase("training")
        self._lap()
        for number in range(self.done + 1, self.config.federation.rounds + 1):
            order = self._order(number)  # 2. support, terms, and what each client lacks of the model
            answers = self._exchange(order)  # 3. send, and collect what comes back in time
            accepted = {c: a.values for c, a in sorted(answers.items()) if a.values is not None}
            enough = len(accepted) >= self.config.federation.min_clients
            if enough:
                self._step(order, accepted)  # 4. aggregate on the support and step
            self._record(order, answers, aggregated=enough)  # 5. measure, account, write
            if not enough:
                raise self._too_few(order, answers)

    def _lap(self) -> float:
        """Seconds since the last call; nothing between two rounds is left out of both."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    # ------------------------------------------------------------------ 1. meeting

    def meet(self) -> None:
        """Learn which node is which partition and its nominal size; make the plan."""
        wanted = self._wanted_clients()
        ids = self._wait_for_nodes(wanted)
        self._met.update(ids)
        hello = RecordDict({"hello": ConfigRecord({"config": config_digest(self.config)})})
        asked = [new_message(self._grid, hello, messages.QUERY, node, "0") for node in ids]
        sizes: dict[int, int] = {}
        ledgers: set[str] = set()
        for reply in self._pull(list(self._grid.push_messages(asked)), self.config.federation.reply_timeout):
            if not reply.has_content():
                raise RunStopped("clients", "a node failed to start", "see the log of that node")
            head = messages.config_of(reply.content, "hello")
            if set(head) != set(messages.HELLO_FIELDS) or head["status"] != "ok":
                raise RunStopped("clients", f"a node refused to take part ({head.get('status')})", "see that node's log")
            self._check_hello(head, sizes)
            sizes[head["partition-id"]] = head["nominal-size"]
            self.nodes[head["partition-id"]] = reply.metadata.src_node_id
            ledgers.add(head["ledger"])
        if sorted(sizes) != list(range(len(sizes))) or (wanted and len(sizes) != wanted):
            raise RunStopped("clients", f"partitions {sorted(sizes)} came, {wanted} clients were expected", "start the others")
        declared = tuple(sizes[c] for c in sorted(sizes))
        if ledgers == {"host"} and self._host is not None:
            self._grid = self._host(self._grid, declared)
        self.plan = self._plan_for(declared, ledgers == {"host"})
        self.book = EpsilonBook(self.plan.noise_multiplier, self.plan.delta, self.plan.accountant)
        for rate in sorted(set(self.plan.sample_rates)):
            most = max(t for q, t in zip(self.plan.sample_rates, self.plan.steps_by_client, strict=True) if q == rate)
            local = self.config.federation.local_steps
            self.book.prepare(rate, range(local, most + 1, local))

    def _wanted_clients(self) -> int:
        """How many clients the config names; 0 where the data decides."""
        return 0 if self.config.data.partition == "natural" else self.config.federation.clients

    def _check_hello(self, head: dict[str, Any], sizes: dict[int, int]) -> None:
        partition, size = head["partition-id"], head["nominal-size"]
        if head["fingerprint"] != fingerprint():
            raise RunStopped("clients", f"client {partition} runs other code", "install one version of fed-dpprune everywhere")
        if head["config"] != config_digest(self.config):
            raise RunStopped("clients", f"client {partition} has another config", "start all nodes for the same run")
        if type(partition) is not int or type(size) is not int or size < 1 or partition < 0:
            raise RunStopped("clients", "a node's partition-id or nominal-size is not a whole number", "see its node-config")
        if partition in sizes:
            raise RunStopped("clients", f"two nodes say that they are partition {partition}", "see their node-configs")

    def _wait_for_nodes(self, wanted: int) -> list[int]:
        """Node ids, once all are there: a ServerApp may start before its nodes are registered."""
        end = time.monotonic() + min(MEET_S, self.config.federation.reply_timeout)
        while True:
            ids = sorted(self._grid.get_node_ids())
            if len(ids) >= max(1, wanted):
                break
            if time.monotonic() > end:
                raise RunStopped("clients", f"{len(ids)} of {wanted} nodes came", "start the others, or set federation.clients")
            self._pause(FAR_POLL_S)
        if wanted and len(ids) > wanted:
            raise RunStopped("clients", f"{len(ids)} nodes came, federation.clients is {wanted}", "make the two numbers equal")
        return ids

    # ------------------------------------------------------------------ 2. the order

    def _order(self, number: int) -> Order:
        """Every client's support and terms."""
        model, cohort = self.broadcast.model, self.plan.cohorts[number - 1]
        odds = self.world.odds(model, number) if self.world.odds else ()
        shipped = self._supports.ship(number, model, self._scores(model)) if shipped_part(self.config.sparsity) else None

        sparsity = self.config.sparsity
        groups = {c: 0 if sparsity.shared else group(sparsity, c) for c in cohort}
        drawn = {g: self._supports.of(number, c, model, odds=odds, shipped=shipped) for c, g in groups.items()}
        live = {c: drawn[g] for c, g in groups.items()}  # one object for all clients that share a support
        self.provenances.update(item.support.provenance for item in live.values())
        terms = {c: self._terms(number, c, live[c], odds) for c in cohort}
        return Order(number, live, terms, self.broadcast.version, odds, shipped)

    def _scores(self, model: Vector) -> NDArray[np.float64]:
        """What a shipped support is chosen by, shape (d,): public data's scores, or how far each weight came since the start."""
        if self.world.scores:
            return self.world.scores(model)
        return np.abs(model.astype(np.float64) - self.world.begin.model)

    def _terms(self, number: int, client: int, live: RoundSupport, odds: tuple[int, ...]) -> RoundTerms:
        config, support = self.config, live.support
        fraction = support.live_fraction or 1.0
        shrink = fraction**0.5 if config.sparsity.clip_scaling == "sqrt" else 1.0
        return RoundTerms(
            run=self.run_id,
            round=number,
            rounds=config.federation.rounds,
            fingerprint=fingerprint(),
            config=config_digest(config),
            layout=self.layout.digest,
            seed=config.seed,
            survivors=self.world.begin.survivors.digest,
            survivor_count=self.world.begin.survivors.k,
            digest=support.digest,
            live=support.k,
            provenance=support.provenance,
            model=self.broadcast.digest,
            client=client,
            sample_rate=self.plan.sample_rates[client],
            noise_multiplier=self.plan.noise_multiplier,
            clip_norm=config.privacy.clip_norm * shrink,
            steps=config.federation.local_steps,
            learning_rate=config.client.learning_rate * fraction**config.sparsity.lr_scaling,
            delta=config.privacy.delta,
            accountant=config.privacy.accountant,
            unit=config.privacy.unit,
            odds=odds,
        )

    def _request(self, order: Order, client: int, *, resync: bool = False, retry: bool = False) -> RecordDict:
        """A client's message; counted as sent."""
        parcel = self.broadcast.parcel(client, shipped=order.shipped, resync=resync)
        content = messages.train_request(order.terms[client].to_wire(), parcel)
        kind: Any = "retry" if retry else METERED[parcel.kind]
        dense = 0 if resync else FLOAT32 * self.layout.d  # a dense message is whole each time: nobody asks for it again
        size = messages.message_bytes(content)
        self.meter.add(Metered(order.round, client, "down", kind, len(parcel.payload), size, dense))
        return content

    # ------------------------------------------------------------------ 3. the exchange

    def _exchange(self, order: Order) -> dict[int, Answer]:
        """Ask every client of the cohort and judge what comes back; who says nothing in time is "silent"."""
        self._returned()
        answers = self._ask(order, sorted(order.terms))
        again = [client for client, answer in sorted(answers.items()) if answer.reason == "need-resync"]
        if again:  # they do not hold what the server thought: the whole model, once
            answers = {c: a for c, a in answers.items() if c not in again} | self._ask(order, again, resync=True)
        for client in order.terms:
            answers.setdefault(client, Answer("silent", "no answer in time"))
        return answers

    def _ask(self, order: Order, clients: list[int], *, resync: bool = False) -> dict[int, Answer]:
        """The first reply of each client, judged. What comes beside it counts for nobody and is named in the record."""
        answers: dict[int, Answer] = {}
        asked: dict[str, tuple[int, int]] = {}

        def send(to: list[int], *, retry: bool = False) -> list[str]:
            contents = [self._request(order, c, resync=resync, retry=retry) for c in to]
            batch = [
                new_message(self._grid, content, messages.TRAIN, self.nodes[c], str(order.round))
                for c, content in zip(to, contents, strict=True)
            ]
            ids = list(self._grid.push_messages(batch))
            asked.update({message_id: (c, self.nodes[c]) for message_id, c in zip(ids, to, strict=True)})
            return ids

        def send_again() -> list[str]:
            return send([c for c in self._returned() if c in clients and c not in answers], retry=True)

        def unanswered() -> bool:
            return len(answers) < len(clients)

        for reply in self._pull(send(clients), self.config.federation.reply_timeout, send_again, unanswered):
            node = reply.metadata.src_node_id
            client, addressee = asked.get(reply.metadata.reply_to_message_id, (None, None))
            if client is not None and node != addressee and reply.has_error():
                _log.warning("client %d cannot be reached; it has until the timeout to come back", client)
            elif client is None or node != addressee:
                order.strays.append(f"node {node}: rejected (unknown-sender)")
            elif client in answers:
                order.strays.append(f"client {client}: rejected (duplicate)")
            else:
                answers[client] = self._judge(order, client, reply)
            if len(asked) > len(clients) == len(answers):
                break  # what was sent to a node that is gone will not be answered
        return answers

    def _returned(self) -> list[int]:
        """Partitions whose node came back under another id: a SuperNode without a key of its own gets one at each start.

        Does not wait: who is asked here has answered by a later call.
        """
        if not self._is_far():
            return []
        fresh = [node for node in self._grid.get_node_ids() if node not in self._met]
        self._met.update(fresh)
        hello = RecordDict({"hello": ConfigRecord({"config": config_digest(self.config)})})
        asked = [new_message(self._grid, hello, messages.QUERY, node, "0") for node in fresh]
        self._greeted.update(self._grid.push_messages(asked) if asked else ())
        back = []
        for reply in self._grid.pull_messages(sorted(self._greeted)) if self._greeted else ():
            self._greeted.discard(reply.metadata.reply_to_message_id)
            partition = self._same_client(reply)
            if partition is not None:
                self.nodes[partition] = reply.metadata.src_node_id
                back.append(partition)
        return sorted(back)

    def _same_client(self, reply: Any) -> int | None:
        """The partition that a new node says it is, if all it declares is what that client declared at the start."""
        try:
            head = messages.config_of(reply.content, "hello")
            self._check_hello(head, {})
        except (FedDPPruneError, ValueError, KeyError) as error:
            _log.warning("a node that came later is left out: %s", error)
            return None
        partition: int = head["partition-id"]
        known = partition in self.nodes and self.plan.nominal_sizes[partition] == head["nominal-size"]
        return partition if known and head["status"] == "ok" else None

    def _pull(
        self,
        ids: list[str],
        timeout: float,
        more: Callable[[], list[str]] | None = None,
        wanting: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Replies as they come, until all are there or time is up.

        Args:
            ids: Messages to wait for.
            timeout: Seconds.
            more: Asked now and then, over a network: further messages to wait for.
            wanting: Over a network: whether to wait on for such messages when all others have been answered.
        """
        waiting, end = set(ids), time.monotonic() + timeout
        order = {message_id: place for place, message_id in enumerate(ids)}
        asked_at = time.monotonic()
        while waiting or (self._is_far() and wanting()):
            if more is not None and self._is_far() and time.monotonic() - asked_at > REJOIN_S:
                for message_id in more():
                    waiting.add(message_id)
                    order[message_id] = len(order)
                asked_at = time.monotonic()
            replies = list(self._grid.pull_messages(sorted(waiting, key=order.__getitem__)))
            for reply in replies:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if self._stop.is_set():
                raise Interrupted
            if not replies:
                if time.monotonic() > end:
                    return
                self._pause(self._poll_s())

    def _is_far(self) -> bool:
        """Whether clients are on other machines, where nodes may go and come back."""
        name = type(self._grid.inner if isinstance(self._grid, HostGrid) else self._grid).__name__
        return name not in (InlineGrid.__name__, "InMemoryGrid")

    def _poll_s(self) -> float:
        """Between two looks for replies: short in one process, patient over a network."""
        return FAR_POLL_S if self._is_far() else NEAR_POLL_S

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Interrupted

    def _judge(self, order: Order, client: int, message: Any) -> Answer:
        """Accept an update, or say why not. Whatever is wrong with it, the round goes on with the rest."""
        if not message.has_content():
            return Answer("failed", "internal-error")
        terms = order.terms[client]
        try:
            reply = self._read(order, client, message.content)
            if reply.status not in REPLY_CODES.keys() | REFUSAL_CODES.keys():
                raise WireError("reply", "unknown-status")
            if reply.status != "ok":
                return Answer("failed" if reply.status in FAILURES else "refused", reply.status)
            values = self._checked_values(order, terms, reply)
        except WireError as error:
            _log.warning("update of client %d in round %d rejected: %s", client, order.round, error)
            return Answer("rejected", error.why)
        self.broadcast.acknowledged(client, order.version)
        return Answer("answered", "", values)

    def _read(self, order: Order, client: int, content: RecordDict) -> Reply:
        """A reply, counted as it came. Only an update has a dense equivalent: a refusal would be as short there.

        Raises:
            WireError: It is not of the protocol; its bytes travelled all the same.
        """
        payload, size, dense = 0, 0, 0
        try:
            reply = messages.read_reply(content)
            payload, size = len(reply.payload), messages.message_bytes(content)
            dense = FLOAT32 * self.layout.d if reply.status == "ok" or reply.payload else 0
        finally:
            size = size or messages.foreign_bytes(content)
            self.meter.add(Metered(order.round, client, "up", "update", payload, size, dense))
        return reply

    def _checked_values(self, order: Order, terms: RoundTerms, reply: Reply) -> NDArray[np.float32]:
        """The update's values, shape (k,), once every echo fits the terms and no value is absurd.

        Raises:
            WireError: Something does not fit.
        """
        for name, got, wanted in (
            ("wrong-request", reply.request, terms.key),
            ("wrong-round", reply.round, terms.round),
            ("wrong-digest", reply.digest, terms.digest),
            ("wrong-fingerprint", reply.fingerprint, terms.fingerprint),
        ):
            if got != wanted:
                raise WireError("update", name)
        values = uplink.decode(self.config.wire, reply.payload, terms.live)
        check_update(values, terms.live, self._bound(order, terms))
        return values

    def _bound(self, order: Order, terms: RoundTerms) -> float:
        """The largest |value| that clipping, noise and the optimiser allow an honest client (docs/wire.md)."""
        client, live = self.config.client, order.live[terms.client]
        rescale = 1.0
        if self.config.sparsity.rescale == "d-over-k" and terms.live:
            fewest = min(live.steps(step).k for step in range(terms.steps)) or 1
            rescale = self.layout.d / fewest
        largest = float(np.abs(self.broadcast.model[live.support.indices]).max(initial=0.0))
        return UpdateBound(
            clip_norm=terms.clip_norm * rescale,
            noise_multiplier=terms.noise_multiplier,
            divisor=terms.sample_rate * self.plan.nominal_sizes[terms.client],
            learning_rate=terms.learning_rate,
            steps=terms.steps,
            coordinates=terms.live,
            clients=len(order.terms),
            rounds=terms.rounds,
            momentum=client.momentum,
            weight_decay=client.weight_decay,
            weight=largest,
            overshoot=codec(self.config.wire.uplink).overshoot,
        ).value

    # ------------------------------------------------------------------ 4. the step

    def _step(self, order: Order, accepted: dict[int, NDArray[np.float32]]) -> None:
        """Aggregate in order of partition id and move the live coordinates."""
        values = list(accepted.values())
        if self.config.sparsity.shared:
            support, mean = order.moved(accepted), aggregate.mean_on_support(values)
        else:
            support, mean = aggregate.mean_by_coordinate([order.live[c].support for c in accepted], values, self.layout.d)
        wanted = self.optimizer.step(self.broadcast.model, support, mean, order.round)
        self.broadcast.advance(wanted, support, order.odds, () if self.config.sparsity.shared else tuple(accepted))

    # ------------------------------------------------------------------ 5. the record

    def _record(self, order: Order, answers: dict[int, Answer], *, aggregated: bool) -> None:
        """Evaluate, account, write and tell."""
        last = order.round == self.config.federation.rounds or not aggregated
        due = last or order.round % self.config.federation.evaluate_every == 0
        accuracy, loss = self.world.evaluate(self.broadcast.model) if due else (None, None)
        for client, answer in answers.items():
            self.steps[client] = self.steps.get(client, 0) + self._charged_steps(order.terms[client], answer)
        link = self._link_time(order)
        clients = [self._client_record(order, client, answers[client], link) for client in sorted(order.terms)]
        count = {s: sum(a.status == s for a in answers.values()) for s in ("answered", "refused", "rejected", "failed", "silent")}
        up, down = self.meter.of_round(order.round, "up"), self.meter.of_round(order.round, "down")
        notes = [f"client {c}: {a.status} ({a.reason})" for c, a in sorted(answers.items()) if a.status != "answered"]
        notes += order.strays
        record = RoundRecord(
            round=order.round,
            accuracy=accuracy,
            loss=loss,
            live=max(item.support.k for item in order.live.values()),
            digest=order.moved(order.live).digest,
            epsilon_max=self.epsilon_max(),
            bytes_up=up.payload,
            bytes_down=down.payload,
            message_up=up.message,
            message_down=down.message,
            planned_up=self.plan.uplink.payload_by_round[order.round - 1],
            planned_down=self.plan.downlink.payload_by_round[order.round - 1],
            dense_up=up.dense_float32,
            dense_down=down.dense_float32,
            clients=ClientCounts(len(order.terms), count["answered"], count["refused"], count["rejected"] + len(order.strays)),
            notes=tuple(notes + ([] if aggregated else ["too few clients: not aggregated"])),
            link_s=link.seconds if link else None,
            wall_s=self._lap(),
        )
        if aggregated:
            self.done = order.round
            local = range(self.config.federation.local_steps)
            live = next(iter(order.live.values()))  # every client's has the same size
            self._step_shares += [live.steps(step).k / self.layout.d for step in local]
        self.meter.forget(order.round + 1)  # the clients' lines hold it now; a checkpoint need not grow with it
        self._recorder.round(record, clients, self)
        for note in notes:
            self._observer.note(f"round {order.round}: {note}")
        megabytes = self.meter.total("up").payload / 1e6
        self._observer.round_done(record, self.config.federation.rounds, record.epsilon_max, megabytes)

    def _link_time(self, order: Order) -> RoundTime | None:
        """What the round's messages would take on the link that the study names; nothing waits for it."""
        if self._link is None:
            return None
        sizes = {
            c: (self.meter.of_client(order.round, c, "down").message, self.meter.of_client(order.round, c, "up").message)
            for c in order.terms
        }
        slow = self._link.slowdowns(len(self.plan.nominal_sizes), self.config.seed)
        return round_time(self._link, sizes, slow)

    def _charged_steps(self, terms: RoundTerms, answer: Answer) -> int:
        """Clients refuse before their charge, but a host with the ledger charges before it asks; who is silent may have paid."""
        before = answer.status == "refused" and not (isinstance(self._grid, HostGrid) and terms.key in self._grid.charged)
        return 0 if before else terms.steps

    def _client_record(self, order: Order, client: int, answer: Answer, link: RoundTime | None) -> ClientRecord:
        """One client's line, after `steps` has been brought up to date."""
        terms = order.terms[client]
        steps = self._charged_steps(terms, answer)
        up = self.meter.of_client(order.round, client, "up")
        down = self.meter.of_client(order.round, client, "down")
        seconds = self._grid.seconds.get(terms.key) if isinstance(self._grid, HostGrid) else None
        return ClientRecord(
            round=order.round,
            client=client,
            status=answer.status,
            reason=answer.reason,
            nominal_size=self.plan.nominal_sizes[client],
            steps=steps,
            sample_rate=terms.sample_rate,
            noise_multiplier=terms.noise_multiplier,
            clip_norm=terms.clip_norm,
            epsilon=self.book.at(terms.sample_rate, self.steps[client]),
            bytes_up=up.payload,
            bytes_down=down.payload,
            message_up=up.message,
            message_down=down.message,
            planned_up=self.plan.uplink.payload_by_client[order.round - 1][client],
            planned_down=self.plan.downlink.payload_by_client[order.round - 1][client],
            dense_up=up.dense_float32,
            dense_down=down.dense_float32,
            downlink_kind="+".join(sorted(down.by_kind)),
            compute_s=seconds,
            link_s=link.by_client[client] if link else None,
        )

    def epsilon_max(self) -> float:
        """The largest cumulative epsilon of any client so far."""
        return max((self.book.at(self.plan.sample_rates[c], t) for c, t in self.steps.items()), default=0.0)

    def epsilon_by_client(self) -> dict[int, float]:
        """Cumulative epsilon of every client, those that never took part at 0."""
        return {c: self.book.at(q, self.steps.get(c, 0)) for c, q in enumerate(self.plan.sample_rates)}

    def _too_few(self, order: Order, answers: dict[int, Answer]) -> RunStopped:
        """Why the run ends here: who did not take part, and the reason given most."""
        left = sum(a.status == "answered" for a in answers.values())
        out = {c: a for c, a in sorted(answers.items()) if a.status != "answered"}
        first = next(iter(out))
        names = ", ".join(map(str, list(out)[:5])) + (", ..." if len(out) > 5 else "")
        return RunStopped(
            f"round {order.round}",
            f"{left} of {len(answers)} clients answered and federation.min-clients is {self.config.federation.min_clients} "
            f"(out: {names}; client {first}: {out[first].reason})",
            self._what_would_fit(out[first].reason),
        )

    def _what_would_fit(self, code: str) -> str:
        """What a refusal means and, where this host's policy is the clients', which limit it met and what fits into it."""
        if code not in REFUSAL_CODES or not isinstance(self._grid, HostGrid):
            return explain(code)
        fits = ClientPolicy.from_config(self.config.policy).explain(code)
        rounds = self.plan.max_rounds
        return f"{fits}, which {rounds} rounds of this setting fit into" if code == "budget-exhausted" and rounds else fits

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything that a resumed server needs; rates and supports follow from the config."""
        head, arrays = self.broadcast.state()
        for name, array in self.optimizer.state().items():
            arrays[f"optimizer-{name}"] = array
        state = {
            "broadcast": head,
            "meter": self.meter.state(),
            "steps": {str(client): count for client, count in self.steps.items()},
            "step_shares": self._step_shares,
            "provenances": sorted(self.provenances),
        }
        return state, arrays

    def restore(self, round: int, state: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Continue after `round`.

        Raises:
            BadInput: The checkpoint was written by a version that kept another state.
        """
        try:
            self._restore(round, state, arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput("the checkpoint", f"was written by another version ({error!r})", "start anew with --force") from None

    def _restore(self, round: int, state: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.done = round
        self.broadcast.restore(state["broadcast"], arrays)
        self.optimizer.restore({n.removeprefix("optimizer-"): a for n, a in arrays.items() if n.startswith("optimizer-")})
        self.meter = Meter.from_state(state["meter"])
        self.steps = {int(client): count for client, count in state["steps"].items()}
        self._step_shares = list(state["step_shares"])
        self.provenances = set(state["provenances"])

    def representation_sparsity(self) -> float:
        """Mean over the steps so far of the share of coordinates that did not live (the measure of arXiv 2112.00845)."""
        return 1.0 - sum(self._step_shares) / len(self._step_shares) if self._step_shares else 0.0


def explain(code: str) -> str:
    """What a refusal code means, in words."""
    return {**REPLY_CODES, **REFUSAL_CODES}.get(code, "see the log")
