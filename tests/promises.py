"""The promises of docs/reliability.md, and the counts of how often each was tried and held.

A test that holds a promise is marked ``@pytest.mark.promise("its key")``. It counts as one try on one backend, unless
it says what a try is by putting each into ``with attempt():``. `conftest.py` collects the counts, from the processes of
pytest-xdist too, and ``pytest --promises=docs/reliability.md`` writes them into the page.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Key and statement of each promise, in the order of the page.
PROMISES = {
    "first step": "The first step is that of gradient descent, exactly",
    "sign": "Opposite gradients give opposite updates and the same second moment, exactly",
    "scale": "With eps = eps_root = 0 a power of two that multiplies all gradients changes no update after the first, "
    "exactly",
    "permutation": "An element's steps do not depend on its place, exactly",
    "split": "The parts of an array step as the whole, exactly",
    "vmap": "A step under vmap is that of a loop, exactly (JAX, optax, PyTorch)",
    "nesting": "How parameters are nested, named and grouped does not matter, exactly",
    "resume": "A run that is stopped after any step and taken up by a fresh host goes on as if never stopped, exactly",
    "clip": "With a clip no element ever moves by more than the learning rate times t^p",
    "finite": "From finite gradients whose squares are finite, the second moment is never negative and nothing is NaN",
    "magnitudes": "Gradients from the smallest normal number to half the root of the largest, alike or alternating, "
    "with b1 = 0, b2 = 0 or b2 = 1 - 2^-53, agree with the equations to the published bounds",
    "denormals": "Gradients below the smallest normal number count for what they are; in XLA, on a CPU, for 0",
    "signed zero": "A gradient of 0 or -0 moves nothing, and 0 / 0 never appears, also with eps = eps_root = 0",
    "nothing to divide by": "Where s = 0 and eps = 0, a gradient is divided by the smallest normal number",
    "constant gradient": "Where m has become g, the residual is 0 exactly for as long as g stays",
    "many steps done": "After 2^24 - 1 and 2^31 - 1 steps the update is that of the equations, for every kind of count",
    "empty and 0-d": "Arrays without elements or without axes step as others do",
    "rate of zero": "A learning rate of 0 moves nothing, exactly, and the moments go on",
    "isolation": "A gradient that is not finite, or whose square is not, spoils its own element and no other, exactly",
    "not finite": "The guard that each host has or needs keeps out gradients that are not finite; parameters, moments "
    "and count stay as they were",
    "soak": "In a long run neither memory grows nor do the moments drift from those in float64",
    "compensation": "With compensate=True 16-bit parameters lose no update: what rounding takes is kept and given back "
    "(on every backend: the cases compensated-* of the reference suite)",
    "supply chain": "The wheel holds the four packages and asks for array-api-compat alone; nothing in it pickles, "
    "evaluates text, starts a process or opens a connection",
    "bad input": "What cannot be used is refused by an exception of the right type that names the leaf or the option, "
    "and nothing has changed",
    "concurrency": "Threads, forks and pickles neither lose a step nor mix two",
}

BEGIN, END = "<!-- promises: begin -->", "<!-- promises: end -->"


class Count(NamedTuple):
    """How often one test tried a promise on one backend, and how often the promise held."""

    promise: str
    test: str
    backend: str
    tried: int
    held: int


class _Tally:
    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()


_now: list[_Tally] = []  # of the test that runs


@contextlib.contextmanager
def attempt(backend: object = "") -> Iterator[None]:
    """Count what happens within as one try of the test's promise, held unless it raises.

    `backend` is needed only where the test has no parameter of that name.
    """
    for tally in _now:
        tally.tried[str(backend)] += 1
    yield
    for tally in _now:
        tally.held[str(backend)] += 1


@contextlib.contextmanager
def counting(promise: str, test: str, backend: str) -> Iterator[list[Count]]:
    """Give a list that afterwards holds the counts of the test run within."""
    tally, counts = _Tally(), list[Count]()
    passed = False
    _now.append(tally)
    try:
        yield counts
        passed = True
    finally:
        _now.remove(tally)
        if not tally.tried:
            tally.tried[""], tally.held[""] = 1, int(passed)
        elif not passed and tally.tried == tally.held:  # it failed after the last try
            tally.tried[""] += 1
        counts += [Count(promise, test, name or backend, n, tally.held[name]) for name, n in tally.tried.items()]


def table(counts: Iterable[Count]) -> str:
    """Return the page's table: a row for each promise, with the tests, the backends, and the sums."""
    rows = ["| promise | tests | backends | tried | held |", "|---|---|---|---|---|"]
    counts = list(counts)
    for promise, statement in PROMISES.items():
        mine = [c for c in counts if c.promise == promise]
        tests = ", ".join(f"`{test}`" for test in sorted({c.test for c in mine})) or "none"
        tried, held = sum(c.tried for c in mine), sum(c.held for c in mine)
        rows.append(
            f"| **{promise}**: {statement} | {tests} | {len({c.backend for c in mine})} | {tried:,} | {held:,} |"
        )
    return "\n".join(rows)


def write(page: Path, text: str) -> None:
    """Put `text` between the marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page} lacks {BEGIN} or {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
