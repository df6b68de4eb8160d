"""Tasks: labelled rows from a shipped source, a local folder or zip, or a hub data set.

A task is data only. What a source must offer is one function `TaskSource -> SourceRows`; splitting,
the server's probe set and every check are done once, here, for all of them. Rows are split by the
task's name alone, so every seed and every strategy is judged on the same test rows.
"""

import csv
import functools
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.config import SITE, Task, TaskSource
from common.errors import ConfigError, DataError
from common.installed_text import INSTALLED_TEXT
from common.published_tasks import PUBLISHED_TASKS, PublishedTask
from common.seeds import numpy_generator

Kind = Literal["text", "image"]
SERVER = "server"  # the site that is the server
TextInput = tuple[str, ...]  # one text, or a pair


class ZippedPicture(NamedTuple):
    """A picture inside a zip: where it stands, and its file."""

    place: str
    content: bytes


ImageInput = Image.Image | Path | ZippedPicture


class Split(NamedTuple):
    """Rows of one split: `inputs` (n,) and `labels` (n,), int64 indices into the label list."""

    inputs: Sequence[Any]  # of `TextInput` or of `ImageInput`
    labels: NDArray[np.int64]

    def select(self, rows: NDArray[np.int64]) -> "Split":
        """Return the rows at these positions, in this order."""
        return Split([self.inputs[row] for row in rows], self.labels[rows])

    def cut(self, part: slice) -> "Split":
        """Return a part of the rows."""
        return Split(self.inputs[part], self.labels[part])

    def __len__(self) -> int:
        """Return the number of rows (not of fields)."""
        return len(self.labels)


_SPLITS = ("train", "validation", "test")
_NO_ROWS = Split((), np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class SourceRows:
    """What a source offers: its own splits, before anything is cut out of them."""

    kind: Kind
    labels: tuple[str, ...]
    splits: Mapping[str, Split]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledTask:
    """A task ready for use; its four splits share no row. Prompts call labels by `class_names`."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    train: Split
    validation: Split
    probe: Split
    test: Split
    class_names: tuple[str, ...] = ()


def load_tasks(config: Task, site: str = SERVER) -> tuple[LabelledTask, ...]:
    """Load every task of the experiment, once a process.

    `site` says whose folder, where everyone has one. Nothing is cut from the rows of a client's.

    Raises:
        ConfigError: an unknown task name, or a folder that is not there.
        DataError: rows that cannot be used; the message names the file and the row.
    """
    return tuple(_load(source, config, site) for source in config.sources)


def load_shifts(config: Task) -> tuple[LabelledTask, ...]:
    """Load the tasks that a model is scored on though nothing of them is trained on; all rows.

    Raises:
        ConfigError, DataError: as `load_tasks`.
    """
    whole = config.model_copy(update={"limit": 0, "probe_examples": 0})
    return tuple(_load(source, whole, SERVER) for source in config.shifts)


@functools.lru_cache(maxsize=16)
def _load(source: TaskSource, config: Task, site: str) -> LabelledTask:
    rows = _chosen_classes(_read(source, site), source)
    name = source.label
    train, validation, test = _as_they_are(rows) if site != SERVER else _cut(name, rows, config)
    if config.include_validation:
        labels = np.concatenate([train.labels, validation.labels])
        train = Split([*train.inputs, *validation.inputs], labels)
        validation = validation.cut(slice(0))
    if config.limit:
        train = train.select(_shuffled(len(train), name, "limit")[: config.limit])
    probed = config.probe_examples if site == SERVER else 0
    probe_rows = _balanced(train.labels, probed // len(config.sources), name)
    kept = np.setdiff1d(np.arange(len(train)), probe_rows)
    return LabelledTask(
        name,
        rows.kind,
        rows.labels,
        train.select(kept),
        validation,
        train.select(probe_rows),
        test,
        rows.class_names,
    )


def _chosen_classes(rows: SourceRows, source: TaskSource) -> SourceRows:
    """Keep the classes that the source wants, renumbered, and what prompts call them."""
    if source.class_names and len(source.class_names) != len(rows.labels):
        raise ConfigError(
            f"task.class_names: {len(source.class_names)} names for the {len(rows.labels)} labels "
            f"of {source.label} ({', '.join(rows.labels[:8])}{', ...' * (len(rows.labels) > 8)})"
        )
    names = source.class_names or rows.class_names or rows.labels
    names = tuple(name.replace("_", " ") for name in names)
    if source.classes == "all":
        return replace(rows, class_names=names)
    middle = (len(rows.labels) + 1) // 2
    kept = {"base": slice(middle), "new": slice(middle, None)}[source.classes]
    chosen = range(len(rows.labels))[kept]
    if len(chosen) < 2:
        raise ConfigError(
            f"task.classes = {source.classes!r}: {source.label} would have {len(chosen)} classes; "
            "at least two are needed"
        )
    splits = {}
    for split, given in rows.splits.items():
        inside = given.select(np.flatnonzero(np.isin(given.labels, chosen)))
        splits[split] = Split(inside.inputs, inside.labels - chosen.start)
    return SourceRows(rows.kind, rows.labels[kept], splits, names[kept])


def _read(source: TaskSource, site: str) -> SourceRows:
    if source.name and source.name in PUBLISHED_TASKS:
        return _read_published(PUBLISHED_TASKS[source.name], source)
    if source.location:
        raise ConfigError(
            f"task.location = {source.location!r} is of published tasks, such as "
            f"{next(iter(PUBLISHED_TASKS))} (fedcopra list tasks); give task.path or task.hub"
        )
    if source.name:
        if source.name not in SHIPPED_TASKS:
            raise ConfigError(
                f"task.name = {source.name!r}: unknown; choose from {', '.join(SHIPPED_TASKS)}, "
                "a published one (fedcopra list tasks), or give task.path or task.hub"
            )
        return SHIPPED_TASKS[source.name].read()
    if source.path:
        return _read_path(Path(source.path.replace(SITE, site)).expanduser(), source)
    return _read_hub(source)


def _cut(name: str, rows: SourceRows, config: Task) -> tuple[Split, Split, Split]:
    """Return train, validation and test; a split that the source lacks is cut from its training.

    Where training rows are at sites, the server may have none.
    """
    train = rows.splits.get("train", _NO_ROWS) if config.at_sites else rows.splits["train"]
    order = _shuffled(len(train), name, "split")
    n_test = 0 if "test" in rows.splits else round(config.test_fraction * len(train))
    if config.examples:
        order = order[: n_test + config.examples]
    n_validation = 0
    if "validation" not in rows.splits:
        of = len(order) - n_test if config.examples else len(train)
        n_validation = round(config.validation_fraction * of)
    parts = np.split(order, [n_test, n_test + n_validation])
    cut_test, cut_validation, remaining = (train.select(np.sort(part)) for part in parts)
    test = rows.splits.get("test", cut_test)
    if not len(test) or not (len(remaining) or config.at_sites):
        raise DataError(f"task {name}: {len(train)} training rows are too few to split")
    return remaining, rows.splits.get("validation", cut_validation), test


def _as_they_are(rows: SourceRows) -> tuple[Split, Split, Split]:
    """Return train, validation and test as the source has them."""
    train, validation, test = (rows.splits.get(split, _NO_ROWS) for split in _SPLITS)
    return train, validation, test


def _shuffled(n: int, *stream: str) -> NDArray[np.int64]:
    return numpy_generator(0, "task", *stream).permutation(n)


def _balanced(labels: NDArray[np.int64], n: int, name: str) -> NDArray[np.int64]:
    """Choose `n` rows, as equal in class as possible, and never more than half of a class."""
    shuffled = [
        np.flatnonzero(labels == label)[_shuffled(int((labels == label).sum()), name, "probe")]
        for label in np.unique(labels)
    ]
    halves = [rows[: len(rows) // 2] for rows in shuffled]
    if sum(map(len, halves)) < n:
        raise DataError(
            f"task {name}: task.probe_examples asks for {n} rows, but half of its training rows "
            f"of every class are only {sum(map(len, halves))}; lower it or set it to 0"
        )
    # Turn by turn, one row of every class in random order, so that a prefix is balanced as well.
    generator = numpy_generator(0, "task", name, "turns")
    turns = [
        halves[label][turn]
        for turn in range(max(map(len, halves), default=0))
        for label in generator.permutation(len(halves))
        if turn < len(halves[label])
    ]
    return np.array(turns[:n], dtype=np.int64)


# --- shipped -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShippedTask:
    """A row of `fedcopra list tasks`."""

    summary: str
    read: Callable[[], SourceRows]


def _digits() -> SourceRows:
    """Return scikit-learn's 1,797 scanned digits, 8x8, enlarged to 20x20 in a 28x28 frame."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = []
    for pixels in digits.images:
        frame = Image.new("L", (28, 28))
        scan = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        frame.paste(scan.resize((20, 20), Image.Resampling.BILINEAR), (4, 4))
        pictures.append(frame)
    labels = tuple(str(digit) for digit in range(10))
    split = Split(pictures, digits.target.astype(np.int64))
    return SourceRows("image", labels, {"train": split}, _DIGIT_NAMES)


_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _installed_text(name: str) -> Callable[[], SourceRows]:
    def read() -> SourceRows:
        rows = INSTALLED_TEXT[name]()
        columns = [rows.text] if rows.text_pair is None else [rows.text, rows.text_pair]
        inputs: list[TextInput] = list(zip(*columns, strict=True))
        split = Split(inputs, np.array(rows.label, dtype=np.int64))
        return SourceRows("text", rows.labels, {"train": split})

    return read


SHIPPED_TASKS: Mapping[str, ShippedTask] = {
    "digits": ShippedTask("image: 1,797 scanned digits of scikit-learn, 10 classes", _digits),
    "docstrings": ShippedTask(
        "text: which installed library a docstring's summary comes from",
        _installed_text("docstrings"),
    ),
    "docstring-kinds": ShippedTask(
        "text: does a docstring's summary describe a class, a function, a method or a module",
        _installed_text("docstring-kinds"),
    ),
    "error-messages": ShippedTask(
        "text: which type of exception is raised with this message",
        _installed_text("error-messages"),
    ),
    "name-matches-summary": ShippedTask(
        "text pair: does this function name belong to this docstring's summary",
        _installed_text("name-matches-summary"),
    ),
}

# --- local folders and zips --------------------------------------------------------------------

_CLASS_NAMES = "classes.json"
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_EXPECTED = (
    "expected train.jsonl, train.csv or train.parquet (text), or train/<class>/<picture>, "
    "as a folder or a zip (images)"
)


def _read_path(path: Path, source: TaskSource) -> SourceRows:
    if not path.exists():
        raise ConfigError(f"task.path = {str(path)!r}: there is no such folder or file")
    tables = {
        split: path / (split + ending)
        for split in _SPLITS
        for ending in _TABLES
        if (path / (split + ending)).is_file()
    }
    if "train" in tables or (tables and source.at_sites):
        columns = {split: _read_table(file) for split, file in tables.items()}
        names = source.labels or _label_names(path / "labels.json")
        return _text_rows({s: str(f) for s, f in tables.items()}, source, columns, names)
    pictures = _zipped_pictures(path) if zipfile.is_zipfile(path) else _folder_pictures(path)
    if "train" not in pictures and not (pictures and source.at_sites):
        raise DataError(f"task.path = {str(path)!r}: {_EXPECTED}")
    return _image_rows(path, pictures, source.labels)


_Columns = dict[str, list[Any]]


def _read_table(file: Path) -> _Columns:
    """Return the columns; values are as the file has them, and None is missing."""
    try:
        columns = _TABLES[file.suffix](file)
    except (ValueError, OSError, csv.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} cannot be read: {reason}") from None
    if not any(columns.values()):
        raise DataError(f"{file} holds no rows")
    return columns


def _read_jsonl(file: Path) -> _Columns:
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every line must be a JSON object")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(file: Path) -> _Columns:
    with file.open(encoding="utf-8", newline="") as lines:
        header, *rows = [row for row in csv.reader(lines, strict=True) if row] or [[]]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(header)}")
    return {name: [row[at] for row in rows] for at, name in enumerate(header)}


def _read_parquet(file: Path) -> _Columns:
    import pyarrow.parquet

    columns: _Columns = pyarrow.parquet.read_table(file).to_pydict()
    return columns


_TABLES: Mapping[str, Callable[[Path], _Columns]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text_rows(
    places: Mapping[str, str],
    source: TaskSource,
    columns: Mapping[str, _Columns],
    names: tuple[str, ...] | None,
) -> SourceRows:
    """Check texts and labels; `places` says where each split comes from."""
    for split, table in columns.items():
        for wanted in (source.text_column, source.label_column):
            if wanted not in table:
                raise DataError(
                    f"{places[split]}: there is no column {wanted!r}; the columns are "
                    f"{', '.join(table)} (task.text_column and task.label_column choose others)"
                )
    labels = names or _labels_seen(columns["train"][source.label_column])
    splits = {}
    for split, table in columns.items():
        texts = [source.text_column, source.pair_column]
        inputs = list(zip(*(table[name] for name in texts if name in table), strict=True))
        for row, parts in enumerate(inputs):
            if not all(isinstance(part, str) for part in parts):
                raise DataError(f"{places[split]}, row {row}: {parts!r} is not text")
        indices = _label_indices(places[split], table[source.label_column], labels)
        splits[split] = Split(inputs, indices)
    return SourceRows("text", labels, splits)


def _label_names(file: Path) -> tuple[str, ...] | None:
    return _names_in(str(file), file.read_bytes()) if file.is_file() else None


def _names_in(place: str, content: bytes) -> tuple[str, ...]:
    """Return the names that a JSON file lists."""
    try:
        names = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{place} cannot be read: {error}") from None
    if not isinstance(names, list) or not names or len(set(map(str, names))) != len(names):
        raise DataError(f"{place} must be a list of different names")
    return tuple(map(str, names))


def _labels_seen(given: Sequence[Any]) -> tuple[str, ...]:
    """Return the labels of the training rows: 0 to the largest number, or all names, sorted."""
    seen = {label for label in given if not _is_missing(label)}
    if any(isinstance(label, str) for label in seen):
        return tuple(sorted(set(map(str, seen))))
    numbers = [_as_index(label) for label in seen]
    if None in numbers:
        return tuple(sorted(map(str, seen)))
    return tuple(str(number) for number in range(max(filter(None, numbers), default=0) + 1))


def _is_missing(label: Any) -> bool:
    return label is None or label == "" or label != label  # NaN is no label either


def _as_index(label: Any) -> int | None:
    """Return a label that is a whole number, or digits as a CSV file has them."""
    if isinstance(label, str):
        return int(label) if label.isdecimal() else None
    if isinstance(label, bool) or not isinstance(label, int | float) or label != int(label):
        return None
    return int(label)


def _label_indices(place: str, given: Sequence[Any], labels: tuple[str, ...]) -> NDArray[np.int64]:
    by_name = {name: index for index, name in enumerate(labels)}
    indices = np.empty(len(given), dtype=np.int64)
    for row, label in enumerate(given):
        if _is_missing(label):
            raise DataError(f"{place}, row {row}: there is no label")
        # A name first: the number 1 may be called "1" without being the second label.
        index = by_name.get(str(label), _as_index(label))
        if index is None or not 0 <= index < len(labels):
            shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
            raise DataError(
                f"{place}, row {row}: label {label!r} is outside the list of {len(labels)} "
                f"labels ({shown})"
            )
        indices[row] = index
    return indices


_Pictures = dict[str, list[tuple[str, Path | ZippedPicture]]]  # split -> (class, picture)


def _is_picture(split: str, file: str) -> bool:
    """Say whether a file counts; hidden ones are the droppings of file managers."""
    return split in _SPLITS and Path(file).suffix.lower() in _PICTURES and not file.startswith(".")


def _folder_pictures(path: Path) -> _Pictures:
    found: _Pictures = {}
    for file in sorted(path.glob("*/*/*")):
        split, label = file.parts[-3:-1]
        if _is_picture(split, file.name):
            found.setdefault(split, []).append((label, file))
    return found


def _zipped_pictures(path: Path) -> _Pictures:
    found: _Pictures = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            *_, split, label, file = ("", "", *Path(name).parts)
            if _is_picture(split, file):
                picture = ZippedPicture(f"{path}: {name}", archive.read(name))
                found.setdefault(split, []).append((label, picture))
    return found


def _names_of_pictured(path: Path) -> tuple[str, ...]:
    """Return what `classes.json` calls the classes, in the order of their folders; or nothing."""
    if not zipfile.is_zipfile(path):
        return _label_names(path / _CLASS_NAMES) or ()
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if Path(name).name == _CLASS_NAMES]
        return _names_in(f"{path}: {found[0]}", archive.read(found[0])) if found else ()


def _image_rows(path: Path, pictures: _Pictures, labels: tuple[str, ...]) -> SourceRows:
    labels = labels or tuple(sorted({label for label, _ in pictures["train"]}))
    names = _names_of_pictured(path)
    if names and len(names) != len(labels):
        raise DataError(
            f"{path}: {_CLASS_NAMES} has {len(names)} names, and there are {len(labels)} classes"
        )
    splits = {
        split: Split(
            [picture for _, picture in rows],
            _label_indices(f"{path}, split {split}", [label for label, _ in rows], labels),
        )
        for split, rows in pictures.items()
    }
    return SourceRows("image", labels, splits, names)


def open_picture(picture: ImageInput) -> Image.Image:
    """Decode one picture.

    Raises:
        DataError: it cannot be decoded; the message names it.
    """
    if isinstance(picture, Image.Image):
        return picture
    place, file = (
        (picture.place, io.BytesIO(picture.content))
        if isinstance(picture, ZippedPicture)
        else (str(picture), picture)
    )
    try:
        opened = Image.open(file)
        opened.load()
    except (OSError, SyntaxError) as error:
        raise DataError(f"{place} is no picture: {str(error).splitlines()[0]}") from None
    return opened


# --- hub ---------------------------------------------------------------------------------------


def _read_published(task: PublishedTask, source: TaskSource) -> SourceRows:
    """Read a published task from `location`, or from the hub's id in the table."""
    place = source.location or task.hub
    if Path(place).expanduser().exists():
        rows = _read_path(Path(place).expanduser(), source)
    elif not place:
        raise ConfigError(f"task.name = {source.name!r}: no hub id is known; give task.location")
    else:
        usual = TaskSource.model_fields
        columns = {k: v for k, v in task.columns.items() if getattr(source, k) == usual[k].default}
        there = source.model_copy(update={"name": None, "hub": place, **columns})
        try:
            rows = _read_hub(there, task.part, task.splits)
        except DataError as error:
            known = "" if task.verified or source.location else ", an id that was never verified"
            note = f"; {task.note}" if task.note else ""
            reason = str(error).partition("; for a local copy")[0]
            raise DataError(
                f"task.name = {source.name!r} at {place!r}{known}: {reason}; for a "
                f"folder or another id: --set task.location=PLACE{note}"
            ) from None
    if (rows.kind, len(rows.labels)) != (task.kind, task.classes):
        raise DataError(
            f"task.name = {source.name!r}: {place} has {rows.kind} of {len(rows.labels)} classes, "
            f"and the task is {task.kind} of {task.classes}"
        )
    return rows


_SAME_SPLITS = {split: split for split in _SPLITS}


def _read_hub(
    source: TaskSource, part: str = "", named: Mapping[str, str] = MappingProxyType(_SAME_SPLITS)
) -> SourceRows:
    """Read a data set of a hub; `named` says what it calls our splits."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        found = load_dataset(source.hub, *([part] if part else []))
        data = {ours: found[theirs] for ours, theirs in named.items() if theirs in found}
        data = {split: _labelled(rows, source.label_column) for split, rows in data.items()}
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"task.hub = {source.hub!r} cannot be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); for a local copy: --set task.path=FOLDER"
        ) from None
    if "train" not in data:
        raise DataError(f"task.hub = {source.hub!r} has no train split, only {', '.join(found)}")
    columns = {split: data[split].to_dict() for split in _SPLITS if split in data}
    features = data["train"].features
    if source.image_column in features:
        return _hub_images(source, data)
    names = getattr(features.get(source.label_column), "names", None)
    places = {split: f"{source.hub}, split {split}" for split in columns}
    return _text_rows(places, source, columns, tuple(names) if names else None)


def _labelled(rows: Any, column: str) -> Any:
    """Leave out rows whose label is -1, as hubs write that there is none."""
    if column not in rows.features:
        return rows
    labels = rows[column]
    kept = [row for row, label in enumerate(labels) if label != -1]
    return rows if len(kept) == len(labels) else rows.select(kept)


def _hub_images(source: TaskSource, data: Any) -> SourceRows:
    if source.label_column not in data["train"].features:
        raise DataError(
            f"task.hub = {source.hub!r}: there is no column {source.label_column!r}; the columns "
            f"are {', '.join(data['train'].features)} (task.label_column chooses another)"
        )
    names = getattr(data["train"].features[source.label_column], "names", None)
    labels = tuple(names) if names else _labels_seen(data["train"][source.label_column])
    splits = {
        split: Split(
            data[split][source.image_column],
            _label_indices(f"{source.hub}, {split}", data[split][source.label_column], labels),
        )
        for split in _SPLITS
        if split in data
    }
    return SourceRows("image", labels, splits)


def held_out(task: LabelledTask, name: str) -> Split:
    """Return the rows that models are scored on: `test` or `validation`."""
    split = {"test": task.test, "validation": task.validation}[name]
    if not len(split):
        raise DataError(f"task.evaluate_on = {name!r}: task {task.name} has no {name} rows")
    return split
