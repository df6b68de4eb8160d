"""Experiment files: what loads, and that what cannot be meant is refused in one clear line."""

import json
import random
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_federation import LORA_METHODS

from common.config import (
    Experiment,
    build_experiment,
    experiment_from_flat,
    load_experiment,
    parse_assignments,
    parse_value,
    split_alternatives,
)
from common.errors import ConfigError
from strategies import STRATEGIES, resolve

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "experiments").glob("*.toml"))

SMALL: Mapping[str, Any] = {
    "task": {"name": "digits"},
    "backbone": {"name": "glyph-vit"},
    "strategy": {"name": "copra-merge"},
}


def small(**values: Any) -> Experiment:
    """Build the smallest experiment with these keys, `__` for a dot and `_` kept."""
    return build_experiment(SMALL, {key.replace("__", "."): v for key, v in values.items()})


def refusal(values: Mapping[str, Any], tables: Mapping[str, Any] = SMALL) -> str:
    """Return the message with which these values are refused; always one line."""
    with pytest.raises(ConfigError) as caught:
        resolve(build_experiment(tables, values, origin="study.toml"))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- shipped files --------------------------------------------------------------------------------


def test_there_are_shipped_experiments() -> None:
    assert SHIPPED


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_experiments_load_and_resolve(file: Path) -> None:
    resolve(load_experiment(file))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_typo_in_any_key_of_a_shipped_experiment_is_refused_by_name(
    file: Path, tmp_path: Path
) -> None:
    text = file.read_text(encoding="utf-8")
    keys = re.findall(r"^([a-z_]+) *=", text, flags=re.MULTILINE)
    assert keys
    for key in dict.fromkeys(keys):
        broken = tmp_path / "broken.toml"
        broken.write_text(re.sub(rf"^{key} *=", f"{key}x =", text, count=1, flags=re.MULTILINE))
        with pytest.raises(ConfigError) as caught:
            resolve(load_experiment(broken))
        assert "\n" not in str(caught.value)
        assert f"{key}x" in str(caught.value) or key in str(caught.value)


def test_flowers_run_config_gives_a_sound_experiment() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = _flatten(pyproject["tool"]["flwr"]["app"]["config"])
    # Keys without a table are the ServerApp's own: where to write, and how to use Flower's nodes.
    flat = {key: value for key, value in listed.items() if "." in key}
    resolve(experiment_from_flat(flat))


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{key}": value} if inner is None else inner
    return flat


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("federation.round", 4, ["rounds", "fraction", "seed"]),
        ("adapter.alhpa", 16, ["alpha", "rank"]),
        ("trian.local_steps", 4, ["train", "federation"]),
        ("task.nmae", "digits", ["name", "path", "hub", "members"]),
        ("strategy.fedavgg.x", 1, ["fedavg", "copra-merge"]),
        ("strategy.copra-merge.veto", 2.0, ["veto_z", "probe_examples"]),
        ("strategy.fedavg.veto_z", 2.0, ["none"]),
    ],
)
def test_an_unknown_key_is_refused_with_its_value_and_the_choices(
    key: str, value: Any, choices: list[str]
) -> None:
    message = refusal({key: value})
    first_unknown = key.split(".")[0] if key.startswith("trian") else key.removesuffix(".x")
    assert first_unknown in message
    assert str(value) in message or ".x" in key
    for choice in choices:
        assert choice in message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("partition.kind", "dirichlett", ["iid", "dirichlet", "classes", "by-task"]),
        ("train.decay", "exponential", ["none", "linear", "cosine"]),
        ("train.device", "tpu", ["auto", "cpu", "cuda"]),
        ("train.precision", "float16", ["float32", "bfloat16"]),
        ("train.optimiser", "lion", ["adamw", "adam", "sgd"]),
        ("wire.up", "int2", ["float32", "float16", "int8", "int4"]),
        ("wire.down", "int8", ["float32", "float16"]),
        ("adapter.kind", "ia3", ["lora"]),
        ("strategy.name", "fedsgd", list(STRATEGIES)),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(
    key: str, value: str, says: list[str]
) -> None:
    message = refusal({key: value})
    assert key in message
    assert value in message
    for choice in says:
        assert choice in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation.rounds", "4"),
        ("federation.rounds", 4.0),
        ("federation.rounds", True),
        ("federation.rounds", 0),
        ("federation.fraction", 0.0),
        ("federation.fraction", 1.5),
        ("federation.seed", -1),
        ("federation.workers", -1),
        ("federation.evaluate_every", 0),
        ("adapter.rank", 0),
        ("adapter.rank", 8.5),
        ("adapter.alpha", 0),
        ("adapter.alpha", "16"),
        ("adapter.ranks", 4),
        ("adapter.rslora", 1),
        ("adapter.targets", "query"),
        ("adapter.dropout", 1.0),
        ("copra.enabled", "yes"),
        ("copra.initial", 1.1),
        ("copra.ramp", -0.1),
        ("partition.alpha", 0.0),
        ("partition.clients", 0),
        ("task.test_fraction", 1.0),
        ("task.name", 3),
        ("train.learning_rate", 0.0),
        ("train.max_grad_norm", 0.0),
        ("train.warmup", 1.0),
        ("strategy.copra-merge.veto_z", "2"),
        ("strategy.copra-merge.veto_z", 0.0),
        ("strategy.copra-merge.norm_limit", 1.0),
        ("strategy.copra-merge.probe_examples", 1.5),
        ("task", "digits"),
        ("strategy", "fedavg"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_key_and_value(key: str, value: Any) -> None:
    message = refusal({key: value})
    assert key in message
    assert json.dumps(value) in message or repr(value) in message


def test_harm_names_its_kind_and_clients_that_there_are() -> None:
    assert "name both or neither" in refusal({"harm.kind": "random-labels"})
    assert "name both or neither" in refusal({"harm.clients": [1]})
    message = refusal({"harm.kind": "random-labels", "harm.clients": [0, 99]})
    assert "client 99" in message


def test_a_wrong_element_of_a_list_is_refused_by_its_place() -> None:
    message = refusal({"adapter.ranks": [4, "8"]})
    assert "adapter.ranks.1" in message
    assert '"8"' in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key",
    [
        "adapter.alpha",
        "train.learning_rate",
        "train.weight_decay",
        "partition.alpha",
        "federation.timeout",
        "strategy.copra-merge.veto_z",
    ],
)
def test_a_number_that_is_none_is_refused(key: str, value: float) -> None:
    """TOML has nan and inf; JSON, in which experiments travel to clients, has not."""
    assert key in refusal({key: value})


def test_a_date_is_refused_like_any_wrong_type() -> None:
    """TOML reads 2024-11-20 as a date, also after --set."""
    assert "federation.rounds" in refusal(parse_assignments(["federation.rounds=2024-11-20"]))


def test_a_folder_called_like_a_date_can_be_set() -> None:
    experiment = build_experiment(SMALL, parse_assignments(["task.path=2024-11-20"]))
    assert experiment.task.path == "2024-11-20"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter.ranks": [4, 0]}, ["adapter", "ranks", "at least 1"]),
        ({"adapter.ranks": [2, 4], "strategy.name": "fedavg"}, ["ranks", "fedavg", "flexlora"]),
        ({"adapter.ranks": [2, 4], "strategy.name": "ffa-lora"}, ["ranks", "ffa-lora"]),
        ({"partition.kind": "by-task"}, ["task.members", "by-task"]),
        (
            {"task.probe_examples": 100, "strategy.copra-merge.probe_examples": 200},
            ["strategy.copra-merge.probe_examples = 200", "task.probe_examples = 100"],
        ),
        ({"task.probe_examples": 100}, ["512", "100"]),
    ],
)
def test_an_impossible_pair_is_refused(values: dict[str, Any], says: list[str]) -> None:
    message = refusal(values)
    for part in says:
        assert part in message


MEMBERS = [{"name": "docstrings"}, {"name": "error-messages"}]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"task.members": MEMBERS}, ["task.members", "iid"]),
        (
            {"task.members": MEMBERS, "partition.kind": "by-task", "partition.clients": 5},
            ["partition.clients = 5", "2"],
        ),
        (
            {
                "task.members": MEMBERS,
                "partition.kind": "by-task",
                "strategy.name": "centralised",
            },
            ["by-task", "centralised", "fedavg"],
        ),
        (
            {"task.members": [{"name": "digits"}] * 2, "partition.kind": "by-task"},
            ["digits"],
        ),
        (
            {"task.members": [{"path": "a/x"}, {"path": "b/x.zip"}], "partition.kind": "by-task"},
            ["x"],
        ),
        (
            {"task.members": [{"name": "digits", "lable": "y"}], "partition.kind": "by-task"},
            ["lable", "label_column"],
        ),
        ({"task.members": [{}], "partition.kind": "by-task"}, ["name, path or hub"]),
    ],
)
def test_impossible_federations_of_tasks_are_refused(
    values: dict[str, Any], says: list[str]
) -> None:
    message = refusal(values)
    for part in says:
        assert part in message


@pytest.mark.parametrize("table", ["task", "backbone"])
@pytest.mark.parametrize("source", [{}, {"name": ""}, {"name": "a", "path": "b"}])
def test_a_source_is_one_of_name_path_and_hub(table: str, source: dict[str, str]) -> None:
    message = refusal({}, {**SMALL, table: source})
    assert table in message
    assert "name, path" in message


def test_a_missing_table_is_named() -> None:
    assert "backbone is missing" in refusal({}, {"task": {"name": "digits"}})


def test_a_strategy_needs_a_name() -> None:
    assert "name" in refusal({}, {**SMALL, "strategy": {"fedavg": {}}})


def test_options_of_strategies_that_are_not_chosen_are_checked_too() -> None:
    """In a comparison every strategy's table stands in one file."""
    tables = {**SMALL, "strategy": {"name": "fedavg", "copra-merge": {"veto_z": -1.0}}}
    assert "strategy.copra-merge.veto_z" in refusal({}, tables)
    resolve(build_experiment({**SMALL, "strategy": {"name": "fedavg", "copra-merge": {}}}))


@pytest.mark.parametrize("order", [("copra-merge", "fedavg"), ("fedavg", "copra-merge")])
def test_a_strategy_gets_its_own_options(order: tuple[str, str]) -> None:
    options = {"copra-merge": {"probe_examples": 7}, "fedavg": {}}
    strategy = {"name": "copra-merge"} | {name: options[name] for name in order}
    assert resolve(build_experiment({**SMALL, "strategy": strategy})).probe_examples == 7


def test_equal_ranks_suit_every_strategy() -> None:
    for name in LORA_METHODS:
        optimiser = STRATEGIES[name].optimiser or "adamw"
        settings = {"strategy__name": name, "train__optimiser": optimiser}
        resolve(small(adapter__ranks=[4, 4], task__probe_examples=512, **settings))


def test_the_file_is_named_in_a_refusal(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[task]\nname = "digits"\n[federation]\nround = 3\n')
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_experiment(file)


@pytest.mark.parametrize(
    "content", ["[task\n", "a = 1\na = 2\n", "= 3", b"\xff\xfe\x00", "[task]\nname = digits"]
)
def test_a_file_that_is_no_toml_is_refused_in_one_line(
    tmp_path: Path, content: str | bytes
) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"broken\.toml") as caught:
        load_experiment(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_experiment(tmp_path / "nowhere.toml")


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(
        '[task]\nname = "digits"\n[backbone]\nname = "glyph-vit"\n[federation]\nrounds = 3\n'
    )
    experiment = load_experiment(file, {"federation.rounds": 5, "adapter.ranks": [2, 4]})
    assert experiment.federation.rounds == 5
    assert experiment.adapter.ranks == (2, 4)
    assert load_experiment(file).federation.rounds == 3


@pytest.mark.parametrize("table", ["task", "backbone"])
@pytest.mark.parametrize(("old", "new"), [("name", "path"), ("path", "hub"), ("hub", "name")])
def test_a_new_source_replaces_the_one_in_the_file(table: str, old: str, new: str) -> None:
    tables = {**SMALL, table: {old: "old"}}
    source = getattr(build_experiment(tables, {f"{table}.{new}": "new"}), table)
    assert getattr(source, new) == "new"
    assert getattr(source, old) is None


def test_a_new_source_drops_the_columns_of_the_old_and_takes_its_own_in_any_order() -> None:
    tables = {**SMALL, "task": {"hub": "a/b", "text_column": "sentence", "limit": 50}}
    plain = build_experiment(tables, {"task.path": "x"}).task
    assert (plain.text_column, plain.limit) == ("text", 50)
    for keys in (["task.path", "task.text_column"], ["task.text_column", "task.path"]):
        task = build_experiment(tables, dict.fromkeys(keys, "x")).task
        assert (task.path, task.text_column) == ("x", "x")


def test_a_single_task_replaces_members() -> None:
    tables = {**SMALL, "task": {"members": MEMBERS, "limit": 100}}
    tables["partition"] = {"kind": "by-task"}
    experiment = build_experiment(tables, {"task.name": "digits", "partition.kind": "iid"})
    assert experiment.task.members == ()
    assert experiment.task.limit == 100


def test_the_tables_given_are_not_changed() -> None:
    tables = {"task": {"name": "digits"}, "backbone": {"name": "glyph-vit"}}
    build_experiment(tables, {"task.path": "x", "adapter.rank": 2})
    assert tables == {"task": {"name": "digits"}, "backbone": {"name": "glyph-vit"}}


def test_a_value_cannot_have_keys() -> None:
    assert "adapter.rank" in refusal({"adapter.rank.x": 1}, {**SMALL, "adapter": {"rank": 4}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("[2, 4, 8]", [2, 4, 8]),
        ('"4"', "4"),
        ("fedavg", "fedavg"),
        ("some/folder.zip", "some/folder.zip"),
        ("", ""),
        ("C:\\data\\task", "C:\\data\\task"),
    ],
)
def test_values_on_the_command_line_are_toml_or_plain_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_assignments_need_an_equals_sign_and_a_key() -> None:
    assert parse_assignments(["a.b = 3", "c=x=y"]) == {"a.b": 3, "c": "x=y"}
    for wrong in ("federation.rounds", "=3", " = 3"):
        with pytest.raises(ConfigError, match="key=value"):
            parse_assignments([wrong])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("copra.enabled=true,false", [True, False]),
        ("adapter.ranks=[2, 4],[8]", [[2, 4], [8]]),
        ("adapter.rank=4", [4]),
        ('task.path="a,b",c', ["a,b", "c"]),
        ("strategy.name=fedavg, flexlora", ["fedavg", "flexlora"]),
        (
            'task.shifts=[{path="x",class_names=["a","b"]},{path="y"}],[]',
            [[{"path": "x", "class_names": ["a", "b"]}, {"path": "y"}], []],
        ),
    ],
)
def test_alternatives_are_split_at_outer_commas(text: str, values: list[Any]) -> None:
    (found,) = split_alternatives([text]).values()
    assert found == values


def test_an_experiment_cannot_be_changed() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="frozen"):
        small().adapter.rank = 3  # type: ignore[misc]


# --- flat configs ---------------------------------------------------------------------------------


def flat_of(experiment: Experiment) -> dict[str, Any]:
    """Write an experiment as Flower's run config would hold it."""
    given = experiment.model_dump(mode="json", exclude_defaults=True)
    return {
        key: json.dumps(value) if isinstance(value, list) else value
        for key, value in _flatten(given).items()
        if value is not None
    }


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"adapter__ranks": [2, 4, 8], "adapter__rslora": True, "federation__fraction": 0.5},
        {"adapter__targets": ["query", "key"], "copra__enabled": True},
        {"task__path": "some/folder", "strategy__copra-merge__veto_z": 3.0},
    ],
)
def test_a_flat_config_gives_the_same_experiment(values: dict[str, Any]) -> None:
    experiment = small(**values)
    assert experiment_from_flat(flat_of(experiment)) == experiment


def test_empty_strings_in_a_flat_config_mean_not_given() -> None:
    flat = {**flat_of(small()), "task.path": "", "adapter.ranks": "", "train.warmup": ""}
    assert experiment_from_flat(flat) == small()


def test_lists_in_a_flat_config_are_toml_in_a_string() -> None:
    flat = {**flat_of(small()), "adapter.ranks": "[2, 4]", "adapter.targets": '["query"]'}
    adapter = experiment_from_flat(flat).adapter
    assert (adapter.ranks, adapter.targets) == ((2, 4), ("query",))


def test_false_and_zero_in_a_flat_config_are_values() -> None:
    flat = {**flat_of(small()), "adapter.train_head": False, "task.validation_fraction": 0.0}
    experiment = experiment_from_flat(flat)
    assert experiment.adapter.train_head is False
    assert experiment.task.validation_fraction == 0.0


def test_a_broken_list_in_a_flat_config_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.ranks"):
        experiment_from_flat({**flat_of(small()), "adapter.ranks": "[2, 4"})


def test_the_order_of_a_flat_config_does_not_matter() -> None:
    """pyproject.toml names a task and a user adds a path; the config travels as a map."""
    flat = {**flat_of(small()), "task.path": "my/folder", "backbone.path": "my/model"}
    found = set()
    for seed in range(8):
        keys = list(flat)
        random.Random(seed).shuffle(keys)
        experiment = experiment_from_flat({key: flat[key] for key in keys})
        found.add((experiment.task.path, experiment.backbone.path))
    assert found == {("my/folder", "my/model")}


# --- what follows from it -------------------------------------------------------------------------


def test_an_experiment_travels_as_json_without_loss() -> None:
    experiment = small(adapter__ranks=[2, 4], copra__enabled=True, train__learning_rate=1e-3)
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_ranks_are_cycled_over_clients() -> None:
    adapter = small(adapter__ranks=[2, 8, 4]).adapter
    assert [adapter.rank_of(client) for client in range(5)] == [2, 8, 4, 2, 8]
    assert adapter.server_rank == 8
    plain = small(adapter__rank=6).adapter
    assert [plain.rank_of(0), plain.rank_of(9), plain.server_rank] == [6, 6, 6]


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    assert small(adapter__alpha=16).adapter.scale(8) == 2.0
    assert small(adapter__alpha=16, adapter__rslora=True).adapter.scale(4) == 8.0


@pytest.mark.parametrize(
    ("fraction", "clients", "size"), [(1.0, 10, 10), (0.5, 10, 5), (0.01, 10, 1), (0.34, 3, 1)]
)
def test_a_cohort_has_at_least_one_client(fraction: float, clients: int, size: int) -> None:
    assert small(federation__fraction=fraction).federation.cohort_size(clients) == size


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ({"name": "digits"}, "digits"),
        ({"path": "data/sst2"}, "sst2"),
        ({"path": "data/pictures.zip"}, "pictures"),
        ({"path": "data/sst2/"}, "sst2"),
        ({"hub": "stanfordnlp/sst2"}, "sst2"),
    ],
)
def test_a_source_is_called_by_its_last_part(source: dict[str, str], label: str) -> None:
    assert build_experiment({**SMALL, "task": source}).task.label == label
