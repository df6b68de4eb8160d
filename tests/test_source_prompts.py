"""Prompts of finished runs go into a bank, from either modality; what is in it is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from common.config import Experiment, build_experiment
from common.errors import ConfigError, DataError
from common.prompt_bank import BankEntry, load_bank, save_entry
from server.analysis.source_prompts import (
    describe,
    entries_of_file,
    entries_of_run,
    put_into,
)
from server.analysis.stored_run import StoredRun, open_run
from server.cli import app
from server.record import build_record, write_run
from server.reporting.bank_page import prompt_rows, remarks
from server.simulation import simulate


def stored(experiment: Experiment, folder: Path) -> StoredRun:
    [finished] = simulate([experiment], lambda *_: None)
    folder.mkdir()
    label = experiment.strategy_name
    write_run(folder, build_record(finished, label), finished.outcomes)
    return open_run(folder)


@pytest.fixture(scope="module")
def text_run(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """Two language tasks, each with a prompt of its own."""
    place = tmp_path_factory.mktemp("runs")
    members = []
    for name, rows in (("films", 60), ("two books", 44)):
        (place / name).mkdir()
        lines = [
            json.dumps({"text": f"the film was {WORDS[8 + row % 2]}", "label": row % 2})
            for row in range(rows)
        ]
        (place / name / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        members.append({"path": str(place / name)})
    experiment = build_experiment(
        {
            "task": {"members": members, "probe_examples": 0, "evaluate_on": "validation"},
            "partition": {"kind": "by-task", "clients": 4},
            "backbone": {"path": str(bert_folder)},
            "adapter": {"kind": "prompt", "prompt": {"length": 5, "task_specific": True}},
            "train": {"local_steps": 2, "learning_rate": 0.05},
            "federation": {"rounds": 1, "workers": 0},
            "strategy": {"name": "promptfl"},
        }
    )
    return stored(experiment, place / "run")


def test_every_task_of_a_run_gives_one_entry(text_run: StoredRun, tmp_path: Path) -> None:
    entries = entries_of_run(text_run, "CC0-1.0")
    assert [entry.name for entry in entries] == ["films", "two-books"]
    for entry, name in zip(entries, ("films", "two books"), strict=True):
        trained = text_run.one_model().tensors[f"head.{name}.context"]
        assert torch.equal(entry.prompt, trained)
        assert (entry.length, entry.width, entry.group) == (5, 16, "text")
        assert (entry.licence, entry.backbone, entry.privacy) == ("CC0-1.0", "tiny-bert", None)
        assert entry.metric == "accuracy on validation rows"
        assert entry.score == text_run.record["final"]["tasks"][name]["accuracy"]
        assert entry.neurons is not None
        assert len(entry.neurons) == 4 * 24
        assert len(entry.backbone_digest) == 64
    # What clients trained on: all rows less the fifth for testing and the tenth for validation.
    assert [entry.examples for entry in entries] == [42, 31]
    put_into(tmp_path / "bank", entries)
    assert list(load_bank(tmp_path / "bank")) == ["films", "two-books"]
    with pytest.raises(ConfigError, match="has a prompt called films already"):
        put_into(tmp_path / "bank", entries)
    put_into(tmp_path / "bank", entries_of_run(text_run, prefix="again-"))
    assert len(load_bank(tmp_path / "bank")) == 4


@pytest.mark.parametrize("transfer", [False, True])
def test_prompts_of_pictures_go_into_a_bank_too(
    digits_experiment: Callable[..., Experiment],
    text_run: StoredRun,
    tmp_path: Path,
    transfer: bool,
) -> None:
    adapter: dict[str, Any] = {"kind": "prompt", "prompt": {"length": 0, "visual": 3}}
    if transfer:
        source = save_entry(entries_of_run(text_run)[0], tmp_path)
        adapter["prompt"]["visual"] = 0
        adapter["transfer"] = {"kind": "projection", "sources": [str(source)]}
    run = stored(digits_experiment(adapter=adapter, strategy__name="promptfl"), tmp_path / "run")
    [entry] = entries_of_run(run)
    assert (entry.name, entry.group) == ("digits", "image")
    assert entry.prompt.shape == ((5, 16) if transfer else (3, 16))
    if not transfer:
        assert torch.equal(entry.prompt, run.one_model().tensors["prompt.image"][0])


def test_what_has_no_prompt_is_refused(
    digits_experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    lora = stored(digits_experiment(), tmp_path / "lora")
    with pytest.raises(ConfigError, match="which has no soft prompts"):
        entries_of_run(lora)
    adapter = {"kind": "prompt", "prompt": {"length": 0}}
    head = digits_experiment(adapter=adapter, strategy__name="promptfl")
    with pytest.raises(ConfigError, match="no prompt of the first layer"):
        entries_of_run(stored(head, tmp_path / "head"))


def test_a_bank_is_described(text_run: StoredRun, tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)
    entries = entries_of_run(text_run)
    stranger = BankEntry(
        "stranger", torch.randn(3, 16, generator=stream), "other", "x", "MIT", group="image"
    )
    narrow = BankEntry("narrow", torch.randn(3, 8, generator=stream), "other", "y", "MIT")
    found = describe({entry.name: entry for entry in (*entries, stranger, narrow)})
    assert found["names"] == ["films", "narrow", "stranger", "two-books"]
    cosine, overlap = found["cosine"], found["overlap"]
    assert [row[i] for i, row in enumerate(cosine)] == pytest.approx([1.0] * 4)
    assert cosine[0][1] is None
    assert cosine[0][2] == cosine[2][0]
    assert overlap[0][3] == overlap[3][0]
    assert 0 < overlap[0][3] < 1
    assert overlap[0][2] is None  # of another model, and nothing is known of it
    assert found["groups"] is None  # prompts of unlike widths have no mean likeness
    row = dict(zip(found["names"], prompt_rows(found), strict=True))["stranger"]
    assert row[:5] == ["stranger", "other", "3 x 16", "-", "-"]
    assert any("4 prompts" in remark for remark in remarks(found))


def test_the_command_lists_and_refuses(
    text_run: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bank"
    app(["bank", str(folder), "--add", str(text_run.folder)], standalone_mode=False)
    assert json.loads((folder / "bank.json").read_text())["names"] == ["films", "two-books"]
    page = (folder / "bank.html").read_text(encoding="utf-8")
    assert "Cosine of mean vectors" in page
    assert "two-books" in page
    assert "films" in capsys.readouterr().err
    # Listing again changes nothing in the bank.
    app(["bank", str(folder)], standalone_mode=False)
    assert len(load_bank(folder)) == 2
    copied = entries_of_file(folder / "films.safetensors")
    put_into(tmp_path / "other", copied)
    assert load_bank(tmp_path / "other")["films"].checksum == copied[0].checksum
    with pytest.raises(ConfigError, match="holds no prompts"):
        app(["bank", str(tmp_path / "empty")], standalone_mode=False)
    with pytest.raises(ConfigError, match="--prefix is of the prompts of --add"):
        app(["bank", str(folder), "--prefix", "x"], standalone_mode=False)
    with pytest.raises(DataError, match="not the 13 prompts"):
        entries_of_file(text_run.folder / "served.safetensors")
