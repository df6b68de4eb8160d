"""A Flower Grid in this process: no Ray, no network, one client after the other.

For tests and for `federation.workers = 0`. It calls the same ClientApp with the same messages, so
a run gives the same served tensors as on Ray.
"""

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_FIRST_NODE = 2  # 0 and 1 are Flower's own


class LocalGrid(Grid):
    """Runs `client_app` for `clients` nodes when messages are pushed."""

    def __init__(self, client_app: ClientApp, clients: int) -> None:
        # Flower refuses to make a Message outside a run; these say which run this is.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._client_app = client_app
        self._contexts = {
            client + _FIRST_NODE: Context(
                run_id=1,
                node_id=client + _FIRST_NODE,
                node_config={"partition-id": client, "num-partitions": clients},
                state=RecordDict(),
                run_config={},
            )
            for client in range(clients)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """There is only one run."""

    @property
    def run(self) -> Run:
        """There is no Run object: nothing here has a SuperLink."""
        raise RuntimeError("an in-process grid has no Run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower, and not offered here."""
        raise RuntimeError("make a Message with its constructor")

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[Any]:
        """Nodes have no further description here."""
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run each message's client at once."""
        return [self._run_client(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return, and forget, the replies to these messages."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all messages and return their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _run_client(self, message: Message) -> str:
        message_id = str(uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        try:
            reply = self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # As in a simulation: a client's failure is a reply, and the round goes on.
            reason = f"{type(error).__name__}: {error}"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code=code, reason=reason), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._replies[message_id] = reply
        return message_id
