"""Tasks: what is read from where, how rows are split, and what is refused with which words."""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from PIL import Image

from common import tasks
from common.backbones import load_backbone
from common.config import Backbone, Task, TaskSource
from common.errors import ConfigError, DataError
from common.features import extract_features
from common.tasks import SHIPPED_TASKS, LabelledTask, Split, load_tasks, open_picture

Row = dict[str, Any]
LABELS = ["anger", "joy", "fear"]


def rows(n: int, start: int = 0) -> list[Row]:
    """Unique texts; of the three labels the first is twice as common."""
    return [
        {"text": f"row number {k}", "label": LABELS[[0, 1, 0, 2][k % 4]]}
        for k in range(start, start + n)
    ]


def write_jsonl(file: Path, content: Sequence[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


def write_csv(file: Path, content: Sequence[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(content).to_csv(file, index=False)
    return file


def write_parquet(file: Path, content: Sequence[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not by way of pandas, which turns whole numbers with a gap into floats.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(content)), file)
    return file


WRITERS: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


def load(folder: Path, **settings: Any) -> LabelledTask:
    """Load the task in a folder, by default without a probe set."""
    return load_tasks(Task(path=str(folder), **{"probe_examples": 0, **settings}))[0]


def texts(split: Split) -> list[str]:
    return [" + ".join(parts) for parts in split.inputs]


def labelled(task: LabelledTask, split: Split) -> set[tuple[str, str]]:
    names = [task.labels[index] for index in split.labels]
    return set(zip(texts(split), names, strict=True))


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [(), ("test",), ("validation",), ("validation", "test")])
@pytest.mark.parametrize("limit", [0, 50])
def test_splits_share_no_row_and_lose_none(
    tmp_path: Path, own: tuple[str, ...], limit: int
) -> None:
    starts = {"train": 0, "validation": 1000, "test": 2000}
    sizes = {"train": 100, "validation": 15, "test": 25}
    for split in ("train", *own):
        write_jsonl(tmp_path / f"{split}.jsonl", rows(sizes[split], starts[split]))
    task = load(tmp_path, probe_examples=20, limit=limit)
    splits = [task.train, task.validation, task.probe, task.test]
    everything = [text for split in splits for text in texts(split)]
    assert len(everything) == len(set(everything))
    assert len(task.test) == (25 if "test" in own else 20)
    assert len(task.validation) == (15 if "validation" in own else 10)
    assert len(task.probe) == 20
    given = 100 - (0 if "test" in own else 20) - (0 if "validation" in own else 10)
    assert len(task.train) == (limit or given) - 20
    known = {(row["text"], row["label"]) for row in rows(100)}
    for split in own:
        read = labelled(task, getattr(task, split))
        assert read == {(r["text"], r["label"]) for r in rows(sizes[split], starts[split])}
    cut = [s for name, s in task.__dict__.items() if isinstance(s, Split) and name not in own]
    found = set().union(*(labelled(task, split) for split in cut))
    assert found <= known
    assert limit or found == known


def test_held_out_rows_do_not_depend_on_probe_or_limit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(120))
    plain = load(tmp_path)
    for settings in ({"probe_examples": 30}, {"limit": 40}, {"limit": 60, "probe_examples": 12}):
        other = load(tmp_path, **settings)
        assert texts(other.test) == texts(plain.test)
        assert texts(other.validation) == texts(plain.validation)
        assert set(texts(other.train)) | set(texts(other.probe)) <= set(texts(plain.train))


def test_the_split_does_not_depend_on_global_random_streams(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(120))
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        tasks._load.cache_clear()
        task = load(tmp_path, probe_examples=12)
        found.append([texts(s) for s in (task.train, task.validation, task.probe, task.test)])
    assert found[0] == found[1]


def test_cut_splits_are_drawn_from_all_over_the_file(tmp_path: Path) -> None:
    """Files are often sorted by label."""
    write_jsonl(tmp_path / "train.jsonl", sorted(rows(120), key=lambda row: str(row["label"])))
    task = load(tmp_path)
    assert set(task.test.labels) == {0, 1, 2}


def test_a_fraction_of_zero_leaves_no_validation(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(100))
    task = load(tmp_path, validation_fraction=0.0, test_fraction=0.5)
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 0, 50)


@pytest.mark.parametrize("examples", [3, 7, 12, 24])
def test_the_probe_is_balanced_and_so_is_every_prefix_of_it(tmp_path: Path, examples: int) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(200))
    probe = load(tmp_path, probe_examples=examples).probe
    assert len(probe) == examples
    for prefix in range(1, examples + 1):
        counts = np.bincount(probe.labels[:prefix], minlength=3)
        assert counts.max() - counts.min() <= 1


def test_the_probe_takes_at_most_half_of_a_class(tmp_path: Path) -> None:
    rare = [row for row in rows(200) if row["label"] != "fear"]
    rare += [{"text": f"rare {k}", "label": "fear"} for k in range(14)]
    write_jsonl(tmp_path / "train.jsonl", rare)
    task = load(tmp_path, probe_examples=40)
    left, taken = (np.bincount(s.labels, minlength=3) for s in (task.train, task.probe))
    assert taken.sum() == 40
    assert bool((taken <= left + 1).all())
    fear = task.labels.index("fear")
    assert taken[fear] == (taken + left)[fear] // 2


def test_a_probe_above_half_of_the_rows_is_refused_with_the_most_there_can_be(
    tmp_path: Path,
) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(100))
    message = refusal(tmp_path, probe_examples=60)
    assert "task.probe_examples" in message
    assert "60" in message
    most = int(message.split("only ")[1].split(";")[0])
    load(tmp_path, probe_examples=most)
    refusal(tmp_path, probe_examples=most + 1)


def test_members_share_the_probe_evenly(tmp_path: Path) -> None:
    sources = []
    for name in ("one", "two"):
        write_jsonl(tmp_path / name / "train.jsonl", rows(100))
        sources.append(TaskSource(path=str(tmp_path / name)))
    tasks = load_tasks(Task(members=tuple(sources), probe_examples=20))
    assert [task.name for task in tasks] == ["one", "two"]
    assert [len(task.probe) for task in tasks] == [10, 10]
    assert texts(tasks[0].test) != texts(tasks[1].test), "tasks are split by their names"


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", list(WRITERS))
def test_tables_of_every_kind_are_read(tmp_path: Path, ending: str) -> None:
    content = rows(60)
    content[7]["text"] = 'a "quoted", and\nbroken line – with ünïcode'
    content[8]["text"] = "12"
    WRITERS[ending](tmp_path / f"train.{ending}", content)
    task = load(tmp_path)
    found = set().union(*(labelled(task, s) for s in (task.train, task.validation, task.test)))
    assert found == {(row["text"], row["label"]) for row in content}
    assert (task.kind, task.name) == ("text", tmp_path.name)
    assert task.labels == ("anger", "fear", "joy")
    assert task.train.labels.dtype == np.int64


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan", "N/A"])
def test_words_that_mean_missing_to_pandas_are_text_and_labels(tmp_path: Path, word: str) -> None:
    content = [
        {"text": word if k == 5 else f"row {k}", "label": [word, "x"][k % 2]} for k in range(40)
    ]
    write_csv(tmp_path / "train.csv", content)
    task = load(tmp_path)
    assert task.labels == tuple(sorted([word, "x"]))
    found = set().union(*(labelled(task, s) for s in (task.train, task.validation, task.test)))
    assert found == {(row["text"], row["label"]) for row in content}


def test_a_column_of_numbers_is_text_if_it_is_the_text_column(tmp_path: Path) -> None:
    """In a CSV file nothing but the column says what is text."""
    write_csv(tmp_path / "train.csv", [{"text": str(k), "label": "ab"[k % 2]} for k in range(40)])
    assert set(texts(load(tmp_path).train)) <= {str(k) for k in range(40)}


@pytest.mark.parametrize("ending", list(WRITERS))
def test_pairs_of_texts_are_read(tmp_path: Path, ending: str) -> None:
    content = [{**row, "text_pair": f"second {k}"} for k, row in enumerate(rows(40))]
    WRITERS[ending](tmp_path / f"train.{ending}", content)
    task = load(tmp_path)
    assert {len(parts) for parts in task.train.inputs} == {2}
    assert set(texts(task.train)) <= {f"{r['text']} + {r['text_pair']}" for r in content}


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    content = [{"q": r["text"], "p": "b", "y": r["label"], "text": "wrong"} for r in rows(40)]
    write_jsonl(tmp_path / "train.jsonl", content)
    task = load(tmp_path, text_column="q", pair_column="p", label_column="y")
    assert set(texts(task.train)) <= {f"{row['q']} + b" for row in content}


def test_rows_keep_their_own_label(tmp_path: Path) -> None:
    content = [{"text": f"text {k}", "label": f"label {k % 5}"} for k in range(80)]
    write_jsonl(tmp_path / "train.jsonl", content)
    task = load(tmp_path, probe_examples=10)
    for split in (task.train, task.validation, task.probe, task.test):
        for text, label in labelled(task, split):
            assert int(text.split()[1]) % 5 == int(label.split()[1])


# --- labels ---------------------------------------------------------------------------------------


def test_labels_json_names_integer_labels(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{k}", "label": k % 3} for k in range(40)])
    (tmp_path / "labels.json").write_text('["zero", "one", "two", "never seen"]')
    task = load(tmp_path)
    assert task.labels == ("zero", "one", "two", "never seen")
    for text, label in labelled(task, task.train):
        assert label == ["zero", "one", "two"][int(text[1:]) % 3]


def test_labels_json_orders_label_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    (tmp_path / "labels.json").write_text(json.dumps(["joy", "fear", "anger"]))
    task = load(tmp_path)
    assert task.labels == ("joy", "fear", "anger")
    assert labelled(task, task.train) <= {(row["text"], row["label"]) for row in rows(40)}


def test_integer_labels_without_names_are_counted(tmp_path: Path) -> None:
    """A class that training lacks keeps its place."""
    content = [{"text": f"t{k}", "label": [0, 3][k % 2]} for k in range(40)]
    write_jsonl(tmp_path / "train.jsonl", content)
    task = load(tmp_path)
    assert task.labels == ("0", "1", "2", "3")
    assert set(task.train.labels) == {0, 3}


@pytest.mark.parametrize("names", [["10", "9"], ["007", "7"], ["90210", "10001"]])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_labels_that_only_look_like_numbers_are_names(
    tmp_path: Path, ending: str, names: list[str]
) -> None:
    """These formats tell "7" from 7."""
    content = [{"text": f"t{k}", "label": names[k % 2]} for k in range(40)]
    WRITERS[ending](tmp_path / f"train.{ending}", content)
    task = load(tmp_path)
    assert set(task.labels) == set(names)
    for text, label in labelled(task, task.train):
        assert label == names[int(text[1:]) % 2]


@pytest.mark.parametrize("names", [["0", "1"], ["007", "7"], ["yes", "1"]])
def test_labels_of_a_csv_file_keep_their_names(tmp_path: Path, names: list[str]) -> None:
    content = [{"text": f"t{k}", "label": names[k % 2]} for k in range(40)]
    write_csv(tmp_path / "train.csv", content)
    task = load(tmp_path)
    for text, label in labelled(task, task.train):
        assert label == names[int(text[1:]) % 2]


# --- pictures -------------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    """Return a picture that no other number gives."""
    return Image.new("RGB", (9, 7), (number % 256, number // 256, 100))


def picture_files() -> dict[str, Image.Image]:
    """Name every picture by split and class: 30 cats and 20 dogs to train, 4 and 4 to test."""
    named = {f"train/cat/{k}.png": picture(k) for k in range(30)}
    named |= {f"train/dog/{k}.png": picture(100 + k) for k in range(20)}
    named |= {f"test/{'cat' if k < 4 else 'dog'}/t{k}.png": picture(200 + k) for k in range(8)}
    return named


def picture_folder(folder: Path) -> Path:
    for name, image in picture_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    (folder / "train" / "cat" / "notes.txt").write_text("no picture")
    return folder


def picture_zip(file: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{inside}README.md", "no picture")
        for name, image in picture_files().items():
            buffer = io.BytesIO()
            image.save(buffer, format="png")
            archive.writestr(inside + name, buffer.getvalue())
    return file


def pixels(split: Split) -> list[tuple[Any, ...]]:
    return [open_picture(p).getpixel((0, 0)) for p in split.inputs]


@pytest.mark.parametrize("how", ["folder", "zip", "zip with a folder inside"])
def test_pictures_are_read_from_folders_and_zips(tmp_path: Path, how: str) -> None:
    if how == "folder":
        place = picture_folder(tmp_path / "animals")
    else:
        place = picture_zip(tmp_path / "animals.zip", "animals/" if "inside" in how else "")
    task = load(place, probe_examples=6)
    assert (task.kind, task.name, task.labels) == ("image", "animals", ("cat", "dog"))
    assert len(task.test) == 8
    assert len(task.train) + len(task.validation) + len(task.probe) == 50
    everything = [
        p for s in (task.train, task.validation, task.probe, task.test) for p in pixels(s)
    ]
    assert len(set(everything)) == 58
    for split in (task.train, task.validation, task.probe):
        for (number, _, _), label in zip(pixels(split), split.labels, strict=True):
            assert task.labels[label] == ("cat" if number < 100 else "dog")
    for (number, _, _), label in zip(pixels(task.test), task.test.labels, strict=True):
        assert task.labels[label] == ("cat" if number < 204 else "dog")


def test_folder_and_zip_give_the_same_splits(tmp_path: Path) -> None:
    folder = load(picture_folder(tmp_path / "animals"), probe_examples=6)
    zipped = load(picture_zip(tmp_path / "animals.zip"), probe_examples=6)
    for name in ("train", "validation", "probe", "test"):
        assert pixels(getattr(folder, name)) == pixels(getattr(zipped, name))


@pytest.mark.parametrize("how", ["folder", "zip"])
def test_classes_json_says_what_prompts_call_the_classes(tmp_path: Path, how: str) -> None:
    names = json.dumps(["house_cat", "wolf"])
    if how == "folder":
        place = picture_folder(tmp_path / "animals")
        (place / "classes.json").write_text(names)
    else:
        place = picture_zip(tmp_path / "animals.zip", "animals/")
        with zipfile.ZipFile(place, "a") as archive:
            archive.writestr("animals/classes.json", names)
    task = load(place)
    assert task.labels == ("cat", "dog")
    assert task.class_names == ("house cat", "wolf")
    assert load(place, class_names=("a", "b")).class_names == ("a", "b")
    with pytest.raises(ConfigError, match=r"class_names: 3 names for the 2 labels .*cat, dog"):
        load(place, class_names=("a", "b", "c"))


def test_too_many_names_of_classes_are_refused(tmp_path: Path) -> None:
    place = picture_folder(tmp_path / "animals")
    (place / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"classes.json has 3 names, and there are 2 classes"):
        load(place)


def test_base_and_new_classes_share_all_rows_and_no_class() -> None:
    def of(classes: Any) -> LabelledTask:
        [task] = load_tasks(Task(name="digits", classes=classes, probe_examples=0))
        return task

    base, new, whole = of("base"), of("new"), of("all")
    assert base.labels + new.labels == whole.labels
    assert base.class_names == ("zero", "one", "two", "three", "four")
    assert (base.name, new.name) == ("digits-base", "digits-new")
    for split in (base.train, base.test, new.train, new.test):
        assert set(split.labels.tolist()) == set(range(5))
    parts = ("train", "validation", "test")
    total = sum(len(getattr(task, part)) for task in (base, new) for part in parts)
    assert total == sum(len(getattr(whole, part)) for part in parts)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    place = picture_folder(tmp_path / "animals")
    with pytest.raises(ConfigError, match=r"classes = 'new': animals-new would have 1 classes"):
        load(place, classes="new")


def test_what_a_mac_puts_into_a_zip_is_no_picture(tmp_path: Path) -> None:
    file = picture_zip(tmp_path / "animals.zip", "animals/")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("__MACOSX/animals/train/cat/._0.png", b"\x00\x05\x16\x07")
    task = load(file)
    assert len(task.train) + len(task.validation) == 50
    pixels(task.train)


def test_a_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "animals")
    (folder / "test" / "horse").mkdir()
    picture(9).save(folder / "test" / "horse" / "h.png")
    message = refusal(folder)
    for part in ("animals", "test", "horse", "cat, dog"):
        assert part in message


def test_a_picture_that_cannot_be_decoded_is_refused_by_name(
    tmp_path: Path, vit_folder: Path
) -> None:
    folder = picture_folder(tmp_path / "animals")
    (folder / "train" / "cat" / "5.png").write_bytes(b"no picture at all")
    backbone = load_backbone(Backbone(path=str(vit_folder)), "image", "cpu")
    task = load(folder)
    pictures = [*task.train.inputs, *task.validation.inputs]
    whole = Split(pictures, np.zeros(len(pictures), dtype=np.int64))
    with pytest.raises(DataError, match=r"cat.5\.png"):
        extract_features(backbone.preprocessor, whole)


# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_folder_is_refused_by_name() -> None:
    message = refusal(Path("/nowhere/at/all"))
    assert "task.path" in message
    assert "/nowhere/at/all" in message


def test_an_unknown_task_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"task\.name = 'digit'") as caught:
        load_tasks(Task(name="digit"))
    for name in SHIPPED_TASKS:
        assert name in str(caught.value)


def test_a_folder_of_neither_kind_is_refused_with_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    message = refusal(tmp_path)
    assert "train.jsonl" in message
    assert "train/<class>" in message


def test_a_label_outside_the_list_is_refused_with_file_row_and_label(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    write_jsonl(tmp_path / "test.jsonl", [*rows(3, 500), {"text": "x", "label": "grief"}])
    message = refusal(tmp_path)
    for part in (str(tmp_path), "test", "row 3", "grief", "anger, fear, joy"):
        assert part in message


@pytest.mark.parametrize("label", [3, -1, "three", 1.5])
def test_a_label_outside_labels_json_is_refused(tmp_path: Path, label: Any) -> None:
    content: list[Row] = [{"text": f"t{k}", "label": k % 3} for k in range(40)]
    content[17]["label"] = label
    write_jsonl(tmp_path / "train.jsonl", content)
    (tmp_path / "labels.json").write_text('["zero", "one", "two"]')
    message = refusal(tmp_path)
    assert "row 17" in message
    assert str(label) in message


@pytest.mark.parametrize("ending", list(WRITERS))
@pytest.mark.parametrize("labels", [LABELS, [0, 1, 2]])
def test_a_row_without_a_label_is_refused_by_its_number(
    tmp_path: Path, ending: str, labels: list[Any]
) -> None:
    content: list[Row] = [{"text": f"t{k}", "label": labels[k % 3]} for k in range(40)]
    content[17]["label"] = None
    WRITERS[ending](tmp_path / f"train.{ending}", content)
    assert "row 17" in refusal(tmp_path)


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_what_is_no_text_is_refused_with_file_and_row(tmp_path: Path, text: Any) -> None:
    content = rows(40)
    content[17]["text"] = text
    write_jsonl(tmp_path / "train.jsonl", content)
    message = refusal(tmp_path)
    assert "row 17" in message
    assert "not text" in message
    assert str(tmp_path) in message


def test_faults_are_told_with_the_file_they_are_in(tmp_path: Path) -> None:
    """As `load_tasks` promises: the message names the file and the row."""
    content = rows(40)
    content[17]["text"] = None
    write_jsonl(tmp_path / "train.jsonl", content)
    assert "train.jsonl" in refusal(tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"train.{ending}").write_text("")
    assert f"train.{ending}" in refusal(tmp_path)


def test_a_file_with_a_header_alone_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    assert "train.csv" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("jsonl", b'{"text": "a", "label": 0}\n{"text": \n'),
        ("jsonl", b"\xff\xfe\x00\x01"),
        ("csv", b'text,label\n"never closed,0\n'),
        ("csv", b"text,label\na,0,9,9\nb,1,2,3,4\n"),
        ("parquet", b"no parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, ending: str, content: bytes
) -> None:
    (tmp_path / f"train.{ending}").write_bytes(content)
    assert f"train.{ending}" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{broken", '{"a": 1}', '"joy"', '["joy", "joy", "fear"]'])
def test_labels_json_that_is_no_list_of_different_names_is_refused(
    tmp_path: Path, content: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    (tmp_path / "labels.json").write_text(content)
    assert "labels.json" in refusal(tmp_path)


def test_a_missing_column_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": 0}] * 9)
    message = refusal(tmp_path)
    for part in ("'text'", "sentence, label", "task.text_column"):
        assert part in message


def test_too_few_rows_to_split_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(2))
    assert "too few" in refusal(tmp_path)


def test_a_hub_task_that_cannot_be_had_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"task\.hub = 'nobody/nothing-at-all'") as caught:
        load_tasks(Task(hub="nobody/nothing-at-all"))
    assert "\n" not in str(caught.value)
    assert "task.path" in str(caught.value)


# --- hub ------------------------------------------------------------------------------------------


def hub_data(monkeypatch: pytest.MonkeyPatch, **splits: Any) -> None:
    import datasets

    data = datasets.DatasetDict(splits)
    monkeypatch.setattr(datasets, "load_dataset", lambda _: data)


def test_a_hub_task_of_texts_keeps_its_class_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    made = {"sentence": [f"s{k}" for k in range(40)], "label": [k % 2 for k in range(40)]}
    hub_data(monkeypatch, train=Dataset.from_dict(made, features=features))
    source = Task(hub="someone/texts", text_column="sentence", probe_examples=0)
    (task,) = load_tasks(source)
    assert task.labels == ("neg", "pos")
    for text, label in labelled(task, task.train):
        assert label == ["neg", "pos"][int(text[1:]) % 2]


def test_a_hub_task_of_pictures_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    made = {"image": [picture(k) for k in range(40)], "label": [k % 2 for k in range(40)]}
    hub_data(monkeypatch, train=Dataset.from_dict(made, features=features))
    (task,) = load_tasks(Task(hub="someone/pictures", probe_examples=4))
    assert (task.kind, task.labels) == ("image", ("cat", "dog"))
    for (number, _, _), label in zip(pixels(task.train), task.train.labels, strict=True):
        assert number % 2 == label


# --- shipped --------------------------------------------------------------------------------------


def test_digits_are_1797_pictures_of_ten_classes() -> None:
    (task,) = load_tasks(Task(name="digits"))
    splits = (task.train, task.validation, task.probe, task.test)
    assert [len(split) for split in splits] == [746, 180, 512, 359]
    assert (task.kind, task.labels) == ("image", tuple("0123456789"))
    for split in splits:
        assert set(split.labels) == set(range(10))
        assert {(p.size, p.mode) for p in split.inputs} == {((28, 28), "L")}
    assert set(Counter(task.probe.labels.tolist()).values()) <= {51, 52}


def test_digits_are_scikit_learns_enlarged() -> None:
    from sklearn.datasets import load_digits

    (task,) = load_tasks(Task(name="digits"))
    original = load_digits()
    small = np.asarray(task.train.inputs[0])[4:24, 4:24].astype(float)
    assert not np.asarray(task.train.inputs[0])[:4].any()
    shrunk = (
        np.asarray(Image.fromarray(small).resize((8, 8), Image.Resampling.BOX), dtype=float)
        / 255
        * 16
    )
    nearest = np.square(original.images - shrunk).sum(axis=(1, 2)).argmin()
    assert original.target[nearest] == task.train.labels[0]
