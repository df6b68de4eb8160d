"""The command line; `fedcopra --help` lists the commands, each a function in `server.commands`.

Heavy imports stand inside the commands, so that `--help` and mistakes answer at once.
"""

import sys
from collections.abc import Callable, Mapping

import click
import typer

from common.errors import FedcopraError
from server.commands import analyses, deployment, merging, prompts, runs
from server.environment import prepare_environment

app = typer.Typer(
    name="fedcopra",
    help="Federated fine-tuning of foundation models: simulate, compare, report, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: Mapping[str, Callable[..., None]] = {
    "simulate": runs.simulate,
    "compare": runs.compare,
    "report": runs.report,
    "export": runs.export,
    "merge": merging.merge,
    "connectivity": analyses.connectivity,
    "shapley": analyses.shapley,
    "prune": analyses.prune,
    "low-norm": analyses.low_norm,
    "paired": analyses.paired,
    "bank": prompts.bank,
    "gap": prompts.gap,
    "transfer": prompts.transfer,
    "selectors": prompts.selectors,
    "certs": deployment.certs,
    "run": deployment.run,
    "list": runs.list_entries,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(deployment.site, name="site")


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    prepare_environment()
    try:
        sys.exit(app(standalone_mode=False))
    except FedcopraError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(f"{error.format_message()} (fedcopra --help shows how)")
    except click.Abort:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"fedcopra: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
