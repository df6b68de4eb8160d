"""Shapley values: of games whose values are known, and of the parts of an adapter."""

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import Experiment
from common.errors import ConfigError, DataError
from common.lowrank import adapted_modules
from server import cli
from server.analysis.shapley import (
    Coalition,
    Value,
    all_coalitions,
    along,
    antithetic_pairs,
    block_parts,
    measure_shapley,
    module_parts,
    plan_shapley,
    read_shapley,
    shapley_design,
    write_shapley,
)
from server.analysis.stored_run import Scorer, open_run
from server.record import build_record, write_run
from server.reporting.block_panels import shapley_panels
from server.simulation import simulate

Build = Callable[..., Experiment]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def game(worth: Callable[[Coalition], float]) -> Value:
    """A game of one measure and one row."""
    return lambda coalition: torch.tensor([[worth(coalition)]], dtype=torch.float64)


def random_game(players: int, seed: int, rows: int = 1) -> tuple[str, Value]:
    """Players, and a game in which every coalition has a worth of its own."""
    names = "abcdefghijkl"[:players]
    coalitions = [
        frozenset(m) for k in range(players + 1) for m in itertools.combinations(names, k)
    ]
    drawn = torch.randn(len(coalitions), 2, rows, generator=generator(seed), dtype=torch.float64)
    table = dict(zip(coalitions, drawn, strict=True))
    return names, table.__getitem__


def smooth_game(seed: int) -> tuple[str, Value]:
    """Eight players whose gains wear off as others join, pair by pair more or less."""
    names, stream = "abcdefgh", random.Random(seed)
    gain = {name: stream.uniform(-0.5, 1.5) for name in names}
    pair = {p: stream.gauss(0, 0.2) for p in itertools.combinations(names, 2)}

    def worth(coalition: Coalition) -> float:
        together = sum(pair[p] for p in itertools.combinations(sorted(coalition), 2))
        return math.tanh(sum(gain[name] for name in coalition) + together)

    return names, game(worth)


def by_definition(players: str, value: Value) -> Tensor:
    """Mean gains over all orders, one after the other."""
    gains = torch.zeros(len(players), *value(frozenset()).shape, dtype=torch.float64)
    orders = list(itertools.permutations(players))
    for order in orders:
        for size, player in enumerate(order):
            gain = value(frozenset(order[: size + 1])) - value(frozenset(order[:size]))
            gains[players.index(player)] += gain / len(orders)
    return gains


# Games.


@pytest.mark.parametrize("players", [1, 2, 4, 5])
def test_all_coalitions_give_the_mean_over_all_orders(players: int) -> None:
    names, value = random_game(players, seed=players, rows=3)
    found = all_coalitions(names).values(value)
    assert found.exact
    assert found.coalitions == 2**players
    torch.testing.assert_close(found.by_row, by_definition(names, value))
    torch.testing.assert_close(found.values, found.by_row.mean(dim=2))
    assert not found.sampling_error.any()


def test_along_every_order_both_ways_are_the_same_values() -> None:
    names, value = random_game(4, seed=1, rows=3)
    pairs = [(order, order[::-1]) for order in itertools.permutations(names)]
    found = along(pairs).values(value)
    assert not found.exact
    torch.testing.assert_close(found.by_row, by_definition(names, value))


def test_players_of_an_additive_game_are_worth_what_they_add() -> None:
    worth = {"a": 1.0, "b": -2.0, "c": 0.5, "d": 0.0, "e": 3.0}
    value = game(lambda coalition: 7 + sum(worth[player] for player in coalition))
    pairs = antithetic_pairs(tuple(worth), 2, generator())
    for design in (all_coalitions(tuple(worth)), along(pairs)):
        found = design.values(value)
        assert dict(zip(found.players, found.values[:, 0].tolist(), strict=True)) == pytest.approx(
            worth, abs=1e-12
        )
        # No order matters, and so there is nothing to err about.
        assert float(found.sampling_error.max()) < 1e-12


def test_a_unanimous_gain_is_shared_evenly_by_those_who_are_needed() -> None:
    value = game(lambda coalition: float({"b", "d", "e"} <= coalition))
    found = all_coalitions("abcdef").values(value)
    third = 1 / 3
    assert found.values[:, 0].tolist() == pytest.approx([0, third, 0, third, third, 0])


def test_equals_are_worth_the_same_and_a_dummy_what_it_brings_alone() -> None:
    """The worth depends on how many of a, b and c are there, and d always adds 2."""
    value = game(lambda coalition: len(coalition - {"d"}) ** 2 + 2.0 * ("d" in coalition))
    found = all_coalitions("abcd").values(value)
    assert found.values[:, 0].tolist() == pytest.approx([3, 3, 3, 2])


@settings(max_examples=25, deadline=None)
@given(players=st.integers(2, 6), seed=st.integers(0, 999), pairs=st.integers(2, 5))
def test_values_sum_to_the_whole_gain(players: int, seed: int, pairs: int) -> None:
    names, value = random_game(players, seed, rows=2)
    orders = antithetic_pairs(names, pairs, generator(seed))
    for design in (all_coalitions(names), along(orders)):
        found = design.values(value)
        whole = value(frozenset(names)) - value(frozenset())
        torch.testing.assert_close(found.by_row.sum(dim=0), whole)
        torch.testing.assert_close(found.values.sum(dim=0), found.everyone - found.none)
        assert float(found.residual.abs().max()) < 1e-12
        assert found.gain_row_error.tolist() == pytest.approx((whole.std(dim=1) / 2**0.5).tolist())


def sampled_errors(antithetic: bool) -> tuple[Tensor, Tensor]:
    """What was found less what is exact, and the standard errors given: (repeats, players)."""
    names, value = smooth_game(seed=3)
    exact = all_coalitions(names).values(value).values[:, 0]
    missed, said = [], []
    for repeat in range(30):
        pairs = antithetic_pairs(names, 10, generator(repeat))
        if not antithetic:
            second = antithetic_pairs(names, 10, generator(1000 + repeat))
            pairs = [(one, other) for (one, _), (other, _) in zip(pairs, second, strict=True)]
        found = along(pairs).values(value)
        missed.append(found.values[:, 0] - exact)
        said.append(found.sampling_error[:, 0])
    return torch.stack(missed), torch.stack(said)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def test_reverse_orders_err_less_than_orders_of_their_own() -> None:
    antithetic, plain = sampled_errors(antithetic=True)[0], sampled_errors(antithetic=False)[0]
    assert rms(antithetic) < 0.7 * rms(plain)
    # Unbiased: the mean over repeats is nearer by far than a single one.
    assert rms(antithetic.mean(dim=0)) < 0.5 * rms(antithetic)


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_sampling_error_is_as_large_as_it_says(antithetic: bool) -> None:
    missed, said = sampled_errors(antithetic)
    assert rms(missed) == pytest.approx(rms(said), rel=0.2)


def test_the_error_over_rows_is_paired() -> None:
    """Rows that differ much in level but hardly in gain have a small error."""
    level = torch.tensor([0.0, 50.0, 100.0, 150.0])
    gains = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0]), "b": torch.tensor([0.5, 0.5, 0.5, 0.5])}

    def value(coalition: Coalition) -> Tensor:
        return sum((gains[player] for player in coalition), level)[None]

    found = all_coalitions("ab").values(value)
    assert found.values[:, 0].tolist() == pytest.approx([1.25, 0.5])
    assert found.row_error[:, 0].tolist() == pytest.approx([0.25, 0.0], abs=1e-6)


def test_all_coalitions_are_scored_where_orders_would_visit_as_many() -> None:
    assert len(shapley_design("abcdef", 50, generator()).shares) == 64
    twelve = "abcdefghijkl"
    design = shapley_design(twelve, 50, generator())
    assert len(design.pairs) == 25
    assert 300 < len(design.shares) <= 50 * 11 + 2
    # 8 players: 2^8 = 256 coalitions, and 38 orders visit 268, 36 only 254.
    assert not shapley_design(twelve[:8], 38, generator()).pairs
    assert shapley_design(twelve[:8], 36, generator()).pairs


def test_every_coalition_is_scored_once() -> None:
    names, value = random_game(5, seed=0)
    asked = []

    def counting(coalition: Coalition) -> Tensor:
        asked.append(coalition)
        return value(coalition)

    design = along(antithetic_pairs(names, 20, generator()))
    assert design.values(counting).coalitions == len(asked) == len(set(asked)) <= 32


def test_orders_are_a_function_of_the_stream() -> None:
    first, again, other = (antithetic_pairs("abcdefgh", 4, generator(s)) for s in (1, 1, 2))
    assert first == again != other
    assert all(list(reversed(one)) == list(two) for one, two in first)


# Parts of an adapter.


def factors(*modules: str) -> dict[str, Tensor]:
    return {
        f"{module}.lora_{factor}.weight": torch.ones(2, 2) for module in modules for factor in "AB"
    }


def test_parts_are_named_by_block_and_by_what_tells_modules_apart() -> None:
    tensors = factors(
        *(f"vit.layers.{n}.attn.self.{kind}" for n in (10, 9, 2) for kind in ("value", "query"))
    )
    blocks = block_parts(tensors)
    assert [part.name for part in blocks] == ["block 2", "block 9", "block 10"]
    assert blocks[1].modules == ("vit.layers.9.attn.self.query", "vit.layers.9.attn.self.value")
    modules = module_parts(tensors)
    assert [part.name for part in modules][:3] == [
        "block 2 query",
        "block 2 value",
        "block 9 query",
    ]
    assert {part.kind for part in modules} == {"query", "value"}


def test_stacks_of_blocks_are_told_apart() -> None:
    tensors = factors("t5.encoder.block.0.q", "t5.encoder.block.1.q", "t5.decoder.block.0.q")
    assert [part.name for part in block_parts(tensors)] == ["decoder 0", "encoder 0", "encoder 1"]


# A run.


@pytest.fixture(scope="module")
def finished(
    digits_experiment: Build, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function of settings: the folder of a new run."""
    made: dict[str, Any] = {}

    def folder_of(**values: Any) -> Path:
        key = json.dumps(values)
        if key not in made:
            (made[key],) = simulate([digits_experiment(**values)], lambda *_: None)
        folder = tmp_path_factory.mktemp("run")
        write_run(folder, build_record(made[key], "fedavg"), made[key].outcomes)
        return folder

    return folder_of


def test_values_of_a_run_are_those_of_its_coalitions(finished: Callable[..., Path]) -> None:
    run = open_run(finished())
    scorer = Scorer(run.experiment, "validation", 60)
    seen: list[str] = []
    found = measure_shapley(plan_shapley(run, "blocks", 50, 0), scorer, seen.append)
    assert len(seen) == found["coalitions"] == 16
    assert (found["method"], found["split"], found["examples"]) == (
        "all coalitions",
        "validation",
        60,
    )

    served = run.one_model()
    parts = {part.name: part.modules for part in block_parts(served.tensors)}

    def value(coalition: Coalition) -> Tensor:
        scored = scorer(served, {m for name in coalition for m in parts[name]})
        return torch.tensor([[-scored.loss], [scored.accuracy]], dtype=torch.float64)

    wanted = by_definition(list(parts), value)[:, :, 0]  # type: ignore[arg-type]
    for column, measure in enumerate(("minus_loss", "accuracy")):
        mine = [row[measure]["value"] for row in found["values"]]
        assert mine == pytest.approx(wanted[:, column].tolist(), abs=1e-7)
        assert abs(found["residual"][measure]) < 1e-9
    assert found["all"]["minus_loss"] == pytest.approx(-scorer(served).loss)
    # Without any of its adapters, and not without its head.
    assert found["none"]["minus_loss"] == pytest.approx(-scorer(served, ()).loss)
    assert found["none"] != found["all"]
    assert all(row["minus_loss"]["row_error"] > 0 for row in found["values"])


def test_modules_are_sampled_and_make_up_the_same_gain(finished: Callable[..., Path]) -> None:
    run = open_run(finished())
    scorer = Scorer(run.experiment, "validation", 30)
    plan = plan_shapley(run, "modules", 6, 3)
    found = measure_shapley(plan, scorer)
    assert found["method"] == "antithetic orders"
    assert (found["orders"], found["orders_seed"]) == (6, 3)
    modules = [module for row in found["values"] for module in row["modules"]]
    assert sorted(modules) == adapted_modules(run.one_model().tensors)
    total = sum(row["minus_loss"]["value"] for row in found["values"])
    assert total == pytest.approx(found["gain"]["minus_loss"], abs=1e-9)
    assert any(row["minus_loss"]["sampling_error"] > 0 for row in found["values"])


def test_without_validation_rows_there_are_no_values(finished: Callable[..., Path]) -> None:
    run = open_run(finished(task__validation_fraction=0.0))
    with pytest.raises(ConfigError, match=r"digits has no validation rows.*validation_fraction"):
        plan_shapley(run, "blocks", 50, 0)


@pytest.mark.parametrize(
    ("players", "orders", "says"),
    [("heads", 50, "blocks, modules"), ("blocks", 7, "--orders 7"), ("blocks", 2, "--orders 2")],
)
def test_choices_that_there_are_not_are_named(
    finished: Callable[..., Path], players: str, orders: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_shapley(open_run(finished()), players, orders, 0)


def test_personal_models_have_no_values(finished: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="a model of its own"):
        plan_shapley(open_run(finished(strategy__name="fedsa-lora")), "blocks", 50, 0)


def test_the_command_keeps_values_of_other_players_and_draws_them(
    finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    for players in ("modules", "blocks", "blocks"):
        asked = ["shapley", str(folder), "--players", players, "--orders", "4", "--examples", "20"]
        cli.app(asked, standalone_mode=False)
    said = capsys.readouterr().err
    assert "block 3 " in said
    assert "report.html" in said
    content = json.loads((folder / "shapley.json").read_text())
    assert list(content) == ["blocks", "modules"]
    page = (folder / "report.html").read_text()
    assert page.count("Which blocks is the gain of the adapters owed to?") >= 1
    assert page.count("Which modules is the gain of the adapters owed to?") >= 1


@pytest.mark.parametrize("content", ["{", "[]", '{"heads": {}}'])
def test_a_file_that_holds_no_values_is_named_before_anything_is_scored(
    finished: Callable[..., Path], content: str
) -> None:
    folder = finished()
    (folder / "shapley.json").write_text(content)
    with pytest.raises(DataError, match=r"shapley\.json.*remove it"):
        plan_shapley(open_run(folder), "blocks", 50, 0)


def test_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_shapley(tmp_path) == {}
    write_shapley(tmp_path, {"players": "blocks", "n": 1})
    write_shapley(tmp_path, {"players": "blocks", "n": 2})
    assert read_shapley(tmp_path) == {"blocks": {"players": "blocks", "n": 2}}


# Its panel.


def analysis(values: Mapping[str, float], error: float = 0.01) -> dict[str, Any]:
    gain = sum(values.values())

    def measured(value: float) -> dict[str, float]:
        return {"value": value, "row_error": error, "sampling_error": 0.0}

    return {
        "label": "fedavg",
        "seed": 0,
        "digest": "0123456789abcdef",
        "players": "blocks",
        "split": "validation",
        "examples": 100,
        "orders": None,
        "coalitions": 2 ** len(values),
        "none": {"minus_loss": -1.0, "accuracy": 0.5},
        "all": {"minus_loss": gain - 1.0, "accuracy": 0.9},
        "gain": {"minus_loss": gain, "accuracy": 0.4},
        "gain_row_error": {"minus_loss": 2 * error, "accuracy": 0.05},
        "values": [
            {
                "player": name,
                "block": name,
                "kind": "",
                "minus_loss": measured(value),
                "accuracy": measured(value),
            }
            for name, value in values.items()
        ],
    }


def test_the_panel_says_what_the_top_holds_and_who_does_harm() -> None:
    values = {"block 0": 0.2, "block 1": 0.5, "block 2": -0.1, "block 3": 0.4}
    (panel,) = shapley_panels({"blocks": analysis(values)})
    assert "top 2 of 4 blocks (block 1 and block 3) hold 90%" in panel.conclusion
    assert "evenly it would be 50%" in panel.conclusion
    assert "Below zero beyond two standard errors: block 2" in panel.conclusion
    assert [row[3] for row in panel.numbers] == ["20%", "50%", "−10%", "40%"]


def test_with_no_gain_to_speak_of_nobody_is_given_a_share() -> None:
    (panel,) = shapley_panels({"blocks": analysis({"block 0": 0.01, "block 1": 0.02})})
    assert "no gain beyond two standard errors" in panel.conclusion
    assert "hold" not in panel.conclusion
    assert [row[3] for row in panel.numbers] == ["–", "–"]
