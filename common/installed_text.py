"""Text-classification tasks of real language that need no data file.

The text is the docstrings and error messages in the source files of the libraries fedcopra depends
on, so it is on every machine where fedcopra is installed. The sources are parsed, never imported.
The rows depend on the installed versions alone: machines that hold the same versions hold the same
rows in the same order.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

from common.errors import DataError

# Distribution: the package it installs. Each is required on every platform and Python version, by
# fedcopra itself or by torch (networkx, sympy), datasets (pandas) or flwr (sqlalchemy).
LIBRARIES: Final[Mapping[str, str]] = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "sqlalchemy": "sqlalchemy",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
KINDS: Final = ("class", "function", "method", "module")
EXCEPTIONS: Final = (
    "AttributeError",
    "ImportError",
    "NotImplementedError",
    "RuntimeError",
    "TypeError",
    "ValueError",
)
MATCHES: Final = ("mismatch", "match")

_ROWS_PER_TASK = 4_800
_WORDS_PER_TEXT = range(4, 61)
# Parsing a library's first files yields docstrings enough; raise statements are rarer and
# found far faster, each parsed alone, so more files are searched for them.
_PARSED_BYTES = 2_000_000
_SEARCHED_BYTES = 30_000_000
_BYTES_PER_FILE = 100_000
_CHARACTERS_PER_RAISE = 800
_SKIPPED_FOLDER = re.compile(
    r"_?tests?|testing|_?vendor\w*|_?extern\w*|third_?party|array_api_\w+|cobyqa|pyprima"
)

_PARAGRAPH_END = re.compile(
    r"(?:\A|\n)\s*(?:\n|>>>|\.\. |:\w+[^`\n]*:\s"
    r"|(?:Args|Arguments|Parameters|Returns|Examples?|Usage)\b:?\n)"
)
# Roles, code quotes and links are each library's house style, which would give the library away.
_MARKUP = re.compile(r":[\w:+]+:(?=`)|\[?`+[~.!]*(?=\w)|`+\]?|https?://\S+|([-=~^*#\"])\1{2,}")
_LIBRARY_NAME = re.compile(
    r"matplotlib|pyplot|networkx|numpy|pandas|scikit(?:[- ]?learn)?|sklearn|scipy|sql ?alchemy"
    r"|sympy|(?:py)?torch|hugging ?face|\btransformers\b|\b(?:mpl|nn|np|nx|pd|plt|sa|sp)\b(?=\.)",
    re.IGNORECASE,
)
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_RAISE = re.compile(rf"raise (?:{'|'.join(EXCEPTIONS)})\(")


@dataclass(frozen=True)
class TextRows:
    """One task's rows, column by column; a row's label is an index into `labels`.

    `text_pair` is None unless each row is a pair of texts. No text (or pair) occurs twice, and the
    rows are in the order of a hash of their text, so any slice of them is a fair sample.
    """

    text: list[str]
    text_pair: list[str] | None
    label: list[int]
    labels: tuple[str, ...]


class _Summary(NamedTuple):
    library: str
    kind: str
    name: str
    text: str


class _Row(NamedTuple):
    label: str
    text: str
    text_pair: str | None = None


def docstrings() -> TextRows:
    """Return docstring summaries, labelled with the library they are from; its name is masked."""
    return _task("docstrings")


def docstring_kinds() -> TextRows:
    """Return docstring summaries, labelled with what they document, one of KINDS."""
    return _task("docstring-kinds")


def error_messages() -> TextRows:
    """Return error messages, labelled with the exception they are raised in, one of EXCEPTIONS."""
    return _task("error-messages")


def name_matches_summary() -> TextRows:
    """Return functions' names in words, paired with a docstring summary: their own, or another's.

    No summary occurs in two rows, so no split of the rows has one on both sides.
    """
    return _task("name-matches-summary")


INSTALLED_TEXT: Final[Mapping[str, Callable[[], TextRows]]] = {
    "docstrings": docstrings,
    "docstring-kinds": docstring_kinds,
    "error-messages": error_messages,
    "name-matches-summary": name_matches_summary,
}


def _task(name: str) -> TextRows:
    """The named task's rows from the cache, which is first filled with all the tasks if need be."""
    installed = {library: _installed(library) for library in LIBRARIES}
    # This file is in the key: what other rules extracted must not be taken for what these would.
    key = _digest(
        hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "python=={}.{}".format(*sys.version_info),
        *(f"{library}=={version}" for library, (version, _) in installed.items()),
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "fedcopra" / "installed-text" / f"{key[:32]}.json"
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tasks = _extract({library: folder for library, (_, folder) in installed.items()})
        with suppress(OSError):  # an unwritable cache costs another scan, never the rows
            _publish(path, json.dumps(tasks))
    return TextRows(**{**tasks[name], "labels": tuple(tasks[name]["labels"])})


def _installed(library: str) -> tuple[str, Path]:
    """The library's version and the folder of its package, which is not imported."""
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(library)
        spec = importlib.util.find_spec(LIBRARIES[library])
        if spec is not None and spec.submodule_search_locations:
            return version, Path(next(iter(spec.submodule_search_locations)))
    raise DataError(
        f"{library!r} is not installed: the installed-text tasks read the sources of "
        f"{', '.join(LIBRARIES)}, which installing fedcopra installs"
    )


def _publish(path: Path, content: str) -> None:
    """Write the file in one step: several processes may fill the cache at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{uuid4().hex}")
    try:
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _extract(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Every task's columns by the task's name, in the form the cache stores."""
    summaries: list[_Summary] = []
    errors: list[_Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for library, folder in folders.items():
            for found in _scan(library, folder):
                if isinstance(found, _Summary):
                    summaries.append(found)
                else:
                    errors.append(found)
    masked = (_Row(s.library, _LIBRARY_NAME.sub("library", s.text)) for s in summaries)
    tasks = {
        "docstrings": _columns(tuple(LIBRARIES), masked),
        "docstring-kinds": _columns(KINDS, (_Row(s.kind, s.text) for s in summaries)),
        "error-messages": _columns(EXCEPTIONS, errors),
        "name-matches-summary": _columns(MATCHES, _name_pairs(summaries)),
    }
    return {name: asdict(rows) for name, rows in tasks.items()}


def _columns(labels: tuple[str, ...], rows: Iterable[_Row]) -> TextRows:
    """The rows as columns, no label with more than its share of the task."""
    kept: list[_Row] = []
    room = dict.fromkeys(labels, _ROWS_PER_TASK // len(labels))
    for row in _unambiguous(rows):
        if room[row.label] > 0:
            room[row.label] -= 1
            kept.append(row)
    # In the order of choice a frequent label would be used up early; another order mixes them.
    kept.sort(key=lambda row: _digest(row.text_pair or "", row.text))
    pairs = [row.text_pair for row in kept if row.text_pair is not None]
    label = [labels.index(row.label) for row in kept]
    return TextRows([row.text for row in kept], pairs or None, label, labels)


def _unambiguous(rows: Iterable[_Row]) -> list[_Row]:
    """Each text (or pair) once, in hash order, without those that occur with several labels."""
    same: dict[tuple[str, str], set[_Row]] = defaultdict(set)
    for row in rows:
        same[row.text.casefold(), (row.text_pair or "").casefold()].add(row)
    single = (min(group) for group in same.values() if len({row.label for row in group}) == 1)
    return sorted(single, key=lambda row: _digest(row.text, row.text_pair or ""))


def _name_pairs(summaries: Iterable[_Summary]) -> Iterator[_Row]:
    """Half the summaries with their own name, the others with another's of the same library."""
    named: dict[str, list[_Row]] = defaultdict(list)
    for summary in summaries:
        words = " ".join(_NAME_WORD.findall(summary.name)).lower()
        if words and summary.kind in ("function", "method"):
            named[summary.library].append(_Row(words, summary.text))
    used: set[str] = set()
    for rows in named.values():
        # A summary shared by several names says too little of each: it counts as ambiguous.
        single = [row for row in _unambiguous(rows) if row.text.casefold() not in used]
        used.update(row.text.casefold() for row in single)
        for row in single[::2]:
            yield _Row("match", row.label, row.text)
        for row, other in pairwise(single[1::2]):
            if row.label != other.label:
                yield _Row("mismatch", other.label, row.text)


def _scan(library: str, folder: Path) -> Iterator[_Summary | _Row]:
    """What the library's source says, from files chosen by hash until enough has been read."""
    names = [path.relative_to(folder) for path in folder.rglob("*.py")]
    if not names:
        raise DataError(f"{library!r} has no Python source in {folder} for the tasks to read")
    own = (name.as_posix() for name in names if not any(map(_SKIPPED_FOLDER.fullmatch, name.parts)))
    read = 0
    for name in sorted(own, key=_digest):
        if read >= _SEARCHED_BYTES:
            break
        if (folder / name).stat().st_size > _BYTES_PER_FILE:
            continue
        source = (folder / name).read_bytes()
        if read < _PARSED_BYTES:
            # What this Python cannot parse, a template or a later syntax, is passed over.
            with suppress(SyntaxError, ValueError):
                yield from _summaries(library, ast.parse(source))
        yield from _errors(source.decode(errors="ignore"))
        read += len(source)


def _summaries(library: str, module: ast.Module) -> Iterator[_Summary]:
    """The summaries of the module and of all it defines; expressions define nothing."""
    pending: list[tuple[ast.AST, bool]] = [(module, False)]
    while pending:
        node, in_class = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "method" if in_class else "function"
            if isinstance(node, ast.Module | ast.ClassDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "module"
            doc = (ast.get_docstring(node, clean=False) or "").strip()
            if text := _sentence(_MARKUP.sub("", _PARAGRAPH_END.split(doc, maxsplit=1)[0])):
                yield _Summary(library, kind, getattr(node, "name", ""), text)
            in_class = kind == "class"
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            pending.extend((child, in_class) for child in getattr(node, block, ()))


def _errors(source: str) -> Iterator[_Row]:
    """The messages of the errors raised in the source, each labelled with its exception."""
    for found in _RAISE.finditer(source):
        lines = source[found.start() : found.start() + _CHARACTERS_PER_RAISE].split("\n")
        for statement in accumulate(lines, "{}\n{}".format):
            with suppress(SyntaxError, ValueError):  # until the last of the statement's lines
                match ast.parse(statement).body:
                    case [ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[said, *_]))]:
                        text = _sentence(_literal(said))
                        if text and name not in text:
                            yield _Row(name, text)
                break


def _literal(node: ast.expr) -> str:
    """The text of a string expression, with `...` for what is known only when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_literal, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _literal(left) + _literal(right)
        case ast.BinOp(left=left, op=ast.Mod()):
            return re.sub(r"%(?:\(\w+\))?[-+ #0-9.]*[a-zA-Z]", "...", _literal(left))
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            return re.sub(r"\{[^{}]*\}", "...", _literal(template))
    return "..."


def _sentence(text: str) -> str:
    """The text in single spaces, or nothing where it is not printable prose of a fit length."""
    text = " ".join(text.split())
    fit = text.isprintable() and text[:1].isalnum() and len(_WORD.findall(text)) in _WORDS_PER_TEXT
    return text if fit else ""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
