"""FedProx: clients pay for leaving the model that they were sent.

Li et al., arXiv 1812.06127, equation 2: the local loss is `F_k(x) + µ/2·‖x - x_t‖²`, over all that
is trained. The server's merge is that of the method underneath.
"""

from dataclasses import replace

from pydantic import Field

from strategies.base import Setting, Strategy
from strategies.over import OverOptions, underlying


class FedProxOptions(OverOptions):
    """Options of FedProx.

    Attributes:
        mu: µ of the proximal term; 0 is the method underneath.
    """

    mu: float = Field(0.01, ge=0)


def fedprox(options: FedProxOptions, setting: Setting) -> Strategy:
    """Ask clients of the method underneath for the proximal term."""
    inner = underlying(options, setting)
    return replace(inner, rules=replace(inner.rules, proximal=options.mu))
