"""Aggregation strategies: how the server turns clients' updates into the next model.

`STRATEGIES` is the whole list. `resolve` turns an experiment into a strategy, or says why not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from common.config import Experiment
from common.errors import ConfigError
from common.seeds import child_seed
from strategies.base import Client, Options, Setting, Strategy
from strategies.controls import ControlOptions, centralised, dense_oracle, local_only
from strategies.copra_merge import CopraMergeOptions, copra_merge
from strategies.cost import ADAPTERS, FACTORS, PROMPTS, Cost, same
from strategies.dare import DareOptions, dare
from strategies.fedask import FedASKOptions, fedask
from strategies.fedavg import FedAvgOptions, fedavg
from strategies.fedex_lora import FedExLoRAOptions, fedex_lora
from strategies.fedprox import FedProxOptions, fedprox
from strategies.fedrot_lora import FedRotLoRAOptions, fedrot_lora
from strategies.fedsa_lora import FedSALoRAOptions, fedsa_lora
from strategies.fedsvd import FedSVDOptions, fedsvd
from strategies.ffa_lora import FFALoRAOptions, ffa_lora
from strategies.flexlora import FlexLoRAOptions, flexlora
from strategies.flora import FLoRAOptions, flora
from strategies.geometric_median import GeometricMedianOptions, geometric_median
from strategies.global_local_prompts import GlobalLocalPromptsOptions, global_local_prompts
from strategies.hetlora import HetLoRAOptions, hetlora
from strategies.local_heads import LocalHeadsOptions, local_heads
from strategies.lora_fair import LoRAFAIROptions, lora_fair
from strategies.prompt_rules import (
    DirMagOptions,
    MeanDirOptions,
    NormProxOptions,
    PromptFLOptions,
    ShrinkOptions,
    UpdateNormOptions,
    dir_mag,
    mean_dir,
    norm_prox,
    promptfl,
    shrink,
    update_norm,
)
from strategies.robust import (
    MedianOptions,
    MultiKrumOptions,
    TrimmedMeanOptions,
    median,
    multi_krum,
    trimmed_mean,
)
from strategies.rolora import RoLoRAOptions, rolora
from strategies.scaffold import ScaffoldOptions, scaffold
from strategies.server_optimisers import (
    FedAdagradOptions,
    FedAdamOptions,
    FedAvgMOptions,
    fedadagrad,
    fedadam,
    fedavgm,
    fedyogi,
)
from strategies.shared_probe import with_shared_probe
from strategies.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from strategies.ties import TiesOptions, ties


@dataclass(frozen=True)
class Method:
    """A row of the table: how a strategy is built, what it says of itself, and what it can do.

    Attributes:
        build: from checked options and the setting to the strategy.
        options: the type of its options.
        summary: what the server does, in a line.
        citation: the paper.
        served: what the served delta is of the mean of the clients' deltas: `exact`, `best rank r`,
            `inexact`, or `personal` where there is no single one. Methods for either kind of
            adapter say what it is for LoRA.
        cost: what travels.
        weighting: what clients count by: their `examples`, `equal`, or the `norms` of their deltas.
        adapters: the kinds of adapter that the method has a meaning for.
        unequal_ranks: whether clients may have ranks of their own.
        by_task: whether clients may hold different tasks.
        at_sites: whether each client may have a folder of its own: nobody else trains on its rows,
            and the server's test rows say all that is reported.
        secure_aggregation: whether the server needs no more than sums over clients.
        noise: whether noise on what clients send enters the delta linearly, as differential privacy
            wants it.
        optimiser: the local optimiser that the formulas take for granted; empty for any.
        server_state, client_state: what is kept from round to round beside the model, or nothing.
        control: whether it is there to be compared with, and not federated.
    """

    build: Callable[[Any, Setting], Strategy]
    options: type[Options]
    summary: str
    citation: str
    served: Literal["exact", "best rank r", "inexact", "personal"]
    cost: Cost
    weighting: Literal["examples", "equal", "norms"] = "examples"
    adapters: tuple[str, ...] = ("lora",)
    unequal_ranks: bool = False
    by_task: bool = True
    at_sites: bool = True
    secure_aggregation: bool = False
    noise: bool = False
    optimiser: Literal["", "sgd"] = ""
    server_state: str = ""
    client_state: str = ""
    control: bool = False


EITHER = ("lora", "prompt")

STRATEGIES: Mapping[str, Method] = {
    "fedavg": Method(
        fedavg,
        FedAvgOptions,
        "averages every tensor; of LoRA the factors A and B, apart",
        "arXiv 1602.05629, 2305.05644",
        "inexact",
        ADAPTERS,
        secure_aggregation=True,
        adapters=EITHER,
    ),
    "ffa-lora": Method(
        ffa_lora,
        FFALoRAOptions,
        "freezes A, averages B: exact at half the bytes",
        "arXiv 2403.12313",
        "exact",
        same("B + H"),
        secure_aggregation=True,
        noise=True,
    ),
    "flexlora": Method(
        flexlora,
        FlexLoRAOptions,
        "averages the deltas BA, then SVD to each client's rank",
        "arXiv 2402.11505",
        "best rank r",
        FACTORS,
        unequal_ranks=True,
    ),
    "flora": Method(
        flora,
        FLoRAOptions,
        "adds the stacked BA to the base, and restarts the adapters every round",
        "arXiv 2409.05976",
        "exact",
        # The fresh adapter is drawn by each client; of the stack the smaller form travels.
        Cost(("A + B + H",), ("min(S, D) + H",)),
        unequal_ranks=True,
    ),
    "fedex-lora": Method(
        fedex_lora,
        FedExLoRAOptions,
        "averages A and B, adds what that misses to the base: exact unless truncated",
        "arXiv 2410.09432",
        "exact",
        Cost(("A + B + H",), ("A + B + H + min((K - 1)*(A + B), D)",)),
    ),
    "fedsa-lora": Method(
        fedsa_lora,
        FedSALoRAOptions,
        "averages A; B and the head stay at the client",
        "arXiv 2410.01463",
        "personal",
        same("A"),
        secure_aggregation=True,
        client_state="B and head",
        at_sites=False,
    ),
    "copra-merge": Method(
        copra_merge,
        CopraMergeOptions,
        "averages increments of BA, then SVD; a probe set may veto a client",
        "ours, after arXiv 2410.22911",
        "best rank r",
        FACTORS,
        unequal_ranks=True,
    ),
    "task-arithmetic": Method(
        task_arithmetic,
        TaskArithmeticOptions,
        "adds a multiple of the mean increment of BA, then SVD",
        "arXiv 2212.04089",
        "best rank r",
        FACTORS,
        unequal_ranks=True,
    ),
    "ties": Method(
        ties,
        TiesOptions,
        "trims increments of BA, elects signs, averages what agrees, then SVD",
        "arXiv 2306.01708",
        "inexact",
        FACTORS,
        unequal_ranks=True,
    ),
    "dare": Method(
        dare,
        DareOptions,
        "drops entries of increments of BA at random, merges the rest, then SVD",
        "arXiv 2311.03099",
        "inexact",
        FACTORS,
        unequal_ranks=True,
    ),
    "median": Method(
        median,
        MedianOptions,
        "robust: the median of every entry of increments of BA, then SVD",
        "arXiv 1803.01498",
        "inexact",
        FACTORS,
        weighting="equal",
        unequal_ranks=True,
    ),
    "trimmed-mean": Method(
        trimmed_mean,
        TrimmedMeanOptions,
        "robust: the mean of every entry without its extremes, then SVD",
        "arXiv 1803.01498",
        "inexact",
        FACTORS,
        weighting="equal",
        unequal_ranks=True,
    ),
    "multi-krum": Method(
        multi_krum,
        MultiKrumOptions,
        "robust: averages the clients closest to their neighbours, then SVD",
        "arXiv 1703.02757",
        "inexact",
        FACTORS,
        weighting="equal",
        unequal_ranks=True,
    ),
    "geometric-median": Method(
        geometric_median,
        GeometricMedianOptions,
        "robust: the point with the least sum of distances to the clients' deltas, then SVD",
        "arXiv 1912.13445",
        "inexact",
        FACTORS,
        weighting="equal",
        unequal_ranks=True,
    ),
    "fedavgm": Method(
        fedavgm,
        FedAvgMOptions,
        "averages, then steps with momentum on the server",
        "arXiv 1909.06335",
        "inexact",
        ADAPTERS,
        secure_aggregation=True,
        server_state="momentum",
        adapters=EITHER,
    ),
    "fedadagrad": Method(
        fedadagrad,
        FedAdagradOptions,
        "averages, then takes an Adagrad step on the server",
        "arXiv 2003.00295",
        "inexact",
        ADAPTERS,
        secure_aggregation=True,
        server_state="moments",
        adapters=EITHER,
    ),
    "fedadam": Method(
        fedadam,
        FedAdamOptions,
        "averages, then takes an Adam step on the server",
        "arXiv 2003.00295",
        "inexact",
        ADAPTERS,
        secure_aggregation=True,
        server_state="moments",
        adapters=EITHER,
    ),
    "fedyogi": Method(
        fedyogi,
        FedAdamOptions,
        "averages, then takes a Yogi step on the server",
        "arXiv 2003.00295",
        "inexact",
        ADAPTERS,
        secure_aggregation=True,
        server_state="moments",
        adapters=EITHER,
    ),
    "fedprox": Method(
        fedprox,
        FedProxOptions,
        "averages; clients pay for leaving the model they were sent",
        "arXiv 1812.06127",
        "inexact",
        ADAPTERS,
        secure_aggregation=True,
        adapters=EITHER,
    ),
    "scaffold": Method(
        scaffold,
        ScaffoldOptions,
        "averages; control variates take client drift out of every local step",
        "arXiv 1910.06378",
        "inexact",
        same("2*(A + B + P + H)"),
        secure_aggregation=True,
        optimiser="sgd",
        server_state="control variate",
        client_state="control variate",
        adapters=EITHER,
    ),
    "rolora": Method(
        rolora,
        RoLoRAOptions,
        "trains and averages B and A in turn: exact at half the bytes",
        "arXiv 2502.01755",
        "exact",
        # What the round before has merged comes down while the other factor goes up.
        Cost(("B + H", "A + H"), ("A + H", "B + H")),
        secure_aggregation=True,
        noise=True,
        server_state="whose turn it is",
    ),
    "fedsvd": Method(
        fedsvd,
        FedSVDOptions,
        "averages B, then turns the basis by SVD so that A has orthonormal rows",
        "arXiv 2505.12805",
        "exact",
        Cost(("B + H",), ("A + B + H",)),
        secure_aggregation=True,
        noise=True,
    ),
    "fedrot-lora": Method(
        fedrot_lora,
        FedRotLoRAOptions,
        "turns the factors towards what was sent, then averages A and B apart",
        "arXiv 2602.23638",
        "inexact",
        FACTORS,
        server_state="whose turn it is",
    ),
    "lora-fair": Method(
        lora_fair,
        LoRAFAIROptions,
        "averages A and B apart, then corrects B towards the mean of the deltas",
        "arXiv 2411.14961",
        "inexact",
        FACTORS,
    ),
    "hetlora": Method(
        hetlora,
        HetLoRAOptions,
        "averages zero-padded factors by the norms of the deltas; clients prune their ranks",
        "arXiv 2401.06432",
        "inexact",
        FACTORS,
        weighting="norms",
        unequal_ranks=True,
        server_state="ranks after pruning",
    ),
    "fedask": Method(
        fedask,
        FedASKOptions,
        "merges deltas from sums of sketches, in two exchanges a round",
        "arXiv 2507.09990",
        "inexact",
        Cost(("q*(m + n) + H",), ("q*m + A + B + H",)),
        unequal_ranks=True,
        secure_aggregation=True,
    ),
    "promptfl": Method(
        promptfl,
        PromptFLOptions,
        "averages soft prompts",
        "arXiv 2208.11625",
        "exact",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
        noise=True,
    ),
    "mean-dir": Method(
        mean_dir,
        MeanDirOptions,
        "averages soft prompts, then gives back the norm that averaging takes",
        "ours",
        "inexact",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
    ),
    "dir-mag": Method(
        dir_mag,
        DirMagOptions,
        "averages norms and directions of soft prompts apart",
        "ours",
        "inexact",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
    ),
    "shrink": Method(
        shrink,
        ShrinkOptions,
        "averages soft prompts, then multiplies them by a factor below 1",
        "ours, after arXiv 2302.10911",
        "inexact",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
    ),
    "update-norm": Method(
        update_norm,
        UpdateNormOptions,
        "steps along the mean change of soft prompts, as far as clients went on average",
        "ours, after arXiv 2008.04538",
        "inexact",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
    ),
    "norm-prox": Method(
        norm_prox,
        NormProxOptions,
        "averages soft prompts, then lowers every norm by a threshold",
        "ours, after arXiv 2408.13979",
        "inexact",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
    ),
    "global-local-prompts": Method(
        global_local_prompts,
        GlobalLocalPromptsOptions,
        "averages a global prompt; a local one stays at the client; no optimal transport",
        "after arXiv 2403.00041",
        "personal",
        PROMPTS,
        adapters=("prompt",),
        secure_aggregation=True,
        client_state="local prompt",
        at_sites=False,
    ),
    "local-heads": Method(
        local_heads,
        LocalHeadsOptions,
        "averages prompts, or what transfers them; heads, queries and own vectors stay at clients",
        "ours, after OpenReview SYnIf4LxAG",
        "personal",
        same("P"),
        adapters=("prompt",),
        secure_aggregation=True,
        client_state="head, queries and own vectors",
    ),
    "local-only": Method(
        local_only,
        ControlOptions,
        "control: every client trains alone",
        "",
        "personal",
        # It stays a federation on the wire: each client's model is kept on the server.
        ADAPTERS,
        unequal_ranks=True,
        control=True,
        adapters=EITHER,
    ),
    "centralised": Method(
        centralised,
        ControlOptions,
        "control: one model on the pooled data",
        "",
        "exact",
        ADAPTERS,
        by_task=False,
        at_sites=False,
        control=True,
        adapters=EITHER,
    ),
    "dense-oracle": Method(
        dense_oracle,
        ControlOptions,
        "control: the exact mean of the deltas, dense and in float64",
        "",
        "exact",
        # Float64 numbers count as two.
        Cost(("A + B + H",), ("A + B + H + 2*D",)),
        control=True,
    ),
}


def resolve(experiment: Experiment) -> Strategy:
    """Build the experiment's strategy.

    Raises:
        ConfigError: an unknown strategy or option, or a strategy that cannot do what is asked.
    """
    name = experiment.strategy_name
    if name not in STRATEGIES:
        raise ConfigError(f"strategy.name = {name!r}: unknown; choose from {', '.join(STRATEGIES)}")
    method = STRATEGIES[name]
    options = _options(experiment, name)
    _refuse_impossible(experiment, name, method, options)
    strategy = method.build(options, setting_of(experiment))
    travels = experiment.adapter.transfer.travels
    if travels == "prompt" and strategy.rules.control_variates:
        raise ConfigError(
            f"adapter.transfer.travels = 'prompt': strategy {name} corrects gradients of what "
            "travels, and clients train the map; choose 'projector'"
        )
    nemesis = experiment.nemesis
    if nemesis.kind in ("pan", "blend") and nemesis.probing == "round":
        strategy = with_shared_probe(strategy, nemesis.strength)
    tasks = len(experiment.task.sources)
    if 0 < strategy.probe_examples < 2 * tasks:
        raise ConfigError(
            f"strategy.{name}.probe_examples = {strategy.probe_examples}: the probe has two "
            f"halves, so that {tasks} tasks need at least {2 * tasks}; or choose probe = 'none'"
        )
    own_start = experiment.federation.start == "own"
    if own_start and "lora_A" not in strategy.trains({}):
        raise ConfigError(
            f"federation.start = 'own': strategy {name} does not train A in the first round, so "
            "that no server would ever know each client's; choose 'common'"
        )
    if strategy.probe_examples > experiment.task.probe_examples:
        raise ConfigError(
            f"strategy.{name}.probe_examples = {strategy.probe_examples}: the server keeps only "
            f"task.probe_examples = {experiment.task.probe_examples}; raise that or lower this"
        )
    return strategy


def setting_of(experiment: Experiment) -> Setting:
    """Return what methods may know of the run."""
    adapter = experiment.adapter
    seed = child_seed(experiment.federation.seed, "strategy")
    tasks = [source.label for source in experiment.task.sources]
    clients = tuple(
        Client(k, tasks[k % len(tasks)], adapter.rank_of(k), adapter.scale(adapter.rank_of(k)))
        for k in range(experiment.partition.clients)
    )
    start_seed = experiment.federation.seed
    return Setting(adapter.server_rank, adapter.scale, seed, clients, start_seed)


def _options(experiment: Experiment, name: str) -> Options:
    chosen: Options | None = None
    for table, values in experiment.strategy.items():
        if table == "name":
            continue
        if table not in STRATEGIES:
            raise ConfigError(
                f"strategy.{table}: neither the key name nor a strategy; "
                f"strategies are {', '.join(STRATEGIES)}"
            )
        checked = _checked(table, values)
        chosen = checked if table == name else chosen
    return chosen or STRATEGIES[name].options()


def _checked(name: str, values: Any) -> Options:
    options = STRATEGIES[name].options
    try:
        return options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["strategy", name, *map(str, first["loc"])])
        choices = ", ".join(options.model_fields) or "none"
        raise ConfigError(
            f"{key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}; "
            f"the options here are {choices}"
        ) from None


def _refuse_impossible(experiment: Experiment, name: str, method: Method, options: Options) -> None:
    kind = experiment.adapter.kind
    if kind not in method.adapters:
        raise ConfigError(
            f"adapter.kind = {kind!r}: strategy {name} has a meaning for "
            f"{', '.join(method.adapters)} only; set that, or choose from "
            f"{_able(lambda other: kind in other.adapters)}"
        )
    # What a method is laid over is a row of the table too.
    over = getattr(options, "over", name)
    if kind not in STRATEGIES[over].adapters:
        raise ConfigError(
            f"strategy.{name}.over = {over!r}: it has a meaning for adapter.kind = "
            f"{', '.join(STRATEGIES[over].adapters)} only, and here that is {kind!r}; "
            f"choose {type(options).model_fields['over'].default!r}"
        )
    ranks = list(experiment.adapter.ranks)
    if len(set(ranks)) > 1 and not method.unequal_ranks:
        raise ConfigError(
            f"adapter.ranks = {ranks}: strategy {name} needs one rank for all clients; with "
            f"unequal ranks choose from {_able(lambda other: other.unequal_ranks)}"
        )
    optimiser = experiment.train.optimiser
    if method.optimiser not in ("", optimiser):
        raise ConfigError(
            f"train.optimiser = {optimiser!r}: the formulas of strategy {name} hold for "
            f"{method.optimiser!r} only; set that, or choose from "
            f"{_able(lambda other: other.optimiser in ('', optimiser))}"
        )
    if experiment.task.members and not method.by_task:
        raise ConfigError(
            f"partition.kind = 'by-task': strategy {name} trains one model on pooled rows and has "
            f"no meaning over several tasks; choose from {_able(lambda other: other.by_task)}"
        )
    if experiment.task.at_sites and not method.at_sites:
        raise ConfigError(
            f"partition.kind = 'sites': strategy {name} pools rows, or scores clients' own models "
            f"on the server's test rows; choose from {_able(lambda other: other.at_sites)}"
        )


def _able(can: Callable[[Method], bool]) -> str:
    return ", ".join(name for name, method in STRATEGIES.items() if can(method))
