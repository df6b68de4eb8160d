"""Write the report: one HTML file, of one run or of a comparison, that works offline.

Reads plain records only; it neither trains nor loads a model, and needs no PyTorch and no Flower.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.errors import DataError
from common.package_files import package_file
from server.folders import CHOOSING, FORMAT
from server.reporting.analyses import ANALYSES, analysis_files
from server.reporting.choices import choice_rows, price_of_choosing
from server.reporting.comparison import (
    DIRECTIONS,
    Comparison,
    Groups,
    Record,
    by_label,
    compare,
    copra_enabled,
)
from server.reporting.drawing import PALETTE
from server.reporting.figures import Panel, panels, with_lora
from server.reporting.findings import copra_effects, headline, own_standing, traffic
from server.reporting.prompt_panels import prompt_panels
from server.reporting.weights import weight_panels
from server.reporting.wording import (
    amount_of_bytes,
    count_of,
    duration,
    interval,
    percent,
    points,
    relative_error,
    spoken,
)

# fmt: off
PARTS = (
    "label", "seed", "experiment", "strategy", "environment", "task",
    "start", "digest", "rounds", "final",
)
# fmt: on


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs in `folders` to `out`, whole or not at all; return `out`.

    A folder holds a `record.json`, or is a comparison whose sub-folders do. The first label found
    is the one the others are held to: folders count in the order given, and the sub-folders of a
    comparison in the order of its `comparison.json`, or else by name.

    Raises:
        DataError: naming the folder without a record, or the file that is none.
    """
    records = tell_apart([(Path(f), record) for f in folders for record in read_records(Path(f))])
    comparison = compare(records)
    tasks = list(dict.fromkeys(str(record["task"]["name"]) for record in records))
    what = "Run" if len(records) == 1 else f"Comparison of {len(records)} runs"
    choices = [choice for folder in folders for choice in _choices(Path(folder))]
    page = render(
        records, comparison, f"{what} on {spoken(tasks)}", choices, _analysis_panels(folders)
    )
    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out} is a folder: name the report's file")
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(out)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return out


def read_records(folder: Path) -> list[Record]:
    """Return the record in `folder`, or those in the folders below it, label by label."""
    if (folder / "record.json").is_file():
        return [_read_record(folder / "record.json")]
    paths = sorted(folder.rglob("record.json"))
    # Runs that only served to choose settings are no part of what is compared.
    compared = [path for path in paths if CHOOSING not in path.relative_to(folder).parts]
    records = [_read_record(path) for path in compared]
    if not records:
        raise DataError(f"{folder}: there is no record.json, neither here nor in a folder below")
    labels = [record["label"] for record in records]
    if (folder / "comparison.json").is_file():
        rows = _read_json(folder / "comparison.json").get("rows", [])
        labels = [row["label"] for row in rows if "label" in row] + labels
    order = list(dict.fromkeys(labels))
    return sorted(records, key=lambda record: (order.index(record["label"]), record["seed"]))


def tell_apart(found: Sequence[tuple[Path, Record]]) -> list[Record]:
    """Return every run once, and name the folder where two different runs share label and seed.

    The same run may stand in two folders, alone and in a comparison: same experiment, same digest.
    """
    kept: dict[tuple[str, int], Record] = {}
    clashing = set()
    unlike = []
    for folder, record in found:
        other = kept.setdefault((record["label"], record["seed"]), record)
        if other is not record and all(
            other.get(key) == record.get(key) for key in ("experiment", "digest")
        ):
            continue
        if other is not record:
            clashing.add(record["label"])
        unlike.append((folder, record))
    return [
        {**record, "label": f"{record['label']} · {folder}"}
        if record["label"] in clashing
        else record
        for folder, record in unlike
    ]


def _read_record(path: Path) -> Record:
    record = _read_json(path)
    if record.get("format") != FORMAT:
        raise DataError(f"{path}: format = {record.get('format')}, and this version reads {FORMAT}")
    missing = [name for name in PARTS if name not in record]
    if missing:
        raise DataError(f"{path}: not a whole record, {spoken(missing)} is missing")
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object")
    return content


def _choices(folder: Path) -> list[Mapping[str, Any]]:
    file = folder / "comparison.json"
    found = _read_json(file).get("choices", []) if file.is_file() else []
    return list(found)


def _analysis_panels(folders: Sequence[Path]) -> list[Panel]:
    """Return the panels of all analyses in these folders and those below."""
    found: list[Panel] = []
    for folder in folders:
        for record in sorted(Path(folder).rglob("record.json")):
            if CHOOSING in record.relative_to(folder).parts:
                continue
            for name, file in analysis_files(record.parent).items():
                found += ANALYSES[name](_read_json(file))
    # Drawings are told apart by name, also where several runs have the same analysis.
    return [replace(panel, name=f"{panel.name}-{n}") for n, panel in enumerate(found)]


def render(
    records: Sequence[Record],
    comparison: Comparison,
    title: str,
    choices: Sequence[Mapping[str, Any]] = (),
    analysed: Sequence[Panel] = (),
) -> str:
    """Return the report as one HTML document; equal records give equal documents."""
    groups = by_label(records)
    environment = Environment(
        loader=FileSystemLoader(package_file("server/reporting/report.html.jinja").parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**FILTERS, "emphasise": emphasise_any_of(list(groups))}
    return environment.get_template("report.html.jinja").render(
        title=title,
        palette=PALETTE,
        headline=headline(groups, comparison),
        facts=facts(records),
        cautions=cautions(groups),
        comparison=comparison,
        paired={pair["label"]: pair for pair in comparison["paired"]},
        own_paired={pair["label"]: pair for pair in comparison["own"]["paired"]},
        own_standing=own_standing(groups),
        kinds=_kinds(comparison["ledger"]),
        traffic=traffic(comparison["ledger"]),
        choices=choice_rows(choices),
        price_of_choosing=price_of_choosing(choices),
        several_seeds=any(len(members) > 1 for members in groups.values()),
        strategies=list({r["strategy"]["name"]: r["strategy"] for r in records}.values()),
        panels=[*panels(groups), *prompt_panels(groups), *weight_panels(groups), *analysed],
        with_lora=bool(with_lora(groups)),
        with_prompts=len(with_lora(groups)) < len(groups),
        copra_effects=copra_effects(comparison),
        copra_settings=sorted({"on" if copra_enabled(record) else "off" for record in records}),
        vetoes=vetoes(records),
        decisions=decisions(records),
        alarms=alarms(records),
        diagnostics=diagnostics(groups),
        absences=absences(records),
        environments=environments(records),
        experiments={label: toml_like(rows[0]["experiment"]) for label, rows in groups.items()},
    )


def _kinds(ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every kind of numbers that travelled: the usual ones first, then by name."""
    found = {kind for row in ledger for way in DIRECTIONS for kind in row[way]["kinds"]}
    usual = [kind for kind in ("A", "B", "head", "prompt") if kind in found]
    return [*usual, *sorted(found - set(usual))]


# What was run.

Fact = Callable[[Record], str]


def _task(record: Record) -> str:
    task = record["task"]
    name = spoken([str(member) for member in task.get("tasks") or [task["name"]]])
    return f"{name} ({task['kind']})" if task.get("kind") else name


def _examples(record: Record) -> str:
    sizes = record["task"].get("sizes") or {}
    scored = record["task"].get("evaluated_on", "test")
    return ", ".join(
        f"{sizes[split]} {split}" for split in ("train", "probe", scored) if sizes.get(split)
    )


def _partition(record: Record) -> str:
    partition = record["experiment"]["partition"]
    detail = {"dirichlet": "alpha", "classes": "classes"}.get(partition["kind"])
    return f"{partition['kind']}, {detail} {partition[detail]}" if detail else partition["kind"]


def _clients(record: Record) -> str:
    fraction = record["experiment"]["federation"].get("fraction", 1)
    share = "" if fraction == 1 else f", {percent(fraction, 0)} each round"
    return f"{record['experiment']['partition']['clients']}{share}"


def _training(record: Record) -> str:
    train = record["experiment"]["train"]
    rate = train["learning_rate"]
    return f"{train['local_steps']} steps × {train['batch_size']} examples, learning rate {rate:g}"


def _backbone(record: Record) -> str:
    source = record["experiment"]["backbone"]
    return str(source.get("name") or Path(source.get("path") or source.get("hub") or "?").name)


def _adapter(record: Record) -> str:
    adapter = record["experiment"]["adapter"]
    return f"{adapter['kind']}, {_SIZES[adapter['kind']](adapter, record['task']['kind'])}"


def _ranks(adapter: Mapping[str, Any], _: str) -> str:
    ranks = adapter.get("ranks") or [adapter["rank"]]
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {spoken([str(rank) for rank in ranks])}"


def _vectors(adapter: Mapping[str, Any], kind: str) -> str:
    prompt = adapter["prompt"]
    said = []
    if prompt["length"]:
        whose = " and class" if prompt["class_specific"] else ""
        whose += ", one prompt a task" if prompt.get("task_specific") else ""
        several = f" in each of {prompt['prompts']} prompts" if prompt["prompts"] > 1 else ""
        place = "text" if kind == "text" else "caption"
        said.append(f"{count_of(prompt['length'], 'vector')} a {place}{whose}{several}")
    if prompt["visual"]:
        blocks = count_of(prompt["visual_blocks"], "block")
        said.append(f"{prompt['visual']} a picture in {blocks}")
    transfer = adapter.get("transfer", {"kind": "none"})
    if transfer["kind"] != "none":
        names = spoken([Path(source).stem for source in transfer["sources"]])
        if (control := transfer.get("control", "none")) != "none":
            names = f"{control} vectors in place of {names}"
        said.append(f"{transfer['kind']} transfer of {names}")
    return spoken(said) if said else "linear head alone"


_SIZES: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
    "lora": _ranks,
    "prompt": _vectors,
}


def _copra(record: Record) -> str:
    if record["experiment"]["adapter"]["kind"] != "lora":
        return ""
    copra = record["experiment"].get("copra", {})
    return f"on (from {copra['initial']}, ramp {copra['ramp']})" if copra_enabled(record) else "off"


def _nemesis(record: Record) -> str:
    if record["experiment"]["adapter"]["kind"] != "prompt":
        return ""
    nemesis = record["experiment"]["nemesis"]
    if nemesis["kind"] == "none":
        return "off"
    return f"{nemesis['kind']} (strength {nemesis['strength']:g}, {nemesis['schedule']})"


FACTS: Mapping[str, Fact] = {
    "Task": _task,
    "Examples": _examples,
    "Backbone": _backbone,
    "Adapter": _adapter,
    "Partition": _partition,
    "Clients": _clients,
    "Rounds": lambda record: str(len(record["rounds"])),
    "Local training": _training,
    "CopRA": _copra,
    "Nemesis": _nemesis,
    "Seeds": lambda record: str(record["seed"]),
}


def facts(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return what was run, fact by fact, with every value that occurs; no fact without one."""
    found = {name: list(dict.fromkeys(map(fact, records))) for name, fact in FACTS.items()}
    return {name: list(filter(None, values)) for name, values in found.items() if any(values)}


def cautions(groups: Groups) -> list[str]:
    """Return what to hold against the numbers: settings that differ, and the test set's size."""
    first = next(iter(groups.values()))[0]
    said = []
    differing: dict[str, list[str]] = {}
    settings = [dict(_leaves(members[0]["experiment"])) for members in groups.values()]
    on_purpose = {"strategy", "copra", "nemesis"}
    for key in dict.fromkeys(key for leaves in settings for key in leaves):
        values = list(dict.fromkeys(json.dumps(leaves.get(key)) for leaves in settings))
        varied_on_purpose = key.split(".")[0] in on_purpose or key == "federation.seed"
        if len(values) > 1 and not varied_on_purpose:
            differing[key] = values
    if first["task"].get("evaluated_on", "test") != "test":
        said.append("Scored on validation examples: fit to choose settings by, not to report.")
    if differing:
        listed = [f"{key} ({', '.join(values)})" for key, values in differing.items()]
        prompts = len(with_lora(groups)) < len(groups)
        beside = "Nemesis" if prompts else "CopRA"
        said.append(f"Besides strategy and {beside}, the runs differ in {spoken(listed)}.")
    scored = first["task"].get("evaluated_on", "test")
    examples = (first["task"].get("sizes") or {}).get(scored)
    share = first["final"]["accuracy"]
    one_task = not first["task"].get("tasks")
    if one_task and examples and share is not None and 0 <= share <= 1:
        error = math.sqrt(share * (1 - share) / examples)
        said.append(
            f"Measured on {examples} {scored} examples, an accuracy near {percent(share)} has a "
            f"standard error of about {points(error, sign=False)} from the choice of these "
            "examples alone, on top of the seeds."
        )
    return said


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# What the server decided, and who was absent.

Event = tuple[Record, int, dict[str, Any]]


def vetoes(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return which client each run's merge left out, and in which rounds."""
    return _by_rounds(
        (record, entry["round"], {"client": client})
        for record in records
        for entry in record["rounds"]
        for client in entry.get("merge", {}).get("vetoed") or []
    )


def decisions(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what each run's merge says it decided, and in which rounds."""
    return _by_rounds(
        (record, entry["round"], {"decision": _written(decision)})
        for record in records
        for entry in record["rounds"]
        if (decision := entry.get("merge", {}).get("decision"))
    )


def alarms(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what each run's merge warns of, and in which rounds."""
    return _by_rounds(
        (record, entry["round"], {"alarm": alarm})
        for record in records
        for entry in record["rounds"]
        if (alarm := entry.get("merge", {}).get("alarm"))
    )


def absences(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the clients whose update did not count: refused, failed or missing, and why."""
    return _by_rounds(
        (
            record,
            entry["round"],
            {
                "client": client["client"],
                "status": client["status"],
                "reason": client.get("reason") or "no reason given",
            },
        )
        for record in records
        for entry in record["rounds"]
        for client in entry.get("clients", [])
        if client["status"] != "ok"
    )


def diagnostics(groups: Groups) -> list[dict[str, Any]]:
    """Return the numbers that merges report, first and last round, as means over seeds."""
    found = []
    for label, members in groups.items():
        merges = [[entry.get("merge", {}) for entry in r["rounds"]] for r in members if r["rounds"]]
        names = dict.fromkeys(key for run in merges for merge in run for key in merge)
        for name in names:
            first = [run[0].get(name) for run in merges]
            last = [run[-1].get(name) for run in merges]
            if all(_is_number(value) for value in first + last):
                found.append(
                    {
                        "label": label,
                        "name": name.replace("_", " "),
                        "first": f"{math.fsum(first) / len(first):.4g}",
                        "last": f"{math.fsum(last) / len(last):.4g}",
                    }
                )
    return found


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _by_rounds(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Gather equal events of one label: the rounds of a seed, and the seeds of equal rounds."""
    seen: dict[str, tuple[dict[str, Any], dict[int, list[int]]]] = {}
    for record, number, event in events:
        row = {"label": record["label"], **event}
        _, rounds = seen.setdefault(json.dumps(row), (row, {}))
        rounds.setdefault(record["seed"], []).append(number)
    gathered = []
    for row, rounds in seen.values():
        written = {seed: spans(numbers) for seed, numbers in rounds.items()}
        gathered += [
            {**row, "seeds": spans([s for s in written if written[s] == span]), "rounds": span}
            for span in dict.fromkeys(written.values())
        ]
    return gathered


def spans(numbers: Sequence[int]) -> str:
    """Write ascending numbers with runs shortened.

    >>> spans([1, 2, 3, 5])
    '1–3, 5'
    """
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}–{high}" for low, high in ranges)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# How to do it again.


def environments(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return each distinct environment with the runs that it held."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        entry = found.setdefault(
            json.dumps(record["environment"], sort_keys=True),
            {"facts": _environment_facts(record["environment"]), "runs": []},
        )
        entry["runs"].append(f"{record['label']}, seed {record['seed']}")
    return list(found.values())


def _environment_facts(environment: Mapping[str, Any]) -> dict[str, str]:
    git = environment.get("git")
    dirty = " with uncommitted changes" if git and git.get("dirty") else ""
    return {
        "Python": str(environment.get("python", "unknown")),
        **{str(name): str(v) for name, v in sorted((environment.get("versions") or {}).items())},
        "Platform": str(environment.get("platform", "unknown")),
        "Device": str(environment.get("device", "unknown")),
        "Git": f"{git['commit']}{dirty}" if git else "not a git checkout",
    }


def toml_like(tables: Mapping[str, Any], path: str = "") -> str:
    """Write nested settings the way an experiment file does; what is not set is left out."""
    values = {k: v for k, v in tables.items() if v is not None and not isinstance(v, Mapping)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    block = "\n".join([f"[{path}]", *lines] if path and lines else lines)
    inner = [
        toml_like(value, f"{path}.{key}" if path else str(key))
        for key, value in tables.items()
        if isinstance(value, Mapping)
    ]
    return "\n\n".join(part for part in (block, *inner) if part)


def plain_number(value: float | None) -> str:
    """Write a loss with three decimals."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def signed(value: float | None) -> str:
    """Write a difference between losses with its sign and three decimals."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def probability(value: float | None) -> str:
    """Write a p value: three decimals, and no smaller than that."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def emphasise_any_of(labels: Sequence[str]) -> Callable[[str], Markup]:
    """Return a filter that sets these names off from the sentence around them."""
    names = [re.escape(str(escape(label))) for label in sorted(labels, key=len, reverse=True)]
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(names)})(?![\w-])")
    return lambda text: Markup(pattern.sub(r'<b class="method">\g<0></b>', str(escape(text))))


def with_sign(write: Callable[[float], str]) -> Callable[[float], str]:
    """Return `write` with a plus before what is above zero."""
    return lambda value: f"{'+' if value > 0 else ''}{write(value)}"


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "points": points,
    "amount_of_bytes": amount_of_bytes,
    "duration": duration,
    "relative_error": relative_error,
    "plain_number": plain_number,
    "signed": signed,
    "probability": probability,
    "spoken": spoken,
    "bare_points": lambda value: points(value, unit=False),
    "signed_bytes": with_sign(amount_of_bytes),
    "signed_duration": with_sign(duration),
    "filter_named": lambda value, name: FILTERS[name](value),
    "interval_of": lambda bounds, name: interval(bounds, FILTERS[name]),
}
