"""Which values of a parameter `make test` takes. The others are marked `exhaustive`: `make test-all` takes them."""

import itertools

import pytest


def _named(values):
    return list(values.items()) if isinstance(values, dict) else [(str(value).removeprefix("torch."), value) for value in values]


def _parameter(kept, name, *values):
    return pytest.param(*values, id=name, marks=() if kept else pytest.mark.exhaustive)


def some(values, kept, also=()):
    """Parameters of a list, or of a dict with its keys as ids; a plain tuple is of several. kept: their ids, or every how many, and
    `also` those of these ids."""
    named = _named(values)
    names = [name for name, _ in named]
    chosen = set(names[::kept] if isinstance(kept, int) else kept) | set(also)
    assert chosen <= set(names), f"there is no {chosen - set(names)}"
    return [_parameter(name in chosen, name, *(value if type(value) is tuple else (value,))) for name, value in named]


def paired(firsts, seconds, kept=None):
    """Parameters of all pairs. Kept: every first with one second, these in turn, or only the firsts of these ids."""
    firsts, seconds = _named(firsts), _named(seconds)
    made = []
    for (i, (one, first)), (j, (other, second)) in itertools.product(enumerate(firsts), enumerate(seconds)):
        made.append(_parameter((i - j) % len(seconds) == 0 and (kept is None or one in kept), f"{one}-{other}", first, second))
    if kept is not None:
        assert set(kept) <= {name for name, _ in firsts}, f"there is no {set(kept) - {name for name, _ in firsts}}"
    return made
