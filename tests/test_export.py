"""Export of whole runs: PEFT gives the logits of the served model, residuals and all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_federation import LORA_METHODS

from common.adapters import AdaptedBackbone
from common.backbones import load_preprocessor
from common.config import Experiment, build_experiment
from common.errors import ConfigError
from common.features import extract_features
from common.lowrank import SVD, Span, Term, adapted_modules, factor_names, kept_energy
from common.models import load_model
from common.residuals import is_residual, residual_name
from common.tasks import load_tasks
from common.tensors import Tensors
from server import cli
from server.export import export_run
from server.record import build_record, read_run, write_run
from server.simulation import simulate
from strategies import STRATEGIES

CPU = torch.device("cpu")
Build = Callable[..., Experiment]
WIDTH = 16
PERSONAL = [name for name in LORA_METHODS if STRATEGIES[name].served == "personal"]
RESIDUAL_METHODS = [n for n in ("dense-oracle", "flora", "fedex-lora") if n in STRATEGIES]


@pytest.fixture(scope="module")
def run_of(
    digits_experiment: Build, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function of strategy and settings: the folder of a finished run, made once."""
    made: dict[str, Path] = {}

    def folder_of(strategy: str, **settings: Any) -> Path:
        key = json.dumps([strategy, settings])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            experiment = digits_experiment(strategy__name=strategy, **settings)
            (finished,) = simulate([experiment], lambda *_: None)
            write_run(made[key], build_record(finished, strategy), finished.outcomes)
        return made[key]

    return folder_of


def peft_logits(run: Path, folder: Path) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    rows = probe_rows(run)
    experiment = read_run(run)[1]
    base = AutoModelForImageClassification.from_pretrained(experiment.backbone.path, num_labels=10)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return model(**rows.inputs).logits


def probe_rows(run: Path) -> Any:
    experiment = read_run(run)[1]
    (task,) = load_tasks(experiment.task)
    rows = extract_features(load_preprocessor(experiment.backbone, "image"), task.probe)
    return rows.batch(torch.arange(40), CPU)


def served_logits(run: Path, changed: Tensors | None = None) -> Tensor:
    """Logits of the model of the run, by the code that scores it."""
    _, experiment, tensors = read_run(run)
    (task,) = load_tasks(experiment.task)
    model = load_model(experiment.backbone, "image", experiment.adapter, "cpu")
    assert isinstance(model, AdaptedBackbone)
    model.load({**tensors, **(changed or {})}, experiment.adapter.server_rank, task)
    model.module.eval()
    with torch.no_grad():
        return model.logits(probe_rows(run))


def spectra(run: Path) -> dict[str, SVD]:
    """The SVD of every module's dense `residual + s·B·A`, by sums of matrices."""
    _, experiment, tensors = read_run(run)
    found = {}
    for module in adapted_modules(tensors):
        name_B, name_A = factor_names(module)
        scale = experiment.adapter.scale(tensors[name_A].shape[0])
        delta = scale * tensors[name_B].double() @ tensors[name_A].double()
        delta += tensors[residual_name(module)].double()
        found[module] = Span([Term.dense(delta)]).svd([1.0])
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("strategy", RESIDUAL_METHODS)
def test_at_full_rank_peft_gives_the_logits_of_the_served_model(
    run_of: Callable[..., Path], tmp_path: Path, strategy: str, rslora: bool
) -> None:
    run = run_of(strategy, adapter__rslora=rslora)
    residuals = {n: t for n, t in read_run(run)[2].items() if is_residual(n)}
    kept = export_run(run, tmp_path / "adapter", rank=WIDTH)
    assert kept == pytest.approx(1.0)
    served = served_logits(run)
    torch.testing.assert_close(peft_logits(run, tmp_path / "adapter"), served, rtol=0, atol=2e-5)
    # And the residual is at work: without it the logits are others.
    without = served_logits(run, {n: torch.zeros_like(t) for n, t in residuals.items()})
    assert float((without - served).abs().max()) > 1e-3


@pytest.mark.parametrize("strategy", RESIDUAL_METHODS)
def test_a_lower_rank_keeps_the_best_directions_and_says_how_much(
    run_of: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    run = run_of(strategy, adapter__rslora=False)
    kept = export_run(run, tmp_path / "adapter", rank=2)
    assert kept == pytest.approx(kept_energy(spectra(run).values(), 2), rel=1e-6)
    assert 0.1 < kept < 0.9999
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    for module, svd in spectra(run).items():
        name_B, name_A = (f"base_model.model.{name}" for name in factor_names(module))
        B, A = saved[name_B].double(), saved[name_A].double()
        torch.testing.assert_close(
            config["lora_alpha"] / 2 * B @ A, svd.truncated(2).dense(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-5, atol=1e-6)  # balanced


@pytest.mark.parametrize("strategy", RESIDUAL_METHODS)
def test_without_a_rank_the_message_names_one_that_is_enough(
    run_of: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    run = run_of(strategy, adapter__rslora=False)
    enough = next(r for r in range(1, WIDTH + 1) if kept_energy(spectra(run).values(), r) >= 0.99)
    with pytest.raises(ConfigError, match=rf"residual.*--rank {enough} keeps 99 %"):
        export_run(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    kept = export_run(run, tmp_path / "adapter", rank=enough)
    assert kept is not None
    assert kept >= 0.99


@pytest.mark.parametrize("rank", [-1, WIDTH + 1])
def test_a_rank_that_no_module_has_is_refused(
    run_of: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    run = run_of("dense-oracle", adapter__rslora=False)
    with pytest.raises(ConfigError, match=rf"--rank {rank}; .* from 1 to {WIDTH}"):
        export_run(run, tmp_path / "adapter", rank=rank)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_are_exported_whatever_the_layout_and_size_of_their_weights(
    bert_folder: Path, tmp_path: Path, family: str
) -> None:
    """GPT-2 keeps its weights as (in, out); Llama's value projection is smaller than its query."""
    from peft import PeftModel
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        GPT2Config,
        GPT2Model,
        LlamaConfig,
        LlamaModel,
    )

    decoder = {
        "gpt2": lambda: GPT2Model(
            GPT2Config(vocab_size=32, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64)
        ),
        "llama": lambda: LlamaModel(
            LlamaConfig(
                vocab_size=32,
                hidden_size=WIDTH,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
            )
        ),
    }[family]()
    base, texts, run = tmp_path / "base", tmp_path / "texts", tmp_path / "run"
    save_random(decoder, base)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(base)
    for folder in (texts, run):
        folder.mkdir()
    rows = [f"the film was {('good', 'very bad')[i % 2]},{i % 2}" for i in range(24)]
    for split in ("train", "test"):
        (texts / f"{split}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    experiment = build_experiment(
        {
            "task": {"path": str(texts), "probe_examples": 0},
            "backbone": {"path": str(base)},
            "adapter": {"rank": 4, "alpha": 6.0},
            "strategy": {"name": "dense-oracle"},
        },
        {},
    )
    (task,) = load_tasks(experiment.task)
    model = load_model(experiment.backbone, "text", experiment.adapter, "cpu")
    assert isinstance(model, AdaptedBackbone)
    stream = torch.Generator().manual_seed(2)
    start = model.initial((task,), seed=0)
    state = {n: t + 0.3 * torch.randn(t.shape, generator=stream) for n, t in start.items()}
    for module in adapted_modules(start):
        term = Term.of(start, module)
        size = (term.B.shape[0], term.A.shape[1])
        state[residual_name(module)] = 0.2 * torch.randn(size, generator=stream)
    (run / "record.json").write_text(json.dumps({"experiment": experiment.model_dump(mode="json")}))
    save_file(state, run / "served.safetensors")

    assert export_run(run, tmp_path / "adapter", rank=WIDTH) == pytest.approx(1.0)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    theirs: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    batch = extract_features(model.backbone.preprocessor, task.test).batch(torch.arange(6), CPU)
    model.load(state, 4, task)
    model.module.eval()
    with torch.no_grad():
        found, served = theirs(**batch.inputs).logits, model.logits(batch)
        merged = theirs.merge_and_unload()(**batch.inputs).logits
    torch.testing.assert_close(found, served, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, served, rtol=1e-4, atol=1e-4)


def test_plain_factors_are_written_as_they_are(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("fedavg")
    assert export_run(run, tmp_path / "adapter") is None
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = read_run(run)[2]
    for module in adapted_modules(tensors):
        for name in factor_names(module):
            assert torch.equal(saved[f"base_model.model.{name}"], tensors[name])
    torch.testing.assert_close(
        peft_logits(run, tmp_path / "adapter"), served_logits(run), rtol=0, atol=1e-5
    )


def test_plain_factors_can_be_cut_too(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("fedavg")
    kept = export_run(run, tmp_path / "whole", rank=4)
    assert kept == pytest.approx(1.0)
    torch.testing.assert_close(
        peft_logits(run, tmp_path / "whole"), served_logits(run), rtol=0, atol=1e-4
    )
    less = export_run(run, tmp_path / "less", rank=1)
    assert less is not None
    assert less < 0.9999
    with pytest.raises(ConfigError, match="from 1 to 4"):
        export_run(run, tmp_path / "more", rank=5)


@pytest.mark.parametrize("strategy", PERSONAL)
def test_a_run_of_personal_models_is_refused(
    run_of: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    """Its record holds no client's own part, or no single model."""
    with pytest.raises(ConfigError, match=f"{strategy} gives every client a model of its own"):
        export_run(run_of(strategy), tmp_path / "adapter", rank=2)
    assert not (tmp_path / "adapter").exists()


def test_the_command_line_says_what_was_kept(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("dense-oracle", adapter__rslora=False)
    cli.app(["export", str(run), str(tmp_path / "adapter"), "--rank", "16"], standalone_mode=False)
    assert "rank 16 keeps 100.00 %" in capsys.readouterr().err
