"""Whole runs with soft prompts on a tiny CLIP."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from clients.prompt_norms import norm_penalty
from clients.training import LocalRun, train_locally
from common.config import (
    Adapter,
    Backbone,
    Copra,
    Experiment,
    Nemesis,
    Prompt,
    Train,
    build_experiment,
)
from common.errors import ConfigError
from common.features import Features
from common.models import load_model
from common.nemesis import vector_norms
from common.prompted_clip import PromptedClip
from common.shards import Shard, deal_shards
from common.tasks import LabelledTask
from server.cli import app
from server.folders import appearing_whole
from server.record import build_record, write_run
from server.simulation import Finished, simulate

Build = Callable[..., Experiment]


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def prompt_experiment(clip_folder: Path) -> Build:
    """A function of dotted keys: prompts on the tiny CLIP, digits, 3 clients, 2 rounds of 2."""

    def build(**values: Any) -> Experiment:
        tables = {
            "task": {"name": "digits", "limit": 240, "probe_examples": 0},
            "partition": {"kind": "iid", "clients": 3},
            "backbone": {"path": str(clip_folder)},
            "adapter": {"kind": "prompt", "prompt": {"length": 4}},
            "train": {
                "local_steps": 2,
                "batch_size": 16,
                "learning_rate": 0.05,
                "optimiser": "sgd",
            },
            "federation": {"rounds": 2, "workers": 0},
            "strategy": {"name": "promptfl"},
        }
        return build_experiment(tables, {k.replace("__", "."): v for k, v in values.items()})

    return build


def run(experiment: Experiment) -> Finished:
    [finished] = simulate([experiment], lambda *_: None)
    return finished


METHODS = ("promptfl", "mean-dir", "dir-mag", "shrink", "update-norm", "norm-prox", "fedavg",
           "fedprox", "fedavgm", "fedadam", "scaffold", "local-only", "centralised")  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_rule_runs(prompt_experiment: Build, name: str) -> None:
    finished = run(prompt_experiment(strategy__name=name))
    last = finished.outcomes.rounds[-1]
    assert all(client["status"] == "ok" for client in last["clients"])
    assert last["accuracy"] is not None or name == "local-only"
    assert {n for model in finished.outcomes.served for n in model.tensors} == {"prompt.text"}


def test_only_the_prompt_travels(prompt_experiment: Build) -> None:
    [_, second] = run(prompt_experiment()).outcomes.rounds
    for client in second["clients"]:
        for direction in ("up", "down"):
            counted = dict(client["bytes"][direction])
            del counted["protocol"], counted["total"]
            assert counted == {"prompt": 4 * 12 * 4}


def test_norms_are_in_the_record(prompt_experiment: Build) -> None:
    finished = run(prompt_experiment(nemesis__kind="pun"))
    record = build_record(finished, "promptfl")
    for row in record["rounds"]:
        found = row["prompts"]["prompt.text"]
        assert found["positions"] == [4]
        assert all(0 < ratio <= 1 + 1e-6 for ratio in found["shrink"])
    [model] = finished.outcomes.served
    norms = vector_norms(model.tensors["prompt.text"])
    assert record["rounds"][-1]["prompts"]["prompt.text"]["norm"] == pytest.approx(norms.tolist())


def test_a_prefix_is_trained_pulled_and_averaged_like_a_context(prompt_experiment: Build) -> None:
    prefix = {"adapter__prompt__prefix": 3, "adapter__prompt__length": 0}
    found = {}
    for kind in ("none", "pun", "pan"):
        finished = run(prompt_experiment(**prefix, nemesis__kind=kind))
        [model] = finished.outcomes.served
        [(name, tensor)] = model.tensors.items()
        assert name == "prompt.prefix"
        found[kind] = float(vector_norms(tensor).sum())
        last = finished.outcomes.rounds[-1]
        assert len(last["prompts"][name]["norm"]) == tensor[..., 0].numel()
        asked = [sum(c.get("asked", {}).get(name, ())) for c in last["clients"]]
        assert asked == [2 if kind == "pan" else 0] * 3  # one position a step
    assert found["pun"] < found["none"]


def test_other_classes_and_other_data_are_scored_beside(prompt_experiment: Build) -> None:
    shifts = [{"name": "digits", "classes": "new"}]
    finished = run(prompt_experiment(task__classes="base", task__shifts=shifts))
    record = build_record(finished, "promptfl")
    assert record["final"]["shifts"].keys() == {"digits-new"}
    assert 0 <= record["final"]["shifts"]["digits-new"]["accuracy"] <= 1
    assert record["task"]["labels"] == ["0", "1", "2", "3", "4"]
    # Nobody holds a new class.
    assert all(len(client["label_counts"]) == 5 for client in record["task"]["clients"])


def test_few_shots_are_drawn_by_the_seed(prompt_experiment: Build) -> None:
    finished = run(prompt_experiment(partition__shots=3))
    record = build_record(finished, "promptfl")
    counts = torch.tensor([client["label_counts"] for client in record["task"]["clients"]])
    assert counts.sum(dim=0).tolist() == [3] * 10
    with pytest.raises(
        Exception, match=r"partition.shots = 99: class '\d' of task digits has only"
    ):
        run(prompt_experiment(partition__shots=99))


def test_asked_once_a_round_clients_share_their_answers(prompt_experiment: Build) -> None:
    settings = {"nemesis__kind": "pan", "nemesis__probing": "round", "nemesis__shrink": 0.1}
    finished = run(prompt_experiment(**settings, adapter__prompt__spread=0.5))
    # Of three clients with a shard each, in batches of 16.
    sizes = [len(shard.rows) for shard in deal_shards_of(finished)]
    trials = sum(-(-size // 16) for size in sizes)
    possible = {(hits + 1) / (trials + 2) for hits in range(trials + 1)}
    for row in finished.outcomes.rounds:
        shares = row["merge"]["probed"]["prompt.text"]
        assert len(shares) == 4
        assert all(min(abs(share - p) for p in possible) < 1e-6 for share in shares)
        # Four weights down, hits and trials of four positions up.
        assert [client["bytes"]["up"]["probe"] for client in row["clients"]] == [32] * 3
        assert [client["bytes"]["down"]["probe"] for client in row["clients"]] == [16] * 3
    first = finished.outcomes.rounds[0]["merge"]["probed"]["prompt.text"]
    assert len(set(first)) > 1  # it does tell positions apart
    none = run(prompt_experiment(adapter__prompt__spread=0.5))
    assert finished.outcomes.digest != none.outcomes.digest


def test_how_often_a_position_is_chosen_is_in_the_record(prompt_experiment: Build) -> None:
    settings = {"nemesis__kind": "pan", "nemesis__probed": 3, "nemesis__shrink": 0.1}
    finished = run(prompt_experiment(**settings, adapter__prompt__spread=0.5))
    for row in finished.outcomes.rounds:
        for client in row["clients"]:
            assert client["asked"].keys() == client["chosen"].keys() == {"prompt.text"}
            asked, chosen = client["asked"]["prompt.text"], client["chosen"]["prompt.text"]
            assert sum(asked) == 2 * 3  # steps, positions
            assert all(0 <= c <= a <= 2 for c, a in zip(chosen, asked, strict=True))
    chosen = [
        n
        for row in finished.outcomes.rounds
        for client in row["clients"]
        for n in client["chosen"]["prompt.text"]
    ]
    assert any(chosen)


def deal_shards_of(finished: Finished) -> tuple[Shard, ...]:
    experiment = finished.experiment
    return deal_shards(experiment.task, experiment.partition, experiment.federation.seed)


def test_weights_from_the_server_take_the_place_of_probes(
    model: PromptedClip, rows: Features, task: LabelledTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stepped(model, rows, task, Nemesis())
    before = start(model, task)
    monkeypatch.setattr(model, "hits_of", None)
    nemesis = Nemesis(kind="pan", probing="round")
    weights = {"prompt.text": torch.tensor([0.0, 0.5, 1.0, 0.0])}
    penalty = norm_penalty(model, ONE_STEP, nemesis, weights)
    train_locally(model, rows, ONE_STEP, SGD, Copra(), penalty=penalty)
    change = model.state()["prompt.text"] - plain
    pull = weights["prompt.text"][:, None] / 2 * functional.normalize(before, dim=-1)
    torch.testing.assert_close(change, -0.1 * pull, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "settings", "words"),
    [
        ("flexlora", {}, ["flexlora", "prompt"]),
        (
            "promptfl",
            {"backbone__name": "glyph-vit", "adapter__kind": "lora", "adapter__prompt__length": 16},
            ["promptfl", "lora"],
        ),
    ],
)
def test_pairs_without_a_meaning_are_refused(
    prompt_experiment: Build, strategy: str, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(prompt_experiment(strategy__name=strategy, **settings))
    assert all(word in str(refused.value) for word in words)


# --- the local loop ----------------------------------------------------------------------------


@pytest.fixture
def model(clip_folder: Path) -> PromptedClip:
    adapter = Adapter(kind="prompt", prompt=Prompt(length=4))
    found = load_model(Backbone(path=str(clip_folder)), "image", adapter, "cpu")
    assert isinstance(found, PromptedClip)
    return found


@pytest.fixture
def rows(model: PromptedClip, picture_rows: Features) -> Features:
    return model.past_stem(picture_rows)


def start(model: PromptedClip, task: LabelledTask) -> Tensor:
    context = 0.5 * torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    model.load({"prompt.text": context}, 0, task)
    return context


@pytest.fixture
def task(empty_task: Callable[..., LabelledTask]) -> LabelledTask:
    return replace(empty_task("image"), class_names=("cat", "big dog", "seven"))


SGD = Train(optimiser="sgd", learning_rate=0.1, batch_size=48, max_grad_norm=1e9)
ONE_STEP = LocalRun(seed=0, first_step=0, steps=1, total_steps=1, trains=("prompt",))


def stepped(
    model: PromptedClip,
    rows: Features,
    task: LabelledTask,
    nemesis: Nemesis,
    run: LocalRun = ONE_STEP,
) -> Tensor:
    """Return what one step makes of the same start."""
    start(model, task)
    train_locally(model, rows, run, SGD, Copra(), penalty=norm_penalty(model, run, nemesis))
    return model.state()["prompt.text"]


def test_pun_adds_a_pull_of_equal_strength_to_every_position(
    model: PromptedClip, rows: Features, task: LabelledTask
) -> None:
    before = start(model, task)
    plain = stepped(model, rows, task, Nemesis())
    pulled = stepped(model, rows, task, Nemesis(kind="pun", strength=2.0))
    expected = plain - 0.1 * 2.0 / 4 * functional.normalize(before, dim=-1)
    torch.testing.assert_close(pulled, expected, rtol=1e-5, atol=1e-6)


def test_pan_pulls_where_shrinking_gets_more_rows_right(
    model: PromptedClip, rows: Features, task: LabelledTask
) -> None:
    before = start(model, task)
    batch = rows.batch(torch.arange(len(rows)), model.device)
    with torch.no_grad():
        hits = int((model.logits(batch).argmax(dim=1) == batch.labels).sum())
        better = []
        for position in range(4):
            copy = before.clone()
            copy[position] *= 0.1
            model.load({"prompt.text": copy}, 0, task)
            better.append(int((model.logits(batch).argmax(dim=1) == batch.labels).sum()) > hits)
    assert any(better)
    assert not all(better)
    nemesis = Nemesis(kind="pan", strength=2.0, probed=4, shrink=0.1)
    change = stepped(model, rows, task, nemesis) - stepped(model, rows, task, Nemesis())
    chosen = torch.tensor(better, dtype=torch.float32)
    expected = -0.1 * 2.0 / sum(better) * functional.normalize(before, dim=-1) * chosen[:, None]
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)


def test_the_blend_is_between_and_fades_over_the_rounds(
    model: PromptedClip, rows: Features, task: LabelledTask
) -> None:
    plain = stepped(model, rows, task, Nemesis())
    full = stepped(model, rows, task, Nemesis(kind="pun")) - plain
    late = replace(ONE_STEP, round=10, rounds=10)
    faded = stepped(model, rows, task, Nemesis(kind="pun", schedule="logistic"), late) - plain
    assert float(faded.norm() / full.norm()) == pytest.approx(0.018, abs=0.001)  # 1 - sigmoid(4)
    pan = stepped(model, rows, task, Nemesis(kind="pan", probed=4, shrink=0.1)) - plain
    blend = Nemesis(kind="blend", blend=0.25, probed=4, shrink=0.1)
    between = stepped(model, rows, task, blend) - plain
    torch.testing.assert_close(between, 0.25 * full + 0.75 * pan, rtol=1e-4, atol=1e-6)


def test_pun_never_probes(
    model: PromptedClip, rows: Features, task: LabelledTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(model, "hits_of", lambda *a: asked.append(1))
    stepped(model, rows, task, Nemesis(kind="pun"))
    assert not asked


def test_nothing_is_probed_where_all_rows_are_right(
    model: PromptedClip, rows: Features, task: LabelledTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(model, task)
    with torch.no_grad():
        right = model.logits(rows.batch(torch.arange(len(rows)), model.device)).argmax(dim=1)
    solved = replace(rows, labels=right)
    plain = stepped(model, solved, task, Nemesis())
    monkeypatch.setattr(model, "hits_of", None)
    pan = Nemesis(kind="pan", strength=2.0, probed=4, shrink=0.1)
    assert torch.equal(stepped(model, solved, task, pan), plain)


def test_probing_more_positions_than_there_are_is_refused(
    model: PromptedClip, rows: Features, task: LabelledTask
) -> None:
    with pytest.raises(ConfigError, match="5 positions are to be probed"):
        stepped(model, rows, task, Nemesis(kind="pan", probed=5))


@pytest.mark.parametrize("command", ["connectivity", "shapley", "prune", "export"])
def test_commands_for_adapters_refuse_prompts_in_one_line(
    prompt_experiment: Build, tmp_path: Path, command: str
) -> None:
    finished = run(prompt_experiment(federation__rounds=1))
    with appearing_whole(tmp_path / "run") as folder:
        write_run(folder, build_record(finished, "promptfl"), finished.outcomes)
    more = [str(tmp_path / "adapter")] if command == "export" else []
    result = CliRunner().invoke(app, [command, str(tmp_path / "run"), *more])
    assert isinstance(result.exception, ConfigError)
    assert "adapter.kind = 'prompt'" in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.slow
def test_a_round_of_a_clip_of_real_size_fits_in_six_gigabytes(tmp_path: Path) -> None:
    """ViT-B/16's configuration with random weights, from a folder, in a process of its own."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path / "clip-vit-b-16"
    CLIPModel(CLIPConfig(vision_config={"patch_size": 16})).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    # Of 828 words in place of 49,408: what a caption is made of does not change its cost.
    AutoTokenizer.from_pretrained(ROOT / "common/shipped/glyph-clip").save_pretrained(folder)
    settings = {
        "backbone.path": str(folder),
        "task.limit": 40,
        "task.test_fraction": 0.02,
        "task.validation_fraction": 0,
        "partition.clients": 2,
        "partition.shots": 2,
        "federation.rounds": 1,
        "federation.workers": 0,
        "train.local_steps": 2,
    }
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    program = (
        "import resource, sys; from server.cli import app; "
        "app(sys.argv[1:], standalone_mode=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = ["simulate", "experiments/clip-local.toml", *chosen, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kibibytes = int(done.stdout.strip().splitlines()[-1])
    print(f"peak memory {kibibytes / 2**20:.2f} GiB")
    assert kibibytes < 6e9 / 1024
