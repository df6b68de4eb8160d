"""The report's figures of PAN: shares of questions at which shrinking helped, worked by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from synthetic_records import prompt_record

from server.reporting.comparison import by_label
from server.reporting.figures import Panel
from server.reporting.prompt_panels import prompt_panels

Counts = Sequence[tuple[Sequence[int], Sequence[int]]]


def with_answers(
    answers: Sequence[Counts], *, seed: int = 0, label: str | None = None
) -> dict[str, Any]:
    """Return a record in which clients were asked and answered so, by round and client."""
    record = prompt_record("promptfl", seed, label=label, rounds=len(answers))
    record["experiment"]["nemesis"] |= {"kind": "pan"}
    for entry, of_round in zip(record["rounds"], answers, strict=True):
        for client, (asked, chosen) in zip(entry["clients"], of_round, strict=False):
            client |= {
                "asked": {"prompt.text": list(asked)},
                "chosen": {"prompt.text": list(chosen)},
            }
    return record


def named(*records: Mapping[str, Any]) -> dict[str, Panel]:
    return {panel.name: panel for panel in prompt_panels(by_label(records))}


FIRST: Counts = [([2, 1, 0, 1], [1, 0, 0, 1]), ([2, 0, 0, 2], [1, 0, 0, 0])]
SECOND: Counts = [([0, 1, 0, 3], [0, 1, 0, 0]), ([4, 0, 0, 0], [0, 0, 0, 0])]


def test_shares_are_counted_over_clients_and_rounds() -> None:
    found = named(with_answers([FIRST, SECOND]))
    panel = found["pan-selection"]
    # 8, 2, 0 and 6 questions; 2, 1, 0 and 1 yeses: 4 of 16.
    assert panel.numbers == [
        ["0", "25.0% of 8"],
        ["1", "50.0% of 2"],
        ["2", "–"],
        ["3", "16.7% of 6"],
    ]
    assert "with promptfl in 25.0% of 16 questions" in panel.conclusion
    assert "from 16.7% at position 3 to 50.0% at position 1" in panel.conclusion
    # sqrt(.25·.75/(16/3)): three positions were asked about.
    assert "(±18.8 points)" in panel.conclusion
    by_round = found["pan-selection-by-round-0"]
    assert [row[1:] for row in by_round.numbers] == [
        ["50.0%", "0.0%"],
        ["0.0%", "100.0%"],
        ["–", "–"],
        ["33.3%", "0.0%"],
    ]
    assert "37.5% of questions in round 1, and in 12.5% in round 2" in by_round.conclusion


def test_seeds_are_put_together_and_labels_kept_apart() -> None:
    found = named(
        with_answers([FIRST], seed=0),
        with_answers([SECOND], seed=1),
        with_answers([SECOND], label="other"),
        prompt_record("promptfl", label="plain"),
    )
    panel = found["pan-selection"]
    assert panel.columns == ("Position", "promptfl", "other")
    assert [row[1] for row in panel.numbers] == ["25.0% of 8", "50.0% of 2", "–", "16.7% of 6"]
    assert [row[2] for row in panel.numbers] == ["0.0% of 4", "100.0% of 1", "–", "0.0% of 3"]
    assert [key.label for key in panel.legend] == ["promptfl", "other"]
    # One round has nothing to compare.
    assert not [name for name in found if "by-round" in name]


def test_answers_that_the_server_has_put_together_are_called_estimates() -> None:
    record = prompt_record("promptfl", rounds=2)
    record["experiment"]["nemesis"] |= {"kind": "pan", "probing": "round"}
    for entry, likely in zip(record["rounds"], ([0.5, 0.2], [0.1, 0.4]), strict=True):
        entry["merge"] = {"probed": {"prompt.text": likely}}
    panel = named(record)["pan-selection"]
    assert panel.numbers == [["0", "30.0%"], ["1", "30.0%"]]
    assert "Clients of promptfl answer once a round" in panel.shows
    assert "in 30.0%, as estimated" in panel.conclusion
    assert "standard error" not in panel.conclusion


@pytest.mark.parametrize("yeses", [0, 1])
def test_one_answer_everywhere_is_drawn(yeses: int) -> None:
    always: Counts = [([1, 1, 1, 1], [yeses] * 4)]
    found = named(with_answers([always, always]))
    assert f"in {100 * yeses}.0% of 8 questions." in found["pan-selection"].conclusion
    assert found["pan-selection"].drawing
    assert found["pan-selection-by-round-0"].drawing


def test_without_pan_there_is_no_such_panel() -> None:
    assert not [name for name in named(prompt_record("promptfl")) if name.startswith("pan")]
