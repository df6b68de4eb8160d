"""What a method costs on the wire, as formulas that are both printed and computed.

Numbers, not bytes, of one client in one round, from the second round on and when it takes part in
every round: the common start is drawn by everyone and never travels, and a client that was absent
is sent what it missed. Source: the table of the aggregation specification, section A.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The quantities that formulas are made of, each summed over all adapted modules.

    What a model does not have, factors or soft prompts, counts 0.

    Attributes:
        A, B: numbers in the factors of the client.
        H: numbers in its head, contexts of single classes included.
        P: numbers in its shared soft prompts.
        D: numbers in the dense matrices.
        m, n: outputs and inputs.
        q: width of a sketch.
        S: numbers in the factors of all clients of the cohort together.
        K: clients in the cohort.
    """

    A: int
    B: int
    H: int
    P: int
    D: int
    m: int
    n: int
    q: int
    S: int
    K: int


NAMES: Mapping[str, str] = {
    "A": "numbers in a client's factor A",
    "B": "numbers in its factor B",
    "H": "numbers in its head, contexts of single classes included",
    "P": "numbers in its shared soft prompts",
    "D": "numbers in the dense matrices that are adapted",
    "m": "outputs of the adapted matrices",
    "n": "inputs of the adapted matrices",
    "q": "width of the sketch",
    "S": "numbers in the factors of the whole cohort",
    "K": "clients in the cohort",
}


@dataclass(frozen=True)
class Cost:
    """Formulas of what goes up and down; several take turns, round by round."""

    up: tuple[str, ...]
    down: tuple[str, ...]

    def numbers(self, sizes: Sizes, server_round: int) -> tuple[int, int]:
        """Return the numbers that go (up, down) in this round, 1-based."""
        return _value(self.up, sizes, server_round), _value(self.down, sizes, server_round)

    @property
    def words(self) -> tuple[str, str]:
        """Return (up, down) as they are printed."""
        return ", then ".join(self.up), ", then ".join(self.down)


def _value(formulas: tuple[str, ...], sizes: Sizes, server_round: int) -> int:
    formula = formulas[(server_round - 1) % len(formulas)]
    # Formulas are constants of this package: arithmetic over the names above, and min.
    return int(eval(formula, {"__builtins__": {}, "min": min}, vars(sizes)))


def same(formula: str) -> Cost:
    """Return a cost that is the same up and down."""
    return Cost((formula,), (formula,))


FACTORS = same("A + B + H")
PROMPTS = same("P + H")
# Of methods for either kind of adapter: what the other kind is made of counts 0.
ADAPTERS = same("A + B + P + H")
