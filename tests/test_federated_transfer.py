"""Transfers among several clients: what travels, what stays, who takes part, what is drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.training import LocalRun as Run
from clients.training import _learning_rate, _optimiser
from common.config import Experiment, Train, build_experiment
from common.control_prompts import CONTROLS
from common.errors import ConfigError
from common.models import load_model
from common.nemesis import vector_norms
from common.prompt_bank import BankEntry, load_entry, save_entry
from common.prompt_transfer import QUERIES, TARGET, VALUE_WEIGHT, WEIGHT
from common.prompted_vit import VISUAL, PromptedVit, source_rows
from common.tensors import is_prompt
from server.flower_strategy import choose_cohort
from server.simulation import Finished, simulate
from strategies.base import EVERYTHING

WIDTH, SOURCE = 16, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prompt of 6 vectors, narrower than the ViT."""
    prompt = torch.randn(6, SOURCE, generator=torch.Generator().manual_seed(0))
    entry = BankEntry("narrow", prompt, backbone="toy", task="toy", licence="CC0-1.0")
    return str(save_entry(entry, tmp_path_factory.mktemp("bank")))


@pytest.fixture
def transferring(
    digits_experiment: Callable[..., Experiment], source: str
) -> Callable[..., Experiment]:
    """A function of a kind and dotted keys: a transfer of the narrow source among 3 clients."""

    def build(kind: str, strategy: str = "promptfl", **values: Any) -> Experiment:
        transfer = {"kind": kind, "sources": [source], "length": 5, "concentrated": 3}
        adapter = {"kind": "prompt", "prompt": {"length": 0}, "transfer": transfer}
        return digits_experiment(adapter=adapter, strategy__name=strategy, **values)

    return build


def run(experiment: Experiment) -> Finished:
    [finished] = simulate([experiment], lambda *_: None)
    for row in finished.outcomes.rounds:
        assert all(client["status"] == "ok" for client in row["clients"])
    return finished


def model_of(experiment: Experiment) -> PromptedVit:
    model = load_model(experiment.backbone, "image", experiment.adapter, "cpu")
    assert isinstance(model, PromptedVit)
    return model


def test_the_prompt_may_travel_in_place_of_its_map(
    transferring: Callable[..., Experiment],
) -> None:
    """Σ w_k (S W_kᵀ + 1 b_kᵀ) = S W̄ᵀ + 1 b̄ᵀ: oracle T9, through two rounds of a federation."""
    sgd = {"train__optimiser": "sgd", "train__learning_rate": 0.3}
    sgd["adapter__transfer__begin"] = "orthogonal"
    by_map, by_prompt = (
        run(transferring("projection", adapter__transfer__travels=way, **sgd))
        for way in ("projector", "prompt")
    )
    [mapped], [made] = by_map.outcomes.served, by_prompt.outcomes.served
    model = model_of(by_map.experiment)
    model.load(mapped.tensors, 0, by_map.evaluator.tasks[0])
    folded = model.folded()
    assert folded.keys() == made.tensors.keys()
    for name, tensor in folded.items():
        torch.testing.assert_close(made.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    start = by_prompt.evaluator.initial(0)
    assert float((made.tensors[VISUAL] - start[VISUAL]).abs().max()) > 0.01
    up = [row["clients"][0]["bytes"]["up"]["prompt"] for row in (
        by_map.outcomes.rounds[0], by_prompt.outcomes.rounds[0])]  # fmt: skip
    assert up == [4 * (WIDTH * SOURCE + WIDTH), 4 * 6 * WIDTH]


def test_what_would_not_average_cannot_travel_as_a_prompt(
    transferring: Callable[..., Experiment],
) -> None:
    with pytest.raises(ConfigError, match="travels = 'prompt' is of a projection"):
        transferring("attention", adapter__transfer__travels="prompt")
    scaffold = transferring("projection", "scaffold", adapter__transfer__travels="prompt")
    with pytest.raises(ConfigError, match="strategy scaffold corrects gradients"):
        simulate([scaffold], lambda *_: None)


@pytest.mark.parametrize("queries", ["local", "shared"])
def test_heads_stay_and_so_may_queries(
    transferring: Callable[..., Experiment], queries: str
) -> None:
    option = {"strategy__local-heads__queries": queries}
    finished = run(transferring("attention", "local-heads", **option))
    start = finished.evaluator.initial(0)
    [model] = finished.outcomes.served
    moved = {n for n, t in model.tensors.items() if not torch.equal(t, start[n])}
    assert VALUE_WEIGHT in moved
    assert ({QUERIES, TARGET} <= moved) == (queries == "shared")
    assert not any(name.startswith("head.") for name in moved)
    for row in finished.outcomes.rounds:
        kinds = set(row["clients"][0]["bytes"]["up"])
        assert ("own" in kinds) == (queries == "shared")
        assert "head" not in kinds
    last = finished.outcomes.rounds[-1]
    assert last["accuracy"] is None
    assert 0 <= last["own_accuracy"] <= 1


def test_what_clients_keep_is_their_own(transferring: Callable[..., Experiment]) -> None:
    """Scores of clients differ from those of a model with the common start's head and queries."""
    finished = run(transferring("projection", "local-heads"))
    first, last = finished.outcomes.rounds[0], finished.outcomes.rounds[-1]
    assert last["own_loss"] < first["own_loss"]
    with pytest.raises(ConfigError, match="nothing but heads is trained"):
        run(transferring("frozen", "local-heads", adapter__transfer__begin="orthogonal"))


def test_only_some_clients_take_part(transferring: Callable[..., Experiment]) -> None:
    alone = run(transferring("projection", federation__only=[2]))
    assert [c["client"] for r in alone.outcomes.rounds for c in r["clients"]] == [2, 2]
    together = run(transferring("projection"))
    assert not torch.equal(
        alone.outcomes.served[0].tensors[WEIGHT], together.outcomes.served[0].tensors[WEIGHT]
    )
    own = run(transferring("projection", "local-only", federation__only=[0, 2]))
    assert [model.client for model in own.outcomes.served] == [0, 2]
    # Alone in a group, or apart from everyone: the same training.
    for name, tensor in alone.outcomes.served[0].tensors.items():
        torch.testing.assert_close(own.outcomes.served[1].tensors[name], tensor)
    few = transferring("projection", federation__only=[2, 0], federation__fraction=0.5)
    assert {tuple(choose_cohort(few, server_round)) for server_round in range(20)} == {(0,), (2,)}
    for only in ([3], [0, 0], [-1]):
        with pytest.raises(ConfigError, match="name each client once"):
            transferring("projection", federation__only=only)


# --- what is drawn and not trained --------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_takes_the_place_of_the_source(
    transferring: Callable[..., Experiment], source: str, control: str
) -> None:
    def rows(**values: Any) -> torch.Tensor:
        config = transferring("projection", **values).adapter.transfer
        return source_rows(load_entry(source), config)

    plain, drawn = rows(), rows(adapter__transfer__control=control)
    assert drawn.shape == plain.shape
    assert not torch.equal(drawn, plain)
    assert torch.equal(rows(adapter__transfer__control=control), drawn)
    # Another seed of the federation is another control, unless a draw is given.
    other = rows(adapter__transfer__control=control, federation__seed=1)
    assert not torch.equal(other, drawn)
    kept = rows(adapter__transfer__control=control, federation__seed=1, adapter__transfer__draw=0)
    assert torch.equal(kept, drawn)
    same_norms = control not in ("unrelated", "untrained")
    assert torch.allclose(vector_norms(drawn), vector_norms(plain), atol=1e-5) == same_norms
    # As many numbers are trained.
    experiment = transferring("projection", adapter__transfer__control=control)
    task = finished_task(experiment)
    plainly = model_of(transferring("projection"))
    assert model_of(experiment).shapes(0, task) == plainly.shapes(0, task)


def finished_task(experiment: Experiment) -> Any:
    from common.tasks import load_tasks

    return load_tasks(experiment.task)[0]


def test_long_vectors_are_capped(transferring: Callable[..., Experiment], source: str) -> None:
    config = transferring("projection", adapter__transfer__norm_cap=2.0).adapter.transfer
    norms = vector_norms(source_rows(load_entry(source), config))
    assert float(norms.max()) == pytest.approx(2.0)


def test_a_fixed_map_bridges_widths(transferring: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match=r"choose adapter\.transfer\.begin = 'orthogonal'"):
        model_of(transferring("frozen"))
    experiment = transferring("frozen", adapter__transfer__begin="orthogonal")
    model, task = model_of(experiment), finished_task(experiment)
    assert model.has_stem
    assert [n for n in model.shapes(0, task) if is_prompt(n)] == []
    model.load(model.initial((task,), 0), 0, task)
    prompt = model.folded()[VISUAL]
    assert prompt.shape == (1, 6, WIDTH)
    # Orthonormal columns keep norms, since the target is the wider one.
    transfer = experiment.adapter.transfer
    rows = source_rows(load_entry(transfer.sources[0]), transfer)
    torch.testing.assert_close(vector_norms(prompt[0]), vector_norms(rows), rtol=1e-5, atol=1e-5)
    elsewhere = {"adapter__transfer__begin": "orthogonal", "federation__seed": 1}
    other = model_of(transferring("frozen", **elsewhere))
    other.load(other.initial((task,), 0), 0, task)
    assert not torch.equal(other.folded()[VISUAL], prompt)


# --- schedules ------------------------------------------------------------------------------------


def test_schedules_go_by_epochs() -> None:
    """Oracle T10, by steps: 3 steps an epoch, 100 epochs in 5 rounds."""
    wanted = {
        "warmed-cosine": [0.1, 0.5, 1, 1, 0.5, 0.000305],
        "vpt": [0, 0.4, 0.9, 1, 0.5, 0.000305],
    }
    for decay, factors in wanted.items():
        train = Train(learning_rate=2.0, decay=decay)
        found = []
        for epoch in (0, 4, 9, 10, 55, 99):
            # The second step of the epoch, wherever its round starts.
            server_round, step = divmod(3 * epoch + 1, 60)
            local = Run(0, 60 * server_round, 60, 300, EVERYTHING)
            found.append(_learning_rate(step, local, train, epoch=3))
        assert found == pytest.approx([2 * factor for factor in factors], abs=1e-6)
    short = Run(0, 0, 4, 4, EVERYTHING)
    rates = [_learning_rate(s, short, Train(learning_rate=1.0, decay="vpt"), 1) for s in range(4)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5])


def test_optimisers_of_transfer() -> None:
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2))}
    adam = _optimiser(parameters, Train(optimiser="adam", weight_decay=0.1, decay_biases=False))
    assert type(adam) is torch.optim.Adam
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.0]
    sgd = _optimiser(parameters, Train(optimiser="sgd", momentum=0.9, weight_decay=0.1))
    assert [(g["momentum"], g["weight_decay"]) for g in sgd.param_groups] == [(0.9, 0.1)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"train.momentum": 0.9}, "train.momentum = 0.9 is of sgd"),
        ({"train.decay": "vpt", "train.warmup": 0.1}, "warms up by itself"),
        (
            {"task.include_validation": True, "task.evaluate_on": "validation"},
            "would judge by rows that were learned",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(
    values: dict[str, Any], problem: str, vit_folder: Path
) -> None:
    tables = {"task": {"name": "digits"}, "backbone": {"path": str(vit_folder)}}
    with pytest.raises(ConfigError, match=problem):
        build_experiment(tables, values)
