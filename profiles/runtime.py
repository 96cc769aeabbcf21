"""What a process holds before it loads a model: libraries, and what they set up at first use.

Run as a process of its own (``python -m profiles.runtime``), so that nothing else is counted. It
prints one number, the peak of its resident memory in bytes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from profiles.errors import RunError

# Work so small that its own buffers do not count, yet large enough to use every code path.
SIZE = 256


def measure_runtime_bytes() -> int:
    """Start a fresh process that does a little of everything, and return its peak in bytes."""
    packages = str(Path(__file__).resolve().parent.parent)
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, "-m", "profiles.runtime"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode or not process.stdout.strip().isdigit():
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"measuring the memory of an empty process failed: {last}")
    return int(process.stdout)


def touch_libraries() -> None:
    """Import what a run imports, and make each library set up what it sets up at first use."""
    import torch
    import torch.nn.functional as F

    # The last one is the program itself: its modules take memory too.
    for name in ("numpy", "tokenizers", "tqdm", "highspy", "executor.generate"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    with torch.inference_mode():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                square = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
                for rows in (1, SIZE):
                    F.linear(square[:rows], square).softmax(-1)
                heads = square.view(1, 4, SIZE // 4, SIZE)
                F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory, see proc(5), ``VmHWM``."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024


if __name__ == "__main__":
    # A run computes on a worker's thread, which has an allocator and helpers of its own.
    touch_libraries()
    worker = threading.Thread(target=touch_libraries)
    worker.start()
    worker.join()
    print(peak_resident_bytes())
