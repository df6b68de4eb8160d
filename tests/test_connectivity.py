"""Connectivity of finished runs: what is scored, what is refused, and what the report says."""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import Experiment
from common.errors import ConfigError, DataError
from common.lowrank import adapted_modules, factor_names
from common.paths import barrier, standard_error
from common.tensors import Tensors
from server import cli
from server.analysis.connectivity import measure_connectivity, plan_connectivity
from server.analysis.stored_run import Scorer, open_run
from server.folders import RECORD, SERVED, UPDATES
from server.record import build_record, write_run
from server.reporting.connectivity_panels import connectivity_panels, summaries, summary_rows
from server.simulation import simulate
from strategies.base import Served

Build = Callable[..., Experiment]
RunOf = Callable[..., Path]


@pytest.fixture(scope="module")
def run_of(digits_experiment: Build, tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """A function of settings: the folder of a finished run, made once."""
    made: dict[str, Path] = {}

    def folder_of(**settings: Any) -> Path:
        key = json.dumps(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            (finished,) = simulate([digits_experiment(**settings)], lambda *_: None)
            strategy = settings.get("strategy__name", "fedavg")
            write_run(made[key], build_record(finished, strategy), finished.outcomes)
        return made[key]

    return folder_of


def found_in(
    run: Path,
    other: Path | None = None,
    *,
    points: int = 5,
    clients: int = 4,
    surface: bool = False,
    served: bool = False,
    examples: int = 60,
) -> dict[str, Any]:
    stored = open_run(run)
    plan = plan_connectivity(
        stored,
        open_run(other) if other else None,
        points=points,
        clients=clients,
        surface=surface,
        served=served,
    )
    scorer = Scorer(stored.experiment, stored.experiment.task.evaluate_on, examples)
    scored: list[str] = []
    found = measure_connectivity(plan, scorer, scored.append)
    # The progress bar ends full.
    assert len(scored) == plan.models
    return found


def copied(run: Path, folder: Path, **changed: Tensors) -> Path:
    """Copy a run, with other tensors in `served` or `updates`."""
    folder.mkdir()
    (folder / RECORD).write_bytes((run / RECORD).read_bytes())
    for name, file in (("served", SERVED), ("updates", UPDATES)):
        save_file(dict(changed.get(name) or load_file(run / file)), folder / file)
    return folder


def recorded(run: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a run, with another record."""
    copied(run, folder)
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
    return folder


# --- what is measured -----------------------------------------------------------------------------


def test_three_clients_give_three_pairs_and_three_paths_from_what_was_sent(run_of: RunOf) -> None:
    found = found_in(run_of())
    assert found["positions"] == [0, 0.25, 0.5, 0.75, 1]
    assert found["split"] == "test"
    joined = [(path["kind"], path["from"], path["to"]) for path in found["paths"]]
    assert joined == [
        ("clients", "client 0", "client 1"),
        ("clients", "client 0", "client 2"),
        ("clients", "client 1", "client 2"),
        ("sent", "sent to client 0", "client 0"),
        ("sent", "sent to client 1", "client 1"),
        ("sent", "sent to client 2", "client 2"),
    ]
    for path in found["paths"]:
        for way in ("factors", "deltas"):
            assert path[way]["rows"] == found["examples"] == 60
            assert len(path[way]["loss"]) == 5
    assert len(found_in(run_of(), clients=2)["paths"]) == 3


def test_every_number_is_that_of_models_mixed_by_hand(run_of: RunOf) -> None:
    """The factor path is easily made by hand; and its barrier, its middle and its errors."""
    run = open_run(run_of())
    scorer = Scorer(run.experiment, "test", 60)
    ends = [run.updates[k].tensors for k in (0, 2)]
    shares = [0, 0.25, 0.5, 0.75, 1]
    scored = [
        scorer(Served({n: (1 - t) * ends[0][n] + t * ends[1][n] for n in ends[0]}, 4))
        for t in shares
    ]
    path = found_in(run_of())["paths"][1]["factors"]
    assert path["loss"] == pytest.approx([point.loss for point in scored], abs=1e-6)
    assert path["accuracy"] == pytest.approx([point.accuracy for point in scored])
    assert path["loss_error"][3] == pytest.approx(standard_error(scored[3].losses), rel=1e-4)
    losses = torch.stack([point.losses for point in scored])
    hits = torch.stack([point.hits for point in scored]).double()
    bump = barrier(shares, losses)
    assert path["barrier"]["height"] == pytest.approx(bump.height, abs=1e-6)
    gap = hits[2] - (hits[0] + hits[4]) / 2
    assert path["middle"]["accuracy_gap"] == pytest.approx(float(gap.mean()))
    assert path["middle"]["accuracy_gap_error"] == pytest.approx(
        float(gap.std()) / math.sqrt(60), abs=1e-9
    )
    assert path["least_loss_at"] == shares[int(losses.mean(dim=1).argmin())]


def test_the_delta_path_is_that_of_dense_deltas(run_of: RunOf) -> None:
    """A model whose deltas are dense residuals, mixed by hand, gives the same losses."""
    run = open_run(run_of())
    scorer = Scorer(run.experiment, "test", 60)
    ends = [run.updates[k].tensors for k in (0, 1)]
    mixed = {n: 0.75 * ends[0][n] + 0.25 * ends[1][n] for n in ends[0]}
    for module in adapted_modules(ends[0]):
        name_B, name_A = factor_names(module)
        dense = [1.5 * end[name_B].double() @ end[name_A].double() for end in ends]
        mixed[f"{module}.residual.weight"] = (0.75 * dense[0] + 0.25 * dense[1]).float()
        mixed[name_B] = torch.zeros_like(mixed[name_B])
    expected = scorer(Served(mixed, 4)).loss
    path = found_in(run_of())["paths"][0]
    assert path["deltas"]["loss"][1] == pytest.approx(expected, abs=1e-5)
    difference = path["factors"]["loss"][2] - path["deltas"]["loss"][2]
    assert path["factors_less_deltas"]["loss"] == pytest.approx(difference, abs=1e-6)


def test_lines_lead_from_the_merged_model_to_every_client_when_asked_for(run_of: RunOf) -> None:
    """Specification 7.3b; the factor path is made by hand, the delta path ends where it does."""
    run = open_run(run_of())
    scorer = Scorer(run.experiment, "test", 60)
    found = found_in(run_of(), clients=2, points=3, served=True)
    assert [path["kind"] for path in found["paths"][:3]] == ["clients", "sent", "sent"]
    paths = found["paths"][3:]
    assert [(p["kind"], p["from"], p["to"]) for p in paths] == [
        ("served", "served model", f"client {k}") for k in range(2)
    ]
    merged, shares = run.one_model().tensors, [0, 0.5, 1]
    for path, update in zip(paths, run.updates[:2], strict=True):
        scored = [
            scorer(Served({n: (1 - t) * merged[n] + t * update.tensors[n] for n in merged}, 4))
            for t in shares
        ]
        assert path["factors"]["loss"] == pytest.approx([p.loss for p in scored], abs=1e-6)
        bump = barrier(shares, torch.stack([point.losses for point in scored]))
        assert path["factors"]["barrier"]["height"] == pytest.approx(bump.height, abs=1e-6)
        ends = [path["deltas"]["loss"][end] for end in (0, -1)]
        assert ends == [path["factors"]["loss"][end] for end in (0, -1)]
    panel = connectivity_panels(found)[2]
    assert "from the merged model to each client" in panel.heading
    rows = [row[0] for row in panel.numbers]
    assert rows == [f"client {k}, {way}" for k in range(2) for way in ("deltas", "factors")]


def test_the_merged_model_may_have_a_rank_of_its_own(run_of: RunOf) -> None:
    wide = {"strategy__name": "copra-merge", "strategy__copra-merge__server_rank": 6}
    for path in found_in(run_of(**wide), clients=2, points=3, served=True)["paths"][-2:]:
        assert path["kind"] == "served"
        assert "rank 4 at scale 1.5 and of rank 6 at scale 1" in path["factors"]["left_out"]
        assert len(path["deltas"]["loss"]) == 3


def test_both_ways_share_their_ends_and_all_rows_are_those_of_the_record(run_of: RunOf) -> None:
    run = open_run(run_of())
    found = found_in(run_of(), run_of(federation__seed=1), examples=0)
    joined = found["paths"][0]
    assert joined["kind"] == "runs"
    assert (joined["from"], joined["to"]) == ("fedavg, seed 0", "fedavg, seed 1")
    for path in found["paths"]:
        for end in (0, -1):
            assert path["factors"]["loss"][end] == path["deltas"]["loss"][end]
    final = run.record["final"]
    assert joined["deltas"]["accuracy"][0] == pytest.approx(final["accuracy"], abs=1e-9)
    assert joined["deltas"]["loss"][0] == pytest.approx(final["loss"], abs=1e-6)


def test_equal_runs_give_equal_files(run_of: RunOf) -> None:
    texts = {json.dumps(found_in(run_of(), surface=True)) for _ in range(2)}
    assert len(texts) == 1


def test_unlike_ranks_leave_out_the_factor_path_and_say_why(run_of: RunOf) -> None:
    found = found_in(run_of(adapter__ranks=[2, 4], strategy__name="flexlora"))
    reasons = [path["factors"].get("left_out") for path in found["paths"]]
    # Clients have ranks 2, 4 and 2; a client is sent its own rank.
    assert [bool(reason) for reason in reasons] == [True, False, True, False, False, False]
    assert "rank 2" in reasons[0]
    assert "rank 4" in reasons[0]
    assert found["paths"][0]["factors_less_deltas"] is None
    assert all(len(path["deltas"]["loss"]) == 5 for path in found["paths"])
    factors = summaries(found)[1]
    assert (factors.kind, factors.way, len(factors.paths)) == ("clients", "factors", 1)
    assert "2 of 3" in connectivity_panels(found)[0].shows


def test_another_alpha_is_the_same_line_by_deltas(run_of: RunOf, tmp_path: Path) -> None:
    """A second run at twice the scale with half the B serves the same deltas."""
    run, other = run_of(), run_of(federation__seed=1)
    served = load_file(other / SERVED)
    for name in served:
        if name.endswith(".lora_B.weight"):
            served[name] = served[name] / 2
    halved = copied(other, tmp_path / "halved", served=served)
    doubled = recorded(
        halved, tmp_path / "doubled", lambda r: r["experiment"]["adapter"].update(alpha=12.0)
    )
    plain, rescaled = (found_in(run, folder)["paths"][0] for folder in (other, doubled))
    assert rescaled["deltas"]["loss"] == pytest.approx(plain["deltas"]["loss"], abs=1e-6)
    assert "scale 3" in rescaled["factors"]["left_out"]


def test_residuals_are_a_part_of_what_is_joined(run_of: RunOf) -> None:
    found = found_in(run_of(strategy__name="flora"), run_of(), surface=True)
    joined = found["paths"][0]
    run, other = open_run(run_of(strategy__name="flora")), open_run(run_of())
    scorer = Scorer(run.experiment, "test", 60)
    assert joined["deltas"]["loss"][0] == pytest.approx(scorer(run.one_model()).loss)
    assert joined["deltas"]["loss"][-1] == pytest.approx(scorer(other.one_model()).loss)
    steps = [
        b - a for a, b in zip(joined["deltas"]["loss"], joined["deltas"]["loss"][1:], strict=False)
    ]
    # Without the residual at λ = 1/4 the loss would jump to that of the bare base at once.
    assert max(map(abs, steps)) < 0.6 * sum(map(abs, steps)) + 1e-6
    assert "changes of the base" in found["surface"]["served"]["left_out"]


@pytest.fixture(scope="module")
def several_tasks(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Mapping[str, Any]:
    """Settings of a federation of two tasks with unlike labels, two clients each."""
    place = tmp_path_factory.mktemp("tasks")
    words = ["good film", "bad film", "dull book", "slow book", "very good book", "not bad"]
    for name, labels in (("reviews", 2), ("genres", 3)):
        (place / name).mkdir()
        rows = [
            {"text": f"the {words[k % 6]} {'very ' * (k // 6)}", "label": k % labels}
            for k in range(60)
        ]
        (place / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "task__members": [{"path": str(place / name)} for name in ("reviews", "genres")],
        "task__limit": 0,
        "task__probe_examples": 0,
        "partition__kind": "by-task",
        "partition__clients": 4,
        "backbone__path": str(bert_folder),
    }


def test_clients_of_unlike_tasks_are_scored_on_both(
    run_of: RunOf, several_tasks: Mapping[str, Any]
) -> None:
    found = found_in(run_of(**several_tasks), surface=True, served=True, examples=16)
    rows = {
        (path["from"], path["to"]): (path["tasks"], path["deltas"]["rows"])
        for path in found["paths"]
    }
    tasks = {u.client.client: u.client.task for u in open_run(run_of(**several_tasks)).updates}
    for first in range(4):
        for second in range(first + 1, 4):
            both = sorted({tasks[first], tasks[second]})
            assert rows[f"client {first}", f"client {second}"] == (both, 8 * len(both))
    for start in ("sent to client 0", "served model"):
        assert rows[start, "client 0"] == ([tasks[0]], 8)
    assert found["surface"]["left_out"] == "it needs three kept clients of one task"


def test_what_is_sent_to_all_alike_is_scored_once(run_of: RunOf) -> None:
    stored = open_run(run_of())
    plan = plan_connectivity(stored, None, points=5, clients=3, surface=False)
    # One model sent, three returned; six paths by two ways, three points between the ends.
    assert plan.models == 4 + 6 * 2 * 3
    with_surface = plan_connectivity(stored, None, points=5, clients=3, surface=True)
    assert with_surface.models == plan.models + 25 + 1
    served = plan_connectivity(stored, None, points=5, clients=3, surface=False, served=True)
    assert served.models == plan.models + 1 + 3 * 2 * 3


def test_the_surface_has_the_clients_at_its_marks(run_of: RunOf) -> None:
    run = open_run(run_of())
    found = found_in(run_of(), surface=True)
    surface = found["surface"]
    assert [row["client"] for row in surface["clients"]] == [0, 1, 2]
    to_first, to_second = (path["deltas"]["loss"] for path in found["paths"][:2])
    ends = [to_first[0], to_first[-1], to_second[-1]]
    assert [row["loss"] for row in surface["clients"]] == ends
    # Distances are norms of differences of dense deltas.
    first, second = surface["clients"][:2]
    squares = 0.0
    for module in adapted_modules(run.updates[0].tensors):
        name_B, name_A = factor_names(module)
        dense = [
            1.5 * u.tensors[name_B].double() @ u.tensors[name_A].double() for u in run.updates[:2]
        ]
        squares += float((dense[0] - dense[1]).square().sum())
    assert math.dist((first["x"], first["y"]), (second["x"], second["y"])) == pytest.approx(
        squares**0.5
    )
    assert len(surface["x"]) == len(surface["y"]) == len(surface["loss"]) == 5
    for axis, row in (("x", 0), ("y", 1)):
        places = [(corner["x"], corner["y"])[row] for corner in surface["clients"]]
        assert surface[axis][0] < min(places)
        assert max(places) < surface[axis][-1]
    # FedAvg of three equal shards on factors: near the mean of deltas, and near the plane.
    served, mean = surface["served"], surface["mean"]
    size = math.dist((first["x"], first["y"]), (second["x"], second["y"]))
    assert math.dist((served["x"], served["y"]), (mean["x"], mean["y"])) < 0.3 * size
    assert served["off_plane"] < 0.5 * size


def test_three_clients_on_a_line_have_no_surface(run_of: RunOf, tmp_path: Path) -> None:
    updates = load_file(run_of() / UPDATES)
    same = {name: updates[name.replace("client.1/", "client.0/")] for name in updates}
    folder = copied(run_of(), tmp_path / "same", updates={n: t.clone() for n, t in same.items()})
    found = found_in(folder, surface=True)
    assert "on a line" in found["surface"]["left_out"]
    twins = found["paths"][0]
    # Two equal clients: float32's rounding must not count as a bump.
    assert twins["deltas"]["barrier"]["beyond_noise"] is False
    assert twins["deltas"]["loss"] == pytest.approx([twins["deltas"]["loss"][0]] * 5, abs=1e-5)
    assert "There is no surface" in connectivity_panels(found)[-1].conclusion


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "says"),
    [
        ({}, {"points": 4}, "--points 4: choose an odd number"),
        ({}, {"points": 1}, "--points 1: choose an odd number"),
        ({}, {"clients": 1}, "--clients 1: .* 2 of them or more"),
        (
            {"federation__keep_updates": 0},
            {},
            r"run it again with --set federation\.keep_updates=8",
        ),
        ({"strategy__name": "fedsa-lora"}, {}, "a model of its own"),
        ({"strategy__name": "fedask"}, {"served": True}, "no client let the server see all"),
        ({"strategy__name": "fedask"}, {}, "no client let the server see all .*fedask"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    run_of: RunOf, settings: Mapping[str, Any], arguments: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        found_in(run_of(**settings), **arguments)


def test_an_older_run_without_updates_is_to_be_run_again(run_of: RunOf, tmp_path: Path) -> None:
    folder = recorded(run_of(), tmp_path / "older", lambda record: record.pop("updates"))
    with pytest.raises(ConfigError, match=r"federation\.keep_updates=8"):
        found_in(folder)
    # Its model can still be joined to another's.
    found = found_in(folder, run_of(federation__seed=1), surface=True)
    assert [path["kind"] for path in found["paths"]] == ["runs"]
    assert "three kept clients" in found["surface"]["left_out"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e["backbone"].update(max_length=48), r"backbone\.max_length = 48, and 64 in"),
        (lambda e: e["backbone"].update(path="elsewhere"), r'backbone\.path = "elsewhere", and'),
        (lambda e: e["task"].update(test_fraction=0.3), r"task\.test_fraction = 0\.3, and 0\.2"),
    ],
)
def test_a_second_run_of_another_kind_is_refused(
    run_of: RunOf, tmp_path: Path, change: Callable[[Any], object], says: str
) -> None:
    other = recorded(
        run_of(federation__seed=1), tmp_path / "other", lambda record: change(record["experiment"])
    )
    with pytest.raises(ConfigError, match=says):
        found_in(run_of(), other)


def test_rows_that_do_not_decide_the_test_may_differ(run_of: RunOf, tmp_path: Path) -> None:
    other = recorded(
        run_of(federation__seed=1),
        tmp_path / "other",
        lambda r: r["experiment"]["task"].update(
            limit=0, probe_examples=0, evaluate_on="validation"
        ),
    )
    assert found_in(run_of(), other)["paths"][0]["kind"] == "runs"


def test_other_adapted_modules_a_personal_model_and_the_run_itself_are_refused(
    run_of: RunOf,
) -> None:
    with pytest.raises(ConfigError, match=r"adapt other modules .* only in"):
        found_in(run_of(), run_of(adapter__blocks=2))
    with pytest.raises(ConfigError, match="a model of its own"):
        found_in(run_of(), run_of(strategy__name="fedsa-lora"))
    with pytest.raises(ConfigError, match="is the run itself"):
        found_in(run_of(), run_of())


def test_a_loss_that_is_not_finite_is_told(run_of: RunOf, tmp_path: Path) -> None:
    updates = {n: t.clone() for n, t in load_file(run_of() / UPDATES).items()}
    bias = next(n for n in updates if n.startswith("client.1/returned/head") and "bias" in n)
    updates[bias][0] = 3e38
    updates[bias][1:] = -3e38
    folder = copied(run_of(), tmp_path / "huge", updates=updates)
    with pytest.raises(DataError, match="client 1: the loss of a row is not finite"):
        found_in(folder)


# --- the command and the report -------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedcopra", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_leaves_numbers_and_panels_beside_the_run(
    run_of: RunOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copied(run_of(), tmp_path / "run")
    options = ("--points", "5", "--examples", "60", "--clients", "2")
    assert call(monkeypatch, "connectivity", str(run), *options) == 0
    said = capsys.readouterr().err
    assert "client to client" in said
    assert "report.html" in said
    found = json.loads((run / "connectivity.json").read_text())
    assert len(found["paths"]) == 3
    assert "λ of the highest bump is chosen on the rows" in found["caution"]
    page = (run / "report.html").read_text()
    for heading in (
        "Does a straight line join the clients?",
        "Does a straight line lead from the server&#39;s model to each client&#39;s?",
        "What lies between three clients?",
    ):
        assert heading in page
    assert found["caution"] in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    # Once more, over what is there, without the surface and with the merged model.
    assert call(monkeypatch, "connectivity", str(run), *options, "--no-surface", "--served") == 0
    assert "served to client" in capsys.readouterr().err
    again = json.loads((run / "connectivity.json").read_text())
    assert again["paths"][:3] == found["paths"]
    assert [path["kind"] for path in again["paths"][3:]] == ["served", "served"]
    assert "from the merged model to each client" in (run / "report.html").read_text()
    assert again["surface"] == {"left_out": "it was not asked for"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], ["nowhere", "record.json"]),
        (["RUN", "nowhere"], ["nowhere", "record.json"]),
        (["RUN", "--examples", "-1"], ["--examples -1"]),
        (["RUN", "--points", "10"], ["--points 10", "odd"]),
    ],
)
def test_a_mistake_is_one_line(
    run_of: RunOf,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: list[str],
) -> None:
    given = [str(run_of()) if argument == "RUN" else argument for argument in arguments]
    assert call(monkeypatch, "connectivity", *given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in says)
    assert not (run_of() / "connectivity.json").exists()


def made_up(heights: list[float], error: float = 0.01) -> dict[str, Any]:
    """An analysis of client pairs with these barriers by deltas, and none by factors."""

    def way(height: float) -> dict[str, Any]:
        return {
            "rows": 100,
            "loss": [1.0, 1.0 + height, 1.0],
            "loss_error": [0.1] * 3,
            "accuracy": [0.8, 0.75, 0.8],
            "accuracy_error": [0.02] * 3,
            "barrier": {
                "height": height,
                "error": error,
                "at": 0.5,
                "beyond_noise": height > 2 * error,
            },
            "middle": {
                "accuracy": 0.75,
                "accuracy_gap": -0.05,
                "accuracy_gap_error": 0.01,
                "loss_gap": height,
                "loss_gap_error": error,
            },
            "least_loss_at": 0,
        }

    return {
        "run": "fedavg, seed 0",
        "digest": "0123456789abcdef",
        "split": "test",
        "examples": 100,
        "caution": "With care.",
        "positions": [0, 0.5, 1],
        "paths": [
            {
                "kind": "clients",
                "from": "client 0",
                "to": f"client {number}",
                "tasks": ["digits"],
                "deltas": way(height),
                "factors": {"left_out": "unlike ranks"},
                "factors_less_deltas": None,
            }
            for number, height in enumerate(heights, start=1)
        ],
        "surface": {"left_out": "it was not asked for"},
    }


@pytest.mark.parametrize(
    ("heights", "says"),
    [
        ([0.0, 0.0], "no bump at all on 2 lines"),
        (
            [0.019, 0.01],
            "no bump beyond noise (two standard errors) on 2 lines; the highest is 0.0190",
        ),
        ([0.01, 0.3], "1 of 2 lines meet a bump beyond noise; the highest is 0.3000 ± 0.0100 nats"),
    ],
)
def test_the_conclusion_follows_from_the_numbers(heights: list[float], says: str) -> None:
    panel = connectivity_panels(made_up(heights))[0]
    assert says in panel.conclusion
    assert "−5.0 points" in panel.conclusion
    assert "No path by factors for 2 of 2: unlike ranks" in panel.shows
    assert [key.label for key in panel.legend] == [
        "by deltas",
        "straight line between the losses of the ends",
    ]
    rows = dict(zip([row[0] for row in panel.numbers], panel.numbers, strict=True))
    assert rows["client 0 and 1, factors"][1] == "left out"
    assert summary_rows(made_up(heights))[1][2:4] == ("left out", "2 of 2: unlike ranks")


def test_a_single_line_is_spoken_of_as_one() -> None:
    bumpy, level = (connectivity_panels(made_up([height]))[0].conclusion for height in (0.3, 0.0))
    assert "the line meets a bump beyond noise: 0.3000 ± 0.0100 nats, at λ = 0.5." in bumpy
    assert "−5.0 ± 1.0 points" in bumpy
    assert level.startswith("By deltas: no bump at all. ")


def test_the_highest_barrier_is_named_with_its_pair() -> None:
    said = connectivity_panels(made_up([0.01, 0.3]))[0].conclusion
    assert "at λ = 0.5 of client 0 and 2" in said
