"""Machine and versions go into every saved result."""

import platform
import subprocess
from pathlib import Path

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    import peft
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    machine_info.update(
        {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "commit": commit.stdout.strip(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
    )
