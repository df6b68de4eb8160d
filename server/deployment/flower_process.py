"""Flower's command line in a process that stays: importing it takes longer than answering.

`python -m server.deployment.flower_process` reads a JSON list of arguments a line, and answers each
with a line of JSON: exit code, standard output, standard error.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from tempfile import TemporaryFile


def main() -> None:
    """Answer until there are no more questions."""
    # Flower writes to the streams that it finds when it is imported: what it says is caught below
    # these, at the file descriptors, and the answers go out by a copy of the one there is.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(arguments: Sequence[str]) -> tuple[int, str, str]:
    with TemporaryFile() as output, TemporaryFile() as error:
        os.dup2(output.fileno(), 1)
        os.dup2(error.fileno(), 2)
        code = _call(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        output.seek(0)
        error.seek(0)
        return code, output.read().decode("utf-8"), error.read().decode("utf-8")


def _call(arguments: Sequence[str]) -> int:
    from flwr.cli.app import app

    try:
        app(list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
