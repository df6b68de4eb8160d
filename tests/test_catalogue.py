"""The lists: what people and programs read of the strategies' table, and the page made of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.catalogue import WIDTH, page_of_strategies, strategies, table_of_strategies
from strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
CAN = ["ranks", "tasks", "secure", "noise"]


def test_the_page_on_strategies_is_the_one_that_is_generated() -> None:
    written = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert written == page_of_strategies(), "python -m server.catalogue > docs/strategies.md"


def test_the_generator_prints_the_page() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.catalogue"], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.decode("utf-8") == page_of_strategies()


def test_the_table_fits_a_terminal_and_names_every_method_once() -> None:
    lines = table_of_strategies(strategies()).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].split() == ["strategy", "serves", "up", "down", "weights", *CAN]
    # Wrapped sentences and meanings are indented.
    body = lines[1 : lines.index("")]
    names = [line.split()[0] for line in body if not line.startswith(" ")]
    assert names == list(STRATEGIES)


@pytest.mark.parametrize("entry", strategies(), ids=lambda entry: str(entry["name"]))
def test_every_option_is_told_with_default_type_and_meaning(entry: dict) -> None:
    fields = STRATEGIES[entry["name"]].options.model_fields
    assert list(entry["options"]) == list(fields)
    for name, option in entry["options"].items():
        assert option["default"] == fields[name].default
        assert option["type"]
        assert option["meaning"]


def test_types_carry_bounds_and_choices() -> None:
    options = {entry["name"]: entry["options"] for entry in strategies()}
    assert options["copra-merge"]["norm_limit"]["type"] == "float, > 1"
    assert options["fedprox"]["over"]["type"] == "fedavg | ffa-lora"
    # Told by the class that it inherits from.
    assert "the other" in options["fedprox"]["over"]["meaning"]


def test_what_a_method_keeps_and_needs_is_said() -> None:
    page = page_of_strategies()
    about = page[page.index("### scaffold") :]
    about = about[: about.index("###", 1)]
    for words in ("Server keeps control variate", "Needs train.optimiser = sgd"):
        assert words in about
