"""Merges of PEFT folders: PEFT loads them, and they are the average that PEFT itself would make."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ConfigError, DataError
from common.peft_folders import CONFIG, PREFIX, WEIGHTS
from common.seeds import torch_generator
from server import cli
from server.analysis.merging import GAUGES, NUMBERS, MergeOptions, plan_merge, write_merged
from server.commands.console import console

WIDTH, WIDE = 16, 24
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT classifier of 2 blocks, with a head of 3 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=WIDE,
        max_position_embeddings=16,
        num_labels=3,
    )
    return _saved(BertForSequenceClassification(config), tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 language model, whose linear layers are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16)
    return _saved(GPT2LMHeadModel(config), tmp_path_factory.mktemp("bases") / "gpt2")


def _saved(model: Any, folder: Path) -> Path:
    """Save a model with weights drawn anew, so large that its outputs tell adapters apart."""
    stream = torch_generator(0, "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function of name and settings: a PEFT folder with random factors and heads, made once."""
    known: dict[str, Path] = {}

    def folder_of(name: str, base: Path = base_folder, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        key = f"{name} {base} {settings}"
        if key not in known:
            usual = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
            model = get_peft_model(_base(base), LoraConfig(**(usual | settings)))
            stream = torch_generator(0, name)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
            known[key] = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(str(known[key]))
        return known[key]

    return folder_of


@pytest.fixture
def make(adapters: Callable[..., Path], tmp_path: Path) -> Make:
    """The same, as a copy that the test may change."""

    def made(name: str, *base: Path, **settings: Any) -> Path:
        return Path(shutil.copytree(adapters(name, *base, **settings), tmp_path / name))

    return made


def _base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    kind = {"bert": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM}[model_type]
    return kind.from_pretrained(folder)


def _merge(folders: Sequence[Path], out: Path, **options: Any) -> dict[str, Any]:
    return write_merged(plan_merge(folders, MergeOptions(**options)), out)


def _logits(base: Path, adapter: Path) -> Tensor:
    from peft import PeftModel

    return _outputs(PeftModel.from_pretrained(_base(base), str(adapter)))


def _outputs(model: Any) -> Tensor:
    tokens = torch.randint(20, (5, 8), generator=torch_generator(0, "tokens"))
    with torch.no_grad():
        return model.eval()(tokens).logits


def _deltas(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Every delta as PEFT itself forms it, by module."""
    from peft import PeftModel

    return _dense(PeftModel.from_pretrained(_base(base), str(adapter)), "default")


def _dense(model: Any, name: str) -> dict[str, Tensor]:
    found = {}
    for module, layer in model.named_modules():
        if name in getattr(layer, "lora_A", {}):
            found[module] = layer.get_delta_weight(name).detach().double()
    return found


def _average(deltas: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    total = sum(weights)
    names = sorted({name for each in deltas for name in each})
    return {
        name: sum(
            (w / total * d[name] for w, d in zip(weights, deltas, strict=True) if name in d),
            torch.zeros(()),
        )
        for name in names
    }


def _assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 0.1


def _edit(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the configuration and the tensors of a folder in place."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)


# --- the merge is the average --------------------------------------------------------------------


@pytest.mark.parametrize("gauge", GAUGES)
def test_at_a_sufficient_rank_it_is_the_exact_average(
    make: Make, base_folder: Path, tmp_path: Path, gauge: str
) -> None:
    """Unlike ranks, alphas and kinds of scale; the model that PEFT loads is held to dense sums."""
    folders = [
        make("a", r=2, lora_alpha=3),
        make("b", r=4, lora_alpha=8, use_rslora=True),
        make("c", r=3, lora_alpha=5),
    ]
    numbers = _merge(folders, tmp_path / "merged", weights=(2.0, 1.0, 1.0), rank=9, gauge=gauge)
    assert numbers["merged"]["kept_energy"] == pytest.approx(1.0, abs=1e-12)
    average = _average([_deltas(base_folder, folder) for folder in folders], (2, 1, 1))
    _assert_same(_deltas(base_folder, tmp_path / "merged"), average)

    dense = _base(base_folder)
    with torch.no_grad():
        for name, delta in average.items():
            dense.get_submodule(name.removeprefix(PREFIX)).weight += delta.float()
    found = _logits(base_folder, tmp_path / "merged")
    torch.testing.assert_close(found, _outputs(dense), rtol=1e-5, atol=1e-5)
    assert float((found - _outputs(_base(base_folder))).abs().max()) > 0.01


@pytest.mark.parametrize(("combination", "rank"), [("cat", 9), ("svd", 3), ("svd", 1)])
def test_it_is_the_weighted_adapter_of_peft(
    make: Make, base_folder: Path, tmp_path: Path, combination: str, rank: int
) -> None:
    """PEFT's own merge forms the full matrices."""
    from peft import PeftModel

    folders = [make("a", r=2, lora_alpha=3), make("b", r=4), make("c", r=3, lora_alpha=5)]
    weights = [0.5, 0.2, 0.3]
    model = PeftModel.from_pretrained(_base(base_folder), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(number))
    extra = {"svd_rank": rank} if combination == "svd" else {}
    model.add_weighted_adapter(["0", "1", "2"], weights, "theirs", combination, **extra)
    _merge(folders, tmp_path / "merged", weights=tuple(weights), rank=rank)
    _assert_same(_deltas(base_folder, tmp_path / "merged"), _dense(model, "theirs"))


def test_a_lower_rank_is_the_best_of_that_rank_and_says_what_it_keeps(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make(name, lora_alpha=4) for name in "abc"]
    numbers = _merge(folders, tmp_path / "merged", rank=2)
    spectra = {
        name: torch.linalg.svdvals(delta)
        for name, delta in _average([_deltas(base_folder, f) for f in folders], (1, 1, 1)).items()
    }
    total = sum(float(S.square().sum()) for S in spectra.values())

    def kept(rank: int) -> float:
        return sum(float(S[:rank].square().sum()) for S in spectra.values()) / total

    merged = numbers["merged"]
    assert merged["kept_energy"] == pytest.approx(kept(2), rel=1e-6)
    assert kept(merged["rank_that_keeps_99_percent"]) >= 0.99
    assert kept(merged["rank_that_keeps_99_percent"] - 1) < 0.99
    by_module = {
        n.removeprefix(PREFIX): float(S[:2].square().sum() / S.square().sum())
        for n, S in spectra.items()
    }
    worst = min(by_module, key=lambda name: by_module[name])
    assert merged["worst_module"]["module"] == worst
    assert merged["worst_module"]["kept_energy"] == pytest.approx(by_module[worst], rel=1e-6)
    found = _deltas(base_folder, tmp_path / "merged")
    for name, S in spectra.items():
        torch.testing.assert_close(
            torch.linalg.svdvals(found[name])[:3], torch.cat([S[:2], S.new_zeros(1)]),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


def test_one_adapter_alone_stays_what_it_is(make: Make, base_folder: Path, tmp_path: Path) -> None:
    alone = make("alone", task_type="SEQ_CLS")
    _merge([alone], tmp_path / "merged")
    _assert_same(_deltas(base_folder, tmp_path / "merged"), _deltas(base_folder, alone))
    torch.testing.assert_close(
        _logits(base_folder, tmp_path / "merged"), _logits(base_folder, alone), rtol=0, atol=1e-5
    )
    before, after = (json.loads((f / CONFIG).read_text()) for f in (alone, tmp_path / "merged"))
    assert after == before


def test_order_and_gauge_of_the_adapters_change_nothing(make: Make, tmp_path: Path) -> None:
    """The tensors themselves are held equal, so at a rank where no direction is drawn."""
    a, b = make("a"), make("b", r=3)
    _merge([a, b], tmp_path / "merged", weights=(3.0, 1.0), rank=4)
    _merge([b, a], tmp_path / "turned", weights=(1.0, 3.0), rank=4, alpha=8.0)

    def regauge(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("lora_B.weight")]:
            Q = torch.randn(4, 4, generator=torch_generator(1, name)) + 3 * torch.eye(4)
            other = name.replace("lora_B", "lora_A")
            tensors[name], tensors[other] = tensors[name] @ Q, Q.inverse() @ tensors[other]

    before = load_file(a / WEIGHTS)
    _edit(a, regauge)
    assert not torch.allclose(load_file(a / WEIGHTS)[QUERY + ".lora_A.weight"],
                              before[QUERY + ".lora_A.weight"])  # fmt: skip
    _merge([a, b], tmp_path / "regauged", weights=(3.0, 1.0), rank=4)
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    for other in ("turned", "regauged"):
        found = load_file(tmp_path / other / WEIGHTS)
        assert found.keys() == merged.keys()
        for name, tensor in merged.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_the_gauges_are_what_they_say(make: Make, tmp_path: Path) -> None:
    folders = [make("a"), make("b")]
    for gauge in GAUGES:
        _merge(folders, tmp_path / gauge, rank=4, gauge=gauge)
    for name, A in load_file(tmp_path / "balanced" / WEIGHTS).items():
        if name.endswith("lora_A.weight"):
            B = load_file(tmp_path / "balanced" / WEIGHTS)[name.replace("lora_A", "lora_B")]
            torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-5)
            rows = load_file(tmp_path / "lora" / WEIGHTS)[name]
            torch.testing.assert_close(rows @ rows.T, torch.eye(4) / 3, rtol=1e-4, atol=1e-5)


def test_directions_that_are_not_used_can_still_be_trained(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    """Two adapters of rank 2 at rank 8: half of the directions are free."""
    from peft import PeftModel

    folders = [make("a", r=2), make("b", r=2)]
    _merge(folders, tmp_path / "merged", rank=8)
    average = _average([_deltas(base_folder, f) for f in folders], (1, 1))
    _assert_same(_deltas(base_folder, tmp_path / "merged"), average)
    model = PeftModel.from_pretrained(
        _base(base_folder), str(tmp_path / "merged"), is_trainable=True
    )
    tokens = torch.randint(20, (5, 8), generator=torch_generator(0, "tokens"))
    model(tokens).logits.square().sum().backward()
    for name, layer in model.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert torch.count_nonzero(B[:, 4:]) == 0, name
            assert torch.all(A[4:].norm(dim=1) > 0.1), name
            assert torch.all(B.grad.norm(dim=0) > 1e-6), name


# --- what adapters may differ in -----------------------------------------------------------------


def test_patterns_are_read_and_written_where_ranks_differ(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [
        make("a", rank_pattern={"value": 2}, alpha_pattern={"layer.1.*query": 3}),
        make("b", rank_pattern={"value": 1}, use_rslora=True),
    ]
    average = _average([_deltas(base_folder, folder) for folder in folders], (1, 1))
    _merge(folders, tmp_path / "uniform", rank=8)
    config = json.loads((tmp_path / "uniform" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    _assert_same(_deltas(base_folder, tmp_path / "uniform"), average)

    numbers = _merge(folders, tmp_path / "usual")
    ranks = {row["module"].rsplit(".")[-1]: row["rank"] for row in numbers["modules"]}
    assert ranks == {"query": 4, "value": 2}
    config = json.loads((tmp_path / "usual" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert list(config["rank_pattern"].values()) == [2, 2]
    found = _deltas(base_folder, tmp_path / "usual")
    for name, delta in average.items():
        U, S, Vh = torch.linalg.svd(delta)
        rank = 2 if name.endswith("value") else 4
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(found[name], best, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 18), (True, 8 * 9**0.5 / 4**0.5)])
def test_the_scale_is_that_of_the_first_adapter_unless_alpha_says_otherwise(
    make: Make, base_folder: Path, tmp_path: Path, rslora: bool, alpha: float
) -> None:
    folders = [make("a", use_rslora=rslora), make("b", r=5, lora_alpha=3)]
    average = _average([_deltas(base_folder, folder) for folder in folders], (1, 1))
    for out, given, expected in (("usual", 0.0, alpha), ("given", 7.0, 7.0)):
        _merge(folders, tmp_path / out, rank=9, alpha=given)
        config = json.loads((tmp_path / out / CONFIG).read_text())
        assert config["lora_alpha"] == pytest.approx(expected, rel=1e-12)
        assert config["use_rslora"] is rslora
        _assert_same(_deltas(base_folder, tmp_path / out), average)


def test_a_module_that_some_do_not_adapt_counts_as_zero_there(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    """The first adapts one block only, which its configuration says in a way of its own."""
    folders = [
        make("a", target_modules=["query"], layers_to_transform=[0], exclude_modules=["value"]),
        make("b", target_modules=["value", "query"], r=2),
        make("c", target_modules=r".*layer\.1\..*(query|intermediate\.dense)", r=2),
    ]
    numbers = _merge(folders, tmp_path / "merged", rank=8)
    average = _average([_deltas(base_folder, folder) for folder in folders], (1, 1, 1))
    assert len(average) == 5
    _assert_same(_deltas(base_folder, tmp_path / "merged"), average)
    told = {tuple(row["held_by"]): len(row["names"]) for row in numbers["held_by_some"]}
    a, b, c = map(str, folders)
    assert told == {(a, b): 1, (b,): 2, (b, c): 1, (c,): 1}


def test_conv1d_layers_of_gpt2(make: Make, gpt2_folder: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [
        make("a", gpt2_folder, task_type="CAUSAL_LM", **settings),
        make("b", gpt2_folder, task_type="CAUSAL_LM", **settings, r=2),
    ]
    _merge(folders, tmp_path / "merged", rank=6)
    average = _average([_deltas(gpt2_folder, folder) for folder in folders], (1, 1))
    assert average[PREFIX + "transformer.h.0.attn.c_attn"].shape == (WIDTH, 3 * WIDTH)
    _assert_same(_deltas(gpt2_folder, tmp_path / "merged"), average)


def test_heads_are_averaged_with_the_same_weights(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make(name, task_type="SEQ_CLS") for name in "ab"]
    numbers = _merge(folders, tmp_path / "merged", weights=(3.0, 1.0), rank=8)
    a, b, merged = (load_file(f / WEIGHTS) for f in (*folders, tmp_path / "merged"))
    for name in (PREFIX + "classifier.weight", PREFIX + "classifier.bias"):
        torch.testing.assert_close(merged[name], 0.75 * a[name] + 0.25 * b[name])
    assert numbers["saved_whole"] == [
        {"names": ["classifier.bias", "classifier.weight"], "held_by": list(map(str, folders))}
    ]
    dense = _base(base_folder)
    average = _average([_deltas(base_folder, folder) for folder in folders], (3, 1))
    with torch.no_grad():
        for name, delta in average.items():
            dense.get_submodule(name.removeprefix(PREFIX)).weight += delta.float()
        dense.classifier.weight.copy_(merged[PREFIX + "classifier.weight"])
        dense.classifier.bias.copy_(merged[PREFIX + "classifier.bias"])
    found = _logits(base_folder, tmp_path / "merged")
    torch.testing.assert_close(found, _outputs(dense), rtol=1e-5, atol=1e-5)


def test_a_head_that_only_some_saved_is_averaged_over_these(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make("a"), make("b", modules_to_save=["classifier"])]
    _merge(folders, tmp_path / "merged", rank=8)
    head = PREFIX + "classifier.weight"
    b, merged = (load_file(f / WEIGHTS) for f in (folders[1], tmp_path / "merged"))
    assert torch.equal(merged[head], b[head])
    _logits(base_folder, tmp_path / "merged")  # PEFT finds all that it looks for
    with pytest.raises(
        ConfigError, match=r"classifier\.bias is held by adapters of weight 0 alone"
    ):
        _merge(folders, tmp_path / "none", weights=(1.0, 0.0))
    assert not (tmp_path / "none").exists()


def test_without_heads_the_base_keeps_its_own(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make(name, task_type="SEQ_CLS") for name in "ab"]
    _edit(folders[1], lambda _, tensors: tensors.update(_other_head()))
    with pytest.raises(ConfigError, match=r"classifier.*\(3,\) in .*\(7,\) in .*--without-heads"):
        _merge(folders, tmp_path / "merged", rank=8)
    _merge(folders, tmp_path / "merged", rank=8, without_heads=True)
    assert all(".lora_" in name for name in load_file(tmp_path / "merged" / WEIGHTS))
    dense = _base(base_folder)
    deltas = [_factor_deltas(folder) for folder in folders]
    with torch.no_grad():
        for name, delta in _average(deltas, (1, 1)).items():
            dense.get_submodule(name.removeprefix(PREFIX)).weight += delta
    found = _logits(base_folder, tmp_path / "merged")
    torch.testing.assert_close(found, _outputs(dense), rtol=1e-5, atol=1e-5)


def _other_head() -> dict[str, Tensor]:
    return {PREFIX + "classifier.weight": torch.ones(7, WIDTH),
            PREFIX + "classifier.bias": torch.ones(7)}  # fmt: skip


def _factor_deltas(folder: Path) -> dict[str, Tensor]:
    """`s·B·A` from the file, for adapters whose head does not fit the base."""
    tensors = load_file(folder / WEIGHTS)
    return {
        name.removesuffix(".lora_B.weight"): 2 * B @ tensors[name.replace("lora_B", "lora_A")]
        for name, B in tensors.items()
        if name.endswith("lora_B.weight")
    }


def test_biases_of_the_adapters_are_averaged_too(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make("a", r=2), make("b", lora_bias=True), make("c", lora_bias=True, lora_alpha=3)]
    _merge(folders, tmp_path / "merged", weights=(1.0, 2.0, 1.0), rank=10)
    dense = _base(base_folder)
    with torch.no_grad():
        for name, delta in _average(
            [_deltas(base_folder, folder) for folder in folders], (1, 2, 1)
        ).items():
            layer = dense.get_submodule(name.removeprefix(PREFIX))
            layer.weight += delta.float()
            for folder, share in ((folders[1], 0.5 * 8 / 4), (folders[2], 0.25 * 3 / 4)):
                layer.bias += share * load_file(folder / WEIGHTS)[name + ".lora_B.bias"]
    found = _logits(base_folder, tmp_path / "merged")
    torch.testing.assert_close(found, _outputs(dense), rtol=1e-5, atol=1e-5)


def test_half_precision_adapters_are_merged_in_float32(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make("a"), make("b")]
    for folder in folders:
        _edit(folder, lambda _, t: t.update({n: x.bfloat16() for n, x in t.items()}))
    _merge(folders, tmp_path / "merged", rank=8)
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    _assert_same(
        _deltas(base_folder, tmp_path / "merged"),
        _average([_deltas(base_folder, folder) for folder in folders], (1, 1)),
    )


# --- what is said about the adapters -------------------------------------------------------------


def test_norms_cosines_and_stable_ranks_are_those_of_the_dense_deltas(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make("a"), make("b", r=2), make("c", r=3, target_modules=["query"])]
    numbers = _merge(folders, tmp_path / "merged", weights=(1.0, 1.0, 2.0), rank=3)
    assert json.loads((tmp_path / "merged" / NUMBERS).read_text()) == numbers
    deltas = [_deltas(base_folder, folder) for folder in (*folders, tmp_path / "merged")]
    names = sorted(deltas[0])
    zero = torch.zeros(WIDTH, WIDTH).double()
    flat = torch.stack(
        [torch.cat([each.get(name, zero).reshape(-1) for name in names]) for each in deltas]
    )
    norms = flat.norm(dim=1)
    cosines = (flat / norms[:, None]) @ (flat / norms[:, None]).T
    for k, row in enumerate([*numbers["adapters"], numbers["merged"]]):
        assert row["norm"] == pytest.approx(float(norms[k]), rel=1e-5)
        ranks = [float(d.norm() ** 2 / torch.linalg.svdvals(d)[0] ** 2) for d in deltas[k].values()]
        assert row["stable_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    for k, row in enumerate(numbers["adapters"]):
        assert row["cosine_with_merged"] == pytest.approx(float(cosines[k, 3]), abs=1e-5)
        assert row["weight"] == (0.25, 0.25, 0.5)[k]
    pairs = {(i, j): float(cosines[i, j]) for i in range(3) for j in range(i + 1, 3)}
    for what, choose in (("least", min), ("most", max)):
        i, j = choose(pairs, key=lambda pair: pairs[pair])
        told = numbers["pairwise_cosine"][what]
        assert told["cosine"] == pytest.approx(pairs[i, j], abs=1e-5)
        assert told["between"] == [str(folders[i]), str(folders[j])]
    average = _average(deltas[:3], (1, 1, 2))
    exact = sum(float(delta.norm()) ** 2 for delta in average.values()) ** 0.5
    assert numbers["merged"]["norm_of_exact_average"] == pytest.approx(exact, rel=1e-5)


def test_adapters_that_were_never_trained_have_no_cosines(make: Make, tmp_path: Path) -> None:
    def reset(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.update({n: torch.zeros_like(t) for n, t in tensors.items() if "lora_B" in n})

    folders = [make("a"), make("b")]
    for folder in folders:
        _edit(folder, reset)
    numbers = _merge(folders, tmp_path / "merged")
    assert numbers["pairwise_cosine"] == {}
    assert [row["cosine_with_merged"] for row in numbers["adapters"]] == [None, None]
    assert numbers["merged"]["norm"] == 0
    assert numbers["merged"]["stable_rank"] is None


# --- what is refused -----------------------------------------------------------------------------


def _set(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda config, _: config.update(fields))


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return lambda folder: _edit(folder, edit)


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda _, tensors: tensors.update({new: tensors.pop(old)}))


def _add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: _edit(
        folder, lambda _, tensors: tensors.update({name: torch.ones(shape)})
    )


def _only_heads(folder: Path) -> None:
    save_file({PREFIX + "classifier.bias": torch.ones(3)}, folder / WEIGHTS)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _nested(folder: Path) -> None:
    shutil.move(folder, folder.with_name("aside"))
    folder.mkdir()
    shutil.move(folder.with_name("aside"), folder / "other")


A, B = QUERY + ".lora_A.weight", QUERY + ".lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / CONFIG).unlink(), f"it has no {CONFIG}$"),
        (_nested, rf"it has no {CONFIG}; there is one in .*bad/other"),
        (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG} cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "no JSON object"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 90), f"{WEIGHTS} cannot be read"),
        (_pickled, r"adapter_model.bin.*only safetensors"),
        (_set(peft_type="IA3"), "'IA3', not 'LORA'"),
        (_set(use_dora=True), "DoRA"),
        (_set(bias="all"), "bias is 'all'"),
        (_set(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which changes the base"),
        (_set(trainable_token_indices=[1]), "trainable_token_indices"),
        (_set(r=0), "r is 0"),
        (_set(r=None), "r is None"),
        (_set(lora_alpha=-1), "lora_alpha is -1"),
        (_set(rank_pattern={"(": 2}), r"rank_pattern '\('"),
        (_set(rank_pattern={"query": "x"}), "rank_pattern of query is 'x'"),
        (_set(rank_pattern={"query": 3}), r"query has factors B \(16, 4\).*says rank 3"),
        (_set(task_type="CAUSAL_LM"), r"task_type None, .*bad of CAUSAL_LM"),
        (_set(base_model_name_or_path="other"), r"bert, .*bad of other; .*--any-base"),
        (_set(revision="v2"), r"bad of .*bert \(revision v2\);"),
        (_tensor(A, lambda t: t.index_fill(0, torch.tensor(1), torch.nan)), "lora_A.* 16 numbers"),
        (_tensor(B, lambda t: t / 0), "NaN or infinite"),
        (_tensor(A, lambda t: t[:2]), r"A \(2, 16\).*says rank 4"),
        (_tensor(A, lambda t: torch.cat([t, t], 1)), r"16x16 in .*a and 16x32 in .*bad"),
        (_tensor(A, lambda t: t[:, :, None, None]), r"shape \(4, 16, 1, 1\).*no convolutions"),
        (_tensor(A, lambda t: t.to(torch.int8)), "lora_A.weight is of type I8"),
        (_rename(A, QUERY + ".other"), "lora_A.weight is missing"),
        (_rename(A, "query.lora_A.weight"), "query.lora_A.weight does not begin with base_model"),
        (
            _add(QUERY + ".lora_embedding_A", 4, 9),
            "query.lora_embedding_A is no factor of a linear layer",
        ),
        (_add(QUERY + ".lora_B.bias", 9), r"lora_B.bias has shape \(9,\), not \(16,\)"),
        (_only_heads, "no LoRA factors at all"),
        (
            _set(modules_to_save=["value"]),
            r"bad has saved value whole, and .*a has LoRA factors of bert.encoder",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_and_named(
    make: Make, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    folders = [make("a"), make("bad")]
    spoil(folders[1])
    with pytest.raises((ConfigError, DataError), match=says) as told:
        _merge(folders, tmp_path / "merged")
    assert "\n" not in str(told.value)
    assert "bad" in str(told.value)
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_bases_of_unlike_names_are_merged_when_told_to(
    make: Make, base_folder: Path, tmp_path: Path
) -> None:
    folders = [make("a"), make("b")]
    expected = _average([_deltas(base_folder, folder) for folder in folders], (1, 1))
    _set(base_model_name_or_path="other")(folders[1])
    _merge(folders, tmp_path / "merged", rank=8, any_base=True)
    _assert_same(_deltas(base_folder, tmp_path / "merged"), expected)
    config = json.loads((tmp_path / "merged" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base_folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": (1.0,)}, "--weights 1: 1 weights for 2 adapters"),
        ({"weights": (1.0, -1.0)}, "--weights 1,-1: .*not negative"),
        ({"weights": (0.0, 0.0)}, "--weights 0,0: .*not all zero"),
        ({"weights": (1.0, float("nan"))}, "--weights 1,nan: .*finite"),
        ({"rank": -1}, "--rank -1"),
        ({"rank": WIDTH + 1}, f"--rank 17: the largest module has {WIDTH} directions"),
        ({"alpha": -2.0}, "--alpha -2"),
        ({"gauge": "even"}, "--gauge 'even': choose from balanced, lora"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    make: Make, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _merge([make("a"), make("b")], tmp_path / "merged", **options)


# --- the command ---------------------------------------------------------------------------------


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedcopra", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_says_whether_adapters_agree(
    make: Make, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folders = [make("a", task_type="SEQ_CLS"),
               make("b", r=2, task_type="SEQ_CLS", target_modules=["query"])]  # fmt: skip
    out = tmp_path / "merged"
    monkeypatch.setattr(console, "width", 200)
    assert _call(monkeypatch, *folders, "--out", out, "--weights", "2,1", "--rank", 6) == 0
    said = " ".join(capsys.readouterr().err.split())
    numbers = json.loads((out / NUMBERS).read_text())
    for row in numbers["adapters"]:
        assert f"{row['norm']:.3f} {row['cosine_with_merged']:.3f}" in said
    pair = numbers["pairwise_cosine"]["least"]
    assert f"{folders[0]} and {folders[1]}, cosine {pair['cosine']:.3f}" in said
    assert "rank 6 keeps 100.00 % of the energy" in said
    assert f"value: only in {folders[0]}; zero elsewhere" in said
    assert "classifier.bias, classifier.weight: averaged over all" in said
    _logits(base_folder, out)

    assert _call(monkeypatch, *folders, "--out", out) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert _call(monkeypatch, *folders, "--out", tmp_path / "new", "--weights", "1,x") == 2
    assert capsys.readouterr().err == "fedcopra: --weights 1,x: 'x' is no number\n"
    assert not (tmp_path / "new").exists()
