"""The methods that others are laid over: those whose merge is a mean of the tensors that travel."""

from collections.abc import Callable, Mapping
from typing import Literal

from strategies.base import Options, Setting, Strategy
from strategies.fedavg import FedAvgOptions, fedavg
from strategies.ffa_lora import FFALoRAOptions, ffa_lora

Over = Literal["fedavg", "ffa-lora"]


class OverOptions(Options):
    """Options of a method that is laid over another.

    Attributes:
        over: the other; `ffa-lora` halves what travels and makes the mean that of the deltas.
    """

    over: Over = "fedavg"


def underlying(options: OverOptions, setting: Setting) -> Strategy:
    """Return the method that these options lay another over."""
    return _UNDERLYING[options.over](setting)


_UNDERLYING: Mapping[Over, Callable[[Setting], Strategy]] = {
    "fedavg": lambda setting: fedavg(FedAvgOptions(), setting),
    "ffa-lora": lambda setting: ffa_lora(FFALoRAOptions(), setting),
}
