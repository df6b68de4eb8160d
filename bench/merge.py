"""What merging costs: `python -m bench.merge`. Each claim is a ratio, measured in one run.

- SVD kinds: the factored merge against forming `Σ w_k s_k B_k A_k` as a full matrix and taking its
  full SVD, as FlexLoRA's published code does. Both give the same rank-r matrix.
- Averaging kinds: the merge against reading every number of the updates once (a sum a tensor).
- Every other method: seconds beside those of fedavg.
- PEFT folders: `fedcopra merge`, reading and writing included, against PEFT's own
  `add_weighted_adapter(combination_type="svd")` in memory, which forms every full matrix.
- Memory: the peak of live tensors while 1,000 clients are merged one at a time, in units of one
  client's update, beside the state.
"""

import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.lowrank import SVD, Span, Term, factor_names
from common.seeds import torch_generator
from common.tensors import Tensors, part_of
from server.analysis.merging import MergeOptions, plan_merge, write_merged
from strategies import STRATEGIES
from strategies.base import Client, Setting, Update

ALPHA = 16.0
READING = ("fedavg", "ffa-lora", "rolora", "fedsa-lora")


def main() -> None:
    """Print one line of JSON a measurement."""
    torch.set_num_threads(1)
    for size, rank, repeats in ((768, 8, 5), (2048, 16, 3)):
        print(json.dumps(svd_against_dense(size, rank, repeats)), flush=True)
    updates = list(made_updates(clients=10, size=768, rank=8, modules=24))
    fedavg = merge_seconds("fedavg", updates)
    for name, method in STRATEGIES.items():
        if method.control or "lora" not in method.adapters or name in _NEED_MORE:
            continue
        print(json.dumps(merge_against_reading(name, updates, fedavg)), flush=True)
    print(json.dumps(folders_against_peft()), flush=True)
    for name, options in {"fedavg": {}, "flexlora": {"buffer_rank": 16}}.items():
        print(json.dumps(peak_memory(name, options, clients=1000)), flush=True)


# Their updates hold more than factors; what they add is averaging.
_NEED_MORE = ("scaffold", "fedask")


def svd_against_dense(size: int, rank: int, repeats: int, clients: int = 10) -> dict[str, Any]:
    """Time both at (size, size), in turn; return the median ratio."""
    generator = torch_generator(0, "bench", size)
    terms = [
        Term(
            torch.randn(size, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, size, generator=generator, dtype=torch.float64),
        )
        for _ in range(clients)
    ]
    weights = [1 / clients] * clients
    pairs = [
        (_seconds(lambda: dense_svd(terms, weights)), _seconds(lambda: Span(terms).svd(weights)))
        for _ in range(repeats)
    ]
    factored = Span(terms).svd(weights).truncated(rank).dense()
    dense = dense_svd(terms, weights).truncated(rank).dense()
    difference = torch.linalg.matrix_norm(factored - dense) / torch.linalg.matrix_norm(dense)
    return {
        "what": "factored SVD against dense",
        "size": size,
        "clients": clients,
        "rank": rank,
        "dense_seconds": statistics.median(slow for slow, _ in pairs),
        "factored_seconds": statistics.median(fast for _, fast in pairs),
        "times_faster": statistics.median(slow / fast for slow, fast in pairs),
        "relative_difference": float(difference),
    }


def folders_against_peft(
    clients: int = 10, size: int = 768, rank: int = 8, modules: int = 24
) -> dict[str, Any]:
    """Time both once; what they make is the same."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def base() -> torch.nn.Module:
        return torch.nn.ModuleDict(
            {f"m{number}": torch.nn.Linear(size, size, bias=False) for number in range(modules)}
        )

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r"m\d+")
    weights = [1 / clients] * clients
    with TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(number) for number in range(clients)]
        for number, folder in enumerate(folders):
            adapter = get_peft_model(base(), config)
            stream = torch_generator(2, "folder", number)
            with torch.no_grad():
                for name, parameter in adapter.named_parameters():
                    if ".lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=stream))
            adapter.save_pretrained(str(folder))
        model: Any = PeftModel.from_pretrained(base(), str(folders[0]), adapter_name="0")
        for number, folder in enumerate(folders[1:], start=1):
            model.load_adapter(str(folder), adapter_name=str(number))
        out = Path(scratch) / "merged"
        slow = _seconds(
            lambda: model.add_weighted_adapter(
                list(map(str, range(clients))), weights, "theirs", "svd"
            )
        )
        fast = _seconds(lambda: write_merged(plan_merge(folders, MergeOptions()), out))
        model.load_adapter(str(out), adapter_name="ours")
        ours, theirs = (
            torch.stack([layer.get_delta_weight(name) for layer in model.base_model.model.values()])
            for name in ("ours", "theirs")
        )
    return {
        "what": f"merge of {clients} PEFT folders, {modules} modules of {size}x{size}, rank {rank}",
        "peft_seconds": slow,
        "folders_seconds": fast,
        "times_faster": slow / fast,
        "relative_difference": float((ours - theirs).norm() / theirs.norm()),
    }


def dense_svd(terms: Sequence[Term], weights: Sequence[float]) -> SVD:
    """Return the SVD of the sum by way of the full matrix."""
    full = sum(
        (w * term.B @ term.A for w, term in zip(weights, terms, strict=True)), torch.zeros(())
    )
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    return SVD(U, S, Vh.T)


def merge_against_reading(name: str, updates: Sequence[Update], fedavg: float) -> dict[str, Any]:
    """Time a merge; where it averages, against reading what it averages."""
    seconds = merge_seconds(name, updates)
    found: dict[str, Any] = {
        "what": "merge of 10 clients, 24 modules of 768x768, rank 8",
        "strategy": name,
        "seconds": seconds,
        "times_fedavg": seconds / fedavg,
    }
    if name in READING:
        strategy = toy_strategy(name, 10)
        trained = strategy.trains(strategy.start(made_state(768, 8, 24)))
        sent = set(trained) - set(strategy.rules.keeps) - {"head"}
        read = [t for u in updates for n, t in u.tensors.items() if part_of(n) in sent]
        state = strategy.start(made_state(768, 8, 24))
        merging = cold_seconds(lambda: strategy.merge(state, updates, None))
        found["times_reading_once"] = merging / cold_seconds(lambda: [t.sum() for t in read])
    return found


def cold_seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """Return the median seconds of work whose inputs have to come from memory, not from a cache."""
    larger_than_any_cache = torch.zeros(2**26)
    taken = []
    for _ in range(repeats):
        larger_than_any_cache.add_(1)
        taken.append(_seconds(work))
    return statistics.median(taken)


def merge_seconds(name: str, updates: Sequence[Update]) -> float:
    """Return the median seconds of one merge."""
    strategy = toy_strategy(name, len(updates))
    state = strategy.start(made_state(768, 8, 24))
    return median_seconds(lambda: strategy.merge(state, updates, None))


def peak_memory(name: str, options: dict[str, Any], clients: int) -> dict[str, Any]:
    """Return the peak of live tensors during a merge, in units of one client's update."""
    strategy = toy_strategy(name, clients, **options)
    state = strategy.start(made_state(768, 8, 24))
    sent = made_state(768, 8, 24)
    stream = (_update(number, sent, 8) for number in range(clients))
    with LiveBytes() as live:
        diagnostics = dict(strategy.merge(state, stream, None).diagnostics)
    update = sum(tensor.nbytes for tensor in made_state(768, 8, 24).values())
    return {
        "what": f"peak memory of merging {clients} clients one at a time",
        "strategy": name,
        "options": options,
        "peak_in_updates": live.peak / update,
        "of_which_new_state": 1.0,
        "buffer_error_at_most": diagnostics.get("buffer_error_at_most"),
    }


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be while it is on, and the peak of those alive.

    Work space inside of a linear algebra routine is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def made_state(size: int, rank: int, modules: int) -> dict[str, torch.Tensor]:
    """Return a state of random factors, all of one size."""
    state = {}
    for module in range(modules):
        name_B, name_A = factor_names(f"enc.{module}.query")
        stream = torch_generator(0, "state", module)
        state[name_A] = torch.randn(rank, size, generator=stream)
        state[name_B] = torch.randn(size, rank, generator=stream)
    return state


def made_updates(clients: int, size: int, rank: int, modules: int) -> Iterator[Update]:
    """Yield updates that drift from one start, each made when it is asked for, and then let go."""
    sent = made_state(size, rank, modules)
    for number in range(clients):
        yield _update(number, sent, rank)


def _update(number: int, sent: Tensors, rank: int) -> Update:
    stream = torch_generator(1, "update", number)
    tensors = {
        name: 0.1 * torch.randn(tensor.shape, generator=stream) + tensor
        for name, tensor in sent.items()
    }
    return Update(Client(number, "bench", rank, ALPHA / rank), 10 + number % 7, tensors, sent)


def toy_strategy(name: str, clients: int, rank: int = 8, **options: Any) -> Any:
    method = STRATEGIES[name]
    everyone = tuple(Client(k, "bench", rank, ALPHA / rank) for k in range(clients))
    setting = Setting(rank, lambda r: ALPHA / r, 0, everyone)
    return method.build(method.options(**options), setting)


def median_seconds(work: Callable[[], object], repeats: int = 9, enough: float = 2.0) -> float:
    """Return the median seconds; slow work is not repeated once `enough` seconds are spent."""
    found = [_seconds(work)]
    while len(found) < repeats and sum(found) < enough:
        found.append(_seconds(work))
    return statistics.median(found)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
