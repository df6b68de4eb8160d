"""Holdings: what clients hold, as far as the server knows: rows of each label."""

from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from common.config import Experiment
from common.errors import FedcopraError
from common.messages import pack_question, unpack_holding
from common.shards import Holding, ToldHolding, deal_shards
from common.tasks import LabelledTask
from server.replies import last_line


def check_shards(experiment: Experiment) -> None:
    """Deal the shards out, before anything is started; what lies at sites only they can check.

    Raises:
        DataError: shards that cannot be dealt.
    """
    if not experiment.task.at_sites:
        deal_shards(experiment.task, experiment.partition, experiment.federation.seed)


def find_holdings(
    grid: Grid, experiment: Experiment, nodes: Mapping[int, int], tasks: tuple[LabelledTask, ...]
) -> tuple[Holding, ...]:
    """Return what each client holds, in client order: from the deal, or from what sites say.

    Raises:
        FedcopraError: a site cannot say what it holds; the message has its reason.
    """
    if not experiment.task.at_sites:
        return deal_shards(experiment.task, experiment.partition, experiment.federation.seed)
    text = experiment.model_dump_json()
    questions = [
        Message(pack_question(client, text), dst_node_id=nodes[client], message_type=_QUESTION)
        for client in range(experiment.partition.clients)
    ]
    replies = grid.send_and_receive(questions, timeout=experiment.federation.timeout)
    answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
    holdings = []
    for client, question in enumerate(questions):
        answer = answers.get(question.metadata.message_id)
        if answer is None or answer.has_error():
            why = last_line(str(answer.error.reason)) if answer else "no answer"
            raise FedcopraError(f"client {client} did not say what it holds: {why}")
        _, counts = unpack_holding(answer.content)
        if len(counts) != len(tasks[0].labels):
            raise FedcopraError(
                f"client {client} counts rows of {len(counts)} labels; task {tasks[0].name} has "
                f"{len(tasks[0].labels)}"
            )
        holdings.append(ToldHolding(client, tasks[0], counts))
    return tuple(holdings)


_QUESTION = "query.holdings"
