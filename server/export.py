"""Export: the served adapter of a run as a standard PEFT folder."""

from pathlib import Path

from common.adapters import export_peft
from common.errors import ConfigError
from common.residuals import is_residual
from common.tasks import load_tasks
from server.record import appearing_whole, read_run
from strategies.base import for_task


def export_run(run: Path, folder: Path, task: str = "") -> None:
    """Write the adapter that `run` serves into `folder`, with the head of `task`.

    Raises:
        ConfigError: the run serves no single low-rank adapter, or several tasks and none is named.
    """
    _, experiment, tensors = read_run(run)
    name = experiment.strategy_name
    if any("/" in name for name in tensors):
        raise ConfigError(f"{run}: strategy {name} serves one model a client, no single adapter")
    if any(is_residual(name) for name in tensors):
        raise ConfigError(f"{run}: strategy {name} serves a dense delta, no low-rank adapter")
    tasks = {member.name: member for member in load_tasks(experiment.task)}
    wanted = task or (next(iter(tasks)) if len(tasks) == 1 else "")
    if wanted not in tasks:
        raise ConfigError(f"--task {task!r}: this run has heads for {', '.join(tasks)}; name one")
    with appearing_whole(folder) as unfinished:
        export_peft(
            for_task(tensors, wanted),
            experiment.backbone,
            experiment.adapter,
            tasks[wanted],
            unfinished,
        )
