import pickle

import pytest

from manipi import errors
from manipi.errors import ConfigError, ManipiError, unknown_name

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ManipiError)]
PARTS = {"expected": "a", "found": "b", "where": "c", "next": "d"}


def test_the_text_has_four_parts_in_order():
    assert str(ConfigError(**PARTS)) == "expected a\n   found b\n   where c\n    next d"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_pickling(kind):
    """Worker processes send errors through a pipe."""
    back = pickle.loads(pickle.dumps(kind(**PARTS)))
    assert type(back) is kind
    assert vars(back) == PARTS


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {line.split("─ ")[1].split()[0] for line in errors.__doc__.splitlines() if "─ " in line}
    assert drawn == {kind.__name__ for kind in KINDS} - {"ManipiError"}


def test_an_unknown_name_brings_the_closest_ones():
    error = unknown_name("recipe", "tabeltop", ["tabletop", "libero"], next="look")
    assert error.next == "did you mean tabletop?"
    assert error.found == "'tabeltop'"
    assert unknown_name("recipe", "xyz", ["tabletop"], next="look").next == "look"
    assert unknown_name("recipe in x.py", "f", [], next="look").expected == "a recipe in x.py, of which there is none"
