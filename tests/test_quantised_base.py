"""Quantised bases: never written to, and exact under residuals, whatever a method adds to them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_bert, save_random
from torch import Tensor
from torch.nn import functional

from clients.training import LocalRun, train_locally
from common.adapters import AdaptedBackbone
from common.backbones import load_backbone, load_base_model
from common.config import Adapter, Backbone, Copra, Experiment, Train, build_experiment
from common.errors import ConfigError
from common.features import Features, extract_features
from common.lowrank import Directions, Term, adapted_modules, factor_names
from common.models import load_model
from common.residuals import residual_name
from common.scoring import losses_and_hits
from common.tasks import LabelledTask, Split
from common.tensors import digest
from server.evaluation import Evaluator
from server.simulation import Finished, simulate
from strategies import STRATEGIES

GRIDS = ["int8", "nf4"]
CPU = torch.device("cpu")
ADAPTER = Adapter(rank=4, alpha=6.0)
QUERY = "bert.encoder.layer.1.attention.self.query"
WORDS = ("the film was good", "this book is very dull", "slow", "the book was not bad")
# Those that change the base, or would on a float one.
RESIDUAL_METHODS = [n for n in ("dense-oracle", "flora", "fedex-lora") if n in STRATEGIES]
MakeTask = Callable[..., LabelledTask]

quantises = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install -c constraints.txt '.[quantised]'",
)


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose rows are whole blocks of 4-bit numbers."""
    folder = tmp_path_factory.mktemp("backbones") / "wide-bert"
    save_bert(folder, width=64, intermediate=128)
    return folder


@pytest.fixture(params=GRIDS)
def config(request: pytest.FixtureRequest, wide_bert: Path) -> Backbone:
    return Backbone(path=str(wide_bert), quantised=request.param)


@pytest.fixture
def task(empty_task: MakeTask) -> LabelledTask:
    return empty_task("text")


@pytest.fixture
def model(config: Backbone) -> AdaptedBackbone:
    return AdaptedBackbone(load_backbone(config, "text", "cpu"), ADAPTER)


def rows_of(model: AdaptedBackbone) -> Features:
    labels = np.arange(len(WORDS), dtype=np.int64) % 3
    return extract_features(model.backbone.preprocessor, Split([(w,) for w in WORDS], labels))


def awake(model: AdaptedBackbone, task: LabelledTask) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(2)
    start = model.initial((task,), seed=0)
    return {n: t + 0.3 * torch.randn(t.shape, generator=stream) for n, t in start.items()}


def with_residuals(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(9)
    residuals = {}
    for module in adapted_modules(state):
        name_B, name_A = factor_names(module)
        size = (state[name_B].shape[0], state[name_A].shape[1])
        residuals[residual_name(module)] = 0.1 * torch.randn(size, generator=stream)
    return {**state, **residuals}


def base_bytes(model: AdaptedBackbone) -> str:
    """A digest of all that was loaded: quantised weights, their scales, and what is in float."""
    whole = model.backbone.encoder.state_dict()
    return digest({n.replace(".base_layer", ""): t for n, t in whole.items() if ".lora_" not in n})


def module_of(model: AdaptedBackbone, name: str) -> Any:
    return model.backbone.encoder.get_submodule(name.removeprefix("bert."))


def requantised(layer: Any, grid: str, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer gives with `W + residual` put on the grid anew; and that sum itself, dense."""
    import bitsandbytes as bnb

    out_features, in_features = residual.shape
    if grid == "nf4":
        dense = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state) + residual
        fresh = bnb.nn.Linear4bit(
            in_features, out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        fresh.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4")
        fresh.support_avx512bf16_for_cpu = False
    else:
        state = layer.state_dict()
        dense = state["weight"].float() * (state["SCB"][:, None] / 127) + residual
        fresh = bnb.nn.Linear8bitLt(
            in_features, out_features, has_fp16_weights=False, threshold=layer.state.threshold
        )
        fresh.weight = bnb.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False)
    fresh.bias = layer.bias
    return fresh.to("cpu")(x), dense


# --- how a base is loaded -------------------------------------------------------------------------


@quantises
def test_linear_layers_are_quantised_and_nothing_else(config: Backbone) -> None:
    import bitsandbytes as bnb

    wanted = {"int8": bnb.nn.Linear8bitLt, "nf4": bnb.nn.Linear4bit}[config.quantised]
    base = load_base_model(config, "text", num_labels=3)
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert type(linear.pop("classifier")) is torch.nn.Linear
    assert base.classifier.weight.dtype == torch.float32
    assert len(linear) == 4 * 6 + 1  # six in each of four blocks, and the pooler
    assert {type(m) for m in linear.values()} == {wanted}
    for name, parameter in base.named_parameters():
        quantised = name.endswith(".weight") and name.removesuffix(".weight") in linear
        assert (parameter.dtype in (torch.int8, torch.uint8)) == quantised, name
        assert quantised or parameter.dtype == torch.float32, name


@quantises
def test_peft_wraps_quantised_layers_in_its_own(
    config: Backbone, model: AdaptedBackbone, task: LabelledTask
) -> None:
    model.load(awake(model, task), 4, task)
    wrapped = type(module_of(model, QUERY))
    assert wrapped.__module__ == "peft.tuners.lora.bnb"
    assert wrapped.__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[config.quantised]
    assert all(p.dtype == torch.float32 for p in model.parameters().values())
    assert model.module.classifier.weight.dtype == torch.float32


@quantises
@pytest.mark.parametrize(("grid", "most"), [("int8", 0.05), ("nf4", 0.3)])
def test_a_quantised_model_is_near_the_float_one_but_not_it(
    wide_bert: Path, task: LabelledTask, grid: Any, most: float
) -> None:
    found = []
    for quantised in ("none", grid):
        config = Backbone(path=str(wide_bert), quantised=quantised)
        model = AdaptedBackbone(load_backbone(config, "text", "cpu"), ADAPTER)
        model.load(awake(model, task), 4, task)
        found.append(logits_of(model))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-4 < error < most


def logits_of(model: AdaptedBackbone) -> Tensor:
    model.module.eval()
    with torch.no_grad():
        logits = model.logits(rows_of(model).batch(torch.arange(len(WORDS)), CPU))
    assert logits.dtype == torch.float32
    return logits


def test_without_the_package_the_message_says_what_to_install(
    config: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else found(n)
    )
    with pytest.raises(ConfigError, match=rf"{config.quantised}.*fedcopra\[quantised\]"):
        load_backbone(config, "text", "cpu")


def test_rows_that_are_no_whole_blocks_are_refused_on_a_cpu(bert_folder: Path) -> None:
    """There bitsandbytes unpacks the next row's numbers, on some processors, and says nothing."""
    narrow = Backbone(path=str(bert_folder), quantised="nf4")
    with pytest.raises(ConfigError, match=r"nf4.*attention.*rows of 16 .*multiple of 64.*int8"):
        load_base_model(narrow, "text", num_labels=2)


def test_an_unknown_grid_is_refused_with_the_choices(bert_folder: Path) -> None:
    tables = {
        "task": {"name": "digits"},
        "backbone": {"path": str(bert_folder), "quantised": "int3"},
    }
    with pytest.raises(ConfigError, match=r'backbone\.quantised = "int3".*int8.*nf4'):
        build_experiment(tables, {})


# --- residuals ------------------------------------------------------------------------------------


@quantises
def test_a_residual_adds_its_product_to_the_quantised_forward_to_the_bit(
    model: AdaptedBackbone, task: LabelledTask
) -> None:
    state = awake(model, task)
    whole = with_residuals(state)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    model.load(state, 4, task)
    layer = module_of(model, QUERY)
    plain = layer(x)
    model.load(whole, 4, task)
    residual = whole[residual_name(QUERY)]
    assert torch.equal(layer(x), plain + functional.linear(x, residual))


@quantises
def test_putting_the_residual_on_the_grid_would_not_be_exact(
    config: Backbone, model: AdaptedBackbone, task: LabelledTask
) -> None:
    """The wrong way, measured: so a side residual is needed. It is exact for a float layer."""
    state = model.initial((task,), seed=0)  # B is zero: the layer alone
    whole = with_residuals(state)
    residual = whole[residual_name(QUERY)]
    model.load(whole, 4, task)
    layer = module_of(model, QUERY)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = layer(x)
        wrong, dense = requantised(layer.base_layer, config.quantised, residual, x)
        float_layer = functional.linear(x, dense, layer.base_layer.bias)
    error = float((wrong - exact).norm() / exact.norm())
    assert error > {"int8": 1e-3, "nf4": 3e-2}[config.quantised]
    # The only error left beside the side residual is that of the base's own arithmetic.
    rest = float((float_layer - exact).norm() / exact.norm())
    assert rest < {"int8": 1e-2, "nf4": 1e-6}[config.quantised]


# --- nothing is written to it ---------------------------------------------------------------------


@quantises
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_and_scoring_leave_every_byte_of_the_base(
    model: AdaptedBackbone, task: LabelledTask, precision: Any
) -> None:
    """Biases too: bitsandbytes would round them to the dtype of what comes in."""
    before = base_bytes(model)
    state = with_residuals(awake(model, task))
    model.load(state, 4, task)
    run = LocalRun(
        seed=4, first_step=0, steps=3, total_steps=3, trains=("lora_A", "lora_B", "head")
    )
    settings = Train(learning_rate=0.02, batch_size=4, precision=precision)
    for _ in range(2):  # training after scoring, too
        train_locally(model, rows_of(model), run, settings, Copra())
        losses_and_hits(model, rows_of(model), precision)
    trained = model.state()
    assert all(not torch.equal(trained[name], state[name]) for name in trained)
    assert base_bytes(model) == before


@quantises
def test_scoring_does_not_depend_on_what_ran_before(
    model: AdaptedBackbone, task: LabelledTask
) -> None:
    state = awake(model, task)
    model.load(state, 4, task)
    first = losses_and_hits(model, rows_of(model), "float32")[0]
    losses_and_hits(model, rows_of(model), "bfloat16")
    model.module.train()
    model.load(state, 4, task)
    assert torch.equal(losses_and_hits(model, rows_of(model), "float32")[0], first)


# --- whole federations ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for split, count in {"train": 96, "test": 32}.items():
        lines = [f"the film was very {('good', 'dull')[i % 2]},{i % 2}" for i in range(count)]
        (folder / f"{split}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return folder


def federation(texts: Path, config: Backbone, strategy: str, probe_examples: int = 0) -> Experiment:
    return build_experiment(
        {
            "task": {"path": str(texts), "probe_examples": probe_examples},
            "partition": {"clients": 3},
            "backbone": config.model_dump(exclude_none=True),
            "adapter": {"rank": 4, "alpha": 6.0},
            "train": {"local_steps": 6, "batch_size": 8, "learning_rate": 0.02},
            "federation": {"rounds": 3, "workers": 0},
            "strategy": {"name": strategy},
        },
        {},
    )


def run(experiment: Experiment) -> Finished:
    (finished,) = simulate([experiment], lambda *_: None)
    return finished


@quantises
@pytest.mark.parametrize("strategy", ["fedavg", *RESIDUAL_METHODS])
def test_a_federation_learns_and_leaves_every_byte_of_the_base(
    texts_folder: Path, config: Backbone, strategy: str
) -> None:
    experiment = federation(texts_folder, config, strategy)
    before = base_bytes(AdaptedBackbone(load_backbone(config, "text", "cpu"), ADAPTER))
    finished = run(experiment)
    rounds = finished.outcomes.rounds
    assert all(client["status"] == "ok" for row in rounds for client in row["clients"])
    assert rounds[-1]["loss"] < finished.outcomes.start.loss
    assert base_bytes(finished.evaluator.model) == before
    # Server and clients share the model of this process: it is the one that was trained on.
    shared = load_model(experiment.backbone, "text", experiment.adapter, "auto")
    assert isinstance(shared, AdaptedBackbone)
    assert shared is finished.evaluator.model


@quantises
def test_a_probe_is_asked_on_the_quantised_base(texts_folder: Path, config: Backbone) -> None:
    """A delta is relative to the base that it was trained on (copra specification 7.10)."""
    experiment = federation(texts_folder, config, "copra-merge", probe_examples=12)
    evaluator = Evaluator(experiment)
    (task,), probe = evaluator.tasks, evaluator.probe(12, 4)
    assert probe is not None
    found, before = [], base_bytes(evaluator.model)
    for quantised in (config.quantised, "none"):
        there = config.model_copy(update={"quantised": quantised})
        model = AdaptedBackbone(load_backbone(there, "text", "cpu"), ADAPTER)
        state = awake(model, task)
        model.load(state, 4, task)
        rows = extract_features(model.backbone.preprocessor, task.probe)
        found.append(losses_and_hits(model, rows, "float32")[0])
    losses = probe.losses(state, slice(None)).sort().values
    torch.testing.assert_close(losses, found[0].sort().values, rtol=0, atol=1e-5)
    assert not torch.allclose(losses, found[1].sort().values, atol=1e-3)
    stacks = {module: Term.of(state, module) for module in adapted_modules(state)}
    directions = Directions(stacks, torch.ones(4, 1).double(), {})
    again, slopes = probe.slopes(state, directions, slice(None))
    torch.testing.assert_close(again.sort().values, losses, rtol=0, atol=1e-5)
    assert bool(slopes.isfinite().all())
    assert bool(slopes.any())
    assert base_bytes(evaluator.model) == before


@quantises
def test_a_run_on_a_quantised_base_repeats_and_differs_from_that_on_a_float_one(
    texts_folder: Path, config: Backbone
) -> None:
    plain = config.model_copy(update={"quantised": "none"})
    digests = [
        run(federation(texts_folder, one, "dense-oracle")).outcomes.digest
        for one in (config, config, plain)
    ]
    assert digests[0] == digests[1] != digests[2]


@quantises
def test_conv1d_layers_are_quantised_and_adapted_too(
    tmp_path: Path, bert_folder: Path, task: LabelledTask, config: Backbone
) -> None:
    """Once quantised they are linear layers like any other, (out, in)."""
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    save_random(
        GPT2Model(GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=2, n_positions=64)),
        tmp_path,
        spread=0.125,
    )
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path)
    found = []
    for quantised in ("none", config.quantised):
        there = Backbone(path=str(tmp_path), quantised=quantised)
        model = AdaptedBackbone(load_backbone(there, "text", "cpu"), ADAPTER)
        model.load(with_residuals(awake(model, task)), 4, task)
        found.append(logits_of(model))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-4 < error < 0.5  # about √2 for weights the wrong way round
