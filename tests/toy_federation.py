"""A federation of toy tensors: no model, no data, so that strategies can be held to dense sums."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clients.training import Trained
from clients.upload import returned
from common.lowrank import Directions, Term, adapted_modules, factor_names
from common.memory import Memory, under
from common.messages import Plan
from common.residuals import residual_name
from common.sketches import projections
from common.tensors import Tensors, is_prompt, part_of
from strategies import STRATEGIES
from strategies.base import Client, Probe, Served, Setting, Strategy, Update

MODULES = {"enc.0.query": (12, 10), "enc.0.value": (10, 10), "enc.1.query": (9, 14)}
PROMPTS = {"prompt.text": (5, 10), "prompt.image": (2, 3, 8)}
HEAD = {"weight": (3, 10), "bias": (3,)}
ALPHA = 6.0  # never equal to a rank, so that a forgotten scale shows
ROWS = (30, 10, 50, 20)  # num_examples of clients 0 to 3, cycled

# So large a τ drowns the second moment: the step is η·Δ/2τ.
_UNADAPTIVE = {"beta1": 0.0, "tau": 1e6, "learning_rate": 2e6}

# Options with which a method does what the contracts ask of a mean: a sparse merge keeps every
# entry, nobody prunes a rank, a server optimiser goes all the way to where the clients are, and no
# further, and prompts keep their norms.
NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "hetlora": {"tail_share": 1.0},
    "fedavgm": {"momentum": 0.0},
    "fedadagrad": _UNADAPTIVE,
    "fedadam": {**_UNADAPTIVE, "beta2": 1.0},
    "fedyogi": {**_UNADAPTIVE, "beta2": 1.0},
    "shrink": {"factor": 1.0},
    "norm-prox": {"threshold": 0.0},
}

LORA_METHODS = [name for name, method in STRATEGIES.items() if "lora" in method.adapters]

RATE = 0.5  # the learning rates of a round, summed

Train = Callable[[Client, Tensors], Tensors]
Scale = Callable[[int], float]


def scale(rank: int) -> float:
    return ALPHA / rank


def setting(
    rank: int = 4,
    *,
    scale: Scale = scale,
    ranks: Sequence[int] = (),
    clients: int = 4,
    tasks: Sequence[str] = ("toy",),
) -> Setting:
    ranks = ranks or (rank,)
    everyone = (
        client(k, ranks[k % len(ranks)], tasks[k % len(tasks)], scale=scale) for k in range(clients)
    )
    return Setting(rank, scale, seed=7, clients=tuple(everyone))


def build(
    name: str,
    rank: int = 4,
    *,
    scale: Scale = scale,
    ranks: Sequence[int] = (),
    clients: int = 4,
    tasks: Sequence[str] = ("toy",),
    **options: Any,
) -> Strategy:
    method = STRATEGIES[name]
    known = setting(rank, scale=scale, ranks=ranks, clients=clients, tasks=tasks)
    return method.build(method.options(**NEUTRAL.get(name, {}) | options), known)


def client(number: int, rank: int = 4, task: str = "toy", *, scale: Scale = scale) -> Client:
    return Client(number, task, rank, scale(rank))


def cohort(*numbers: int, ranks: Sequence[int] = (4,), scale: Scale = scale) -> list[Client]:
    return [client(k, ranks[k % len(ranks)], scale=scale) for k in numbers]


def common_start(
    rank: int = 4,
    tasks: Sequence[str] = ("toy",),
    modules: Mapping[str, tuple[int, int]] = MODULES,
) -> dict[str, Tensor]:
    """A as PEFT draws it, B zero, and a random head for every task."""
    stream = torch.Generator().manual_seed(11)
    state: dict[str, Tensor] = {}
    for module, (m, n) in modules.items():
        name_B, name_A = factor_names(module)
        state[name_A] = (2 * torch.rand(rank, n, generator=stream) - 1) * n**-0.5
        state[name_B] = torch.zeros(m, rank)
    return state | _start_of_heads(tasks, stream)


def prompt_start(tasks: Sequence[str] = ("toy",)) -> dict[str, Tensor]:
    """Random soft prompts, whose vectors are about as long as clients drift, and heads."""
    stream = torch.Generator().manual_seed(12)
    state = {name: 0.3 * torch.randn(shape, generator=stream) for name, shape in PROMPTS.items()}
    return state | _start_of_heads(tasks, stream)


def _start_of_heads(tasks: Sequence[str], stream: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for task in tasks:
        for name, shape in HEAD.items():
            state[f"head.{task}.{name}"] = torch.randn(shape, generator=stream)
    return state


@dataclass(frozen=True)
class Toy:
    """A method, and the kind of adapter that its models have beside heads."""

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}"

    def build(self, rank: int = 4, **known: Any) -> Strategy:
        return build(self.name, rank, **known)

    def start(self, rank: int = 4, tasks: Sequence[str] = ("toy",)) -> dict[str, Tensor]:
        return common_start(rank, tasks) if self.kind == "lora" else prompt_start(tasks)

    def play(
        self,
        strategy: Strategy,
        rounds: Sequence[Sequence[Client]],
        state: Tensors | None = None,
        **how: Any,
    ) -> Tensors:
        """Return the state after these rounds, from this kind's start unless another is given."""
        if state is None:
            rank = max(who.rank for clients in rounds for who in clients)
            state = strategy.start(self.start(rank))
        return play(strategy, rounds, state=state, **how)


def idle(_: Client, sent: Tensors) -> Tensors:
    """Train nothing."""
    return {name: tensor.clone() for name, tensor in sent.items()}


def drift(seed: int, *, alike: bool = False) -> Train:
    """Clients move every tensor at random: each its own way, or all the same way."""

    def train(who: Client, sent: Tensors) -> Tensors:
        stream = torch.Generator().manual_seed(1000 * seed + (0 if alike else who.client))
        return {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=stream)
            for name, tensor in sorted(sent.items())
        }

    return train


def probe_of(losses: Callable[[Tensors, slice], Tensor], step: float = 1e-4) -> Probe:
    """Return the probe with these losses, and their slopes by central differences."""

    def slopes(tensors: Tensors, directions: Directions, rows: slice) -> tuple[Tensor, Tensor]:
        count = directions.mixing.shape[1]

        def moved(k: int, by: float) -> Tensor:
            return losses(_moved(tensors, directions, k, by), rows).double()

        found = [(moved(k, step) - moved(k, -step)) / (2 * step) for k in range(count)]
        return losses(tensors, rows), torch.stack(found, dim=1)

    return Probe(losses, slopes)


def _moved(tensors: Tensors, directions: Directions, k: int, by: float) -> dict[str, Tensor]:
    """Return the model moved along direction k, exactly: with factors of a larger rank."""
    moved = dict(tensors)
    for module, stack in directions.stacks.items():
        term = Term.of(tensors, module)
        wide = scale(term.rank + stack.rank)
        name_B, name_A = factor_names(module)
        change = by * stack.B.double() * directions.mixing[:, k]
        moved[name_B] = torch.cat([term.B.double() * scale(term.rank), change], dim=1) / wide
        moved[name_A] = torch.cat([term.A, stack.A]).double()
    for name, changes in directions.entries.items():
        moved[name] = tensors[name] + by * changes[k]
    return moved


def updates_of(
    strategy: Strategy,
    state: Tensors,
    clients: Sequence[Client],
    train: Train,
    memories: dict[int, Memory] | None = None,
    number: int = 0,
) -> list[Update]:
    """Do what server and clients do in a round: only what is trained and sent reaches the server.

    `memories` is what clients keep from round to round; `number` is that of the round, from 0.
    """
    memories = {} if memories is None else memories
    known, trains = {who.client: who for who in clients}, strategy.trains(state)
    updates = []
    for assignment in strategy.assign(sorted(known)):
        who = known[assignment.client]
        sent = strategy.send(state, who)
        memory = memories.get(who.client, Memory())
        start = {n: t for n, t in sent.items() if "/" not in n} | under("kept/", memory.own)
        end = {**start, **train(who, start)}
        plan = Plan("", "", who.client, (), number + 1, 1, trains, 1, 0, (), 0, "", strategy.rules)
        upload = returned(plan, 0, who.scale, sent, start, end, memory, Trained(0.0, RATE))
        memories[who.client] = Memory(1, sent, upload.own)
        rows = sum(ROWS[shard % len(ROWS)] for shard in assignment.shards)
        updates.append(Update(who, rows, {**sent, **upload.tensors}, sent))
    if strategy.follow_up is None:
        return updates
    if strategy.follow_up.kind == "score":
        return updates  # no judge answers
    bases = strategy.follow_up.ask(state, updates)
    return [_projected(update, memories, bases) for update in updates]


def _projected(update: Update, memories: Mapping[int, Memory], bases: Tensors) -> Update:
    pending = under("pending/", memories[update.client.client].own)
    answered = projections(pending, update.client.scale, bases)
    return replace(update, tensors={**update.tensors, **bases, **answered})


def model_after(strategy: Strategy, state: Tensors, update: Update, train: Train) -> Tensors:
    """Return the model a client ended its round with, where the server sees sketches of it only."""
    trains = strategy.trains(state)
    end = train(update.client, update.sent)
    return {**update.sent, **{n: t for n, t in end.items() if part_of(n) in trains}}


def play(
    strategy: Strategy,
    rounds: Sequence[Sequence[Client]],
    train: Callable[[int], Train] = drift,
    state: Tensors | None = None,
    first: int = 0,
) -> Tensors:
    """Return the state after these rounds, from the common start unless another is given.

    `first` is the number of the first of them.
    """
    if state is None:
        rank = max(who.rank for clients in rounds for who in clients)
        state = strategy.start(common_start(rank))
    memories: dict[int, Memory] = {}
    for number, clients in enumerate(rounds, first):
        updates = updates_of(strategy, state, clients, train(number), memories, number)
        state = strategy.merge(state, updates, None).state
    return state


def delta_of(tensors: Tensors, module: str, s: float) -> Tensor:
    """Return the effective delta of a module: `s·B·A` plus any residual; dense, float64."""
    name_B, name_A = factor_names(module)
    delta = s * tensors[name_B].double() @ tensors[name_A].double()
    if residual_name(module) in tensors:
        delta = delta + tensors[residual_name(module)].double()
    return delta


def deltas(model: Served, scale: Scale = scale) -> dict[str, Tensor]:
    """Return the effective delta of every module, and change of every prompt, of a served model."""
    modules, start = adapted_modules(model.tensors), prompt_start()
    return {module: delta_of(model.tensors, module, scale(model.rank)) for module in modules} | {
        name: tensor.double() - start[name].double()
        for name, tensor in model.tensors.items()
        if is_prompt(name)
    }


def mean_deltas(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Return `Σ p_k ΔW_k` of every module, `p_k = n_k/Σn`, each at its client's own scale."""
    total = sum(update.num_examples for update in updates)
    return {
        module: sum(
            u.num_examples / total * delta_of(u.tensors, module, u.client.scale) for u in updates
        )
        for module in adapted_modules(updates[0].tensors)
    }


def heads(tensors: Tensors) -> dict[str, Tensor]:
    """Return the classification heads."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of this rank, by a dense SVD."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    """Demand the same names, and values that differ by `tolerance` in the norm, relatively."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor.double()).norm())
        assert error <= tolerance * max(1.0, float(tensor.double().norm())), (name, error)


def assert_same_models(
    found: Sequence[Served], expected: Sequence[Served], tolerance: float = 1e-6
) -> None:
    """Demand the same effective deltas and heads, whatever the factors."""
    assert [(m.rank, m.task) for m in found] == [(m.rank, m.task) for m in expected]
    for one, other in zip(found, expected, strict=True):
        assert_close(deltas(one), deltas(other), tolerance)
        assert_close(heads(one.tensors), heads(other.tensors), tolerance)
