"""What was chosen on validation rows, in the words of a report; plain records in, text out."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.reporting.wording import amount_of_bytes, duration, percent


def choice_rows(choices: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a row of the table for every choice."""
    return [
        {
            "label": choice["label"],
            "cell": choice["cell"],
            "chosen": ", ".join(f"{key} = {value}" for key, value in choice["chosen"].items()),
            "edge": "edge of the grid" if at_the_edge(choice) else "",
            "tried": "; ".join(
                f"{', '.join(str(value) for value in trial['settings'].values())}: "
                f"{percent(trial['accuracy'])}"
                for trial in choice["tried"]
            ),
        }
        for choice in choices
    ]


def at_the_edge(choice: Mapping[str, Any]) -> bool:
    """Say whether a number was chosen that is the smallest or largest tried: one may be better."""
    for key, value in choice["chosen"].items():
        tried = {trial["settings"][key] for trial in choice["tried"]}
        numbers = [t for t in tried if isinstance(t, int | float) and not isinstance(t, bool)]
        if len(numbers) == len(tried) > 1 and value in (min(numbers), max(numbers)):
            return True
    return False


def price_of_choosing(choices: Sequence[Mapping[str, Any]]) -> str:
    """Say what it cost to choose, or nothing where nothing was chosen."""
    if not choices:
        return ""
    traffic = sum(choice["bytes"] for choice in choices)
    seconds = sum(choice["training_seconds"] for choice in choices)
    # Comparisons of older versions had one run a trial, and did not say so.
    runs = sum(trial.get("runs", 1) for choice in choices for trial in choice["tried"])
    edges = sum(at_the_edge(choice) for choice in choices)
    said = (
        f"Choosing took {runs} runs at seeds of their own, {amount_of_bytes(traffic)} of traffic "
        f"and {duration(seconds)} of training, which no method's own figures include."
    )
    if edges:
        said += (
            f" {edges} of {len(choices)} choices lie at the edge of what was tried: "
            "a wider grid may serve these methods better."
        )
    return said
