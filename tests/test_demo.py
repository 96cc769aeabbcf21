"""The demo, run as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from costmodel.plan.policy import Policy
from costmodel.plan.rounding import overall_weights
from profiles import HardwareProfile


def test_demo_measures_searches_and_generates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "executor.demo", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for expected in ("matmul", "limited by", "peak cpu", "predicted", "measured", "lower bound"):
        assert expected in ended.stdout
    profile = HardwareProfile.load(tmp_path / "profile.json")
    assert {"cpu.memory.read", "cpu.task_overhead", "disk.write.1024KiB.depth4"} <= {
        figure.name for figure in profile.measurements
    }
    assert all(len(figure.samples) >= 3 for figure in profile.measurements)
    policy = Policy.load(tmp_path / "policy.json")
    assert overall_weights(policy).disk > 0.1
    assert policy.cache.disk > 0.1
    lines = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == policy.workload.num_prompts
    assert all(record["text"].strip() for record in records)
    # Real words of the text that the model was trained on, not noise.
    words = " ".join(record["text"].lower() for record in records).split()
    assert sum(word.strip(".,:;?") in {"the", "and", "of", "lord", "unto"} for word in words) > (
        0.15 * len(words)
    )
