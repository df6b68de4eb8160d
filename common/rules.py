"""Local rules: what an aggregation method asks of a client beside training, as plain values.

They travel with the plan, so that a client never sees a strategy.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalRules:
    """What a client does beside training on its rows; the defaults ask for nothing.

    Attributes:
        keeps: parts that stay at the client, from round to round, and are never sent.
        proximal: mu of `µ/2·‖x - x_t‖²` over all that is trained (FedProx).
        control_variates: correct every gradient by `c - c_k`, and return `c_k+ - c_k` (SCAFFOLD).
        tail_share, tail_penalty: gamma and lambda of HetLoRA's penalty on the trailing directions
            from `floor(gamma r)` on; they are pruned where training made them smaller.
        sketch: q > 0 sends a sketch (out, q) of `s B A` instead of the factors (FedASK).
        probes: whether the client says at which positions of its prompts shrinking helps.
        judge_rows: how many rows of its own a client scores candidates on, if it is asked to.
        steady: whether coordinates mean the same from round to round, so that what compression
            lost in one may be made up for in the next.
    """

    keeps: tuple[str, ...] = ()
    proximal: float = 0.0
    control_variates: bool = False
    tail_share: float = 1.0
    tail_penalty: float = 0.0
    sketch: int = 0
    probes: bool = False
    judge_rows: int = 0
    steady: bool = True


NO_RULES = LocalRules()
# For methods whose every merge turns the factors' basis.
TURNING = LocalRules(steady=False)
