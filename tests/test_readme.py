"""The README's commands, on a fresh clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# One small round instead of a whole run; the commands are otherwise the README's own.
BRIEF = "--set federation.rounds=1 --set train.local_steps=2 --set federation.workers=0"
BRIEFLY = {
    "simulate": BRIEF,
    "compare": f"{BRIEF} --seeds 0",
    "connectivity": "--examples 40 --points 3 --clients 3",
    "shapley": "--examples 40 --orders 4",
    "prune": "--examples 40",
    "low-norm": "--examples 40 --replace 0 --rescale 0.5 --raise 2 --rotate 90",
}


def readme_commands() -> list[str]:
    """Return every line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def clone(folder: Path) -> Path:
    """Clone what is committed, as a newcomer gets it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is nothing to clone")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose environment borrows this one's libraries: installing them takes minutes."""
    folder = clone(tmp_path_factory.mktemp("fresh") / "fedcopra")
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True)
    # Python's own bundled setuptools may be too old for this project; the borrowed one is not.
    run(".venv/bin/pip uninstall --quiet --yes setuptools", folder)
    [site] = (folder / ".venv" / "lib").glob("python*/site-packages")
    # Listed after the clone's own installation, which therefore wins. What `make demo` installs has
    # no bitsandbytes: PEFT would take it in at every command, though none of them quantises.
    borrowed = [sysconfig.get_paths()["purelib"], "import sys; sys.modules['bitsandbytes'] = None"]
    (site / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n")
    run(".venv/bin/pip install --quiet --no-deps --no-build-isolation -e .", folder)
    (folder / ".venv" / ".installed").touch()
    return folder


def test_readme_shows_the_two_commands_that_set_everything_up() -> None:
    assert {"make demo", "make test"} <= set(readme_commands())


def test_make_demo_on_a_fresh_clone(fresh_clone: Path) -> None:
    run(f"make demo DEMO_FLAGS='--seeds 0 {BRIEF}'", fresh_clone)
    report = (fresh_clone / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert "copra-merge" in report
    assert (fresh_clone / "runs" / "demo" / "comparison.json").is_file()


# Importing PEFT and transformers takes most of a command's time: the first block stands for all
# in the default run.
FIRST = ("simulate", "compare", "report", "export", "list")


@pytest.mark.ray
@pytest.mark.parametrize("count", [len(FIRST), pytest.param(None, marks=pytest.mark.slow)])
def test_fedcopra_commands_of_the_readme(fresh_clone: Path, count: int | None) -> None:
    commands = [line for line in readme_commands() if line.startswith(("fedcopra", "make certs"))]
    named = [line.split()[1] for line in commands]
    assert tuple(named[: len(FIRST)]) == FIRST
    assert set(named) >= {"connectivity", "shapley", "prune", "low-norm", "merge", "run", "site"}
    shutil.rmtree(fresh_clone / "runs", ignore_errors=True)
    shutil.rmtree(fresh_clone / "adapter", ignore_errors=True)
    for command in commands[:count]:
        if "FOLDER" in command or "COMMAND" in command:
            continue  # needs data that are not here
        if "--on deployment" in command:
            continue  # needs running containers: tests/containers/run.py gives it
        run(f"{command} {BRIEFLY.get(command.split()[1], '')}", fresh_clone)
    assert (fresh_clone / "both.html").is_file()
    assert (fresh_clone / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_make_demo_installs_everything_and_ends_in_time(tmp_path: Path) -> None:
    folder = clone(tmp_path / "fedcopra")
    done = run("make demo", folder)
    assert (folder / "runs" / "demo" / "report.html").is_file()
    assert "open runs/demo/report.html" in done.stdout
    shutil.rmtree(folder)
