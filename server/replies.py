"""Replies that are errors: what a person wants to read of them."""


def last_line(reason: str) -> str:
    """Return the line that names the error: Ray puts a whole traceback before it."""
    lines = [line.strip() for line in reason.replace("\\n", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else reason
