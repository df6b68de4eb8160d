"""Tasks of cross-modality prompt transfer by name: 13 of language, and the 19 of VTAB-1K.

Rows come from a hub, or from wherever `task.location` says. An id whose page nobody has seen is
marked as not verified; names of columns and splits are from memory throughout, and may be wrong.
Keys of `task` override columns. The metric is accuracy throughout. Sizes are those that Zhang et
al. (ICLR 2025, OpenReview SYnIf4LxAG) and VTAB (arXiv 1910.04867) name.

A hub's VTAB data sets hold whole splits: a thousand rows drawn from them (`task.examples = 1000`,
`task.validation_fraction = 0.2`) are not the official thousand, which only
google-research/task_adaptation gives. A folder that has these, 800 in train/ and 200 in
validation/, is taken as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

METRIC = "accuracy"


@dataclass(frozen=True)
class PublishedTask:
    """A task that papers name.

    Attributes:
        kind: of the rows.
        group: of tasks that are alike.
        classes: how many.
        hub: where it is to be had; empty where no id is known.
        part: the configuration of the hub's data set.
        verified: whether the id's page has been seen.
        splits: by our split, the hub's; validation rows that it lacks are cut from training.
        columns: by key of `task`, the hub's column.
        examples: training rows that are published; 0 for VTAB's thousand.
        note: what stands in the way.
    """

    kind: Literal["text", "image"]
    group: str
    classes: int
    hub: str
    part: str = ""
    verified: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    columns: Mapping[str, str] = field(default_factory=dict)
    examples: int = 0
    note: str = ""

    @property
    def summary(self) -> str:
        """Return a line for `fedcopra list tasks`."""
        what = "text" if self.kind == "text" else "image"
        id_ = f"{self.hub}{':' + self.part if self.part else ''}" if self.hub else "no hub id known"
        known = "" if self.verified or not self.hub else " (not verified)"
        note = f"; {self.note}" if self.note else ""
        return f"{what}: {self.group}, {self.classes} classes; {id_}{known}{note}"


_SCRIPT = "a loader script, which current versions of datasets do not run: give task.location"
_GLUE = {"train": "train", "test": "validation"}


def _glue(group: str, classes: int, part: str, examples: int, *texts: str) -> PublishedTask:
    columns = dict(zip(("text_column", "pair_column"), texts, strict=False))
    splits = {"train": "train", "test": "validation_matched"} if part == "mnli" else _GLUE
    return PublishedTask(
        "text", group, classes, "nyu-mll/glue", part, False, splits, columns, examples
    )


def _vtab(
    group: str, classes: int, hub: str, *, verified: bool = False, note: str = ""
) -> PublishedTask:
    return PublishedTask(
        "image",
        group,
        classes,
        f"clip-benchmark/wds_{hub}" if hub else "",
        verified=verified,
        columns={"image_column": "webp", "label_column": "cls"},
        note=note,
    )


_NATURAL, _SPECIALISED, _STRUCTURED = (f"VTAB {group}" for group in (
    "natural", "specialised", "structured"))  # fmt: skip

PUBLISHED_TASKS: Mapping[str, PublishedTask] = {
    "imdb": PublishedTask("text", "sentiment", 2, "stanfordnlp/imdb", examples=25_000),
    "sst2": _glue("sentiment", 2, "sst2", 67_349, "sentence"),
    "laptop": PublishedTask(
        "text",
        "sentiment of an aspect",
        4,
        "alexcadillon/SemEval2014Task4",
        "laptops",
        verified=True,
        examples=3_045,
        note=_SCRIPT,
    ),
    "restaurant": PublishedTask(
        "text",
        "sentiment of an aspect",
        4,
        "alexcadillon/SemEval2014Task4",
        "restaurants",
        verified=True,
        examples=3_041,
        note=_SCRIPT,
    ),
    "movie-rationales": PublishedTask(
        "text",
        "sentiment",
        2,
        "eraser-benchmark/movie_rationales",
        verified=True,
        splits={"train": "train", "validation": "validation", "test": "test"},
        columns={"text_column": "review"},
        examples=1_600,
        note=_SCRIPT,
    ),
    "tweet-sentiment": PublishedTask(
        "text",
        "sentiment",
        3,
        "cardiffnlp/tweet_eval",
        "sentiment",
        splits={"train": "train", "validation": "validation", "test": "test"},
        examples=45_389,
    ),
    "mnli": _glue("inference", 3, "mnli", 392_702, "premise", "hypothesis"),
    "qnli": _glue("inference", 2, "qnli", 104_743, "question", "sentence"),
    "snli": PublishedTask(
        "text",
        "inference",
        3,
        "stanfordnlp/snli",
        splits={"train": "train", "validation": "validation", "test": "test"},
        columns={"text_column": "premise", "pair_column": "hypothesis"},
        examples=549_367,
    ),
    "ethics-deontology": PublishedTask(
        "text",
        "ethics",
        2,
        "hendrycks/ethics",
        "deontology",
        verified=True,
        columns={"text_column": "scenario", "pair_column": "excuse"},
        examples=18_164,
    ),
    "ethics-justice": PublishedTask(
        "text",
        "ethics",
        2,
        "hendrycks/ethics",
        "justice",
        verified=True,
        columns={"text_column": "scenario"},
        examples=21_791,
    ),
    "qqp": _glue("paraphrase", 2, "qqp", 363_846, "question1", "question2"),
    "mrpc": _glue("paraphrase", 2, "mrpc", 3_668, "sentence1", "sentence2"),
    "vtab-cifar100": _vtab(_NATURAL, 100, "vtab-cifar100"),
    "vtab-caltech101": _vtab(_NATURAL, 102, "vtab-caltech101", verified=True),
    "vtab-dtd": _vtab(_NATURAL, 47, "vtab-dtd"),
    "vtab-flowers102": _vtab(_NATURAL, 102, "vtab-flowers"),
    "vtab-pets": _vtab(_NATURAL, 37, "vtab-pets"),
    "vtab-svhn": _vtab(_NATURAL, 10, "vtab-svhn", verified=True),
    "vtab-sun397": _vtab(_NATURAL, 397, "sun397"),
    "vtab-patch-camelyon": _vtab(_SPECIALISED, 2, "vtab-pcam"),
    "vtab-eurosat": _vtab(_SPECIALISED, 10, "vtab-eurosat"),
    "vtab-resisc45": _vtab(_SPECIALISED, 45, "vtab-resisc45", verified=True),
    "vtab-retinopathy": _vtab(
        _SPECIALISED, 5, "vtab-diabetic_retinopathy", note="the original needs a Kaggle login"
    ),
    "vtab-clevr-count": _vtab(_STRUCTURED, 8, "vtab-clevr_count_all", verified=True),
    "vtab-clevr-distance": _vtab(
        _STRUCTURED, 6, "vtab-clevr_closest_object_distance", verified=True
    ),
    "vtab-dmlab": _vtab(_STRUCTURED, 6, "vtab-dmlab", verified=True),
    "vtab-kitti": _vtab(_STRUCTURED, 4, "vtab-kitti_closest_vehicle_distance"),
    "vtab-dsprites-location": _vtab(_STRUCTURED, 16, "vtab-dsprites_label_x_position"),
    "vtab-dsprites-orientation": _vtab(
        _STRUCTURED,
        16,
        "vtab-dsprites_label_orientation",
        note="only djghosh/wds_vtab-dsprites_label_orientation_test has been seen",
    ),
    "vtab-smallnorb-azimuth": _vtab(_STRUCTURED, 18, "vtab-smallnorb_label_azimuth", verified=True),
    "vtab-smallnorb-elevation": _vtab(_STRUCTURED, 9, "vtab-smallnorb_label_elevation"),
}
