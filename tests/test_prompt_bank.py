"""The prompt bank: what is written is read, what was changed is refused; the released prompts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from common.control_prompts import unrelated
from common.errors import ConfigError, DataError
from common.modality_gap import mmd
from common.prompt_bank import (
    BankEntry,
    Privacy,
    capped,
    load_bank,
    load_entry,
    published_roberta_prompts,
    save_entry,
)
from common.prompt_similarity import group_means, similarity, similarity_map

# Four megabytes that do not ship here: beside the checkout, as other real data.
RELEASED = Path(__file__).parents[2] / "shared" / "data" / "prompts" / "roberta-base.safetensors"


@pytest.fixture
def entry() -> BankEntry:
    stream = torch.Generator().manual_seed(0)
    return BankEntry(
        "toy",
        torch.randn(5, 8, generator=stream),
        backbone="tiny-bert",
        task="sentiment of toys",
        licence="CC0-1.0",
        backbone_digest="ab" * 32,
        examples=120,
        score=0.75,
        privacy=Privacy(3.0, 1e-5),
        neurons=torch.randn(24, generator=stream) > 0,
    )


def test_what_is_written_is_read(entry: BankEntry, tmp_path: Path) -> None:
    path = save_entry(entry, tmp_path / "bank")
    read = load_entry(path)
    assert torch.equal(read.prompt, entry.prompt)
    assert read.neurons is not None
    assert torch.equal(read.neurons, entry.neurons)
    for name in ("name", "backbone", "task", "licence", "examples", "score", "privacy"):
        assert getattr(read, name) == getattr(entry, name)
    assert read.checksum == entry.checksum
    bare = replace(entry, name="bare", neurons=None, privacy=None, score=None)
    save_entry(bare, tmp_path / "bank")
    bank = load_bank(tmp_path / "bank")
    assert list(bank) == ["bare", "toy"]
    assert (bank["bare"].neurons, bank["bare"].privacy, bank["bare"].score) == (None, None, None)
    with pytest.raises(ConfigError, match="there already"):
        save_entry(entry, tmp_path / "bank")


def test_half_precision_halves_the_file(entry: BankEntry, tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(1)
    wide = replace(entry, prompt=torch.randn(100, 768, generator=stream), neurons=None)
    whole = save_entry(wide, tmp_path / "whole").stat().st_size
    half = save_entry(wide.halved(), tmp_path / "half").stat().st_size
    # The header is padded to a multiple of 8 bytes.
    assert whole - half == pytest.approx(100 * 768 * 2, abs=8)
    torch.testing.assert_close(
        load_entry(tmp_path / "half" / "toy.safetensors").rows(), wide.rows(), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(DataError, match="NaN or infinity"):
        replace(entry, prompt=torch.full((1, 2), 1e6)).halved()


@pytest.mark.parametrize("what", ["prompt", "neurons", "licence", "privacy", "first_row"])
def test_whatever_was_changed_is_found_out(entry: BankEntry, tmp_path: Path, what: str) -> None:
    path = save_entry(entry, tmp_path)
    tensors = load_file(path)
    said = {f: getattr(entry, f) for f in ("name", "backbone", "task", "licence", "backbone_digest",
            "group", "examples", "metric", "score", "first_row", "origin")}  # fmt: skip
    said["privacy"] = {"epsilon": 3.0, "delta": 1e-5}
    changed = {
        "licence": {"licence": "proprietary"},
        "privacy": {"privacy": {"epsilon": 0.1, "delta": 1e-5}},
        "first_row": {"first_row": "meaningless"},
    }
    if what == "prompt":
        tensors["prompt"][2, 3] += 1e-3
    if what == "neurons":
        tensors["neurons"][0] ^= True
    told = {
        "format": "soft prompt 1",
        "checksum": entry.checksum,
        "entry": json.dumps(said | changed.get(what, {})),
    }
    save_file(tensors, path, metadata=told)
    with pytest.raises(DataError, match="checksum"):
        load_entry(path)
    save_file(load_file(path) | {"prompt": entry.prompt, "neurons": entry.neurons}, path,
              metadata=told | {"entry": json.dumps(said)})  # fmt: skip
    assert load_entry(path).checksum == entry.checksum


def test_other_files_are_refused(entry: BankEntry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        load_entry(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="holds no prompts"):
        load_bank(tmp_path)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DataError, match="no safetensors"):
        load_entry(tmp_path / "text.safetensors")
    save_file({"prompt": entry.prompt}, tmp_path / "bare.safetensors")
    with pytest.raises(DataError, match="no prompt of a bank"):
        load_entry(tmp_path / "bare.safetensors")
    told = {"format": "soft prompt 1", "checksum": "", "entry": '{"pickle": "me", "privacy": null}'}
    save_file({"prompt": entry.prompt}, tmp_path / "odd.safetensors", metadata=told)
    with pytest.raises(DataError, match="no prompt of a bank"):
        load_entry(tmp_path / "odd.safetensors")
    with pytest.raises(DataError, match="not the 13 prompts"):
        published_roberta_prompts(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../up"}, "cannot be called"),
        ({"prompt": torch.ones(3)}, "is not"),
        ({"prompt": torch.ones(3, 2, dtype=torch.int64)}, "int64"),
        ({"prompt": torch.full((3, 2), torch.nan)}, "NaN"),
        ({"prompt": torch.ones(1, 2), "first_row": "meaningless"}, "no vector"),
        ({"first_row": "unknown"}, "first_row = 'unknown'"),
        ({"neurons": torch.ones(3)}, "neurons are bool"),
    ],
)
def test_no_such_entry(entry: BankEntry, change: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        replace(entry, **change)


def test_rows_without_the_first_or_with_another(entry: BankEntry) -> None:
    drifted = replace(entry, first_row="meaningless")
    assert torch.equal(drifted.rows(), entry.prompt[1:])
    assert torch.equal(entry.rows(), entry.prompt)
    assert torch.equal(drifted.all_rows(), entry.prompt)
    mask = torch.arange(8.0)
    assert torch.equal(drifted.all_rows(mask), torch.cat([mask[None], entry.prompt[1:]]))
    with pytest.raises(ConfigError, match=r"\(7,\)"):
        drifted.all_rows(torch.ones(7))
    # The fingerprint is of what means something.
    huge = replace(drifted, prompt=torch.cat([torch.full((1, 8), 1e4), entry.prompt[1:]]))
    assert huge.fingerprint() == drifted.fingerprint()
    norms = torch.linalg.vector_norm(entry.prompt[1:], dim=1)
    assert drifted.fingerprint().norm == pytest.approx(float(norms.mean()))
    assert drifted.fingerprint().norm_spread == pytest.approx(float(norms.std()))


def test_norms_can_be_capped() -> None:
    prompt = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]])
    expected = torch.tensor([[1.2, 1.6], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(capped(prompt, 2.0), expected)
    with pytest.raises(ConfigError, match="above 0"):
        capped(prompt, 0.0)


# --- the 13 released prompts -------------------------------------------------------------------

released = pytest.mark.skipif(not RELEASED.is_file(), reason=f"no file {RELEASED}")


@released
def test_the_released_prompts_are_those() -> None:
    bank = published_roberta_prompts(RELEASED)
    assert len(bank) == 13
    assert {(entry.length, entry.width) for entry in bank.values()} == {(100, 768)}
    assert {entry.prompt.dtype for entry in bank.values()} == {torch.float32}
    snli, mnli = bank["snli"].prompt.double(), bank["mnli"].prompt.double()
    assert float(snli.mean()) == pytest.approx(0.00201, abs=5e-6)
    assert float(snli.std()) == pytest.approx(1.64614, abs=2e-5)
    assert float(snli[0].norm()) == pytest.approx(364.342, abs=1e-3)
    assert float(mnli.std()) == pytest.approx(1.77389, abs=2e-5)
    assert float(mnli[0].norm()) == pytest.approx(399.368, abs=1e-3)
    assert float(bank["laptop"].prompt.double().std()) == pytest.approx(0.05076, abs=5e-6)
    assert bank["mnli"].fingerprint().norm == pytest.approx(28.80, abs=0.005)


@released
@pytest.mark.parametrize(
    ("name", "distance"),
    [("mnli", 2.54), ("snli", 2.51), ("qqp", 2.42), ("qnli", 2.44), ("laptop", 0.27),
     ("movie-rationales", 0.12)],
)  # fmt: skip
def test_how_far_the_released_prompts_are_from_a_random_start(name: str, distance: float) -> None:
    entry = published_roberta_prompts(RELEASED)[name]
    start = unrelated(torch.empty(100, 768), torch.Generator().manual_seed(1))
    assert mmd(entry.rows(), start) == pytest.approx(distance, abs=0.05)
    assert entry.fingerprint().distance == pytest.approx(distance, abs=0.05)


@released
def test_norms_of_the_released_prompts_follow_their_training_rows() -> None:
    bank = published_roberta_prompts(RELEASED).values()
    norms = [entry.fingerprint().norm for entry in bank]
    found = spearmanr(norms, [entry.examples for entry in bank])
    assert float(found.statistic) == pytest.approx(0.967, abs=5e-4)


@released
def test_prompts_of_one_group_are_more_alike() -> None:
    bank = published_roberta_prompts(RELEASED)
    prompts = {name: entry.rows() for name, entry in bank.items()}
    groups = {name: entry.group for name, entry in bank.items()}
    names, found = similarity_map(prompts)
    assert group_means(names, found, groups) == pytest.approx((0.531, 0.376), abs=5e-4)

    def concat(P: torch.Tensor, Q: torch.Tensor) -> float:
        return similarity(P, Q, "concat-cosine")

    assert group_means(names, similarity_map(prompts, concat)[1], groups) == pytest.approx(
        (0.087, 0.043), abs=5e-4
    )
    best = found.fill_diagonal_(-1).argmax().item()
    pair = {names[best // 13], names[best % 13]}
    assert pair == {"mnli", "snli"}
    assert float(found.max()) == pytest.approx(0.863, abs=5e-4)
    # With the meaningless row it would be less.
    whole = similarity(bank["mnli"].all_rows(), bank["snli"].all_rows())
    assert whole == pytest.approx(0.676, abs=5e-4)
