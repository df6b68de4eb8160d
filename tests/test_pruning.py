"""Pruning: what is cut, that differences are paired, and what is said of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import Experiment
from common.errors import ConfigError, DataError
from common.lowrank import adapted_modules, factor_names
from common.residuals import residual_name
from common.tensors import Tensors
from server import cli
from server.analysis.pruning import (
    break_even,
    cuts_of,
    estimate,
    grouped,
    measure_pruning,
    plan_pruning,
    sparse,
)
from server.analysis.shapley import measure_shapley, plan_shapley, write_shapley
from server.analysis.stored_run import Scorer, only_in, open_run
from server.record import build_record, write_run
from server.reporting.block_panels import pruning_panels
from server.simulation import simulate
from strategies.base import Served

Build = Callable[..., Experiment]
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(digits_experiment: Build, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function of label and settings: a new folder of a run."""
    made: dict[str, Any] = {}

    def folder_of(label: str = "fedavg", **values: Any) -> Path:
        key = json.dumps(values)
        if key not in made:
            (made[key],) = simulate([digits_experiment(**values)], lambda *_: None)
        folder = tmp_path_factory.mktemp("run")
        write_run(folder, build_record(made[key], label), made[key].outcomes)
        return folder

    return folder_of


def adapter(blocks: int, *, kinds: Sequence[str] = ("query", "value"), seed: int = 0) -> Served:
    stream = torch.Generator().manual_seed(seed)
    tensors = {"head.toy.bias": torch.ones(3)}
    for module in (f"vit.layers.{n}.{kind}" for n in range(blocks) for kind in kinds):
        name_B, name_A = factor_names(module)
        tensors |= {
            name_B: torch.randn(5, 2, generator=stream),
            name_A: torch.randn(2, 7, generator=stream),
        }
    return Served(tensors, 2)


def on(tensors: Tensors) -> set[str]:
    """The modules that a model still has adapters in, by block and kind."""
    return {
        module.removeprefix("vit.layers.")
        for module in adapted_modules(tensors)
        if tensors[factor_names(module)[0]].any()
    }


# What is cut.


def test_parts_are_kept_as_their_names_say() -> None:
    served = adapter(6)
    cuts = {cut.name: cut for cut in cuts_of(served, 1.0, [], [])}
    kept = {name: on(cut.model().tensors) for name, cut in cuts.items()}

    def both(*blocks: int) -> set[str]:
        return {f"{block}.{kind}" for block in blocks for kind in ("query", "value")}

    assert kept == {
        "all": both(0, 1, 2, 3, 4, 5),
        "every other from 1st": both(0, 2, 4),
        "every other from 2nd": both(1, 3, 5),
        "low third": both(0, 1),
        "middle third": both(2, 3),
        "high third": both(4, 5),
        "only query": {f"{block}.query" for block in range(6)},
        "only value": {f"{block}.value" for block in range(6)},
        "none": set(),
    }
    assert cuts["low third"].blocks == ("block 0", "block 1")
    assert (cuts["low third"].amount, cuts["low third"].of) == (2, 6)
    for cut in cuts.values():
        assert torch.equal(cut.model().tensors["head.toy.bias"], served.tensors["head.toy.bias"])


@pytest.mark.parametrize("blocks", [3, 4, 5, 7, 12])
def test_thirds_are_all_blocks_once(blocks: int) -> None:
    cuts = {cut.name: cut for cut in cuts_of(adapter(blocks), 1.0, [], [])}
    thirds = [cuts[f"{name} third"].blocks for name in ("low", "middle", "high")]
    assert [b for third in thirds for b in third] == [f"block {n}" for n in range(blocks)]
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1


def test_what_a_small_adapter_does_not_have_is_not_cut() -> None:
    names = [cut.name for cut in cuts_of(adapter(1, kinds=["c_attn"]), 1.0, [], [])]
    assert names == ["all", "none"]


def test_the_best_blocks_are_kept_first() -> None:
    order = ["block 2", "block 0", "block 3", "block 1"]
    cuts = [c for c in cuts_of(adapter(4), 1.0, order, []) if c.family == "shapley"]
    assert [cut.name for cut in cuts] == [f"best {k} of 4 blocks" for k in (1, 2, 3)]
    kept = [{name.split(".")[0] for name in on(cut.model().tensors)} for cut in cuts]
    assert kept == [{"2"}, {"0", "2"}, {"0", "2", "3"}]


# Entry by entry.


def deltas(served: Served, scale: float) -> dict[str, Tensor]:
    found = {}
    for module in adapted_modules(served.tensors):
        B, A = (served.tensors[name].double() for name in factor_names(module))
        found[module] = scale * B @ A
        if residual_name(module) in served.tensors:
            found[module] += served.tensors[residual_name(module)].double()
    return found


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_smallest_entries_of_the_whole_delta_are_zero(
    share: float, with_residual: bool
) -> None:
    served = adapter(3)
    tensors = dict(served.tensors)
    # One module far smaller than the others: it goes first, as sizes are those of all together.
    name_B, _ = factor_names("vit.layers.1.query")
    tensors[name_B] = 1e-4 * tensors[name_B]
    if with_residual:
        stream = torch.Generator().manual_seed(5)
        tensors[residual_name("vit.layers.0.value")] = torch.randn(5, 7, generator=stream)
    served = Served(tensors, 2)
    whole, cut = deltas(served, 1.5), deltas(sparse(served, 1.5, share), 1.5)
    entries = torch.cat([delta.flatten() for delta in whole.values()])
    left = torch.cat([delta.flatten() for delta in cut.values()])
    assert int((left == 0).sum()) == round(share * len(entries))
    kept = left != 0
    torch.testing.assert_close(left[kept].float(), entries[kept].float())
    assert float(entries[~kept].abs().max()) < float(entries[kept].abs().min())
    assert not cut["vit.layers.1.query"].any()


def test_with_next_to_no_zeros_the_model_scores_as_before(finished: Runs) -> None:
    """So s, the residual's place beside B = 0, and the layout of weights are right."""
    for strategy in ("fedavg", "dense-oracle"):
        run = open_run(finished(strategy__name=strategy))
        served = run.one_model()
        scorer = Scorer(run.experiment, "validation", 50)
        whole = sparse(served, run.experiment.adapter.scale(served.rank), 1e-9)
        torch.testing.assert_close(scorer(whole).losses, scorer(served).losses, rtol=0, atol=1e-5)
        empty = sparse(served, run.experiment.adapter.scale(served.rank), 1 - 1e-9)
        torch.testing.assert_close(
            scorer(empty).losses, scorer(served, ()).losses, rtol=0, atol=1e-5
        )
        assert not torch.allclose(scorer(empty).losses, scorer(served).losses, atol=1e-5)


def test_a_delta_takes_fewer_numbers_than_factors_from_the_break_even_on() -> None:
    served = adapter(2)
    # Four modules of 5 x 7 at rank 2: 24 numbers in factors, 35 entries.
    assert break_even(served.tensors) == pytest.approx(1 - 24 / 35)


# Statistics.


def test_errors_are_over_rows_of_the_mean_over_seeds_and_over_seeds() -> None:
    one, other = torch.tensor([0.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, 1])
    found = estimate([one, other])
    mean_rows = torch.tensor([0.0, 0.5, 0.5, 1])
    assert found["mean"] == pytest.approx(0.5)
    assert found["seeds"] == pytest.approx([0.75, 0.25])
    assert found["row_error"] == pytest.approx(float(mean_rows.std()) / 2)
    assert found["seed_error"] == pytest.approx(float(torch.tensor([0.75, 0.25]).std()) / 2**0.5)
    assert found["error"] == pytest.approx(
        (found["row_error"] ** 2 + found["seed_error"] ** 2) ** 0.5
    )
    assert estimate([one])["seed_error"] is None
    assert estimate([one])["error"] == estimate([one])["row_error"]


def settings_of(found: Mapping[str, Any]) -> list[str]:
    return [row["label"] for row in found["labels"]]


def test_two_runs_are_compared_row_by_row(finished: Runs) -> None:
    folders = [finished(), finished(train__learning_rate=0.2)]
    runs = [open_run(folder) for folder in folders]
    found = measure_pruning(plan_pruning(runs, [0.5]))
    first, second = settings_of(found)
    assert first == "fedavg · train.learning_rate=0.02"
    assert second == "fedavg · train.learning_rate=0.2"
    assert found["same_rows"]
    scorers = [Scorer(run.experiment, "test") for run in runs]
    cuts = {cut["name"]: cut for cut in found["cuts"]}
    for name, model in (("all", None), ("none", ())):
        scored = [s(r.one_model(), model) for s, r in zip(scorers, runs, strict=True)]
        for label, one in zip((first, second), scored, strict=True):
            assert cuts[name]["scores"][label]["accuracy"]["mean"] == pytest.approx(one.accuracy)
            assert cuts[name]["scores"][label]["loss"]["mean"] == pytest.approx(one.loss)
        apart = scored[1].losses.double() - scored[0].losses.double()
        difference = cuts[name]["differences"][second]["loss"]
        assert difference["mean"] == pytest.approx(float(apart.mean()))
        assert difference["error"] == pytest.approx(float(apart.std()) / len(apart) ** 0.5)
        assert difference["beyond"] == (abs(difference["mean"]) > 2 * difference["error"])
    assert cuts["all"]["scores"][first]["accuracy"]["mean"] == pytest.approx(
        runs[0].record["final"]["accuracy"]
    )
    # A change is against the same run as a whole, and nothing of that for the whole.
    assert cuts["all"]["changes"][second]["loss"]["mean"] == 0
    lost = scorers[1](runs[1].one_model(), ()).losses - scorers[1](runs[1].one_model()).losses
    change = cuts["none"]["changes"][second]["loss"]
    assert change["mean"] == pytest.approx(float(lost.double().mean()))
    assert change["error"] == pytest.approx(float(lost.double().std()) / len(lost) ** 0.5)
    assert json.dumps(found, allow_nan=False)


def test_seeds_of_one_label_are_averaged(finished: Runs) -> None:
    runs = [open_run(finished(federation__seed=seed)) for seed in (0, 1)]
    found = measure_pruning(plan_pruning(runs, [0.5]), 40)
    assert [row["seeds"] for row in found["labels"]] == [[0, 1]]
    whole = found["cuts"][0]["scores"]["fedavg"]["accuracy"]
    scorers = [Scorer(run.experiment, "test", 40) for run in runs]
    alone = [s(r.one_model()).accuracy for s, r in zip(scorers, runs, strict=True)]
    assert whole["seeds"] == pytest.approx(alone)
    assert whole["mean"] == pytest.approx(sum(alone) / 2)


def test_runs_on_different_rows_are_not_subtracted(finished: Runs) -> None:
    runs = [open_run(finished()), open_run(finished("other", task__test_fraction=0.3))]
    found = measure_pruning(plan_pruning(runs, [0.5]), 40)
    assert not found["same_rows"]
    assert all(cut["differences"] == {} for cut in found["cuts"])
    conclusion = pruning_panels(found)[0].conclusion
    assert "scored on different examples" in conclusion
    assert "One seed" not in conclusion


# What is refused, and what is left out.


def test_a_run_given_twice_is_refused(finished: Runs) -> None:
    folder = finished()
    with pytest.raises(ConfigError, match=r"both fedavg, seed 0.*give every run once"):
        grouped([open_run(folder), open_run(folder)])


def test_a_sparsity_that_is_none_is_refused(finished: Runs) -> None:
    with pytest.raises(ConfigError, match="--sparsity 1: choose shares"):
        plan_pruning([open_run(finished())], [0.5, 1.0])


@pytest.mark.parametrize("strategy", ["fedsa-lora", "local-only"])
def test_personal_models_are_refused(finished: Runs, strategy: str) -> None:
    runs = [open_run(finished()), open_run(finished(strategy__name=strategy))]
    with pytest.raises(ConfigError, match="a model of its own"):
        plan_pruning(runs)


def test_without_values_it_is_said_how_to_get_them(finished: Runs) -> None:
    folder = finished()
    plan = plan_pruning([open_run(folder)])
    assert not [cut for cut in plan.cuts[folder] if cut.family == "shapley"]
    (note,) = plan.notes
    assert f"fedcopra shapley {folder}" in note


def with_values(folder: Path) -> list[str]:
    """Leave Shapley values beside a run; return its blocks, the best first."""
    run = open_run(folder)
    plan = plan_shapley(run, "blocks", 4, 0)
    found = measure_shapley(plan, Scorer(run.experiment, "validation", 30))
    write_shapley(folder, found)
    rows = sorted(found["values"], key=lambda row: -row["minus_loss"]["value"])
    return [row["player"] for row in rows]


def test_blocks_are_kept_by_the_values_beside_the_run(finished: Runs) -> None:
    folder = finished()
    best = with_values(folder)
    run = open_run(folder)
    plan = plan_pruning([run], [0.5])
    assert not plan.notes
    (first, *_) = (cut for cut in plan.cuts[folder] if cut.family == "shapley")
    tensors = run.one_model().tensors
    wanted = [m for m in adapted_modules(tensors) if f".{best[0].split()[1]}." in m]
    assert 0 < len(wanted) < len(adapted_modules(tensors))
    kept = only_in(tensors, wanted)
    assert all(torch.equal(first.model().tensors[name], kept[name]) for name in kept)


def test_values_of_another_model_are_refused(finished: Runs) -> None:
    folder, other = finished(), finished(federation__seed=1)
    with_values(other)
    (folder / "shapley.json").write_bytes((other / "shapley.json").read_bytes())
    with pytest.raises(DataError, match=rf"make it anew: fedcopra shapley {folder}"):
        plan_pruning([open_run(folder)])


def test_blocks_are_not_scored_on_the_rows_that_they_were_chosen_on(finished: Runs) -> None:
    folder = finished(task__evaluate_on="validation")
    with_values(folder)
    plan = plan_pruning([open_run(folder)], [0.5])
    assert not [cut for cut in plan.cuts[folder] if cut.family == "shapley"]
    assert "not scored on the same rows" in plan.notes[0]


# The command, and what its panels say.


def test_the_command_writes_numbers_and_report_into_the_first_folder(
    finished: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = finished(), finished("lora", train__learning_rate=0.2)
    with_values(one)
    cli.app(
        ["prune", str(one), str(other), "--examples", "30", "--sparsity", "0.9,0.5"],
        standalone_mode=False,
    )
    said = capsys.readouterr().err
    assert "1: fedavg" in said
    assert "every other from 1st" in said
    assert f"fedcopra shapley {other}" in said.replace("\n", "")
    found = json.loads((one / "pruning.json").read_text())
    assert found["sparsities"] == [0.5, 0.9]
    assert not (other / "pruning.json").exists()
    page = (one / "report.html").read_text()
    for heading in (
        "How good is the model with only a part of its adapters?",
        "How many blocks are needed, the most valuable first?",
        "How many entries of the adapter",
    ):
        assert heading in page


def measured(mean: float, error: float) -> dict[str, Any]:
    beyond = abs(mean) > 2 * error
    return {"mean": mean, "error": error, "seeds": [mean], "beyond": beyond}


def analysis(differences: Mapping[str, float], seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Two labels, of which the second differs so much from the first; errors are 0.01."""
    labels = ("copra · copra.enabled=false", "copra · copra.enabled=true")

    def both(accuracy: float) -> dict[str, Any]:
        return {"accuracy": measured(accuracy, 0.01), "loss": measured(accuracy, 0.01)}

    return {
        "digest": "0123456789abcdef",
        "same_rows": True,
        "labels": [
            {
                "label": label,
                "seeds": list(seeds),
                "control": False,
                "split": "test",
                "examples": 100,
                "blocks": 4,
                "break_even": 0.8,
            }
            for label in labels
        ],
        "cuts": [
            {
                "name": name,
                "family": "parts",
                "amount": 2,
                "of": 4,
                "blocks": None,
                "scores": {labels[0]: both(0.8), labels[1]: both(0.8 + difference)},
                "changes": {label: both(-0.1) for label in labels},
                "differences": {labels[1]: both(difference)},
            }
            for name, difference in differences.items()
        ],
        "notes": ["copra has no Shapley values of blocks: fedcopra shapley runs/copra"],
    }


def test_only_differences_beyond_two_errors_are_called_any() -> None:
    parts, blocks = pruning_panels(
        analysis({"all": -0.019, "low third": 0.021, "high third": -0.021, "none": 0.0})
    )
    assert (
        "copra.enabled=true is ahead with low third, and is behind with high third, and no "
        "difference is shown in the other 2." in parts.conclusion
    )
    assert "One seed is one seed" in parts.conclusion
    assert "With no adapter" not in parts.conclusion
    assert not blocks.drawing
    assert "fedcopra shapley runs/copra" in blocks.conclusion


def test_what_the_heads_do_alone_is_not_put_down_to_pruning() -> None:
    parts, _ = pruning_panels(analysis({"all": 0.0, "low third": 0.05, "none": 0.05}, [0, 1]))
    assert "With no adapter at all copra.enabled=true differs by +5.0 points" in parts.conclusion
    assert "With 2 seeds two standard errors are less than a 95% interval" in parts.conclusion
    same, _ = pruning_panels(analysis({"all": 0.0, "low third": 0.01, "none": 0.0}))
    assert "differs from it in none of the 3 rows" in same.conclusion
