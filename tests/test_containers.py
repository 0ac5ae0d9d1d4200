"""Containers: flatten, align and unflatten are inverse, and say where structures differ."""

import re
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acprop_core._containers import align, flatten, unflatten

Pair = namedtuple("Pair", ["left", "right"])

TREES = st.recursive(
    st.integers() | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text("ab1", max_size=2) | st.integers(0, 9), children, max_size=3)
        | st.tuples(children, children)
        | st.builds(Pair, children, children)
    ),
    max_leaves=12,
)


@given(TREES)
def test_flatten_and_unflatten_are_inverse(tree: Any) -> None:
    leaves = [leaf for _, leaf in flatten(tree)]
    assert unflatten(tree, leaves) == tree
    assert type(unflatten(tree, leaves)) is type(tree)
    assert list(align(tree, tree, "tree")) == leaves


def test_names_are_dotted_paths() -> None:
    tree = {"layers": [{"weight": 1, "bias": 2}, Pair(3, (4,))], 7: None}
    assert [name for name, _ in flatten(tree)] == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.left",
        "layers.1.right.0",
        "7",
    ]
    assert list(flatten(5)) == [("", 5)]


def test_kinds_of_dict_are_kept() -> None:
    ordered = OrderedDict(b=1, a=2)
    assert unflatten(ordered, [3, 4]) == OrderedDict(b=3, a=4)
    assert list(ordered.items()) == [("b", 1), ("a", 2)]  # untouched
    default = defaultdict(list, a=1)
    rebuilt = unflatten(default, [2])
    assert rebuilt == {"a": 2}
    assert rebuilt["new"] == []


def test_align_follows_the_keys_of_the_reference() -> None:
    assert list(align({"b": 1, "a": 2}, {"a": 0, "b": 0}, "tree")) == [2, 1]
    assert list(align((1, 2), [0, 0], "tree")) == [1, 2]


def test_a_prefix_stands_for_what_is_below() -> None:
    like = {"a": [1, 2], "b": 3}
    assert list(align({"a": True, "b": False}, like, "mask", prefix=True)) == [True, True, False]
    assert list(align(True, like, "mask", prefix=True)) == [True, True, True]


@pytest.mark.parametrize(
    ("tree", "like", "message"),
    [
        ({"a": 1}, {"a": 1, "b": {"c": 2}}, "the tree lacks 'b'"),
        ({"a": 1, "x": 1}, {"a": 1}, "the tree has 'x', which the parameters lack"),
        (
            {"a": {"b": 1}},
            {"a": {"b": [1]}},
            "the tree at 'a.b' is one value (int) where the parameters have a",
        ),
        ([1, [2]], [1, 2], "the tree at '1' is a container (list) where the parameters have one value (int)"),
        ([1], [1, 2, 3, 4, 5], "the tree lacks '1', '2', '3' and 1 more"),
        (1, [1], "the tree is one value (int) where the parameters have a container (list)"),
    ],
)
def test_differences_are_named(tree: Any, like: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        list(align(tree, like, "the tree"))
