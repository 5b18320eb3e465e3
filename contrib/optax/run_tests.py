"""Run optax's common tests of the named optimizers, and the tests and examples of _adabound.py.

generate.py --check runs this in a source tree of optax that has them: PYTHONPATH=TREE, from TREE.
"""

from __future__ import annotations

import doctest
import sys
import unittest
from pathlib import Path
from types import ModuleType

import optax
from optax.contrib import _adabound, _adabound_test, _common_test


def tests_of(module: ModuleType) -> list[unittest.TestCase]:
    """Return the tests of a module."""
    tests: list[unittest.TestCase] = []
    for case in unittest.defaultTestLoader.loadTestsFromModule(module):
        assert isinstance(case, unittest.TestSuite)
        tests += [test for test in case if isinstance(test, unittest.TestCase)]
    return tests


def main(names: list[str]) -> None:
    """Run the tests; exit with a message if one fails or is skipped."""
    if not Path(optax.__file__).resolve().is_relative_to(Path.cwd()):
        sys.exit(f"imported {optax.__file__}, which is not in the source tree {Path.cwd()}")
    all_common = tests_of(_common_test)
    common = {}
    for name in [*names, "adopt"]:
        common[name] = [test for test in all_common if f"opt_name='{name}'" in test.id()]
    expected = len(common.pop("adopt"))  # as many as of an optimizer that is tested with one set of arguments
    for name, tests in common.items():
        if not tests or len(tests) != expected:
            sys.exit(f"{name} has {len(tests)} common tests, adopt {expected}")
    own = tests_of(_adabound_test)
    suite = unittest.TestSuite([*(test for tests in common.values() for test in tests), *own])
    result = unittest.TextTestRunner().run(suite)
    examples = doctest.testmod(_adabound)
    if not result.wasSuccessful() or result.skipped or examples.failed or not examples.attempted:
        sys.exit(f"optax {optax.__version__}: {result}, {examples}")
    print(
        f"optax {optax.__version__}: passed {expected * len(names)} common tests, "
        f"{len(own)} of _adabound_test.py and {examples.attempted} lines of examples"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
