"""The simulated clients' host: it stands before the grid and holds the ledger that in a deployment each client holds.

A train request passes here on its way out: policy first, then the charge, committed before any actor sees the request
(invariant 6); a request that was answered before gets its stored bytes back (invariant 8). A reply is stored on its way
in, before the server sees it. One writer, one file, whatever the number of actors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fed_dpprune.errors import ClientFault, WireError
from fed_dpprune.federation import messages
from fed_dpprune.federation import terms as round_terms
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.messages import Reply

_log = logging.getLogger(__name__)


class HostGrid(Grid):
    """Wraps a grid; its clients' charges, refusals and replays are decided here.

    Args:
        grid: What carries the messages that are admitted.
        guard: Ledger and policy of all clients of this host.

    Attributes:
        inner: The wrapped grid.
        seconds: Computing time of each reply, by request digest; filled from what simulated clients note.
        charged: Digests of the requests that were charged and handed to a client.
    """

    def __init__(self, grid: Grid, guard: LedgerGuard) -> None:
        self.inner = grid
        self._guard = guard
        self._ready: dict[str, Message] = {}
        self._sent: dict[str, round_terms.RoundTerms] = {}
        self.seconds: dict[str, float] = {}
        self.charged: set[str] = set()

    def set_run(self, run: Run) -> None:
        """Passed on."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """The wrapped grid's."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Passed on where the grid makes its own messages, else Flower's constructor."""
        return new_message(self.inner, content, message_type, dst_node_id, group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The wrapped grid's."""
        return self.inner.get_node_ids()

    def push_messages(self, messages_out: Iterable[Message]) -> Iterable[str]:
        """Admit, then push; a refusal or a replay is answered from here, in the order asked."""
        batch = list(messages_out)
        train = [m for m in batch if m.metadata.message_type == messages.TRAIN]
        answers = self._admit(train)
        onward = [m for m in batch if id(m) not in answers]
        pushed = iter(list(self.inner.push_messages(onward)))
        ids = []
        for message in batch:
            answer = answers.get(id(message))
            if answer is None:
                message_id = next(pushed)
            else:
                message_id = f"host-{len(self._ready)}-{id(message)}"
                message.metadata.__dict__["_message_id"] = message_id
                self._ready[message_id] = Message(answer, reply_to=message)
            ids.append(message_id)
        return ids

    def _admit(self, train: list[Message]) -> dict[int, RecordDict]:
        """Answers that need no client: refusals and replays, by the message's identity. Charges all others at once."""
        asked: list[tuple[Message, round_terms.RoundTerms]] = []
        for message in train:
            asked.append((message, round_terms.from_wire(messages.config_of(message.content, "terms"))))
        outcomes = self._guard.admit_many([terms for _, terms in asked])
        answers: dict[int, RecordDict] = {}
        for (message, terms), outcome in zip(asked, outcomes, strict=True):
            self._sent[terms.key] = terms
            if isinstance(outcome, ClientFault):
                _log.info("client %d refuses round %d: %s %s", terms.client, terms.round, outcome.code, outcome.detail)
                answers[id(message)] = messages.train_reply(
                    Reply(outcome.code, terms.key, terms.round, terms.digest, terms.fingerprint)
                )
            elif outcome is not None:
                answers[id(message)] = messages.thaw(outcome)
            else:
                self.charged.add(terms.key)
        return answers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there, each stored in the ledger before it is handed on."""
        wanted = list(message_ids)
        local = [self._ready.pop(message_id) for message_id in wanted if message_id in self._ready]
        if local:
            return local
        replies = list(self.inner.pull_messages(wanted))
        for reply in replies:
            self._keep(reply)
        return replies

    def _keep(self, message: Message) -> None:
        """Store what a client answered; where a reply was stored before, that one goes on."""
        if message.metadata.message_type != messages.TRAIN or not message.has_content():
            return
        seconds = messages.take_seconds(message.content)
        try:
            reply = messages.read_reply(message.content)
        except WireError:
            return  # not of the protocol: the server rejects and names it
        if seconds is not None:
            self.seconds[reply.request] = seconds
        if reply.status == "ok" and reply.request in self._sent:
            made = messages.freeze(message.content)
            kept = self._guard.keep(self._sent[reply.request], made)
            if kept != made:
                message.content = messages.thaw(kept)

    def send_and_receive(self, messages_out: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used by this project's server, which pulls as replies come in."""
        raise RuntimeError("the host's grid is pulled, not waited for")


def new_message(grid: Grid, content: RecordDict, message_type: str, node: int, group: str) -> Message:
    """A message for `node`, by the grid itself where it lives outside a Flower process, else by Flower's constructor."""
    from fed_dpprune.federation.inline import InlineGrid

    if isinstance(grid, InlineGrid | HostGrid):
        return grid.create_message(content, message_type, node, group)
    keywords: dict[str, Any] = {"dst_node_id": node, "message_type": message_type, "group_id": group}
    return Message(content, **keywords)
