"""Runs on_gpu.py in a process of its own: an emulated GPU is a backend of PyTorch for as long as the process lives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

CAN_EMULATE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(not (torch.cuda.is_available() or CAN_EMULATE), reason="no GPU, and this torch emulates none")
def test_a_gpu_gives_what_the_cpu_gives():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_gpu.py"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
