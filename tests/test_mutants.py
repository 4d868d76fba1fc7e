"""Promise: the mutants are those of today's sources, and one that survives is reported. `make mutants` runs them."""

import mutants
import pytest
from mutants import MUTANTS, Mutant

HARMLESS = Mutant(
    "harmless", "none", "csrc/rows.h", "#pragma once", "#pragma once  // again", ("test_x.py::test_a",), "cpu"
)


def test_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").isalnum() for name in names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_line_is_there_once(mutant):
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_are_there(mutant):
    for test in mutant.tests:
        file, function = test.split("::")
        assert f"def {function.split('[')[0]}(" in (mutants.TESTS / file).read_text()


def test_the_table_lists_them():
    listed = [row[:3] for row in mutants.read_table()]
    assert listed == [[mutant.name, mutant.file.split("/")[-1], mutant.fault] for mutant in MUTANTS]


def test_the_quickest_are_those_of_the_table():
    seconds = {row[0]: float(row[-1]) for row in mutants.read_table()}
    chosen = mutants.quickest(4)
    assert len(chosen) == 4
    cuda, *others = chosen
    assert seconds[cuda.name] == min(seconds[mutant.name] for mutant in MUTANTS if mutant.is_cuda)
    rest = [mutant for mutant in MUTANTS if mutant not in chosen]
    assert max(seconds[mutant.name] for mutant in others) <= min(seconds[mutant.name] for mutant in rest)


def test_names_and_the_quickest_add_up():
    named = [MUTANTS[-1].name]
    assert mutants.choose([], 0) == list(MUTANTS)
    assert mutants.choose(named, 0) == [MUTANTS[-1]]
    assert {mutant.name for mutant in mutants.choose(named, 3)} == {*named, *(one.name for one in mutants.quickest(3))}
    assert mutants.choose([], 3) == sorted(mutants.quickest(3), key=MUTANTS.index)


def outputs(*lines):
    return "\n".join(f"tests/test_x.py::{line}" for line in lines)


def test_what_caught_it():
    assert mutants.failed_test(0, outputs("test_a PASSED")) is None
    assert mutants.failed_test(1, outputs("test_a[1-b c] PASSED", "test_b[0] FAILED [ 3%]")) == "test_x.py::test_b"
    # The process ended in a test: by an abort, by a sanitizer.
    assert mutants.failed_test(-6, outputs("test_a PASSED", "test_b ")) == "test_x.py::test_b"
    assert mutants.failed_test(66, outputs("test_a ")) == "test_x.py::test_a"


@pytest.mark.parametrize(("status", "output"), [(4, outputs("test_a ")), (5, ""), (1, "cannot load the library")])
def test_tests_that_did_not_run_caught_nothing(status, output):
    with pytest.raises(RuntimeError, match="the tests did not run"):
        mutants.failed_test(status, output)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a mutant whose tests end so; gives the exit status."""
    monkeypatch.setattr(mutants, "MUTANTS", [HARMLESS])
    monkeypatch.setattr(mutants.native_build, "TREES", tmp_path)
    monkeypatch.setattr(mutants.native_build, "without_cuda", lambda: None)

    def run(*unchanged, mutated):
        def run_tests(build, tree, tests):
            assert (build, tests) == ("cpu", HARMLESS.tests)
            text = (tree / HARMLESS.file).read_text()
            assert (HARMLESS.new in text) == (tree != mutants.ROOT)
            return unchanged if tree == mutants.ROOT else mutated

        monkeypatch.setattr(mutants, "run_tests", run_tests)
        return mutants.main([])

    return run


PASSED = (0, outputs("test_a PASSED"))
FAILED = (1, outputs("test_a FAILED"))


def test_a_mutant_that_is_caught(run, capsys):
    assert run(*PASSED, mutated=FAILED) == 0
    assert "test_x.py::test_a\n1 of 1 mutants are caught\n" in capsys.readouterr().out


def test_a_mutant_that_survives(run, capsys):
    assert run(*PASSED, mutated=PASSED) == 1
    out = capsys.readouterr().out
    assert "SURVIVES" in out
    assert "0 of 1 mutants are caught, but not harmless" in out


def test_tests_that_fail_without_a_mutant(run, capsys):
    assert run(*FAILED, mutated=FAILED) == 1
    assert "test_x.py::test_a fails without a mutant" in capsys.readouterr().out


def test_tests_that_do_not_run_with_the_mutant(run, capsys):
    assert run(*PASSED, mutated=(2, "no such file")) == 1
    assert "the tests did not run" in capsys.readouterr().out


def test_a_line_that_is_not_there(run, monkeypatch, capsys):
    stale = Mutant("stale", "none", "csrc/rows.h", "no such line", "", HARMLESS.tests, "cpu")
    monkeypatch.setattr(mutants, "MUTANTS", [stale])
    assert run(*PASSED, mutated=FAILED) == 1
    assert "must hold 'no such line' once" in capsys.readouterr().out
