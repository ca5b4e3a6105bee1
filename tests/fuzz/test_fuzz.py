"""A few mutated files of each kind, and every file that an earlier version failed on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.cases import KINDS, Bases
from tests.fuzz.runner import FORKED, PRELOAD, run_case, run_seed
from tests.pipeline.runs import tiny_whole_run
from tests.shared import made_once

# Seeds of a kind here; `make fuzz` draws others, without end.
CASES = 12
CORPUS = Path(__file__).with_name("corpus")
# Files of past findings, by the command that reads them: {} is the file.
COMMANDS = {
    "check": ("check", "{}"),
    "recipe": ("recipe", "{}"),
    "target": ("targets", "{}"),
    "gate": ("gate", "{}", "--max-size", "0.9"),
    "install": ("install", "{}"),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    FORKED.set_forkserver_preload(PRELOAD)
    whole = made_once(tmp_path_factory, "whole", tiny_whole_run)
    made = Bases.made(tmp_path_factory.mktemp("fuzz") / "bases", whole)
    # The first process waits for the imports, which are no case's time.
    run_seed("yaml", 0, made)
    yield made


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_end_in_one_line(kind: str, bases: Bases) -> None:
    outcomes = [run_seed(kind, seed, bases) for seed in range(CASES)]
    problems = [f"{one.seed}: {one.problem}\n{one.said}" for one in outcomes if one.problem]
    assert not problems, "\n".join(problems)
    # The mutations reach into the program: not everything is refused at its door.
    assert len({one.said.partition("mpq-deploy: ")[2][:40] for one in outcomes}) > 3


FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_was_found_before_ends_in_one_line(path: Path, bases: Bases) -> None:
    command = COMMANDS[path.parent.name]
    arguments = tuple(str(path) if one == "{}" else one for one in command)
    outcome = run_case(path.parent.name, 0, lambda folder: arguments, bases)
    assert not outcome.problem, f"{outcome.problem}\n{outcome.said}"
    assert outcome.code, "it is not one of the files that are accepted"
    assert outcome.seconds < 30


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 300_000
    assert len(FILES) > 20
