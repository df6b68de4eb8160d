"""fedcopra paired: signed-rank tests over comparisons and seeds."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.stats import wilcoxon
from synthetic_records import synthetic_record

from common.errors import ConfigError
from server.analysis.paired_tests import (
    Question,
    accuracies_of,
    parse_questions,
    signed_ranks,
)
from server.cli import app


def of(first: Sequence[float], second: Sequence[float]) -> dict[str, dict[str, dict[int, float]]]:
    """Return one comparison a pair of values, at one seed."""
    return {
        f"task{i}": {"a": {0: a}, "b": {0: b}}
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    }


def test_by_hand() -> None:
    """Differences .03, -.01, .02, 0: ranks 3, 1, 2, and one pair that says nothing."""
    found = signed_ranks(of([0.53, 0.49, 0.52, 0.5], [0.5] * 4), [Question("a", "b")])
    [answer] = found["answers"]
    tested = answer["pairs"]
    assert (tested["above"], tested["equal"], tested["below"], tested["count"]) == (2, 1, 1, 4)
    assert tested["mean"] == pytest.approx(0.01)
    assert tested["median"] == pytest.approx(0.01)
    assert tested["effect"] == pytest.approx((3 + 2 - 1) / 6)
    # Of the 8 signs of three ranks: W₊ = 5 or more has 3 of them on either side... twice 2/8.
    assert tested["p"] == pytest.approx(0.5)
    assert answer["by_comparison"]["p"] == tested["p"]


def test_seeds_are_pairs_and_comparisons_are_their_means() -> None:
    found = {
        "one": {"a": {0: 0.6, 1: 0.7, 2: 0.9}, "b": {0: 0.5, 1: 0.8, 3: 0.1}},
        "two": {"a": {0: 0.5}, "b": {0: 0.1}},
    }
    [answer] = signed_ranks(found, [Question("a", "b")])["answers"]
    assert answer["differences"]["one"] == pytest.approx({0: 0.1, 1: -0.1})
    assert answer["pairs"]["count"] == 3
    assert answer["by_comparison"]["count"] == 2
    assert answer["by_comparison"]["mean"] == pytest.approx(0.2)


def test_questions_are_one_family() -> None:
    many = [0.5 + 0.01 * i for i in range(1, 9)]
    found = of(many, [0.5] * 8)
    for comparison in found.values():
        comparison["c"] = comparison["b"]
    answers = signed_ranks(found, [Question("a", "b"), Question("b", "c")])["answers"]
    p = float(wilcoxon(many, [0.5] * 8).pvalue)
    assert answers[0]["pairs"]["p"] == pytest.approx(p) == pytest.approx(2 / 2**8)
    assert answers[0]["pairs"]["p_holm"] == pytest.approx(2 * p)
    assert (answers[1]["pairs"]["p"], answers[1]["pairs"]["effect"]) == (1.0, 0.0)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    assert parse_questions(["a, b > c"]) == [Question("a, b", "c")]
    for texts in ([], ["a b"], ["> b"]):
        with pytest.raises(ConfigError, match="FIRST > SECOND"):
            parse_questions(texts)
    with pytest.raises(ConfigError, match="task0 has no subject 'x'; choose from a; b"):
        signed_ranks(of([1], [0]), [Question("x", "b")])
    with pytest.raises(ConfigError, match="no seed"):
        signed_ranks({"t": {"a": {0: 1.0}, "b": {1: 1.0}}}, [Question("a", "b")])
    with pytest.raises(ConfigError, match="two comparisons are called runs"):
        accuracies_of([tmp_path / "one" / "runs", tmp_path / "two" / "runs"])


def test_the_command_reads_comparisons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for comparison in ("digits", "mnist"):
        for strategy, final in (("flora", 0.9), ("fedavg", 0.8)):
            for seed in (0, 1):
                run = tmp_path / comparison / f"{strategy}-{seed}"
                run.mkdir(parents=True)
                record = synthetic_record(strategy, seed, final=final + 0.01 * seed)
                (run / "record.json").write_text(json.dumps(record))
    folders = [str(tmp_path / name) for name in ("digits", "mnist")]
    out = tmp_path / "out"
    command = ["paired", *folders, "--pair", "flora > fedavg", "--out", str(out)]
    app(command, standalone_mode=False)
    [answer] = json.loads((out / "paired.json").read_text())["answers"]
    assert answer["pairs"]["count"] == answer["pairs"]["above"] == 4
    assert "+10.0" in capsys.readouterr().err
    assert "flora &gt; fedavg" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="exists"):
        app(command, standalone_mode=False)
