"""Clusters and their plans in files: what was written is read, and mistakes are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodel.cluster.nodes import Cluster, Links, Node, NodeLink, PairLink, equal_nodes
from costmodel.cluster.plan import ClusterPlan, ClusterPrediction, CopyPlan, OneMore, StagePlan
from costmodel.cluster.stages import stages_of_counts
from costmodel.plan.policy import Placement, placed_alike
from costmodel.plan.workload import Workload
from profiles import InputError, recorded_profile
from profiles.timing import Measurement
from tests.costmodel.machines import make_machine, make_model, make_policy

TEN_GBIT = NodeLink(bytes_per_s=1.25e9, latency_s=1e-4)


def _cluster() -> Cluster:
    slow = NodeLink(bytes_per_s=1e8, store_s=4e-3)
    return Cluster(
        nodes=(
            Node(name="a", hardware=recorded_profile("cpu-2core")),
            Node(name="b", hardware=make_machine(gpu_memory=10**9)),
        ),
        links=Links(default=TEN_GBIT, pairs=(PairLink(source="a", target="b", link=slow),)),
    )


def _plan(counts: tuple[int, ...] = (3, 5), **changes: Any) -> ClusterPlan:
    policies = [
        make_policy(
            model=stage,
            weights=placed_alike(stage, Placement(cpu=1)),
            blocks_in_flight=len(counts),
        )
        for stage in stages_of_counts(make_model(), counts)
    ]
    stages = tuple(StagePlan(node=f"node-{i}", policy=p) for i, p in enumerate(policies))
    fields: dict[str, Any] = {
        "model": make_model(),
        "workload": Workload(prompt_len=16, gen_len=5, num_prompts=20),
        "copies": (CopyPlan(stages=stages, share=1.0),),
        "predicted": ClusterPrediction(
            throughput_tok_per_s=3.5,
            limit="node-1: disk_read",
            one_more=(OneMore(like="node-0", throughput_tok_per_s=4.0),),
        ),
    }
    return ClusterPlan(**(fields | changes))


def test_large_messages_pass_through_the_store_of_objects() -> None:
    link = NodeLink(bytes_per_s=1e6, latency_s=1e-3, store_s=4e-3)
    found = link.seconds(np.array([0.0, 102_400.0, 102_401.0]))
    np.testing.assert_allclose(found, [0.001, 0.1034, 0.107401])


def test_a_cluster_survives_its_file(tmp_path: Path) -> None:
    path, cluster = tmp_path / "cluster.json", _cluster()
    sample = Measurement(name="disk", unit="s", samples=(1.0,))
    first = replace(
        cluster.nodes[0], hardware=replace(cluster.nodes[0].hardware, measurements=(sample,))
    )
    replace(cluster, nodes=(first, cluster.nodes[1])).save(path)
    plain = replace(cluster.nodes[0].hardware, measurements=())
    bare = replace(cluster, nodes=(replace(first, hardware=plain), cluster.nodes[1]))
    assert Cluster.load(path) == bare


def test_each_direction_has_a_link_of_its_own() -> None:
    links = _cluster().links
    assert links.between("a", "b").bytes_per_s == 1e8
    assert links.between("b", "a") == TEN_GBIT
    assert TEN_GBIT.seconds(np.array([0.0, 2.5e9])) == pytest.approx([1e-4, 2.0001])


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", _plan()
    plan.save(path)
    assert ClusterPlan.load(path) == plan
    assert plan.nodes == ("node-0", "node-1")
    assert (plan.copies[0].block_size, plan.copies[0].blocks_in_flight) == (8, 2)


def _set(keys: list[str | int], value: object) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set(["schema_version"], 2), "schema_version: got 2"),
        (_set(["nodes"], []), "cluster.nodes: got none"),
        (_set(["nodes", 1, "name"], "a"), "a twice"),
        (_set(["nodes", 0, "name"], ""), "node.name"),
        (_set(["links", "default", "bytes_per_s"], 0), "link.bytes_per_s"),
        (_set(["links", "default", "latency_s"], -1), "link.latency_s"),
        (_set(["links", "default", "store_s"], -1), "link.store_s"),
        (_set(["links", "pairs", 0, "target"], "c"), "node 'c'"),
        (_set(["links", "speed"], 1), "unknown key 'speed'"),
    ],
)
def test_mistakes_in_a_cluster_are_named(
    change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    _cluster().save(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        Cluster.load(path)


STAGE: list[str | int] = ["copies", 0, "stages"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set(["schema_version"], 9), "schema_version"),
        (_set(["copies"], []), "copies: got none"),
        (_set(["copies", 0, "share"], 0.5), "sum to 0.5"),
        (_set(["copies", 0, "share"], 2), "copy.share"),
        (_set([*STAGE, 1, "node"], "node-0"), "node-0 twice"),
        (_set([*STAGE, 1, "policy", "gpu_batch_size"], 5), "block size 10"),
        (_set([*STAGE, 1, "policy", "blocks_in_flight"], 3), "blocks_in_flight 3"),
        (_set(["model", "layer_order"], [0] * 9), "a copy of 8 layers"),
    ],
)
def test_mistakes_in_a_plan_are_named(
    change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    _plan().save(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        ClusterPlan.load(path)


def test_a_plan_without_its_last_layers_is_refused() -> None:
    copy = _plan().copies[0]
    first, last = copy.stages
    with pytest.raises(InputError, match="all 8 layers"):
        alone = replace(first.policy, blocks_in_flight=1)
        replace(copy, stages=(replace(first, policy=alone),))
    with pytest.raises(InputError, match="layers from 3; allowed: layers from 0"):
        replace(copy, stages=(last, first))


def test_other_files_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no key 'copies'"):
        ClusterPlan.load(path)


def test_equal_nodes_are_numbered() -> None:
    cluster = equal_nodes(make_machine(), 3, TEN_GBIT)
    assert [node.name for node in cluster.nodes] == ["node-0", "node-1", "node-2"]
    assert cluster.node("node-2").hardware == make_machine()
    with pytest.raises(InputError, match="node-3"):
        cluster.node("node-3")
    with pytest.raises(InputError, match="number of nodes"):
        equal_nodes(make_machine(), 0, TEN_GBIT)
