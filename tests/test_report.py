"""The report: what it says, that it is one sound file, and how a real browser shows it."""

import doctest
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
from synthetic_records import (
    CLIENTS,
    MODULES,
    by_task_record,
    synthetic_record,
    synthetic_study,
)

from common.errors import FedcopraError
from server.reporting import report, wording
from server.reporting.comparison import by_label, compare
from server.reporting.drawing import PALETTE, marks
from server.reporting.figures import panels
from server.reporting.findings import headline, traffic
from server.reporting.report import alarms, render, toml_like, write_report
from server.reporting.weights import weight_panels

SECTIONS = ("results", "own", "figures", "ledger", "copra", "decisions", "reproduce")
FIGURES = (
    "accuracy-by-round",
    "accuracy-by-bytes",
    "own-accuracy-by-round",
    "examples-by-client",
    "aggregation-error",
    "aggregation-error-by-layer",
    "seconds-by-part",
)


class Document(HTMLParser):
    """Collects what the tests ask of a page: ids, references, styles and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "xlink:href", "src", "srcset", "action", "data"}:
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(records: list[dict[str, Any]], title: str = "A study") -> str:
    return render(records, compare(records), title)


@pytest.fixture(scope="module")
def study_page() -> str:
    return page_of(synthetic_study())


def conclusions(records: list[dict[str, Any]]) -> dict[str, str]:
    return {panel.name: panel.conclusion for panel in panels(by_label(records))}


# One sound file.


def test_weights_of_a_merges_own_are_shown_and_those_by_data_are_not() -> None:
    records = [synthetic_record(name, rounds=6) for name in ("fedavg", "copra-merge")]
    (panel,) = weight_panels(by_label(records))
    assert panel.shows.startswith("copra-merge, seed 0")
    assert panel.conclusion == (
        "In 3 of 6 rounds weights were not the data's. Left out: client 6 (3 times)."
    )
    assert panel.drawing
    assert not weight_panels(by_label(records[:1]))
    # A client that was refused has no weight to speak of: the others share by their data.
    refused = synthetic_record("fedavg", rounds=6, refused=2)
    assert not weight_panels(by_label([refused]))


def test_every_section_and_figure_is_there_in_order(study_page: str) -> None:
    ids = Document(study_page).ids
    found = [name for name in ids if name in {*SECTIONS, *FIGURES}]
    before, after = SECTIONS[:3], SECTIONS[3:]
    assert found == [*before, *FIGURES, *after]
    assert Document(study_page).tags.count("svg") > len(FIGURES)


def test_it_stands_alone(study_page: str) -> None:
    document = Document(study_page)
    assert "script" not in document.tags
    assert all(link.startswith("#") or link == "data:," for link in document.references)
    assert "http" not in study_page
    assert "@import" not in study_page


def test_ids_are_unique_and_references_lead_somewhere(study_page: str) -> None:
    document = Document(study_page)
    assert len(document.ids) == len(set(document.ids))
    targets = {link[1:] for link in document.references if link.startswith("#")}
    assert targets
    assert targets <= set(document.ids)
    labelled = set(re.findall(r'aria-labelledby="([^"]+)"', study_page))
    assert labelled <= set(document.ids)


def test_equal_records_give_equal_pages(study_page: str) -> None:
    before = dict(matplotlib.rcParams)
    assert page_of(synthetic_study()) == study_page
    assert dict(matplotlib.rcParams) == before


def test_text_from_records_is_escaped() -> None:
    hostile = synthetic_record("fedavg", label="<script>alert(1)</script> $x_1$ & co", refused=2)
    hostile["rounds"][0]["clients"][2]["reason"] = "<b>NaN</b>"
    hostile["task"]["clients"][0]["label_counts"][0] = 3
    hostile["task"]["labels"] = ["<i>", *hostile["task"]["labels"][1:]]
    document = Document(page_of([hostile], "<title>"))
    assert "script" not in document.tags
    assert "<script>alert(1)</script> $x_1$ & co" in document.text
    assert "<b>NaN</b>" in document.text


# What it says.


@pytest.mark.parametrize("module", [wording, report])
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def test_headline_names_best_support_and_controls() -> None:
    records = synthetic_study()
    said = " ".join(headline(by_label(records), compare(records)))
    assert "copra-merge · copra.enabled=true ends with the highest accuracy of the 6" in said
    assert "Against fedavg" in said
    assert "the seeds support that it is better" in said
    assert "those of copra-merge overlap" in said
    assert "Controls, no federated methods: centralised" in said


def test_one_seed_is_called_one_seed(study_page: str) -> None:
    records = [synthetic_record("fedavg"), synthetic_record("flora")]
    text = Document(page_of(records)).text
    assert "one seed, which cannot say" in text
    assert "one seed cannot tell" in text
    assert "there is no seed spread" in conclusions(records)["accuracy-by-round"]
    assert "not how it would do on other data" in Document(study_page).text


def test_a_corrected_verdict_explains_itself() -> None:
    noise = [("fedavg", 0.60, 0.61, 0.62), ("close", 0.64, 0.662, 0.69)]
    noise += [(f"noise{n}", 0.60, 0.66, 0.56) for n in range(5)]
    records = [
        synthetic_record("fedavg", seed, label=label, final=value, rounds=2)
        for label, *values in noise
        for seed, value in enumerate(values)
    ]
    said = " ".join(headline(by_label(records), compare(records)))
    assert "no difference shown once corrected for several comparisons" in said


def test_conclusions_follow_the_data() -> None:
    apart = [synthetic_record("fedavg", seed, final=0.5) for seed in (0, 1)]
    apart += [synthetic_record("flora", seed, final=0.8 + seed / 100) for seed in (0, 1)]
    said = conclusions(apart)
    assert "Every seed of flora ends above every seed of fedavg" in said["accuracy-by-round"]
    assert "fedavg needs the least traffic" in said["accuracy-by-bytes"]
    assert "flora serves the exact mean" in said["aggregation-error"]
    assert "fedavg is off by 6%" in said["aggregation-error"]
    assert "strongly skewed" in said["examples-by-client"]
    assert "the longest merge is that of flora" in said["seconds-by-part"].lower()
    for record in apart:
        for client in record["task"]["clients"]:
            client["label_counts"] = [10] * CLIENTS
    assert "as evenly as random dealing" in conclusions(apart)["examples-by-client"]


def test_exact_strategies_are_clipped_and_said_to_be(study_page: str) -> None:
    assert "zero among them, are drawn at 10⁻⁸" in Document(study_page).text


def test_decisions_and_refusals_are_listed(study_page: str) -> None:
    text = " ".join(Document(study_page).text.split())
    assert "blocks.0.query.lora_A holds 3 numbers that are NaN" in text
    assert "1–2, 5" in text
    quiet = Document(page_of([synthetic_record("fedavg")])).text
    assert "No client was refused, failed or went missing." in quiet
    assert "No merge vetoed a client" in quiet


def test_alarms_of_the_merge_are_listed_with_their_rounds() -> None:
    record = synthetic_record("copra-merge", rounds=4)
    for entry in record["rounds"][1:3]:
        entry["merge"] = entry["merge"] | {"alarm": "the rank keeps too little"}
    text = " ".join(Document(page_of([record])).text.split())
    assert "Alarms of the merge" in text
    assert "the rank keeps too little" in text
    assert [(row["alarm"], row["rounds"]) for row in alarms([record])] == [
        ("the rank keeps too little", "2–3")
    ]
    assert "Alarms of the merge" not in Document(page_of([synthetic_record("fedavg")])).text


def test_the_size_of_the_probe_is_told_beside_the_other_examples() -> None:
    record = synthetic_record("copra-merge")
    assert "1100 train, 300 probe, 360 test" in Document(page_of([record])).text
    record["task"]["sizes"]["probe"] = 0
    assert "1100 train, 360 test" in Document(page_of([record])).text


def test_copra_is_reported_only_where_it_varied(study_page: str) -> None:
    assert "With CopRA, the accuracy of" in Document(study_page).text
    unvaried = page_of([synthetic_record("fedavg"), synthetic_record("flora")])
    assert "This comparison did not vary it" in unvaried


def test_other_settings_that_differ_are_named() -> None:
    other = synthetic_record("flora")
    other["experiment"]["partition"]["alpha"] = 5.0
    page = page_of([synthetic_record("fedavg"), other])
    assert "the runs differ in partition.alpha (0.3, 5.0)" in page
    assert "the runs differ" not in page_of([synthetic_record("fedavg")])


def test_by_task_runs_show_tasks() -> None:
    records = [by_task_record("fedavg"), by_task_record("flora")]
    assert "docstrings: " in conclusions(records)["examples-by-client"]
    assert "By task" in Document(page_of(records)).text


def test_a_personalised_method_is_judged_on_own_labels_alone() -> None:
    records = [synthetic_record(name, seed) for name in ("fedavg", "fedsa-lora") for seed in (0, 1)]
    by_name = {panel.name: panel for panel in panels(by_label(records))}
    for name in ("accuracy-by-round", "accuracy-by-bytes"):
        assert [key.label for key in by_name[name].legend] == ["fedavg"]
        assert "fedsa-lora" not in by_name[name].conclusion
    assert [key.label for key in by_name["own-accuracy-by-round"].legend] == [
        "fedavg",
        "fedsa-lora",
    ]
    said = headline(by_label(records), compare(records))
    assert "fedavg ends at" in said[0]
    assert "fedsa-lora, personalised, ends at" in " ".join(said)
    assert "Against fedavg, judged alike, it is" in " ".join(said)
    assert "No finite final value" not in " ".join(said)
    assert "own-accuracy-by-round" not in [
        panel.name for panel in panels(by_label([synthetic_record("fedavg")]))
    ]


def test_a_page_of_personalised_methods_alone() -> None:
    page = page_of([synthetic_record("fedsa-lora", seed) for seed in (0, 1)])
    document = Document(page)
    assert "there is no single model to score" in document.text
    assert "accuracy-by-round" not in document.ids
    assert "own-accuracy-by-round" in document.ids
    assert "fedsa-lora, personalised, ends at" in document.text
    assert not re.search(r"\bnan\b|\bNone\b", document.text)


def test_rounds_without_scores_are_bridged() -> None:
    """The line is drawn straight between scores, and still climbs in the last quarter."""
    record = synthetic_record("fedavg", rounds=12, evaluate_every=5)
    found = {panel.name: panel for panel in panels(by_label([record]))}
    assert "fedavg still gained more than a point" in found["accuracy-by-round"].conclusion
    flat = synthetic_record("fedavg", rounds=12, evaluate_every=5)
    for entry in flat["rounds"][4:]:
        entry["accuracy"] = entry["accuracy"] and 0.8
    flat["final"]["accuracy"] = 0.8
    assert "No line gained" in conclusions([flat])["accuracy-by-round"]
    assert not re.search(r"\bnan\b|\bNone\b", Document(page_of([record])).text)


def test_layers_are_those_of_the_first_label_that_misses_something() -> None:
    records = [synthetic_record(name) for name in ("flora", "fedavg")]
    for entry in records[1]["rounds"]:
        entry["modules"]["vit.layers.2.attention.v_proj"]["factor_covariance"] = 0.77
    panel = {p.name: p for p in panels(by_label(records))}["aggregation-error-by-layer"]
    assert panel.shows.startswith("fedavg, by module")
    assert "most in 2.v_proj (77%)" in panel.conclusion
    assert "averaging the factors would miss 5.8% of the exact mean" in panel.conclusion
    assert panel.drawing.count("aggregation error") == 1
    assert len(panel.numbers) == 2 * len(MODULES)
    # Where the factors are averaged, both maps would be the same.
    for entry in records[1]["rounds"]:
        for module in entry["modules"].values():
            module["aggregation_error"] = module["factor_covariance"]
    panel = {p.name: p for p in panels(by_label(records))}["aggregation-error-by-layer"]
    assert "aggregation error" not in panel.drawing
    assert "because it averages the factors" in panel.shows


def test_small_covariances_are_called_small() -> None:
    record = synthetic_record("flora")
    for entry in record["rounds"]:
        entry["factor_covariance"] /= 100
    said = conclusions([record])["aggregation-error-by-layer"]
    assert "next to nothing to put right" in said
    assert (
        "next to nothing"
        not in conclusions([synthetic_record("flora")])["aggregation-error-by-layer"]
    )


def test_bytes_are_told_by_kind_and_direction() -> None:
    records = [
        synthetic_record(name) for name in ("fedavg", "ffa-lora", "fedsa-lora", "local-only")
    ]
    for entry in records[1]["rounds"]:
        for kinds in (entry["bytes"]["down"], *(c["bytes"]["down"] for c in entry["clients"])):
            kinds["residual"] = 3 * kinds["total"]
            kinds["total"] *= 4
    said = " ".join(traffic(compare(records)["ledger"]))
    assert "A client of fedsa-lora sends and receives 60.6 kB a round, both ways, the least" in said
    assert "one of ffa-lora 152 kB, the most" in said
    assert "A client of ffa-lora receives 4 times what it sends" in said
    assert "Asking clients of fedsa-lora to score their own models took 4.8 kB a run" in said
    assert "local-only" not in said
    page = page_of(records)
    ledger = page[page.index('id="ledger"') : page.index('id="copra"')]
    headings = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', ledger)
    assert headings[2:6] == ["A", "B", "head", "residual"]
    assert "local-only" not in ledger


def test_budgets_name_who_is_ahead_and_only_once_someone_is() -> None:
    records = [
        synthetic_record(name, rounds=4, evaluate_every=2) for name in ("fedavg", "ffa-lora")
    ]
    panel = {p.name: p for p in panels(by_label(records))}["accuracy-by-bytes"]
    # A quarter of the cheapest is one of its rounds, and no first round was scored.
    assert "by 606 kB" not in panel.conclusion
    assert "Ahead on average: ffa-lora by 1.21 MB" in panel.conclusion
    assert panel.columns == ("Method", "by 606 kB", "by 1.21 MB", "by 2.42 MB", "in all")
    assert [row[0] for row in panel.numbers] == ["fedavg", "ffa-lora"]


def test_experiment_reads_like_its_file() -> None:
    assert toml_like({"a": {"b": 1, "gone": None, "c": {"d": ["x"]}}, "top": True}) == (
        'top = true\n\n[a]\nb = 1\n\n[a.c]\nd = ["x"]'
    )


def test_odd_records_still_make_a_page() -> None:
    diverged = synthetic_record("fedavg", label="diverged")
    for point in (*diverged["rounds"][6:], diverged["final"]):
        point["accuracy"] = point["loss"] = math.nan
    unmeasured = synthetic_record("flora", label="unmeasured")
    for entry in unmeasured["rounds"]:
        entry["aggregation_error"] = None
        entry["merge"] = {}
    unmeasured["environment"]["git"] = None
    many = [synthetic_record("fedavg", label=f"variant {n}", rounds=2) for n in range(12)]
    only_control = [synthetic_record("centralised", rounds=1)]
    no_clients = synthetic_record("fedavg", rounds=1)
    no_clients["task"]["clients"] = []
    unlayered = synthetic_record("fedavg", label="unlayered")
    for entry in unlayered["rounds"][::2]:
        del entry["modules"]
    del unlayered["rounds"][1]["modules"]["vit.layers.0.attention.q_proj"]
    for records in (
        [diverged],
        [unmeasured, diverged],
        many,
        only_control,
        [no_clients],
        [unlayered],
    ):
        text = Document(page_of(records)).text
        assert not re.search(r"\bnan\b|\bNone\b", text)


# Colours.


def test_marks_tell_labels_apart() -> None:
    records = [synthetic_record("fedavg", label=f"variant {n}", rounds=1) for n in range(32)]
    chosen = marks(by_label(records)).values()
    assert len({(mark.ink, mark.dashes) for mark in chosen}) == 32


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_line_colours_stand_out_from_the_card(study_page: str) -> None:
    light, dark = re.findall(r"--card: (#[0-9a-f]{6})", study_page)
    assert min(contrast(colours[0], light) for colours in PALETTE) >= 3
    assert min(contrast(colours[1], dark) for colours in PALETTE) >= 3


# Files.


def keep(record: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_write_report_reads_runs_and_comparisons(tmp_path: Path) -> None:
    one = keep(synthetic_record("flora"), tmp_path / "one")
    out = write_report([one], tmp_path / "new" / "report.html")
    assert "Run on digits" in out.read_text(encoding="utf-8")
    study = tmp_path / "study"
    for name in ("fedavg", "flora"):
        for seed in (10, 2):
            keep(synthetic_record(name, seed), study / f"{name}-{seed}")
    page = write_report([study], tmp_path / "study.html").read_text(encoding="utf-8")
    assert "Comparison of 4 runs on digits" in page
    assert 'Differences are to <b class="method">fedavg' in page
    # A comparison says itself which label came first.
    (study / "comparison.json").write_text(json.dumps({"rows": [{"label": "flora"}]}))
    page = write_report([study], tmp_path / "study.html").read_text(encoding="utf-8")
    assert 'Differences are to <b class="method">flora' in page
    assert not list(tmp_path.glob(".*"))


def test_mistakes_name_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedcopraError, match="empty: there is no record"):
        write_report([tmp_path / "empty"], out)
    with pytest.raises(FedcopraError, match="nowhere"):
        write_report([tmp_path / "nowhere"], out)
    broken = keep(synthetic_record(), tmp_path / "broken") / "record.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(FedcopraError, match=r"broken.record\.json: cannot be read as JSON"):
        write_report([tmp_path / "broken"], out)
    broken.write_text('{"format": 7}', encoding="utf-8")
    with pytest.raises(FedcopraError, match="format = 7"):
        write_report([tmp_path / "broken"], out)
    broken.write_text('{"format": 2, "label": "x"}', encoding="utf-8")
    with pytest.raises(FedcopraError, match=r"seed, experiment.* is missing"):
        write_report([tmp_path / "broken"], out)
    assert not out.exists()


def test_a_failed_report_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(synthetic_record("fedavg", rounds=1), tmp_path / "run")
    out = tmp_path / "report.html"
    out.write_text("old", encoding="utf-8")
    # A lone surrogate cannot be written as UTF-8: the write fails half-way.
    monkeypatch.setattr(report, "render", lambda *_: "begun \ud800")
    with pytest.raises(UnicodeEncodeError):
        write_report([folder], out)
    assert out.read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


# In a browser.

QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
# The text's colour, and that of the nearest background behind it, as the browser has them.
COLOURS = """element => {
  const style = getComputedStyle(element);
  const text = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
  let behind = element;
  const background = node => getComputedStyle(node).backgroundColor;
  while (behind.parentElement && background(behind).endsWith(", 0)")) behind = behind.parentElement;
  return [text, background(behind)];
}"""
SIZES = """text => {
  const svg = text.ownerSVGElement;
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const box = text.getBoundingClientRect(), frame = svg.closest("figure").getBoundingClientRect();
  const inside = box.left >= frame.left && box.right <= frame.right;
  return [parseFloat(getComputedStyle(text).fontSize) * scale, box.width, inside];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TEST: playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip(f"NO BROWSER TEST: none of {', '.join(names)} is installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=QUIET.split())
        yield started
        started.close()


def hexadecimal(colour: str) -> str:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1200, 900)])
def test_browser_shows_it_whole(
    browser: Any, study_page: str, tmp_path: Path, scheme: str, width: int, height: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text(study_page, encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert (messages, requests) == ([], [path.as_uri()])

    for opened in (False, True):
        page.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {int(opened)})")
        across, room = page.evaluate(
            "(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.documentElement)"
        )
        assert across <= room

    text, background = page.locator("body").evaluate(COLOURS)
    assert contrast(hexadecimal(text), hexadecimal(background)) >= 12
    assert (luminance(hexadecimal(background)) < 0.1) == (scheme == "dark")
    for selector in (".lead", ".note", "figcaption p", ".drawing text", ".verdict", ".facts dt"):
        for element in page.locator(selector).all():
            text, background = element.evaluate(COLOURS)
            assert contrast(hexadecimal(text), hexadecimal(background)) >= 4.5, selector

    figures = page.locator(".drawing text").all()
    assert len(figures) > 50
    for element in figures:
        size, across, inside = element.evaluate(SIZES)
        assert size >= 10
        assert across > 0
        assert inside
    page.close()


@pytest.mark.browser
def test_long_names_do_not_widen_a_phone_page(browser: Any, tmp_path: Path) -> None:
    label = "copra-merge · " + "an.unbroken.setting" * 5
    path = tmp_path / "report.html"
    records = [
        synthetic_record(name, label=label + name, refused=1) for name in ("fedavg", "flora")
    ]
    path.write_text(page_of(records), encoding="utf-8")
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(element.evaluate(SIZES)[2] for element in page.locator(".drawing text").all())
    page.close()


def test_the_same_run_in_two_folders_counts_once(tmp_path: Path) -> None:
    """A run stands alone and in a comparison."""
    record = synthetic_record("fedavg", 0)
    for name in ("alone", "compared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    page = write_report([tmp_path / "alone", tmp_path / "compared"], tmp_path / "page.html")
    assert "Comparison of" not in page.read_text()


def test_two_runs_of_one_label_and_seed_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    record = synthetic_record("fedavg", 0)
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps({**record, "digest": name}))
    page = write_report([tmp_path / "A", tmp_path / "B"], tmp_path / "page.html").read_text()
    assert "Comparison of 2 runs" in page
    assert f"fedavg · {tmp_path / 'A'}" in page
