"""The Low-Norm Effect of finished runs, as a command, and the norms of prompts in the report."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_records import prompt_record, synthetic_record
from torch import Tensor
from torch.nn import functional

from common.config import Experiment, build_experiment
from common.errors import ConfigError
from common.low_norm import Corruption, corrupt
from common.seeds import torch_generator
from server import cli
from server.analysis.low_norm import (
    Amounts,
    contexts_of,
    corrupted_model,
    measure_low_norm,
    plan_low_norm,
)
from server.analysis.stored_run import Scorer, StoredRun, open_run
from server.record import build_record, write_run
from server.reporting.comparison import by_label, compare
from server.reporting.figures import Panel, panels
from server.reporting.prompt_panels import low_norm_panels, prompt_panels
from server.reporting.report import render
from server.simulation import simulate

Runs = Callable[..., Path]

AMOUNTS = Amounts((0.0, 0.1), (0.1, 0.5), (2.0,), (90.0,), (0.1, 0.5, 2.0))
ROWS = 60


def experiment_of(clip_folder: Path, values: Mapping[str, Any]) -> Experiment:
    tables = {
        "task": {"name": "digits", "limit": 240, "probe_examples": 0},
        "partition": {"kind": "iid", "clients": 3},
        "backbone": {"path": str(clip_folder)},
        "adapter": {"kind": "prompt", "prompt": {"length": 4, "spread": 0.5}},
        "train": {"local_steps": 2, "batch_size": 16, "learning_rate": 0.05, "optimiser": "sgd"},
        "federation": {"rounds": 2, "workers": 0},
        "strategy": {"name": "promptfl"},
    }
    return build_experiment(tables, {k.replace("__", "."): v for k, v in values.items()})


@pytest.fixture(scope="module")
def finished(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function of label and settings: a new folder of a run of prompts on the tiny CLIP."""
    made: dict[str, Any] = {}

    def folder_of(label: str = "promptfl", **values: Any) -> Path:
        key = json.dumps(values)
        if key not in made:
            (made[key],) = simulate([experiment_of(clip_folder, values)], lambda *_: None)
        folder = tmp_path_factory.mktemp("run")
        write_run(folder, build_record(made[key], label), made[key].outcomes)
        return folder

    return folder_of


@pytest.fixture(scope="module")
def two_seeds(finished: Runs) -> list[StoredRun]:
    return [open_run(finished(federation__seed=seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def analysis(two_seeds: list[StoredRun]) -> dict[str, Any]:
    return measure_low_norm(plan_low_norm(two_seeds, AMOUNTS, [(0,), (2,), (3, 1)]), ROWS)


def cell_of(found: Mapping[str, Any], operation: str, *positions: int) -> Mapping[str, Any]:
    (cell,) = (
        cell
        for cell in found["cells"]
        if (cell["operation"], cell["positions"]) == (operation, list(positions))
    )
    return cell


# What is scored.


def test_models_are_corrupted_where_they_should_be_and_nowhere_else(
    two_seeds: list[StoredRun],
) -> None:
    run = two_seeds[0]
    (before,) = run.one_model().tensors.values()
    zeroed, effect = corrupted_model(run, Corruption("replace", 0.0, (2,)))
    assert effect == "lowers"
    assert torch.equal(zeroed.tensors["prompt.text"][2], torch.zeros(12))
    kept = [0, 1, 3]
    assert torch.equal(zeroed.tensors["prompt.text"][kept], before[kept])
    same, effect = corrupted_model(run, Corruption("rescale", 1.0, (0, 1, 2, 3)))
    assert torch.equal(same.tensors["prompt.text"], before)
    assert effect == "keeps"
    turned, effect = corrupted_model(run, Corruption("rotate", 90.0, (1,)))
    cosine = functional.cosine_similarity(turned.tensors["prompt.text"][1], before[1], dim=0)
    assert abs(cosine) < 1e-6
    assert effect == "keeps"
    assert torch.equal(run.one_model().tensors["prompt.text"], before)


def test_draws_are_those_of_the_seed_and_the_corruption(two_seeds: list[StoredRun]) -> None:
    def drawn(run: StoredRun, corruption: Corruption) -> Tensor:
        return corrupted_model(run, corruption)[0].tensors["prompt.text"][corruption.positions[0]]

    first, other = two_seeds
    noise = Corruption("replace", 1.0, (0,))
    assert torch.equal(drawn(first, noise), drawn(first, noise))
    unlike = [
        drawn(other, noise),
        drawn(first, Corruption("replace", 1.0, (1,))),
        drawn(first, Corruption("replace", 2.0, (0,))) / 2,
    ]
    assert not any(torch.allclose(found, drawn(first, noise), atol=1e-3) for found in unlike)


def test_hits_are_those_of_models_corrupted_by_hand(
    two_seeds: list[StoredRun], analysis: Mapping[str, Any]
) -> None:
    experiment = two_seeds[0].experiment
    scorer = Scorer(experiment, "test", ROWS)
    assert (analysis["split"], analysis["examples"], analysis["seeds"]) == ("test", ROWS, [0, 1])
    operations = [
        ("replace 0", ("replace", 0.0)),
        ("rescale 0.1", ("rescale", 0.1)),
        ("rotate 90", ("rotate", 90.0)),
    ]
    for operation, (kind, amount) in operations:
        for positions in ((0,), (2,), (1, 3)):
            cell = cell_of(analysis, operation, *positions)
            hits = []
            for run in two_seeds:
                served = run.one_model()
                stream = torch_generator(
                    run.record["seed"], "low-norm", "prompt.text", kind, repr(amount), *positions
                )
                prompt = served.tensors["prompt.text"]
                changed = corrupt(prompt, Corruption(kind, amount, positions), stream)
                model = type(served)({"prompt.text": changed}, served.rank)
                hits.append(int(scorer(model).hits.sum()))
            assert cell["hits"] == hits
            assert cell["rows"] == [ROWS, ROWS]
    originals = [scorer(run.one_model()) for run in two_seeds]
    assert all(
        cell["original_hits"] == [int(rows.hits.sum()) for rows in originals]
        for cell in analysis["cells"]
    )
    # On all rows that is what the run itself ended with.
    whole = Scorer(experiment, "test")(two_seeds[0].one_model())
    assert whole.accuracy == pytest.approx(two_seeds[0].record["final"]["accuracy"])


def test_counts_are_those_of_the_cells(analysis: Mapping[str, Any]) -> None:
    cells = analysis["cells"]
    assert len(cells) == 6 * 3
    for effect, found in analysis["counts"].items():
        matching = [cell for cell in cells if set(cell["effects"]) == {effect}]
        if effect == "mixed":
            matching = [cell for cell in cells if len(set(cell["effects"])) > 1]
            matching += [cell for cell in cells if set(cell["effects"]) == {"mixed"}]
        rising = [cell for cell in matching if sum(cell["hits"]) > sum(cell["original_hits"])]
        assert found["operations"]["all"] == {"rises": len(rising), "of": len(matching)}
        for operation in {cell["operation"] for cell in matching}:
            assert found["operations"][operation] == {
                "rises": sum(cell["operation"] == operation for cell in rising),
                "of": sum(cell["operation"] == operation for cell in matching),
            }
        if matching:
            mean = sum(cell["change"]["mean"] for cell in matching) / len(matching)
            assert found["change"]["mean"] == pytest.approx(mean, abs=1e-12)
    # The test would say nothing if everything rose, or nothing did.
    rises = [cell["rises"] for cell in cells]
    assert any(rises)
    assert not all(rises)
    assert {cell["effect"] for cell in cells} >= {"lowers", "raises", "keeps"}


def test_a_change_is_paired_and_tested(
    two_seeds: list[StoredRun], analysis: Mapping[str, Any]
) -> None:
    cell = cell_of(analysis, "rescale 2", 0)
    changes = [a - b for a, b in zip(cell["hits"], cell["original_hits"], strict=True)]
    assert cell["change"]["seeds"] == pytest.approx([change / ROWS for change in changes])
    assert cell["change"]["mean"] == pytest.approx(sum(changes) / ROWS / 2)
    for test, change in zip(cell["mcnemar"], changes, strict=True):
        assert test["rises"] - test["falls"] == change
    signs = [sum(c > 0 for c in changes), sum(c < 0 for c in changes)]
    assert [cell["sign_test"]["rises"], cell["sign_test"]["falls"]] == signs
    scorer = Scorer(two_seeds[0].experiment, "test", ROWS)
    apart = []
    for run in two_seeds:
        after, _ = corrupted_model(run, Corruption("rescale", 2.0, (0,)))
        apart.append(scorer(after).hits.double() - scorer(run.one_model()).hits.double())
    error = float(torch.stack(apart).mean(dim=0).std()) / ROWS**0.5
    assert cell["change"]["row_error"] == pytest.approx(error)


def test_response_to_the_scale_of_the_whole_prompt(
    two_seeds: list[StoredRun], analysis: Mapping[str, Any]
) -> None:
    rows = {row["factor"]: row for row in analysis["response"]}
    assert tuple(rows) == (0.1, 0.5, 1.0, 2.0)
    assert rows[1.0]["change"]["mean"] == rows[1.0]["change"]["error"] == 0
    assert rows[1.0]["accuracy"] == analysis["untouched"]
    scorer = Scorer(two_seeds[0].experiment, "test", ROWS)
    for factor in (0.1, 2.0):
        scored = []
        for run in two_seeds:
            served = run.one_model()
            scaled = {"prompt.text": factor * served.tensors["prompt.text"]}
            scored.append(scorer(type(served)(scaled, served.rank)).accuracy)
        assert rows[factor]["accuracy"]["seeds"] == pytest.approx(scored)
        own = analysis["untouched"]["seeds"]
        assert rows[factor]["change"]["mean"] == pytest.approx((sum(scored) - sum(own)) / 2)
    assert len({row["accuracy"]["mean"] for row in rows.values()}) > 1


def test_numbers_are_json_and_say_what_they_are(analysis: Mapping[str, Any]) -> None:
    assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis
    assert "A count alone is no evidence" in analysis["method"]
    assert [len(norms) for norms in analysis["norms"]] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"adapter__prompt__prompts": 2}, (2, 4, 12)),
        ({"adapter__prompt__class_specific": True}, (10, 4, 12)),
        ({"adapter__prompt__visual": 3}, (4, 12)),
        ({"adapter__prompt__prefix": 3}, (4, 12)),
    ],
)
def test_all_contexts_change_together_at_a_position(
    finished: Runs, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    run = open_run(finished(federation__rounds=1, **settings))
    before = run.one_model().tensors
    ((name, context),) = contexts_of(before).items()
    assert context.shape == shape
    model, effect = corrupted_model(run, Corruption("replace", 0.0, (1,)))
    assert effect == "lowers"
    changed = (model.tensors[name] != context).any(-1)
    assert changed[..., 1].all()
    assert not changed[..., [0, 2, 3]].any()
    assert all(torch.equal(model.tensors[n], before[n]) for n in before.keys() - {name})
    found = measure_low_norm(plan_low_norm([run], Amounts((), (0.5,), (), ())), 20)
    assert len(found["norms"][0]) == len(found["cells"]) == 4
    assert found["norms"][0] == pytest.approx(
        context.norm(dim=-1).reshape(-1, 4).mean(dim=0).tolist()
    )


# What is refused.


def test_without_a_context_there_is_nothing_to_corrupt(
    finished: Runs,
    digits_experiment: Callable[..., Experiment],
    tmp_path: Path,
) -> None:
    (lora,) = simulate([digits_experiment()], lambda *_: None)
    write_run(tmp_path, build_record(lora, "fedavg"), lora.outcomes)
    with pytest.raises(ConfigError, match=r"adapter\.kind = 'lora', .* 'prompt'"):
        plan_low_norm([open_run(tmp_path)], AMOUNTS)
    pictures = finished(federation__rounds=1, adapter__prompt__length=0, adapter__prompt__visual=2)
    with pytest.raises(ConfigError, match=r"adapter\.prompt\.length = 0"):
        plan_low_norm([open_run(pictures)], AMOUNTS)


def test_only_seeds_of_one_experiment_are_put_together(finished: Runs) -> None:
    one = finished()
    with pytest.raises(ConfigError, match="both promptfl, seed 0"):
        plan_low_norm([open_run(one), open_run(one)], AMOUNTS)
    faster = finished(federation__seed=1, train__learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"learning_rate=0\.1 are not seeds of one experiment"):
        plan_low_norm([open_run(one), open_run(faster)], AMOUNTS)
    with pytest.raises(ConfigError, match="a model of its own"):
        plan_low_norm([open_run(finished(strategy__name="local-only"))], AMOUNTS)


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        (((-0.1,), (), (), ()), r"--replace -0\.1: choose standard deviations >= 0"),
        (((), (1.0,), (), ()), "--rescale 1: choose factors from 0 to below 1"),
        (((), (math.nan,), (), ()), "--rescale nan"),
        (((), (), (0.9,), ()), r"--raise 0\.9: choose factors above 1"),
        (((), (), (math.inf,), ()), "--raise inf"),
        (((), (), (), (0.0,)), "--rotate 0: choose degrees above 0, up to 180"),
        (((), (), (), (90.0,), (0.0,)), "--whole 0: choose factors above 0"),
        (((), (), (), ()), "no amount is given: name one with --replace, --rescale"),
    ],
)
def test_amounts_that_are_not_what_they_are_called_are_refused(
    amounts: tuple[tuple[float, ...], ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Amounts(*amounts)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(0, 4)], r"--positions 0\+4: 4 is not among the prompt's 0\.\.3"),
        ([(-1,)], "--positions -1"),
        ([(3, 3)], r"--positions 3\+3: name each position once"),
    ],
)
def test_positions_that_there_are_not_are_refused(
    two_seeds: list[StoredRun], groups: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_low_norm(two_seeds, AMOUNTS, groups)


def test_positions_are_each_alone_unless_they_are_named(two_seeds: list[StoredRun]) -> None:
    plan = plan_low_norm(two_seeds, AMOUNTS)
    assert [c.positions for c in plan.corruptions[::6]] == [(0,), (1,), (2,), (3,)]
    assert plan.models == 2 * (1 + 6 * 4 + 4)
    scaled = plan_low_norm(two_seeds, Amounts((), (), (), (90.0,), (1.5, 0.7)))
    assert [by.amount for by in scaled.response] == [0.7, 1.0, 1.5]
    named = plan_low_norm(two_seeds, AMOUNTS, [(3,), (2, 0), (0, 2)])
    assert list(dict.fromkeys(c.positions for c in named.corruptions)) == [(3,), (0, 2)]


# The command.


def test_the_command_writes_numbers_and_report_into_the_first_folder(
    finished: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = finished(), finished(federation__seed=1)
    options = ["--examples", "30", "--positions", "0,1+3", "--rescale", "0.5", "--replace", "0"]
    cli.app(
        ["low-norm", str(one), str(other), *options, "--rotate", "90", "--raise", ""],
        standalone_mode=False,
    )
    said = capsys.readouterr().err
    assert "promptfl, seeds [0, 1]" in said
    assert "a count alone is no evidence" in said.replace("\n", " ")
    found = json.loads((one / "low_norm.json").read_text())
    counts = found["counts"]["lowers"]["operations"]
    assert counts["all"]["of"] == 4
    row = re.search(r"^ *all operations +(\d of 4)", said, flags=re.MULTILINE)
    assert row
    assert row[1] == f"{counts['all']['rises']} of 4"
    assert re.search(r"^ *1\.25 ", said, flags=re.MULTILINE)
    assert not (other / "low_norm.json").exists()
    page = (one / "report.html").read_text()
    assert "Does accuracy rise when a vector is made shorter?" in page
    assert "Does the scale of the whole prompt matter?" in page


@pytest.mark.parametrize("text", ["a", "0,", "1+", "0.5"])
def test_positions_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--positions .* is no position, nor several like 0\+3"):
        cli.app(["low-norm", "nowhere", "--positions", text], standalone_mode=False)


# What the panels say.


def change(mean: float, error: float = 0.01) -> dict[str, Any]:
    beyond = abs(mean) > 2 * error
    return {"mean": mean, "error": error, "seeds": [mean], "beyond": beyond}


def effects_of(
    means: Mapping[str, float], cells: Mapping[str, tuple[str, Sequence[float]]]
) -> dict[str, Any]:
    """An analysis whose cells change accuracy so much; their means, by effect, are as given."""

    def count(effect: str, operation: str | None = None) -> dict[str, int]:
        values = [
            value
            for name, (of, changes) in cells.items()
            if of == effect and operation in (None, name)
            for value in changes
        ]
        return {"rises": sum(value > 0 for value in values), "of": len(values)}

    return {
        "label": "promptfl",
        "seeds": [0],
        "digest": "0123456789abcdef",
        "control": False,
        "split": "test",
        "examples": 100,
        "cells": [
            {"operation": name, "positions": [at], "effect": effect, "change": change(value)}
            for name, (effect, changes) in cells.items()
            for at, value in enumerate(changes)
        ],
        "counts": {
            effect: {
                "operations": {"all": count(effect)}
                | {name: count(effect, name) for name, (of, _) in cells.items() if of == effect},
                "change": change(means[effect]) if effect in means else None,
            }
            for effect in ("lowers", "keeps", "raises", "mixed")
        },
        "response": [
            {"factor": s, "accuracy": change(0.5), "change": change(value, 0.01 * (s != 1))}
            for s, value in ((0.5, -0.1), (0.9, 0.03), (1.0, 0.0), (2.0, 0.01))
        ],
    }


def test_an_effect_is_only_called_one_beyond_errors_and_controls() -> None:
    cells = {
        "rescale 0.5": ("lowers", (0.05, -0.01)),
        "rescale 2": ("raises", (-0.02, -0.02)),
        "rotate 90": ("keeps", (0.01, 0.0)),
    }
    shown = effects_of({"lowers": 0.03, "raises": -0.02, "keeps": 0.005}, cells)
    panel, response = low_norm_panels(shown)
    assert "lowered 1 of 2; raised 0 of 2; kept 1 of 2" in panel.shows
    assert "larger than in any control" in panel.conclusion
    assert "1 of the 2 lowered cells gain beyond two errors" in panel.conclusion
    assert "One seed is one seed" in panel.conclusion
    assert panel.columns[:4] == (
        "Operation", "rises, norm lowered", "rises, norm raised", "rises, norm kept",
    )  # fmt: skip
    assert panel.columns[4:] == ("at 0, points", "at 1, points")
    assert panel.numbers[0] == ["rescale 0.5", "1 of 2", "–", "–", "+5.0", "−1.0"]
    assert panel.numbers[-1][:2] == ["mean change, points", "+3.0 ± 1.0"]
    assert "accuracy is higher at 0.9 and lower at 0.5" in response.conclusion
    assert "highest at 0.9, by +3.0 points" in response.conclusion
    within = low_norm_panels(effects_of({"lowers": 0.019, "raises": 0.0}, cells))[0]
    assert "On average no effect is shown." in within.conclusion
    hurts = low_norm_panels(effects_of({"lowers": -0.03, "raises": 0.0}, cells))[0]
    assert "lowering norms hurts" in hurts.conclusion
    control = low_norm_panels(effects_of({"lowers": 0.03, "raises": 0.04}, cells))[0]
    assert "as large with norms raised: that is no effect" in control.conclusion
    none = low_norm_panels(effects_of({"keeps": 0.0}, {"rotate 90": ("keeps", (0.0, 0.0))}))[0]
    assert "No operation lowered a norm" in none.conclusion
    assert none.drawing


# Norms in the report.


def named(found: Sequence[Panel]) -> dict[str, Panel]:
    return {panel.name: panel for panel in found}


def test_runs_of_prompts_have_their_panels_and_those_of_lora_theirs() -> None:
    prompts = by_label([prompt_record("promptfl", seed) for seed in (0, 1)])
    lora = by_label([synthetic_record("fedavg")])
    assert not prompt_panels(lora)
    assert [panel.name for panel in prompt_panels(prompts)] == [
        "prompt-norms",
        "prompt-norms-by-position-0",
        "prompt-drift",
    ]
    assert not [name for name in named(panels(prompts)) if "aggregation" in name]
    both = {**lora, **prompts}
    assert "promptfl" not in named(panels(both))["aggregation-error"].conclusion
    assert [key.label for key in named(prompt_panels(both))["prompt-norms"].legend] == ["promptfl"]


def test_a_page_of_prompts_speaks_of_prompts() -> None:
    records = [
        prompt_record(name, seed, label=label, norm=norm)
        for seed in (0, 1)
        for name, label, norm in (
            ("promptfl", "promptfl", 0.5),
            ("promptfl", "promptfl · nemesis.kind=pun", 0.4),
        )
    ]
    page = render(records, compare(records), "Prompts")
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    text = text[: text.index("[task]")]  # what follows are settings as they were given
    assert not re.search(r"\bLoRA\b|low-rank|\brank\b|sBA|CopRA|factors|aggregation error", text)
    assert not re.search(r"\bnan\b|\bNone\b", text)
    assert "4 vectors a caption" in text
    assert "Nemesis" in text
    lora = [synthetic_record("fedavg")]
    other = render(lora, compare(lora), "LoRA")
    assert not re.search(r"[Ss]oft prompt|Nemesis|\bprompt\b", other)


def test_norms_are_those_of_the_record() -> None:
    records = [prompt_record("promptfl", seed, norm=0.5 + seed) for seed in (0, 1)]
    panel = named(prompt_panels(by_label(records)))["prompt-norms"]
    last = [record["rounds"][-1]["prompts"]["prompt.text"]["norm"] for record in records]
    every = [norm for of_seed in last for norm in of_seed]
    (row,) = panel.numbers
    assert row[2:5] == [f"{sum(every) / 8:.4g}", f"{min(every):.4g}", f"{max(every):.4g}"]
    assert row[0] == "promptfl"
    first = [record["rounds"][0]["prompts"]["prompt.text"]["norm"] for record in records]
    growth = sum(every) / sum(map(sum, first)) - 1
    assert f"after the last, +{100 * growth:.1f}%" in panel.conclusion
    # By position it is the first run alone.
    at = named(prompt_panels(by_label(records)))["prompt-norms-by-position-0"]
    assert [line[-1] for line in at.numbers] == [f"{norm:.4g}" for norm in last[0]]
    longest = max(range(4), key=lambda position: last[0][position])
    assert f"position {longest} ends with the longest vector" in at.conclusion


def test_what_averaging_takes_off_is_said() -> None:
    records = [
        prompt_record("promptfl", shrink=0.999),
        prompt_record("promptfl", label="far apart", shrink=0.8),
        prompt_record("promptfl", label="alone", clients=1),
    ]
    panel = named(prompt_panels(by_label(records)))["prompt-drift"]
    assert "20.00% with far apart and 0.10% with promptfl." in panel.conclusion
    assert "alone" not in [key.label for key in panel.legend]
    close = named(prompt_panels(by_label(records[:1])))["prompt-drift"]
    assert "next to nothing for a server's rule to give back" in close.conclusion
    assert "prompt-drift" not in named(prompt_panels(by_label(records[2:])))


def test_classes_and_pictures_have_norms_too() -> None:
    record = prompt_record("promptfl")
    for entry in record["rounds"]:
        (drift,) = entry["prompts"].values()
        classes = {
            name: values * 2 if isinstance(values, list) else values
            for name, values in drift.items()
        } | {"positions": [2, 4]}
        classes["norm"] = [*drift["norm"], *(3 * norm for norm in drift["norm"])]
        entry["prompts"] = {"head.digits.context": classes, "prompt.image": drift}
    found = named(prompt_panels(by_label([record])))
    assert set(found) == {
        f"{name}{pictures}{number}"
        for name, number in (
            ("prompt-norms", ""), ("prompt-norms-by-position", "-0"), ("prompt-drift", ""),
        )
        for pictures in ("", "-pictures")
    }  # fmt: skip
    last = drift["norm"]
    at = found["prompt-norms-by-position-0"]
    assert [line[-1] for line in at.numbers] == [f"{2 * norm:.4g}" for norm in last]
    assert found["prompt-norms"].numbers[0][4] == f"{3 * max(last):.4g}"
    assert found["prompt-norms-pictures"].numbers[0][4] == f"{max(last):.4g}"


def test_rounds_without_a_merge_and_prompts_of_clients_own_are_said() -> None:
    gap = prompt_record("promptfl")
    gap["rounds"][-1]["prompts"] = None
    assert len(named(prompt_panels(by_label([gap])))["prompt-norms"].numbers) == 1
    at = named(prompt_panels(by_label([gap])))["prompt-norms-by-position-0"]
    assert [line[-1] for line in at.numbers] == ["–"] * 4
    own = prompt_record("promptfl", label="own")
    for entry in own["rounds"]:
        entry["prompts"]["prompt.text"]["norm"] = None
    found = named(prompt_panels(by_label([gap, own])))
    assert "No single prompt is served by own." in found["prompt-norms"].shows
    assert "own" in [key.label for key in found["prompt-drift"].legend]
    alone = named(prompt_panels(by_label([own])))
    assert not alone["prompt-norms"].drawing
    assert "Every client has a prompt of its own" in alone["prompt-norms"].conclusion
    never = prompt_record("promptfl")
    for entry in never["rounds"]:
        entry["prompts"] = None
    assert not prompt_panels(by_label([never]))
