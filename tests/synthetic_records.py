"""Records as finished runs would leave them, made from formulas instead of training."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

CLIENTS = 10
LABELS = [str(digit) for digit in range(10)]

# Name: (final accuracy, speed, bytes a round each way, aggregation error, seconds of merging)
CHARACTERS: dict[str, tuple[float, float, int, float, float]] = {
    "fedavg": (0.874, 0.22, 590_000, 0.058, 0.004),
    "flora": (0.892, 0.26, 1_480_000, 0.0, 0.011),
    "copra-merge": (0.905, 0.34, 610_000, 6e-8, 0.13),
    "fedex-lora": (0.893, 0.27, 930_000, 3e-7, 0.045),
    "ffa-lora": (0.846, 0.17, 300_000, 0.0, 0.003),
    "fedsa-lora": (0.88, 0.3, 300_000, 0.0, 0.002),
    "centralised": (0.941, 0.5, 0, 0.0, 0.0),
    "local-only": (0.641, 0.3, 0, 0.0, 0.0),
}
CONTROLS = {"centralised", "local-only"}
PERSONALISED = {"fedsa-lora"}
MODULES = [f"vit.layers.{n}.attention.{part}" for n in range(4) for part in ("q_proj", "v_proj")]
PROTOCOL = 40


def synthetic_record(
    strategy: str = "fedavg",
    seed: int = 0,
    *,
    label: str | None = None,
    copra: bool = False,
    rounds: int = 12,
    final: float | None = None,
    refused: int | None = None,
    evaluate_every: int = 1,
) -> dict[str, Any]:
    """Return one record; `final` fixes the last accuracy, `refused` is a client sending NaN."""
    level, speed, size, error, merge = CHARACTERS[strategy]
    control = strategy in CONTROLS
    stream = np.random.default_rng([seed, len(strategy), copra])
    level += 0.008 * copra + float(stream.normal(0, 0.006))
    curve = [
        level - (level - 0.1) * float(np.exp(-speed * n)) + float(stream.normal(0, 0.004))
        for n in range(1, rounds + 1)
    ]
    if final is not None:
        curve[-1] = final
    clients = synthetic_clients(seed)
    personalised = strategy in PERSONALISED
    scores = [
        _scores(value, personalised=personalised)
        if n % evaluate_every == 0 or n == rounds
        else dict.fromkeys(_scores(0.0, personalised=False))
        for n, value in enumerate(curve, start=1)
    ]
    return {
        "format": 2,
        "label": label or strategy,
        "seed": seed,
        "experiment": synthetic_experiment(strategy, seed, copra, rounds),
        "strategy": {
            "name": strategy,
            "summary": f"Stands for {strategy} in a made-up study.",
            "citation": "Nobody et al. (2020), arXiv:0000.00000",
            "control": control,
            "personalised": personalised,
        },
        "environment": {
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "flwr": "1.41.0", "peft": "0.21.0"},
            "git": {"commit": "5f0c1d7a9b2e", "dirty": False},
            "platform": "Linux x86_64",
            "device": "cpu",
        },
        "task": {
            "name": "digits",
            "kind": "image",
            "metric": "accuracy",
            "labels": LABELS,
            "sizes": {"train": 1100, "validation": 0, "probe": 300, "test": 360},
            "clients": clients,
        },
        "start": {"accuracy": 0.1, "loss": 2.3, "own_accuracy": 0.12, "own_loss": 2.2},
        "digest": hashlib.sha256(f"{label or strategy} {seed} {copra}".encode()).hexdigest(),
        "rounds": [
            {
                "round": number,
                **scored,
                "bytes": _round_bytes(size, copra, personalised),
                "seconds": {
                    "wall": 1.2 + merge,
                    "training": 2.3 - 0.4 * copra,
                    "merge": merge,
                    "evaluation": 0.09,
                    "waiting": 1.1,
                },
                **_errors(None if control or personalised else error, number),
                "clients": _weighted(
                    [_reply(client, refused, size, copra) for client in clients],
                    _merge(strategy, number).get("vetoed", []),
                ),
                "merge": _merge(strategy, number),
            }
            for number, scored in enumerate(scores, start=1)
        ],
        "final": dict(scores[-1]),
    }


def synthetic_study(seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Return six methods, one also with CopRA and one personalised, and two controls."""
    names = ["fedavg", "flora", "copra-merge", "fedex-lora", "ffa-lora", "fedsa-lora"]
    names += sorted(CONTROLS)
    runs = [
        synthetic_record(name, seed, refused=4 if name == "fedavg" and seed == 1 else None)
        for name in names
        for seed in seeds
    ]
    with_copra = [
        synthetic_record("copra-merge", seed, label="copra-merge · copra.enabled=true", copra=True)
        for seed in seeds
    ]
    return runs + with_copra


def by_task_record(strategy: str = "fedavg", seed: int = 0) -> dict[str, Any]:
    """Return a record of a federation in which every client has one of three tasks."""
    record = synthetic_record(strategy, seed, rounds=4)
    tasks = ["docstrings", "commits", "issues"]
    for client in record["task"]["clients"]:
        client["task"] = tasks[client["client"] % 3]
        client["label_counts"] = [5] * (2 + client["client"] % 3)
    record["task"] |= {"name": "coding", "kind": "text", "tasks": tasks, "labels": None}
    record["experiment"]["partition"] = {"kind": "by-task", "alpha": 0.5, "clients": CLIENTS}
    for point in (*record["rounds"], record["final"]):
        point["tasks"] = {
            task: {"accuracy": point["accuracy"] + shift, "loss": point["loss"]}
            for task, shift in zip(tasks, (-0.05, 0.0, 0.05), strict=True)
        }
    return record


def prompt_record(
    strategy: str = "promptfl",
    seed: int = 0,
    *,
    label: str | None = None,
    norm: float = 0.5,
    shrink: float = 0.98,
    clients: int = CLIENTS,
    rounds: int = 5,
) -> dict[str, Any]:
    """Return a record of soft prompts of four vectors, whose norms start near `norm` and grow."""
    record = synthetic_record("fedavg", seed, label=label or strategy, rounds=rounds)
    record["strategy"] |= {"name": strategy}
    experiment = record["experiment"]
    experiment["adapter"] = {
        "kind": "prompt",
        "prompt": {
            "length": 4, "class_specific": False, "prompts": 1, "visual": 0, "visual_blocks": 1,
        },
    }  # fmt: skip
    experiment["nemesis"] = {
        "kind": "none", "strength": 1.0, "schedule": "constant", "probing": "step",
    }  # fmt: skip
    experiment["strategy"] = {"name": strategy}
    for number, entry in enumerate(record["rounds"], start=1):
        entry |= {"aggregation_error": None, "factor_covariance": None}
        del entry["modules"]
        for counted in (entry["bytes"], *(client["bytes"] for client in entry["clients"])):
            for way in ("up", "down"):
                counted[way] = {
                    "prompt": counted[way]["total"] - counted[way]["protocol"],
                    "protocol": counted[way]["protocol"],
                    "total": counted[way]["total"],
                }
        entry["prompts"] = {"prompt.text": _prompt_drift(norm, shrink, clients, number)}
    return record


def _prompt_drift(norm: float, shrink: float, clients: int, number: int) -> dict[str, Any]:
    """Return what a round measured of one prompt of four vectors, the last the longest."""
    served = [norm + 0.02 * number + 0.01 * position for position in range(4)]
    rho = [length / shrink for length in served]
    return {
        "positions": [4],
        "norm": served,
        "client_norm": rho,
        "least_client_norm": served,
        "greatest_client_norm": rho,
        "shrink": [shrink] * 4,
        "resultant": [shrink] * 4,
        "drift": [(1 - shrink**2) * length**2 for length in rho],
        "clients": {str(k): {"distance": 0.1, "cosine": 0.9} for k in range(clients)},
    }


def synthetic_clients(seed: int) -> list[dict[str, Any]]:
    """Deal labels out by a Dirichlet draw, as the record describes it."""
    stream = np.random.default_rng([seed, 7])
    counts = np.stack([stream.multinomial(110, p) for p in stream.dirichlet([0.3] * CLIENTS, 10)])
    return [
        {
            "client": client,
            "num_examples": int(row.sum()),
            "task": "digits",
            "rank": 8,
            "label_counts": row.tolist(),
        }
        for client, row in enumerate(counts.T)
    ]


def synthetic_experiment(strategy: str, seed: int, copra: bool, rounds: int) -> dict[str, Any]:
    """Return a resolved experiment."""
    return {
        "task": {"name": "digits", "path": None, "probe_examples": 300},
        "partition": {"kind": "dirichlet", "alpha": 0.3, "clients": CLIENTS},
        "backbone": {"name": "digits-vit", "path": None, "hub": None},
        "adapter": {"kind": "lora", "rank": 8, "ranks": [], "alpha": 16.0},
        "copra": {"enabled": copra, "initial": 0.1, "ramp": 0.75},
        "train": {"local_steps": 10, "batch_size": 32, "learning_rate": 0.002},
        "federation": {"rounds": rounds, "fraction": 1.0, "seed": seed, "workers": 2},
        "strategy": {"name": strategy},
    }


def _scores(value: float, *, personalised: bool) -> dict[str, float | None]:
    """Return the scores of a round; clients' own labels are a little easier."""
    own = {"own_accuracy": value + 0.02, "own_loss": 2.2 * (1 - value)}
    if personalised:
        return {"accuracy": None, "loss": None, **own}
    return {"accuracy": value, "loss": 2.3 * (1 - value), **own}


def _errors(error: float | None, number: int) -> dict[str, Any]:
    """Return what a round measured of its merge, overall and by module."""
    if error is None:
        return {"aggregation_error": None, "factor_covariance": None}
    level, covariance = error * (1 + 0.5 / number), 0.05 * (1 + 2 / number)
    return {
        "aggregation_error": level,
        "factor_covariance": covariance,
        "modules": {
            module: {
                "aggregation_error": level * (0.6 + 0.1 * place),
                "factor_covariance": covariance * (1.4 - 0.1 * place),
            }
            for place, module in enumerate(MODULES)
        },
    }


def _client_bytes(size: int, copra: bool) -> dict[str, dict[str, int]]:
    """Return what one client sends and receives: a tenth of `size` in factors each way."""
    factors = int(size * (0.9 if copra else 1)) // CLIENTS // 2
    up = {"A": factors, "B": factors, "head": 260, "protocol": PROTOCOL}
    return {way: up | {"total": sum(up.values())} for way in ("up", "down")}


def _round_bytes(size: int, copra: bool, personalised: bool) -> dict[str, dict[str, int]]:
    """Return the bytes of all clients; scoring clients' own models is apart."""
    one = _client_bytes(size, copra)
    counted = {
        way: {kind: CLIENTS * count for kind, count in kinds.items()} for way, kinds in one.items()
    }
    scoring = {"protocol": 10 * PROTOCOL, "total": 10 * PROTOCOL}
    return counted | ({"evaluation": scoring} if personalised else {})


def _reply(client: dict[str, Any], refused: int | None, size: int, copra: bool) -> dict[str, Any]:
    sound = client["client"] != refused
    return {
        "client": client["client"],
        "status": "ok" if sound else "refused",
        "reason": None if sound else "blocks.0.query.lora_A holds 3 numbers that are NaN",
        "num_examples": client["num_examples"],
        "loss": 0.8,
        "seconds": 0.23,
        "weight": 0.0,
        "bytes": _client_bytes(size, copra),
    }


def _weighted(replies: list[dict[str, Any]], vetoed: list[int]) -> list[dict[str, Any]]:
    """Return the replies with weights by data, those vetoed and refused left out."""
    counted = [r for r in replies if r["status"] == "ok" and r["client"] not in vetoed]
    total = sum(reply["num_examples"] for reply in counted)
    for reply in counted:
        reply["weight"] = reply["num_examples"] / total
    return replies


def _merge(strategy: str, number: int) -> dict[str, Any]:
    if strategy != "copra-merge":
        return {}
    vetoed = [6] if number in {1, 2, 5} else []
    decision = "reweighted by the probe" if number > 2 else "mean, the probe saw no gain"
    return {"vetoed": vetoed, "kept_energy": 0.98, "decision": decision}
