"""Runs of two processes on the CPU, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]


def launch(*arguments: str, fsdp: bool = False) -> None:
    """Run a script, or with -m a module, in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_FSDP": str(fsdp),
        "ACCELERATE_USE_CPU": "true",  # with --cpu, accelerate would want MPI
    }
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
