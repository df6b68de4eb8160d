"""Export: the served model of a run as a standard PEFT folder."""

from pathlib import Path

from torch import Tensor
from torch.nn import functional

from common.adapters import export_peft
from common.config import Adapter
from common.errors import ConfigError
from common.lowrank import (
    SVD,
    Span,
    Term,
    adapted_modules,
    balanced_factors,
    kept_energy,
    named_factors,
)
from common.residuals import is_residual, residual_name
from common.tasks import load_tasks
from common.tensors import Tensors
from server.folders import SERVED, appearing_whole
from server.record import read_run
from strategies import STRATEGIES
from strategies.base import for_task

_ENOUGH = 0.99  # of the energy, in the rank that is advised


def export_run(run: Path, folder: Path, task: str = "", rank: int = 0) -> float | None:
    """Write the model that `run` serves into `folder`, with the head of `task`.

    Without `rank` the factors are written as they are. With it the whole delta of every module,
    residual and all, is cut to its best `rank` directions (Eckart-Young); returned is the share of
    its energy, the squared Frobenius norm over all modules, that these keep.

    Raises:
        ConfigError: the run serves no single model, or several tasks and none is named, or a
            residual that factors of this rank cannot hold.
    """
    _, experiment, tensors = read_run(run)
    name, adapter = experiment.strategy_name, experiment.adapter
    if adapter.kind != "lora":
        raise ConfigError(
            f"{run}: adapter.kind = {adapter.kind!r}: PEFT has no format for a CLIP's prompts; "
            f"{run / SERVED} holds them by name"
        )
    if STRATEGIES[name].served == "personal":
        raise ConfigError(
            f"{run}: strategy {name} gives every client a model of its own, and a run's record "
            "holds no single one to export"
        )
    tasks = {member.name: member for member in load_tasks(experiment.task)}
    wanted = task or (next(iter(tasks)) if len(tasks) == 1 else "")
    if wanted not in tasks:
        raise ConfigError(f"--task {task!r}: this run has heads for {', '.join(tasks)}; name one")
    state: Tensors = for_task(tensors, wanted)
    kept = None
    if rank or any(is_residual(name) for name in state):
        svds = {m: _delta(state, m, adapter) for m in adapted_modules(state)}
        _check_rank(run, rank, svds)
        state = _at_rank(state, svds, rank, adapter.scale(rank))
        kept = kept_energy(svds.values(), rank)
    with appearing_whole(folder) as unfinished:
        export_peft(state, experiment.backbone, adapter, tasks[wanted], unfinished)
    return kept


def _delta(state: Tensors, module: str, adapter: Adapter) -> SVD:
    """Return the SVD of `residual + s·B·A` of a module."""
    term = Term.of(state, module)
    terms, coefficients = [term], [adapter.scale(term.rank)]
    if residual_name(module) in state:
        terms.append(Term.dense(state[residual_name(module)].double()))
        coefficients.append(1.0)
    return Span(terms).svd(coefficients)


def _check_rank(run: Path, rank: int, svds: dict[str, SVD]) -> None:
    most = max(len(svd.S) for svd in svds.values())
    if not 1 <= rank <= most:
        enough = next(r for r in range(1, most + 1) if kept_energy(svds.values(), r) >= _ENOUGH)
        asked = f"--rank {rank}" if rank else "it serves a residual beside its factors"
        raise ConfigError(
            f"{run}: {asked}; export its best factors of a rank from 1 to {most}: --rank {enough} "
            f"keeps {100 * _ENOUGH:.0f} % of its energy, --rank {most} all"
        )


def _at_rank(state: Tensors, svds: dict[str, SVD], rank: int, scale: float) -> dict[str, Tensor]:
    """Return the state with balanced factors of this rank in place of factors and residuals."""
    cut = {name: tensor for name, tensor in state.items() if not is_residual(name)}
    for module, svd in svds.items():
        term = balanced_factors(svd.truncated(rank), scale)
        missing = rank - term.rank  # a small module has fewer directions than a large one
        padded = Term(
            functional.pad(term.B, (0, missing)), functional.pad(term.A, (0, 0, 0, missing))
        )
        cut |= named_factors(module, padded)
    return cut
