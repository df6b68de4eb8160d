"""What there is: the tables behind `fedcopra list`."""

from collections.abc import Callable, Mapping
from typing import Any


def strategies() -> list[dict[str, Any]]:
    """Describe every strategy."""
    from strategies import STRATEGIES

    return [
        {
            "name": name,
            "summary": method.summary,
            "citation": method.citation,
            "control": method.control,
            "unequal_ranks": method.unequal_ranks,
            "by_task": method.by_task,
            "options": {key: field.default for key, field in method.options.model_fields.items()},
        }
        for name, method in STRATEGIES.items()
    ]


def tasks() -> list[dict[str, Any]]:
    """Describe every shipped task."""
    from common.tasks import SHIPPED_TASKS

    return [{"name": name, "summary": task.summary} for name, task in SHIPPED_TASKS.items()]


def backbones() -> list[dict[str, Any]]:
    """Describe every backbone with a name."""
    from common.backbones import SHIPPED_BACKBONES

    return [
        {"name": name, "kind": backbone.kind, "summary": backbone.summary}
        for name, backbone in SHIPPED_BACKBONES.items()
    ]


CATALOGUES: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "strategies": strategies,
    "tasks": tasks,
    "backbones": backbones,
}
