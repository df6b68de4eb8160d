"""What CopRA costs and saves: `python -m bench.copra`. Each claim is a ratio, measured in one run.

- Schedule: CPU seconds of a client's training with blocks dropped (p from 0.1, ramp 0.75), over
  those of plain LoRA at equal steps, in turn, on a random encoder of 12 blocks of width 384; with
  adapters on query and value, and on every linear layer.
- Probe: the server's merge as a share of a round's wall time, ten clients, with suspects screened
  by slopes, with every client left out once, and without a probe; and with longer local training,
  of which the probe's cost knows nothing.
- Algebra: seconds of one merge of 50 clients' updates, 24 matrices of 768x768 at rank 8, without a
  probe; beside one dense sum of the same updates.
"""

import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.merge import ALPHA, made_updates, median_seconds, toy_strategy
from clients.training import LocalRun, train_locally
from common.adapters import AdaptedBackbone
from common.backbones import PretrainedBackbone, load_backbone
from common.config import Adapter, Backbone, Copra, Train, load_experiment
from common.features import Features
from common.lowrank import Term, adapted_modules
from common.seeds import torch_generator
from common.tasks import Kind, LabelledTask, Split
from server.environment import prepare_environment

# Few steps a training and many pairs of them: what else the machine does comes and goes.
STEPS = 20


def main() -> None:
    """Print one line of JSON a measurement."""
    prepare_environment()
    torch.set_num_threads(1)
    for targets in (("query", "value"), ("query", "key", "value", "dense")):
        print(json.dumps(schedule_against_lora(targets)), flush=True)
    print(json.dumps(algebra()), flush=True)
    print(json.dumps(probe_share()), flush=True)


def schedule_against_lora(targets: tuple[str, ...], repeats: int = 15) -> dict[str, Any]:
    """Train in turn with the schedule and without; return the ratio of CPU seconds."""
    with TemporaryDirectory() as folder:
        backbone = _random_encoder(Path(folder))
        model = AdaptedBackbone(backbone, Adapter(rank=8, alpha=ALPHA, targets=targets))
        task = empty_task("text", ("a", "b"))
        start = model.initial((task,), seed=0)
    rows = _random_texts(256, 24)
    run = LocalRun(1, 0, STEPS, STEPS, ("lora_A", "lora_B", "head"))

    def seconds(copra: Copra) -> float:
        model.load(start, 8, task)
        began = time.process_time()
        train_locally(model, rows, run, Train(batch_size=8), copra)
        return time.process_time() - began

    seconds(Copra())
    pairs = [(seconds(Copra(enabled=True)), seconds(Copra())) for _ in range(repeats)]
    ratios = sorted(dropped / plain for dropped, plain in pairs)
    return {
        "schedule": f"12 blocks, adapters on {', '.join(targets)}",
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[repeats // 4], ratios[-1 - repeats // 4]],
        "seconds_a_step_of_lora": statistics.median(plain for _, plain in pairs) / STEPS,
    }


def empty_task(kind: Kind, labels: tuple[str, ...]) -> LabelledTask:
    """Return a task without rows, for its labels."""
    none = Split([], torch.zeros(0, dtype=torch.int64).numpy())
    return LabelledTask("random", kind, labels, none, none, none, none)


def _random_encoder(folder: Path) -> PretrainedBackbone:
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(
        vocab_size=100,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(95))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return load_backbone(Backbone(path=str(folder)), "text", "cpu")


def _random_texts(count: int, tokens: int) -> Features:
    stream = torch_generator(0, "bench texts")
    ids = torch.randint(5, 100, (count, tokens), generator=stream)
    mask = torch.ones_like(ids)
    labels = torch.randint(2, (count,), generator=stream)
    return Features({"input_ids": ids, "attention_mask": mask}, labels)


def algebra(clients: int = 50, size: int = 768, rank: int = 8, modules: int = 24) -> dict[str, Any]:
    """Time copra-merge without a probe, and one dense sum of the same updates."""
    updates = list(made_updates(clients, size, rank, modules))
    strategy = toy_strategy("copra-merge", clients, rank, probe="none")
    state = strategy.start(updates[0].sent)

    def dense() -> None:
        for module in adapted_modules(updates[0].tensors):
            total = torch.zeros(size, size)
            for update in updates:
                term = Term.of(update.tensors, module)
                total += term.B @ term.A

    merging = median_seconds(lambda: strategy.merge(state, updates, None))
    summing = median_seconds(dense)
    return {
        "algebra": f"{modules} matrices of {size}x{size}, {clients} clients, rank {rank}",
        "seconds": merging,
        "over_one_dense_sum": merging / summing,
    }


def probe_share() -> dict[str, Any]:
    """Return the merge's share of the rounds' wall time, probing in each way."""
    from server.simulation import simulate

    found = {}
    for name, options in {
        "slopes": {"strategy.copra-merge.screening": "gradient"},
        "everyone": {"strategy.copra-merge.screening": "none"},
        "none": {"strategy.copra-merge.probe": "none"},
        "slopes, 50 local steps in place of 20": {"train.local_steps": 50},
    }.items():
        overrides = {"federation.rounds": 4, "federation.evaluate_every": 4, **options}
        experiment = load_experiment(Path("experiments/digits.toml"), overrides)
        [finished] = simulate([experiment], lambda index, row: None)
        # The first round also loads what every later one has.
        rounds = [row["seconds"] for row in finished.outcomes.rounds[1:]]
        found[name] = sum(r["merge"] for r in rounds) / sum(
            r["wall"] - r["evaluation"] for r in rounds
        )
    return {"probe": "digits, 10 clients", "share_of_wall": found}


if __name__ == "__main__":
    main()
