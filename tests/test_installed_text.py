"""The installed-text tasks: what is extracted, what is kept from leaking, and the cache."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common import installed_text
from common.errors import DataError
from common.installed_text import (
    EXCEPTIONS,
    INSTALLED_TEXT,
    KINDS,
    LIBRARIES,
    TextRows,
    docstring_kinds,
    docstrings,
    error_messages,
    name_matches_summary,
)

SOURCE = '''
"""Tools for sorting the crates of a small orchard.

More about them.
"""

class Crate:
    """A wooden crate that holds :class:`~orchard.Apple` objects."""

    def weigh_apples(self):
        """Return the weight of every apple in the crate
        in grams.
        """
        def inner():
            """Sum what the scale has shown so far."""
        if self.full:
            raise ValueError(f"crate {self.name} holds {len(self)} apples " "already, not more")
        raise RuntimeError("the scale of %s shows %d grams too many" % (1, 2))

def ripeFruit_HTML2text(tree):
    """Yield each ripe fruit of pandas that numpydoc and np.array know.

    Parameters: none
    """
    try:
        raise TypeError(
            "a {} is not a tree of the {kind!r} kind".format(tree, kind=1)
        ) from None
    except OSError:
        raise ImportError(tree)
    raise ImportError("an ImportError is named in this message")
    raise KeyError("a kind of error that is not one of the labels")

def short():
    """Too short."""
'''


def install(folder: Path, version: str, source: str = SOURCE) -> None:
    (folder / "orchard" / "tests").mkdir(parents=True, exist_ok=True)
    (folder / "orchard" / "__init__.py").write_text(source)
    (folder / "orchard" / "broken.py").write_text("def (: {{ template }}")
    ignored = '"""This module tests the orchard and is no text of it."""'
    (folder / "orchard" / "tests" / "test_crate.py").write_text(ignored)
    for old in folder.glob("orchard-*.dist-info/METADATA"):
        old.unlink()
        old.parent.rmdir()
    record = folder / f"orchard-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: orchard\nVersion: {version}\n")


@pytest.fixture
def orchard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small library in place of all; its folder, beside the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(installed_text, "LIBRARIES", {"orchard": "orchard"})
    monkeypatch.syspath_prepend(tmp_path / "site")
    install(tmp_path / "site", "1.0")
    return tmp_path / "site"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextRows]:
    """Every task, from the libraries that are really installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {name: rows() for name, rows in INSTALLED_TEXT.items()}


def labelled(rows: TextRows) -> dict[str, str]:
    return dict(zip(rows.text, (rows.labels[label] for label in rows.label), strict=True))


@pytest.mark.usefixtures("orchard")
def test_summaries_are_the_first_paragraph_in_plain_text_by_kind() -> None:
    assert labelled(docstring_kinds()) == {
        "Tools for sorting the crates of a small orchard.": "module",
        "A wooden crate that holds orchard.Apple objects.": "class",
        "Return the weight of every apple in the crate in grams.": "method",
        "Sum what the scale has shown so far.": "function",
        "Yield each ripe fruit of pandas that numpydoc and np.array know.": "function",
    }


@pytest.mark.usefixtures("orchard")
def test_library_names_are_masked_where_the_library_is_the_label() -> None:
    assert "Yield each ripe fruit of library that librarydoc and library.array know." in labelled(
        docstrings()
    )


@pytest.mark.usefixtures("orchard")
def test_messages_have_holes_and_never_name_their_exception() -> None:
    assert labelled(error_messages()) == {
        "crate ... holds ... apples already, not more": "ValueError",
        "the scale of ... shows ... grams too many": "RuntimeError",
        "a ... is not a tree of the ... kind": "TypeError",
    }


@pytest.mark.usefixtures("orchard")
def test_names_are_split_into_words() -> None:
    words = {"weigh apples", "inner", "ripe fruit html 2 text"}
    assert set(name_matches_summary().text) <= words


def test_a_text_with_two_labels_is_dropped_whatever_its_case(orchard: Path) -> None:
    said = "the fruit is not ripe {}"
    errors = [f'raise {name}("{said.format(name[0])}")' for name in ("TypeError", "ValueError")]
    same = ['raise TypeError("Too many apples here")', 'raise ValueError("too many Apples here")']
    install(orchard, "2.0", "\n".join(errors + same + errors))
    assert labelled(error_messages()) == {
        said.format("T"): "TypeError",
        said.format("V"): "ValueError",
    }


def test_another_version_is_read_anew_and_the_same_one_is_not(orchard: Path) -> None:
    before = docstring_kinds()
    install(orchard, "1.0", '"""An entirely different text about pears."""')
    assert docstring_kinds() == before
    install(orchard, "1.1", '"""An entirely different text about pears."""')
    assert docstring_kinds().text == ["An entirely different text about pears."]


def test_a_damaged_or_unwritable_cache_costs_no_rows(
    orchard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = docstring_kinds()
    (cached,) = (orchard.parent / "cache" / "fedcopra" / "installed-text").iterdir()
    assert set(json.loads(cached.read_text())) == set(INSTALLED_TEXT)
    cached.write_text("{")
    assert docstring_kinds() == rows
    assert set(json.loads(cached.read_text())) == set(INSTALLED_TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cached))
    assert docstring_kinds() == rows


def test_a_missing_library_is_named(orchard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (orchard / "orchard").glob("**/*.py"):
        module.unlink()
    with pytest.raises(DataError, match="'orchard' has no Python source in"):
        docstrings()
    monkeypatch.setattr(installed_text, "LIBRARIES", {"no-such-orchard": "no_such_orchard"})
    with pytest.raises(DataError, match=r"'no-such-orchard' is not installed: .+"):
        docstrings()


def test_rows_do_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        "from common import installed_text\n"
        "installed_text.LIBRARIES = {'networkx': 'networkx'}\n"
        "print([rows() for rows in installed_text.INSTALLED_TEXT.values()])\n"
        "import sys; assert 'networkx' not in sys.modules\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(tmp_path / seed)},
            cwd=Path(installed_text.__file__).parents[1],
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@pytest.mark.parametrize("name", INSTALLED_TEXT)
def test_columns_fit_each_other_and_their_labels(tasks: dict[str, TextRows], name: str) -> None:
    rows = tasks[name]
    assert 3_000 <= len(rows.text) == len(rows.label) <= 5_000
    assert set(rows.label) == set(range(len(rows.labels)))
    assert (rows.text_pair is None) == (name != "name-matches-summary")
    pairs = rows.text_pair or [""] * len(rows.text)
    keys = {(text.casefold(), pair.casefold()) for text, pair in zip(rows.text, pairs, strict=True)}
    assert len(keys) == len(rows.text) == len(pairs)


@pytest.mark.parametrize("name", INSTALLED_TEXT)
def test_a_slice_is_a_fair_sample(tasks: dict[str, TextRows], name: str) -> None:
    rows = tasks[name]
    share = {label: count / len(rows.label) for label, count in Counter(rows.label).items()}
    for start in range(0, len(rows.label) - 500, 500):
        count = Counter(rows.label[start : start + 500])
        assert all(abs(count[label] / 500 - share[label]) < 0.1 for label in share)


def test_labels_are_the_libraries_the_kinds_and_the_exceptions(tasks: dict[str, TextRows]) -> None:
    assert tasks["docstrings"].labels == tuple(LIBRARIES)
    assert tasks["docstring-kinds"].labels == KINDS
    assert tasks["error-messages"].labels == EXCEPTIONS
    assert min(Counter(tasks["docstrings"].label).values()) > 300


def test_no_docstring_names_a_library(tasks: dict[str, TextRows]) -> None:
    names = [rf"\b{name}" if name == "transformers" else name for name in LIBRARIES.values()]
    named = re.compile("|".join([*names, "scikit", r"\b(?:np|pd|plt|nx)\."]), re.IGNORECASE)
    assert not [text for text in tasks["docstrings"].text if named.search(text)]


def test_no_message_names_its_exception(tasks: dict[str, TextRows]) -> None:
    assert not [text for text, label in labelled(tasks["error-messages"]).items() if label in text]


def test_no_summary_is_in_two_pairs_and_mismatches_are_not_matches(
    tasks: dict[str, TextRows],
) -> None:
    rows = tasks["name-matches-summary"]
    assert rows.text_pair is not None
    assert len({summary.casefold() for summary in rows.text_pair}) == len(rows.text_pair)
    share = Counter(rows.label)[1] / len(rows.label)
    assert 0.45 < share < 0.55


def test_a_mismatch_never_has_the_summarys_own_name(orchard: Path) -> None:
    count = 60
    functions = [
        f'def sort_{"ab"[i % 2]}{"x" * i}():\n    """Sort fruit {"i" * (i + 2)} by its size."""'
        for i in range(count)
    ]
    install(orchard, "3.0", "\n".join(functions))
    own = {
        f"Sort fruit {'i' * (i + 2)} by its size.": f"sort {'ab'[i % 2]}{'x' * i}"
        for i in range(count)
    }
    rows = name_matches_summary()
    assert rows.text_pair is not None
    assert Counter(rows.label) == {0: count // 2 - 1, 1: count // 2}
    for words, summary, label in zip(rows.text, rows.text_pair, rows.label, strict=True):
        assert (own[summary] == words) == (rows.labels[label] == "match")
