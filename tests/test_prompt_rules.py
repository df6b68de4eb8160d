"""Server rules for soft prompts against numbers by hand, and what is measured of their drift."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_federation import Toy, build, client, cohort, drift, prompt_start, updates_of

from common.config import Experiment, build_experiment
from common.errors import ConfigError, UpdateRefusedError
from common.tensors import Tensors, check_update, digest, is_prompt
from strategies import STRATEGIES, resolve
from strategies.base import Client, Merged, Served, Update
from strategies.prompt_drift import PromptDrift, prompt_drift

NAME = "prompt.text"
CONTEXT = "head.toy.context"
RULES: Sequence[tuple[str, Mapping[str, Any]]] = [
    ("promptfl", {}),
    ("mean-dir", {"lam": 0.5}),
    ("mean-dir", {"lam": 1.0}),
    ("dir-mag", {}),
    ("shrink", {"factor": 0.5, "over": "dir-mag"}),
    ("update-norm", {}),
    ("norm-prox", {"threshold": 0.1}),
]
# Those that leave clients alone who agree.
MEANS = RULES[:4]


def rows(*vectors: Sequence[float]) -> Tensor:
    """Return a prompt of these positions."""
    return torch.tensor(vectors, dtype=torch.float32)


def updates(
    prompts: Sequence[Tensor], counts: Sequence[int] = (), sent: Tensor | None = None
) -> list[Update]:
    """Return updates of one prompt, sent as zeros unless told."""
    counts = counts or [10] * len(prompts)
    start = {NAME: torch.zeros_like(prompts[0]) if sent is None else sent}
    return [
        Update(client(k), count, {NAME: prompt}, start)
        for k, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


def merge(rule: str, told: Sequence[Update], **options: Any) -> Merged:
    """Merge with the method's own defaults, and not with what makes it neutral."""
    return build(rule, **{**_defaults(rule), **options}).merge(told[0].sent, told, None)


def merged(rule: str, told: Sequence[Update], **options: Any) -> Tensor:
    return merge(rule, told, **options).state[NAME]


def _defaults(rule: str) -> dict[str, Any]:
    return STRATEGIES[rule].options().model_dump()


def near(found: Tensor, expected: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(found, rows(*expected), rtol=1e-6, atol=1e-6)


def drift_of(told: Sequence[Update], prompt: Tensor) -> dict[str, PromptDrift]:
    """Measure these updates, and this prompt after the merge."""
    return prompt_drift([Served({NAME: prompt}, 1)], told)


# --- numbers by hand ------------------------------------------------------------------------------

EQUAL = updates([rows([3, 4]), rows([4, -3])])
UNEQUAL = updates([rows([2, 0]), rows([0, 6])], [75, 25])


@pytest.mark.parametrize(
    ("rule", "options", "equal", "unequal"),
    [
        ("promptfl", {}, [3.5, 0.5], [1.5, 1.5]),
        ("mean-dir", {"lam": 0.0}, [3.5, 0.5], [1.5, 1.5]),
        ("mean-dir", {"lam": 0.5}, [4.224874, 0.603553], [1.8106602, 1.8106602]),
        ("mean-dir", {"lam": 1.0}, [4.949747, 0.707107], [2.12132, 2.12132]),
        ("dir-mag", {}, [4.949747, 0.707107], [2.84605, 0.948683]),
        ("shrink", {"factor": 0.9}, [3.15, 0.45], [1.35, 1.35]),
        ("shrink", {"factor": 0.5, "over": "mean-dir"}, [2.4748737, 0.3535534], [1.06066] * 2),
        (
            "shrink",
            {"factor": 0.5, "over": "dir-mag"},
            [2.4748737, 0.3535534],
            [1.423025, 0.4743416],
        ),
        # Sent zeros, changes are the prompts themselves.
        ("update-norm", {}, [4.949747, 0.707107], [2.12132, 2.12132]),
        ("update-norm", {"cap": 1.2}, [4.2, 0.6], [1.8, 1.8]),
        # 1 - 1/3.535534 and 1 - 1/2.12132
        ("norm-prox", {"threshold": 1.0}, [2.5100505, 0.3585787], [0.7928932] * 2),
    ],
)
def test_rules_give_the_numbers_worked_out_by_hand(
    rule: str, options: dict[str, Any], equal: list[float], unequal: list[float]
) -> None:
    near(merged(rule, EQUAL, **options), [equal])
    near(merged(rule, UNEQUAL, **options), [unequal])


def test_half_way_norms_are_half_way() -> None:
    assert float(merged("mean-dir", EQUAL, lam=0.5).norm()) == pytest.approx(4.267767, rel=1e-6)


def test_positions_are_merged_each_for_itself() -> None:
    """In a prompt of (2, 1, 2), and as in the prompt of one position."""
    told = updates(
        [torch.stack([rows([3, 4]), rows([2, 0])]), torch.stack([rows([4, -3]), rows([0, 6])])]
    )
    for rule, options in RULES:
        found = merged(rule, told, **options)
        assert found.shape == (2, 1, 2)
        torch.testing.assert_close(found[0], merged(rule, EQUAL, **options), rtol=1e-6, atol=1e-6)
        second = merged(rule, updates([rows([2, 0]), rows([0, 6])]), **options)
        torch.testing.assert_close(found[1], second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, [3, 4]), (1.0, [2.4, 3.2]), (5.0, [0, 0]), (7.0, [0, 0])]
)
def test_norm_prox_takes_the_threshold_from_every_norm(
    threshold: float, expected: list[float]
) -> None:
    near(merged("norm-prox", updates([rows([3, 4])]), threshold=threshold), [expected])


def test_norm_prox_minimises_what_it_is_the_proximal_step_of() -> None:
    """`x = argmin t·‖x‖ + ½‖x - v‖²`, by gradient descent."""
    v = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
    x = v.clone()
    for _ in range(2000):
        x = x - 0.05 * (0.3 * x / x.norm() + x - v)
    found = merged("norm-prox", updates([v.float()[None]]), threshold=0.3)
    torch.testing.assert_close(found[0].double(), x, rtol=0, atol=1e-6)


def test_norm_prox_of_a_zero_prompt_is_zero() -> None:
    for threshold in (0.0, 1.0):
        assert not merged("norm-prox", updates([rows([0, 0])]), threshold=threshold).any()


def test_shrink_and_norm_prox_take_their_share_every_round() -> None:
    for rule, options, expected in [
        ("shrink", {"factor": 0.9}, 5 * 0.9**3),
        ("norm-prox", {"threshold": 0.25}, 5 - 3 * 0.25),
    ]:
        strategy = build(rule, **options)
        state = {NAME: rows([3, 4])}
        for _ in range(3):
            told = [Update(client(0), 10, dict(state), dict(state))]
            state = dict(strategy.merge(state, told, None).state)
        assert float(state[NAME].norm()) == pytest.approx(expected, rel=1e-6)


# --- update-norm ----------------------------------------------------------------------------------


def test_update_norm_steps_from_what_the_server_had() -> None:
    """Changes [.1, .2] and [.1, -.2]: their mean [.1, 0] is stretched to √.05."""
    told = updates([rows([1.1, 0.2]), rows([1.1, -0.2])], sent=rows([1, 0]))
    near(merged("update-norm", told), [[1 + math.sqrt(0.05), 0]])


def test_update_norm_is_capped_where_changes_cancel() -> None:
    """Their mean is a hundredth of them: stretched by 4, not by 100."""
    told = updates([rows([1.01, 1]), rows([1.01, -1])], sent=rows([1, 0]))
    near(merged("update-norm", told), [[1.04, 0]])
    near(merged("update-norm", told, cap=1.0), [[1.01, 0]])


def test_update_norm_falls_back_where_the_mean_change_vanishes() -> None:
    told = updates([rows([1, 0.5], [2, 0]), rows([1, -0.5], [3, 0])], sent=rows([1, 0], [1, 0]))
    done = merge("update-norm", told)
    near(done.state[NAME], [[1, 0], [2.5, 0]])
    assert done.diagnostics == {"guard_hits": {NAME: 1}}


# --- guards ---------------------------------------------------------------------------------------

GUARDED = [("mean-dir", {"lam": 0.5}), ("mean-dir", {}), ("dir-mag", {})]


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_antipodal_prompts_give_zero_and_no_nan(rule: str, options: dict[str, Any]) -> None:
    told = updates([rows([0.6, 0.8]), rows([-0.6, -0.8])])
    near(merged(rule, told, **options), [[0, 0]])


@pytest.mark.parametrize(("rule", "options"), GUARDED)
def test_guards_fall_back_to_the_mean_and_are_counted(rule: str, options: dict[str, Any]) -> None:
    """Positions: antipodal; R just below and just above 0.1; a client at zero; nothing wrong."""
    below, above = math.acos(0.099), math.acos(0.101)
    both = [
        rows(
            [1, 0],
            [3 * math.cos(below), 3 * sign * math.sin(below)],
            [3 * math.cos(above), 3 * sign * math.sin(above)],
            [2 + 2 * sign, 0],
            [1, 0.1 * sign],
        )
        for sign in (1, -1)
    ]
    both[1][0] *= -1
    told = updates(both)
    mean = merged("promptfl", told)
    done = merge(rule, told, **options)
    guarded = [0, 1, 3]
    assert torch.equal(done.state[NAME][guarded], mean[guarded])
    assert bool((done.state[NAME] != mean)[[2, 4]].any(dim=1).all())
    assert done.diagnostics == {"guard_hits": {NAME: 3}}


def test_mean_dir_falls_back_where_the_mean_vanishes_though_directions_do_not() -> None:
    """Norms 3 and 1 at weights 1 and 3: v̄ = 0, R = 1/2."""
    told = updates([rows([3, 0]), rows([-1, 0])], [10, 30])
    done = merge("mean-dir", told)
    assert not done.state[NAME].any()
    assert done.diagnostics == {"guard_hits": {NAME: 1}}
    # Where norms do not steer, that is no reason: m = [-1/2, 0], and ρ = 3/2.
    near(merged("dir-mag", told), [[-1.5, 0]])


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_nothing_becomes_nan_at_zero(rule: str, options: dict[str, Any]) -> None:
    told = updates([torch.zeros(3, 4), torch.zeros(3, 4)])
    assert torch.equal(merged(rule, told, **options), torch.zeros(3, 4))


def test_shrink_keeps_the_guard_underneath_and_shrinks_what_it_left() -> None:
    told = updates([rows([2, 0]), rows([-1, 0])])
    done = merge("shrink", told, factor=0.5, over="dir-mag")
    near(done.state[NAME], [[0.25, 0]])
    assert done.diagnostics == {"guard_hits": {NAME: 1}}


# --- properties -----------------------------------------------------------------------------------

# Few bits, so that vectors cancel to the bit or not nearly.
NUMBER = st.integers(-4096, 4096).map(lambda n: n / 1024)


@st.composite
def cohorts(draw: st.DrawFn) -> list[Update]:
    """One to five clients with prompts of three positions in four dimensions."""
    count = draw(st.integers(1, 5))
    vectors = st.lists(NUMBER, min_size=12, max_size=12)
    prompts = [torch.tensor(draw(vectors), dtype=torch.float32).view(3, 4) for _ in range(count)]
    counts = [draw(st.integers(1, 100)) for _ in range(count)]
    sent = torch.tensor(draw(vectors), dtype=torch.float32).view(3, 4)
    return updates(prompts, counts, sent)


def mean_norms(told: Sequence[Update]) -> Tensor:
    """ρ by the definition."""
    total = sum(u.num_examples for u in told)
    return sum(u.num_examples / total * u.tensors[NAME].double().norm(dim=-1) for u in told)


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_norms_are_the_clients_mean_norm_wherever_the_guard_is_off(told: list[Update]) -> None:
    mean = merged("promptfl", told)
    rho = mean_norms(told)
    for rule, options in (("mean-dir", {"lam": 1.0}), ("dir-mag", {})):
        done = merge(rule, told, **options)
        on = guard(rule, told)
        assert int(on.sum()) == done.diagnostics["guard_hits"][NAME]
        assert torch.equal(done.state[NAME][on], mean[on])
        found = done.state[NAME].double().norm(dim=-1)
        torch.testing.assert_close(found[~on], rho[~on], rtol=1e-6, atol=1e-12)


def guard(rule: str, told: Sequence[Update]) -> Tensor:
    """Say where the guard is on, by the definition."""
    total = sum(u.num_examples for u in told)
    q = [u.num_examples / total for u in told]
    v = [u.tensors[NAME].double() for u in told]
    lengths = torch.stack([vector.norm(dim=-1) for vector in v])
    units = [vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-12) for vector in v]
    resultant = sum(w * u for w, u in zip(q, units, strict=True)).norm(dim=-1)
    on = (resultant < 0.1) | (lengths < 1e-12).any(dim=0)
    if rule == "mean-dir":
        on |= sum(w * u for w, u in zip(q, v, strict=True)).norm(dim=-1) < 1e-12
    return on


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_the_measurements_obey_their_identities(told: list[Update]) -> None:
    """σ ≤ 1, `Σ q‖v‖² - ‖v̄‖² = D`, and the plain mean's norm is σρ."""
    found = drift_of(told, merged("promptfl", told))[NAME]
    total = sum(u.num_examples for u in told)
    squares = sum(
        u.num_examples / total * u.tensors[NAME].double().square().sum(dim=-1) for u in told
    )
    for i in range(3):
        sigma = found.shrink[i]
        length = 0.0 if sigma is None else sigma * found.client_norm[i]
        assert sigma is None or sigma <= 1 + 1e-6
        assert found.resultant[i] <= 1 + 1e-12
        assert found.norm[i] == pytest.approx(length, rel=1e-6, abs=1e-6)
        assert found.drift[i] == pytest.approx(float(squares[i]) - length**2, rel=1e-9, abs=1e-9)
        least, greatest = found.least_client_norm[i], found.greatest_client_norm[i]
        assert least <= found.client_norm[i] + 1e-12
        assert found.client_norm[i] <= greatest + 1e-12


@settings(deadline=None, max_examples=30)
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(told: list[Update], random: Any) -> None:
    shuffled = random.sample(told, len(told))
    for rule, options in RULES:
        if not torch.equal(guard(rule, told), guard(rule, shuffled)):
            continue  # to rounding on the edge of a guard
        one, other = merged(rule, told, **options), merged(rule, shuffled, **options)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(cohorts())
def test_one_client_or_several_that_agree_get_back_what_they_returned(told: list[Update]) -> None:
    prompt = told[0].tensors[NAME]
    agreeing = [Update(u.client, u.num_examples, told[0].tensors, u.sent) for u in told]
    for cohort_ in (told[:1], agreeing):
        for rule, options in (*MEANS, ("update-norm", {})):
            found = merged(rule, cohort_, **options)
            torch.testing.assert_close(found, prompt, rtol=1e-6, atol=1e-6)
        measured = drift_of(cohort_, prompt)[NAME]
        for i, length in enumerate(prompt.double().norm(dim=-1)):
            if length >= 1e-12:
                assert measured.shrink[i] == pytest.approx(1, abs=1e-9)
                assert measured.resultant[i] == pytest.approx(1, abs=1e-9)
            assert measured.drift[i] == pytest.approx(0, abs=1e-9)


# --- beside other methods, and other tensors ------------------------------------------------------


def toy_round(name: str, number: int = 3, **options: Any) -> tuple[Tensors, Tensors]:
    """Return the state before and after a round with prompts, heads and a context of classes."""
    strategy = build(name, **options)
    stream = torch.Generator().manual_seed(5)
    state = strategy.start({**prompt_start(), CONTEXT: torch.randn(3, 4, 6, generator=stream)})
    told = updates_of(strategy, state, cohort(*range(number)), drift(0))
    return state, strategy.merge(state, told, None).state


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("promptfl", {}),
        ("mean-dir", {"lam": 0.0}),
        ("shrink", {"factor": 1.0}),
        ("shrink", {"factor": 1.0, "over": "promptfl"}),
    ],
)
def test_without_a_rule_it_is_fedavg_to_the_bit(rule: str, options: dict[str, Any]) -> None:
    _, expected = toy_round("fedavg")
    _, found = toy_round(rule, **options)
    assert digest(found) == digest(expected)


@pytest.mark.parametrize(("rule", "options"), RULES[1:])
def test_rules_act_on_prompts_and_contexts_and_on_nothing_else(
    rule: str, options: dict[str, Any]
) -> None:
    _, mean = toy_round("fedavg")
    _, found = toy_round(rule, **options)
    prompts = {name for name in mean if is_prompt(name)}
    assert prompts == {"prompt.text", "prompt.image", CONTEXT}
    assert {name for name in mean if not torch.equal(found[name], mean[name])} == prompts
    assert found.keys() == mean.keys()
    assert {t.dtype for t in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("prompt.text", True),
        ("prompt.image", True),
        ("head.news.context", True),
        ("head.news.weight", False),
        ("local.text", False),
        ("control/prompt.text", False),
        ("text_model.context.lora_A.weight", False),
    ],
)
def test_what_is_a_prompt(name: str, says: bool) -> None:
    assert is_prompt(name) is says


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_the_context_of_a_task_that_nobody_holds_stays(rule: str, options: dict[str, Any]) -> None:
    strategy = build(rule, tasks=("news", "mail"), clients=2, **options)
    start = {
        NAME: rows([1, 2]),
        "head.news.context": rows([3, 4])[None],
        "head.mail.context": rows([5, 12])[None],
    }
    state = strategy.start(start)
    who = client(0, task="news")
    told = updates_of(strategy, state, [who], drift(0))
    after = strategy.merge(state, told, None).state
    assert torch.equal(after["head.mail.context"], start["head.mail.context"])
    assert not torch.equal(after["head.news.context"], start["head.news.context"])


def test_a_client_that_sends_nan_is_refused_before_any_rule() -> None:
    shapes = {NAME: torch.Size([1, 2])}
    with pytest.raises(UpdateRefusedError, match=r"prompt\.text holds 1 numbers that are NaN"):
        check_update({NAME: rows([math.nan, 1])}, shapes)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "scaffold"])
def test_what_servers_and_clients_keep_covers_prompts(name: str) -> None:
    state, after = toy_round(name)
    kept = {n.rpartition("/")[2] for n in after if n.startswith("server/")}
    assert {"prompt.text", "prompt.image", CONTEXT} <= kept
    assert not torch.equal(after[NAME], state[NAME])


# --- global and local prompts ---------------------------------------------------------------------


def test_local_prompts_stay_and_the_rest_is_averaged() -> None:
    strategy = build("global-local-prompts")
    state = strategy.start(prompt_start())
    assert torch.equal(state["local.text"], state["prompt.text"])
    told = updates_of(strategy, state, cohort(0, 1, 2), drift(0))
    for update in told:
        # The server never sees it: an update is completed with what was sent.
        assert torch.equal(update.tensors["local.text"], state["local.text"])
        assert not torch.equal(update.tensors["prompt.text"], state["prompt.text"])
    after = strategy.merge(state, told, None).state
    assert torch.equal(after["local.text"], state["local.text"])
    mean = build("fedavg").merge(state, told, None).state
    averaged = {name for name in after if not torch.equal(after[name], state[name])}
    assert averaged == set(prompt_start())
    assert all(torch.equal(after[name], mean[name]) for name in averaged)


def test_a_client_goes_on_from_its_own_local_prompt() -> None:
    strategy, memories = build("global-local-prompts"), {}
    state = strategy.start(prompt_start())
    started: list[Tensors] = []

    def train(who: Client, start: Tensors) -> Tensors:
        started.append(start)
        return drift(len(started))(who, start)

    for number in range(2):
        told = updates_of(strategy, state, cohort(0), train, memories, number)
        state = strategy.merge(state, told, None).state
    ended = drift(1)(client(0), started[0])
    assert torch.equal(started[1]["local.text"], ended["local.text"])
    assert torch.equal(started[1]["prompt.text"], ended["prompt.text"])
    assert not torch.equal(ended["local.text"], ended["prompt.text"])


def test_global_and_local_prompts_need_a_shared_prompt() -> None:
    with pytest.raises(ConfigError, match=r"no shared text prompt .* adapter\.prompt\.length"):
        build("global-local-prompts").start({CONTEXT: torch.zeros(3, 4, 6)})


# --- what is measured -----------------------------------------------------------------------------


def test_drift_of_two_clients_by_hand() -> None:
    """Position 0 starts from [1, 0] and drifts by [.1, ±.2]; position 1 stands still."""
    told = updates([rows([1.1, 0.2], [0, 2]), rows([1.1, -0.2], [0, 2])], sent=rows([1, 0], [0, 2]))
    found = drift_of(told, rows([1.1, 0], [0, 1]))
    assert list(found) == [NAME]
    measured = found[NAME]
    assert measured.positions == [2]
    assert measured.norm == pytest.approx([1.1, 1])
    assert measured.client_norm == pytest.approx([math.sqrt(1.25), 2])
    assert measured.shrink == pytest.approx([0.98387, 1], abs=1e-5)
    assert measured.drift == pytest.approx([0.04, 0], abs=1e-7)
    assert measured.resultant == pytest.approx([1.1 / math.sqrt(1.25), 1])
    for number in "01":
        assert measured.clients[number].distance == pytest.approx(math.sqrt(0.05), rel=1e-6)
        # d̄ = [.1, 0]
        assert measured.clients[number].cosine == pytest.approx(0.1 / math.sqrt(0.05), rel=1e-6)


def test_shrink_and_resultant_of_the_numbers_by_hand() -> None:
    equal = drift_of(EQUAL, rows([0, 0]))[NAME]
    assert (equal.client_norm, equal.norm) == (pytest.approx([5]), [0])
    assert (equal.shrink, equal.resultant) == (pytest.approx([0.707107]), pytest.approx([0.707107]))
    unequal = drift_of(UNEQUAL, rows([0, 0]))[NAME]
    assert unequal.client_norm == pytest.approx([3])
    assert (unequal.least_client_norm, unequal.greatest_client_norm) == ([2], [6])
    assert unequal.shrink == pytest.approx([0.70710678])
    assert unequal.resultant == pytest.approx([0.790569])


@pytest.mark.parametrize(
    ("clients", "sigma"), [(2, 0.707), (4, 0.5), (8, 0.353), (10, 0.316), (100, 0.1)]
)
def test_random_prompts_shrink_with_the_root_of_their_number(clients: int, sigma: float) -> None:
    stream = torch.Generator().manual_seed(clients)
    told = updates([0.02 * torch.randn(16, 512, generator=stream) for _ in range(clients)])
    found = drift_of(told, told[0].sent[NAME])[NAME]
    assert sum(s or 0.0 for s in found.shrink) / 16 == pytest.approx(sigma, abs=0.01)
    assert sum(found.client_norm) / 16 == pytest.approx(0.4523, abs=0.01)


def test_what_cannot_be_said_at_zero_is_none_and_a_record_can_hold_it() -> None:
    told = updates([torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)])
    measured = drift_of(told, told[0].sent[NAME])[NAME]
    assert measured.positions == [2, 1]
    assert measured.shrink == [None, None]
    assert measured.resultant == [0, 0]
    assert measured.clients["0"].cosine is None
    written = asdict(measured)
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_drift_is_measured_over_the_clients_that_hold_a_prompt() -> None:
    news, mail = ({f"head.{task}.context": rows([3, 4])[None]} for task in ("news", "mail"))
    told = [
        Update(
            Client(k, task, 1, 1.0),
            10,
            {NAME: rows([k, 1]), **context},
            {NAME: rows([0, 1]), **context},
        )
        for k, task, context in ((0, "news", news), (1, "mail", mail), (2, "news", news))
    ]
    found = prompt_drift([Served({NAME: rows([1, 1]), **news, **mail}, 1)], told)
    assert list(found) == ["head.mail.context", "head.news.context", NAME]
    assert {name: list(drift.clients) for name, drift in found.items()} == {
        "head.mail.context": ["1"],
        "head.news.context": ["0", "2"],
        NAME: ["0", "1", "2"],
    }


def test_where_every_client_has_its_model_there_is_no_norm_of_the_one() -> None:
    strategy = build("local-only", clients=2)
    told = updates_of(strategy, strategy.start(prompt_start()), cohort(0, 1), drift(0))
    served = strategy.serve(strategy.merge(prompt_start(), told, None).state)
    found = prompt_drift(served, told)["prompt.text"]
    assert found.norm is None
    assert all(sigma is not None and sigma < 1 for sigma in found.shrink)


def test_there_is_no_drift_without_prompts() -> None:
    strategy = build("fedavg")
    state = strategy.start(Toy("fedavg", "lora").start())
    told = updates_of(strategy, state, cohort(0, 1), drift(0))
    assert prompt_drift(strategy.serve(state), told) == {}


# --- what is refused ------------------------------------------------------------------------------


def experiment(kind: str, **values: Any) -> Experiment:
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    tables = {
        "task": {"name": "digits"},
        "backbone": {"path": "anywhere"},
        "adapter": {"kind": kind},
    }
    return build_experiment(tables, dotted)


@pytest.mark.parametrize("name", [n for n, m in STRATEGIES.items() if "prompt" in m.adapters])
def test_every_method_for_prompts_can_be_chosen(name: str) -> None:
    optimiser = STRATEGIES[name].optimiser or "adamw"
    resolve(experiment("prompt", strategy__name=name, train__optimiser=optimiser))


def test_a_method_without_a_meaning_for_the_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'prompt': strategy flexlora .* lora only") as caught:
        resolve(experiment("prompt", strategy__name="flexlora"))
    assert "choose from fedavg, fedavgm" in str(caught.value)
    with pytest.raises(ConfigError, match=r"'lora': strategy promptfl .* prompt only") as caught:
        resolve(experiment("lora", strategy__name="promptfl"))
    assert "promptfl" not in str(caught.value).partition("choose from")[2]


@pytest.mark.parametrize("name", ["fedprox", "fedadam", "scaffold"])
def test_a_method_laid_over_one_without_a_meaning_is_refused(name: str) -> None:
    """FFA-LoRA trains B and the head: no prompt would ever move."""
    values = {"strategy__name": name, f"strategy__{name}__over": "ffa-lora"}
    values["train__optimiser"] = STRATEGIES[name].optimiser or "adamw"
    resolve(experiment("lora", **values))
    with pytest.raises(ConfigError, match=rf"strategy\.{name}\.over = 'ffa-lora'.*'fedavg'"):
        resolve(experiment("prompt", **values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean-dir.lam", 1.5),
        ("shrink.factor", 0.0),
        ("shrink.over", "fedavg"),
        ("update-norm.cap", 0.5),
        ("norm-prox.threshold", -1.0),
    ],
)
def test_options_without_a_meaning_are_refused(key: str, value: Any) -> None:
    name, _, option = key.partition(".")
    values = {"strategy__name": name, f"strategy__{name}__{option}": value}
    with pytest.raises(ConfigError, match=rf"strategy\.{key} = {value!r}"):
        resolve(experiment("prompt", **values))
