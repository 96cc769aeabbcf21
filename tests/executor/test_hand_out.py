"""Which node answers which request: each once, whoever fails, and nobody idle at the end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.nodes.facts import NodeFacts, check_alike
from executor.nodes.hand_out import HandOut
from profiles.errors import InputError

NODES = ("a", "b", "c")


def test_requests_of_a_lost_node_go_to_others_first() -> None:
    hand_out = HandOut(range(6))
    assert hand_out.take("a", 3) == [0, 1, 2]
    assert hand_out.take("b", 1) == [3]
    assert hand_out.answered("a", 1)
    assert hand_out.give_back("a") == 2
    assert hand_out.take("b", 3) == [0, 2, 4]


def test_who_has_nothing_to_do_answers_what_others_got_last() -> None:
    hand_out = HandOut(range(4))
    assert hand_out.take("a", 4) == [0, 1, 2, 3]
    assert hand_out.take("b", 2) == [3, 2]
    assert hand_out.answered("b", 3)
    assert not hand_out.answered("a", 3)
    # What another node still has is not handed out again.
    assert hand_out.give_back("b") == 1
    assert hand_out.take("a", 4) == []
    assert hand_out.num_left == 3


def test_a_request_without_room_on_a_node_goes_to_another() -> None:
    hand_out = HandOut(range(3))
    assert hand_out.take("a", 2, without={0}) == [1, 2]
    assert not hand_out.is_stuck([{0}, set()])
    assert hand_out.is_stuck([{0}])
    assert hand_out.take("b", 3) == [0]
    assert not hand_out.is_stuck([{0}])


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_every_request_is_answered_once(count: int, seed: int) -> None:
    hand_out, answers = HandOut(range(count)), dict.fromkeys(range(count), 0)
    held: dict[str, list[int]] = {name: [] for name in NODES}
    choose = random.Random(seed).choice
    while hand_out.num_left:
        node = choose(NODES)
        match choose(("take", "take", "answer", "answer", "fail")):
            case "take":
                held[node] += hand_out.take(node, choose((1, 2, 5)))
            case "answer" if held[node]:
                request = held[node].pop(choose(range(len(held[node]))))
                answers[request] += hand_out.answered(node, request)
            case "fail":
                held[node].clear()
                hand_out.give_back(node)
    assert set(answers.values()) == {1}


def test_nodes_that_differ_are_named() -> None:
    here = NodeFacts(host="h", versions={"zigzag": "1", "torch": "2"}, checkpoint="x")
    check_alike([("this machine", here), ("a", here)], None)
    other = NodeFacts(host="h", versions={"zigzag": "1", "torch": "2.1"}, checkpoint="x")
    with pytest.raises(InputError, match=r"node b: got torch 2\.1; allowed: torch 2, as on this"):
        check_alike([("this machine", here), ("a", here), ("b", other)], None)
    other = NodeFacts(host="h", versions=here.versions, checkpoint="y")
    with pytest.raises(InputError, match="node a: got another checkpoint"):
        check_alike([("this machine", here), ("a", other)], None)
