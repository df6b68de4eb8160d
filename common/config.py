"""The experiment: one frozen, typed object, read from TOML or from Flower's flat run config.

The only reader of experiment files. Everything that can be known to be wrong without loading a
model or a data set is refused here or in `strategies.resolve`, naming key, value and choices.
"""

import datetime
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError

Scalar = str | int | float | bool
SITE = "{site}"


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Source(_Table):
    """Where something comes from: a shipped `name`, a local `path` or a `hub` id."""

    name: str | None = None
    path: str | None = None
    hub: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("name", "path", "hub") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"give one of name, path or hub, not {' and '.join(given) or 'none'}")
        return self

    @property
    def label(self) -> str:
        """Return what reports call it: the name, or the last part of the path or hub id."""
        return self.name or Path(self.path or self.hub or "").name.removesuffix(".zip")


class TaskSource(_Source):
    """One task and its columns.

    `{site}` in a path stands for a folder of everyone's own: the number of a client, or `server`.
    """

    location: str = Field(
        "", description="of a published task: a folder, or a hub id other than the listed one"
    )
    text_column: str = "text"
    pair_column: str = "text_pair"
    image_column: str = "image"
    label_column: str = "label"
    labels: tuple[str, ...] = Field(
        (), description="the classes of a folder, in order; empty: those that its rows have"
    )
    class_names: tuple[str, ...] = Field(
        (), description="what prompts call the classes, in label order; empty: the labels"
    )
    classes: Literal["all", "base", "new"] = Field(
        "all", description="base: the first half of the classes, rounded up; new: the others"
    )

    @model_validator(mode="after")
    def _labels_of_a_folder(self) -> Self:
        if self.labels and (not self.path or len(set(self.labels)) != len(self.labels)):
            raise ValueError(
                f"labels = {list(self.labels)}: different classes, of a folder that path names"
            )
        return self

    @property
    def at_sites(self) -> bool:
        """Say whether everyone has a folder of its own."""
        return SITE in (self.path or "")

    @property
    def label(self) -> str:
        """Return what reports call it: the name or last part of the path, and which classes."""
        part = "" if self.classes == "all" else f"-{self.classes}"
        if self.at_sites:
            return (Path(str(self.path).replace(SITE, "")).name or "sites") + part
        return super().label + part


class Task(TaskSource):
    """One task, or several `members` for a by-task federation; and how rows are split.

    `test_fraction` and `validation_fraction` cut a split out of the training rows only where the
    source has none of its own. `probe_examples` training rows, balanced over classes, stay on the
    server for strategies that probe; they are set aside for every strategy, so that all compare
    on the same shards. `limit` keeps that many training rows (0: all). `examples` is how many rows
    there are to train on at all (0: all), and validation rows are cut out of these: 1000 with a
    `validation_fraction` of 0.2 is VTAB-1K's 800 and 200. Once settings are chosen,
    `include_validation` trains on all of them. Every round is scored on the rows of `evaluate_on`:
    choose settings on validation, and report on test. Soft prompts are
    scored on every task of `shifts` beside, of which nothing is trained on: other classes, or the
    same classes in another data set.
    """

    members: tuple[TaskSource, ...] = ()
    shifts: tuple[TaskSource, ...] = ()
    test_fraction: float = Field(0.2, gt=0, lt=1)
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    probe_examples: int = Field(512, ge=0)
    limit: int = Field(0, ge=0)
    examples: int = Field(0, ge=0)
    include_validation: bool = False
    evaluate_on: Literal["test", "validation"] = "test"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("name", "path", "hub", "members") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"give one of name, path, hub or members, not {' and '.join(given) or 'none'}"
            )
        if self.include_validation and self.evaluate_on == "validation":
            raise ValueError(
                "include_validation = true trains on validation rows: evaluate_on = 'validation' "
                "would judge by rows that were learned; choose 'test'"
            )
        labels = [source.label for source in (*self.sources, *self.shifts)]
        if repeated := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"several members or shifts are called {sorted(repeated)[0]}")
        return self

    @property
    def sources(self) -> tuple[TaskSource, ...]:
        """Return the members, or the task itself as the only one."""
        if self.members:
            return self.members
        return (TaskSource(**{key: getattr(self, key) for key in TaskSource.model_fields}),)


class Partition(_Table):
    """How the training rows are dealt out to clients.

    `dirichlet` deals each label out by a draw over clients, so that sizes vary too; at small alpha
    some clients would get nothing, and a draw with fewer than `min_examples` is refused.
    `dirichlet-labels` gives all clients the same size and each a draw of its own over labels.
    `sites` deals nothing out: each client has all training rows of its own folder.
    """

    kind: Literal["iid", "dirichlet", "dirichlet-labels", "classes", "by-task", "sites"] = "iid"
    clients: int = Field(10, ge=1)
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is more skewed")
    classes: int = Field(2, ge=1, description="classes a client, for kind = classes")
    min_examples: int = Field(10, ge=1, description="smallest shard a Dirichlet draw may give")
    shots: int = Field(
        0, ge=0, description="rows kept of each class, over all clients, drawn by the seed; 0: all"
    )


class Backbone(_Source):
    """The pretrained model.

    `quantised` is of its linear layers, heads excepted: `int8` is LLM.int8() (arXiv 2208.07339),
    `nf4` the 4-bit NormalFloat of QLoRA (arXiv 2305.14314) without double quantisation.
    """

    max_length: int = Field(64, ge=1, description="tokens kept of a text")
    quantised: Literal["none", "int8", "nf4"] = Field(
        "none", description="grid of the frozen weights; needs the extra 'quantised'"
    )


class Prompt(_Table):
    """Soft prompts of a CLIP, a ViT or a text encoder: vectors among its tokens.

    The context is `length` vectors in each caption, shared by all classes or, `class_specific`, one
    context a class. Several `prompts` (PLOT without its transport) each make a classifier; their
    logits are averaged. Visual prompts are `visual` vectors behind the class token of the picture,
    in each of the first `visual_blocks` blocks, which forget those of the block before. A `prefix`
    is keys and values that every block of the text tower attends to. A ViT has no captions, and
    needs `length = 0` and no prefix; without visual prompts only its linear head is trained.

    On texts `length` vectors stand in front of each text. A linear head reads the class token, or,
    with a `verbaliser`, the masked language model fills in a class's name. Several tasks share one
    prompt, or, `task_specific`, have one each.
    """

    length: int = Field(16, ge=0, description="context vectors of a caption")
    class_specific: bool = False
    class_at: Literal["end", "middle", "front"] = Field(
        "end", description="where the class name stands; middle: after half the context"
    )
    prompts: int = Field(1, ge=1)
    prefix: int = Field(0, ge=0, description="keys, and as many values, in each text block")
    visual: int = Field(0, ge=0, description="prompt vectors of a picture in a block")
    visual_blocks: int = Field(1, ge=1, description="1: shallow; more: deep")
    words: str = Field("", description="the context starts as these words, as far as they reach")
    spread: float = Field(0.02, gt=0, description="standard deviation of the start's entries")
    ending: str = Field("", description="text behind the caption, such as a full stop")
    task_specific: bool = Field(False, description="of texts: every task has a prompt of its own")
    verbaliser: bool = Field(
        False, description="of texts: classes are answered by their names, and no head is trained"
    )

    @model_validator(mode="after")
    def _keys_of_captions(self) -> Self:
        if not self.length and (self.class_specific or self.prompts > 1 or self.words):
            raise ValueError("length = 0 leaves class_specific, prompts and words without meaning")
        return self


class Transfer(_Table):
    """The prompt of a ViT from one that was learned on text (ICLR 2025, OpenReview SYnIf4LxAG).

    `frozen` takes the source as it is, `projection` trains a linear map of its vectors, and
    `attention` trains `concentrated` vectors that attend to it, and `length` less these of the
    ViT's own; it may have several sources. A source of another width is mapped by what a
    projection starts as: by `frozen` for good, if `begin` is not `identity`.
    """

    kind: Literal["none", "frozen", "projection", "attention"] = "none"
    sources: tuple[str, ...] = Field((), description="files of a prompt bank")
    control: Literal[
        "none",
        "unrelated",
        "untrained",
        "norm-matched",
        "signs-flipped",
        "coordinates-shuffled",
    ] = Field("none", description="what takes the source's place and carries no language")
    draw: int = Field(
        0, ge=0, description="seed of a control and of a fixed map; the federation's by default"
    )
    norm_cap: float = Field(
        0.0, ge=0, description="longer source vectors are scaled back to this norm; 0: as they are"
    )
    travels: Literal["projector", "prompt"] = Field(
        "projector",
        description="what of a projection clients send: the map, or the prompt that it makes",
    )
    begin: Literal["identity", "orthogonal", "uniform"] = Field(
        "identity", description="what the projection starts as; uniform is the published"
    )
    length: int = Field(100, ge=1, description="vectors of an attention's prompt")
    concentrated: int = Field(50, ge=1, description="how many of them attend to the source")
    top: int = Field(0, ge=0, description="source vectors that one may attend to; 0: all")
    paper_exact: bool = Field(
        False,
        description="as published: a first row that means nothing stays, and attention takes "
        "scores and rows as they are",
    )

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if self.kind == "none":
            if self.sources:
                raise ValueError("kind = 'none' has no use for sources")
        elif not self.sources:
            raise ValueError(f"kind = {self.kind!r} needs sources: the file of a prompt")
        elif len(self.sources) > 1 and self.kind != "attention":
            raise ValueError(
                f"kind = {self.kind!r} takes one of the {len(self.sources)} sources; 'attention' "
                "takes several"
            )
        if self.travels == "prompt" and self.kind != "projection":
            raise ValueError(
                f"travels = 'prompt' is of a projection, whose map and prompt average alike; kind "
                f"is {self.kind!r}"
            )
        if self.concentrated > self.length:
            raise ValueError(
                f"concentrated = {self.concentrated} is more than length = {self.length}"
            )
        return self


class Adapter(_Table):
    """What is trained beside frozen weights.

    `lora`: `ΔW = s·B·A`, `s = alpha/r`, or `alpha/√r` with rslora, and a head. `prompt`: the soft
    prompts of a CLIP, or of a ViT and a linear head, in the table `adapter.prompt`; the prompt of a
    ViT may come from text, by the table `adapter.transfer`.
    """

    kind: Literal["lora", "prompt"] = "lora"
    prompt: Prompt = Prompt()
    transfer: Transfer = Transfer()
    rank: int = Field(8, ge=1)
    ranks: tuple[int, ...] = Field((), description="one a client, cycled; replaces rank")
    alpha: float = Field(16.0, gt=0)
    rslora: bool = False
    targets: tuple[str, ...] = Field((), description="module name endings; empty: query and value")
    blocks: int = Field(0, ge=0, description="how many of the last blocks are adapted; 0: all")
    dropout: float = Field(0.0, ge=0, lt=1)
    train_head: bool = True

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> Self:
        of_prompts = {"prompt", "transfer"}
        others = {
            "lora": of_prompts,
            "prompt": set(Adapter.model_fields) - of_prompts - {"kind"},
        }
        foreign = sorted(
            name
            for name in others[self.kind] & self.model_fields_set
            if getattr(self, name) != Adapter.model_fields[name].default
        )
        if foreign:
            raise ValueError(f"kind = {self.kind!r} has no use for {', '.join(foreign)}")
        others_set = {
            key: value
            for key in ("length", "prefix", "visual")
            if (value := getattr(self.prompt, key))
        }
        if self.transfer.kind != "none" and others_set:
            raise ValueError(
                f"transfer.kind = {self.transfer.kind!r} makes the only prompt; set "
                + ", ".join(f"prompt.{key} = 0, not {n}" for key, n in others_set.items())
            )
        return self

    @model_validator(mode="after")
    def _positive_ranks(self) -> Self:
        if any(rank < 1 for rank in self.ranks):
            raise ValueError(f"ranks = {list(self.ranks)}: every rank must be at least 1")
        return self

    def rank_of(self, client: int) -> int:
        """Return the rank of `client`: `ranks`, cycled, or `rank`."""
        return self.ranks[client % len(self.ranks)] if self.ranks else self.rank

    @property
    def server_rank(self) -> int:
        """Return the largest rank that any client may have."""
        return max(self.ranks, default=self.rank)

    def scale(self, rank: int) -> float:
        """Return s for an adapter of `rank`."""
        return float(self.alpha / (rank**0.5 if self.rslora else rank))


class Copra(_Table):
    """Random block dropping with a rising keep probability (CoTo schedule)."""

    enabled: bool = False
    initial: float = Field(0.1, ge=0, le=1, description="keep probability at the first step")
    ramp: float = Field(0.75, ge=0, le=1, description="share of all steps until it reaches 1")
    over: Literal["run", "round"] = Field(
        "run", description="whose steps: one ramp over the whole run, or one a round"
    )
    whole: float = Field(
        0.0, ge=0, le=1, description="share of each round's steps, its last, with every block on"
    )


class Nemesis(_Table):
    """The norm of soft prompts in the clients' loss (Fu et al., arXiv 2408.13979).

    `L = CE + w·[b·PUN + (1 - b)·PAN]`, with b = 1 for `pun`, 0 for `pan` and `blend` in between.
    PAN weighs the positions whose shrinking classifies more of the rows right; it asks so at every
    step about `probed` positions drawn at random and the rows of the batch, or once a round about
    all positions and a part of the client's rows, summed over clients.
    """

    kind: Literal["none", "pun", "pan", "blend"] = "none"
    strength: float = Field(1.0, gt=0, description="A, the weight of the norms in the loss")
    blend: float = Field(0.5, gt=0, lt=1, description="b, for kind = blend")
    norm: Literal["one", "two", "inf"] = "two"
    probing: Literal["step", "round"] = "step"
    probed: int = Field(1, ge=1, description="positions that PAN asks about at a step")
    shrink: float = Field(0.5, ge=0, description="factor on a position that is asked about")
    schedule: Literal["constant", "logistic"] = Field(
        "constant", description="of w over the rounds: 1 throughout, or from 1 to 0"
    )


class Train(_Table):
    """The local loop of one client in one round; the optimiser starts afresh each round."""

    local_steps: int = Field(10, ge=1)
    batch_size: int = Field(32, ge=1)
    optimiser: Literal["adamw", "adam", "sgd"] = Field(
        "adamw", description="adam: weight decay in the gradient (L2), not beside it"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    decay_biases: bool = Field(True, description="false: none for tensors of one axis")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of each round's local steps")
    decay: Literal["none", "linear", "cosine", "warmed-cosine", "vpt"] = Field(
        "none",
        description="of the learning rate, over the whole run; the last two go by epochs of the "
        "shard, warm up over the first ten, or half of fewer than twenty, and vpt starts at 0",
    )
    max_grad_norm: float = Field(1.0, gt=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward pass; adapters always stay in float32"
    )


class Federation(_Table):
    """Rounds, cohort, seed and where clients run."""

    rounds: int = Field(8, ge=1)
    start: Literal["common", "own"] = Field(
        "common", description="of A: the same for all clients, or drawn by each for its first round"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="share of clients sampled each round")
    only: tuple[int, ...] = Field((), description="the clients that take part; empty: all")
    seed: int = Field(0, ge=0)
    workers: int = Field(2, ge=0, description="Ray actors; 0: in this process, without Ray")
    ray_address: str = Field(
        "", description="HOST:PORT of a running Ray cluster's head, whose CPUs are all used"
    )
    timeout: float = Field(3600.0, gt=0, description="seconds to wait for a round's replies")
    evaluate_every: int = Field(
        1, ge=1, description="rounds from one evaluation to the next; the last is always evaluated"
    )
    keep_updates: int = Field(
        8, ge=0, description="clients of the last round whose adapters stay with the run's record"
    )

    def cohort_size(self, clients: int) -> int:
        """Return how many of `clients` take part in a round."""
        return max(1, round(self.fraction * clients))


class Wire(_Table):
    """In which form numbers travel; whatever the strategy.

    `up` is of increments over what the client was sent, with error feedback where the method's
    coordinates last from round to round. `down` is of factors and heads: changes of the base
    always travel in full, since what is lost of them would never come back.
    """

    up: Literal["float32", "float16", "int8", "int4"] = "float32"
    down: Literal["float32", "float16"] = "float32"


class Harm(_Table):
    """Clients that do harm, to see what a method makes of them.

    `random-labels`: they train on labels drawn at random. `scaled-update`: what they return is
    `start + factor·(end - start)`, tensor by tensor; a factor below 0 turns their work round.
    """

    kind: Literal["none", "random-labels", "scaled-update"] = "none"
    clients: tuple[int, ...] = Field((), description="who they are, by number")
    factor: float = -1.0

    @model_validator(mode="after")
    def _someone_does_it(self) -> Self:
        if bool(self.clients) != (self.kind != "none"):
            raise ValueError(
                f"kind = {self.kind!r} and clients = {list(self.clients)}: name both or neither"
            )
        return self


class Experiment(_Table):
    """Everything that decides a run. Two equal experiments give the same served tensors."""

    task: Task
    partition: Partition = Partition()
    backbone: Backbone
    adapter: Adapter = Adapter()
    copra: Copra = Copra()
    nemesis: Nemesis = Nemesis()
    train: Train = Train()
    federation: Federation = Federation()
    wire: Wire = Wire()
    harm: Harm = Harm()
    # `name`, and a table of options a strategy: these belong to `strategies`, which checks them.
    strategy: Mapping[str, Any] = Field(default_factory=lambda: {"name": "fedavg"})

    @model_validator(mode="after")
    def _tasks_meet_partition(self) -> Self:
        by_task, members = self.partition.kind == "by-task", len(self.task.members)
        if bool(members) != by_task:
            raise ValueError(
                "task.members and partition.kind = 'by-task' go together: "
                f"there are {members} members and the kind is {self.partition.kind!r}"
            )
        at_sites = self.partition.kind == "sites"
        if at_sites != self.task.at_sites:
            raise ValueError(
                "partition.kind = 'sites' and a task.path with {site} in it go together, as in "
                f"'data/{{site}}': the kind is {self.partition.kind!r}, the path "
                f"{self.task.path!r}"
            )
        if at_sites and not self.task.labels:
            raise ValueError(
                "partition.kind = 'sites' needs task.labels: no site sees the classes of the others"
            )
        if at_sites and self.partition.shots:
            raise ValueError(
                f"partition.shots = {self.partition.shots} draws from all rows; partition.kind = "
                "'sites' deals none out"
            )
        if absent := [k for k in self.harm.clients if not 0 <= k < self.partition.clients]:
            raise ValueError(
                f"harm.clients names client {absent[0]}; there are {self.partition.clients}, "
                "numbered from 0"
            )
        if members and self.partition.clients % members:
            raise ValueError(
                f"partition.clients = {self.partition.clients} is no multiple of the {members} "
                "members of task: every task has the same number of clients"
            )
        return self

    @model_validator(mode="after")
    def _members_are_clients(self) -> Self:
        members, clients = self.federation.only, self.partition.clients
        if len(set(members)) < len(members) or any(not 0 <= k < clients for k in members):
            raise ValueError(
                f"federation.only = {list(members)}: name each client once, by its number from 0 "
                f"to {clients - 1}"
            )
        return self

    @model_validator(mode="after")
    def _schedules_have_no_second_warmup(self) -> Self:
        train = self.train
        if train.decay in ("warmed-cosine", "vpt") and train.warmup:
            raise ValueError(
                f"train.decay = {train.decay!r} warms up by itself; set train.warmup = 0, not "
                f"{train.warmup}"
            )
        if train.momentum and train.optimiser != "sgd":
            raise ValueError(
                f"train.momentum = {train.momentum} is of sgd; train.optimiser is "
                f"{train.optimiser!r}"
            )
        return self

    @model_validator(mode="after")
    def _adapter_meets_the_rest(self) -> Self:
        kind, prompted = self.adapter.kind, self.adapter.kind == "prompt"
        needs_prompts = {
            "nemesis.kind": self.nemesis.kind != "none",
            "task.shifts": bool(self.task.shifts),
        }
        needs_lora = {
            "copra.enabled": self.copra.enabled,
            "backbone.quantised": self.backbone.quantised != "none",
            "federation.start": self.federation.start != "common",
        }
        for key, given in (needs_lora if prompted else needs_prompts).items():
            if given:
                other = "lora" if prompted else "prompt"
                raise ValueError(
                    f"adapter.kind = {kind!r} has no use for {key}; it needs {other!r}"
                )
        if self.nemesis.probing == "round" and self.wire.up != "float32":
            raise ValueError(
                f"nemesis.probing = 'round' counts, and wire.up = {self.wire.up!r} would round the "
                "counts; choose 'float32'"
            )
        prompt, transfer = self.adapter.prompt, self.adapter.transfer
        if transfer.kind != "none" and (self.task.shifts or self.nemesis.kind != "none"):
            unwanted = "task.shifts" if self.task.shifts else "nemesis.kind"
            raise ValueError(f"adapter.transfer.kind = {transfer.kind!r} has no use for {unwanted}")
        some = prompt.length or prompt.prefix or prompt.visual
        if prompted and self.nemesis.kind != "none" and not some:
            raise ValueError(
                f"nemesis.kind = {self.nemesis.kind!r} needs a prompt; adapter.prompt.length, "
                "prefix and visual are 0"
            )
        if self.task.shifts and prompt.class_specific:
            raise ValueError(
                "task.shifts asks about other tasks; adapter.prompt.class_specific = true trains "
                "contexts for the classes of its own alone"
            )
        if self.nemesis.kind in ("pan", "blend") and prompt.visual:
            raise ValueError(
                f"nemesis.kind = {self.nemesis.kind!r} asks about positions of captions; "
                "adapter.prompt.visual needs 'pun'"
            )
        return self

    @property
    def strategy_name(self) -> str:
        """Return the name of the strategy."""
        return str(self.strategy["name"])

    @property
    def members(self) -> tuple[int, ...]:
        """Return the clients that take part, in order."""
        return tuple(sorted(self.federation.only)) or tuple(range(self.partition.clients))


_SOURCE_KEYS = ("name", "path", "hub", "members")
_OF_A_SOURCE = ("_column", "location")


def build_experiment(
    tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, origin: str = ""
) -> Experiment:
    """Check nested tables, with `overrides` of dotted keys laid over them.

    A new source (`task.path`, say) replaces the one in the file (`task.hub`) and its columns.

    Raises:
        ConfigError: naming the first bad key, its value and the choices.
    """
    # TOML's dates become text, and are then refused where a number or name is wanted.
    merged = json.loads(json.dumps(tables, default=str))
    given = overrides or {}
    # Sources first: they drop what the file says of another source.
    for key in sorted(given, key=_source_order):
        _put(merged, key, given[key])
    _draw_like_the_federation(merged)
    strategy = merged.get("strategy")
    if strategy is not None and not (isinstance(strategy, dict) and "name" in strategy):
        raise ConfigError(_at(origin, "strategy", strategy, "a table with the key name"))
    try:
        # JSON mode: strict about types, yet arrays may fill tuples.
        return Experiment.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        raise ConfigError(_first_error(error, merged, origin)) from None


def _draw_like_the_federation(tables: dict[str, Any]) -> None:
    """Give what a transfer draws the federation's seed, unless it has one of its own."""
    adapter, federation = tables.get("adapter"), tables.get("federation")
    if not isinstance(adapter, dict) or not isinstance(federation, dict):
        return
    transfer = adapter.get("transfer")
    if isinstance(transfer, dict) and transfer.get("kind", "none") != "none":
        transfer.setdefault("draw", federation.get("seed", 0))


def load_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: the file is missing, is no TOML, or says something that cannot be meant.
    """
    path = Path(path)
    tables = _read_toml(path)
    tables.pop("subjects", None)
    return build_experiment(tables, overrides, origin=str(path))


def load_subjects(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read what a file says is to be compared: by label, dotted keys laid over its other tables.

    The table `[subjects."label"]` of an experiment file, which single runs have no use for; empty
    where there is none.

    Raises:
        ConfigError: as `load_experiment`.
    """
    given = _read_toml(Path(path)).get("subjects", {})
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
        raise ConfigError(f'{path}: subjects are tables, as [subjects."linear probe"]')
    return {label: dict(_dotted(settings)) for label, settings in given.items()}


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no experiment file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _dotted(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def experiment_from_flat(config: Mapping[str, Scalar]) -> Experiment:
    """Build the experiment from Flower's run config: dotted keys, scalars only.

    Flower refuses a key that `pyproject.toml` does not list, so unused keys are listed as empty
    strings, which stand for "not given"; a list is written as TOML in a string: `"[2, 4, 8]"`.
    """
    given = {key: value for key, value in config.items() if value != ""}
    parsed = {
        key: parse_value(value) if isinstance(value, str) and value.startswith("[") else value
        for key, value in given.items()
    }
    return build_experiment({}, parsed, origin="run config")


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` strings into `{dotted key: value}`; values are TOML, or else plain text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment}: write key=value, as in federation.rounds=4")
        values[key.strip()] = parse_value(text.strip())
    return values


def split_alternatives(assignments: Iterable[str]) -> dict[str, list[Any]]:
    """Turn `key=a,b` strings into `{dotted key: [a, b]}`; a comma in brackets or quotes stays."""
    given: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment}: write key=value, or key=value,value")
        parts = _split_outside(text)
        given.setdefault(key.strip(), []).extend(parse_value(part.strip()) for part in parts)
    return given


def _split_outside(text: str) -> list[str]:
    """Split at commas that no bracket, brace or double quote encloses."""
    parts, begin, depth, quoted = list[str](), 0, 0, False
    for at, sign in enumerate(text):
        if sign == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def parse_value(text: str) -> Any:
    """Read `text` as a TOML value; what is none (`fedavg`, `some/folder`) is a string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    # No key takes a date, but a folder may be called like one.
    return text if isinstance(value, datetime.date | datetime.time) else value


def _source_order(key: str) -> int:
    """Sort names before paths and hub ids, which replace them, and all of these before the rest."""
    last = key.rpartition(".")[2]
    return _SOURCE_KEYS.index(last) if last in _SOURCE_KEYS else len(_SOURCE_KEYS)


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    table: Any = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a table")
    if parents and parents[0] in {"task", "backbone"} and last in _SOURCE_KEYS:
        for other in (*_SOURCE_KEYS, *(key for key in table if key.endswith(_OF_A_SOURCE))):
            table.pop(other, None)
    table[last] = value


def _first_error(error: ValidationError, tables: Mapping[str, Any], origin: str) -> str:
    details = error.errors()[0]
    path = [str(part) for part in details["loc"]]
    key = ".".join(path)
    if details["type"] == "extra_forbidden":
        choices = ", ".join(_keys_of(path[:-1]))
        return _at(origin, key, details["input"], f"an unknown key; the keys here are {choices}")
    if details["type"] == "missing":
        return f"{origin + ': ' if origin else ''}{key} is missing"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if details["type"] == "value_error":
        return f"{origin + ': ' if origin else ''}{f'[{key}] ' if key else ''}{message}"
    return _at(origin, key, details["input"], message)


def _at(origin: str, key: str, value: Any, problem: str) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return f"{origin + ': ' if origin else ''}{key} = {shown}: {problem}"


def _keys_of(path: list[str]) -> list[str]:
    table: Any = Experiment
    for part in path:
        if part.isdigit():
            table = TaskSource
            continue
        table = table.model_fields[part].annotation
    return list(table.model_fields)
