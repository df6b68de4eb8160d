"""What a model is judged by."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Accuracy (0 to 1) and mean cross-entropy (nats an example); `tasks` if there are several.

    `shifts` are scores on tasks of which nothing was trained on; they count in no mean.

    The own figures are means over clients, on rows weighted like each client's labels: all that a
    personalised model can be judged by, and there for the others too, so that they compare.
    """

    accuracy: float
    loss: float
    own_accuracy: float | None = None
    own_loss: float | None = None
    tasks: Mapping[str, "Scores"] = field(default_factory=dict)
    shifts: Mapping[str, "Scores"] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """Return a plain dict; `tasks` and `shifts` only where there are some."""
        record = {k: v for k, v in asdict(self).items() if k not in ("tasks", "shifts")}
        for key, parts in (("tasks", self.tasks), ("shifts", self.shifts)):
            if parts:
                record[key] = {name: part.as_record() for name, part in parts.items()}
        return record


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Return the unweighted mean."""
    n = len(scores)
    return Scores(sum(s.accuracy for s in scores) / n, sum(s.loss for s in scores) / n)
