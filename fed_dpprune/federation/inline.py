"""The inline runner: Flower's grid without Ray, one process, one thread.

It carries the very messages that Flower would carry, to the very ClientApp that Flower would start; only the transport
is a list. For tests, debugging and small studies.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import cast
from uuid import uuid4

from flwr.app import DEFAULT_TTL, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import now
from flwr.serverapp import Grid
from flwr.supercore.run import Run

CLIENT_APP_RAISED = 2  # Flower's error code for an exception in a ClientApp


class InlineGrid(Grid):
    """A grid whose nodes live in this process; a message is handled when its reply is pulled.

    Args:
        client_app: The app every node runs.
        node_configs: One node-config per node; the node's id is its place plus one.
    """

    def __init__(self, client_app: ClientApp, node_configs: Sequence[Mapping[str, bool | int | float | str]]) -> None:
        self._app = client_app
        self._contexts = {
            node + 1: Context(run_id=1, node_id=node + 1, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in enumerate(node_configs)
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        """There is no SuperLink that could know of a run."""
        raise RuntimeError("an inline grid belongs to no SuperLink run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message outside a Flower process, where Flower's own constructor has no run to name."""
        metadata = Metadata(
            run_id=1,
            message_id="",
            src_node_id=0,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=now().timestamp(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
        )
        return cast(Message, Message(content=content, metadata=metadata))  # type: ignore[call-overload]

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in order."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; ids in order."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first waiting message among `message_ids` and return its reply; an empty list when none waits."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                return [self._handle(message)]
        return []

    def _handle(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does: an exception of the app is an error reply, and the run goes on
            traceback.print_exc()
            return Message(Error(code=CLIENT_APP_RAISED, reason=type(error).__name__), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then handle all."""
        replies: list[Message] = []
        for message_id in self.push_messages(messages):
            replies.extend(self.pull_messages([message_id]))
        return replies
