"""One figure of a benchmark, as one JSON line with the machine and the day: the form of benchmarks/results/."""

import json
import os
import platform
from datetime import date

import psutil


def of_host(name: str, value: float | None, unit: str, **more) -> None:
    """Prints a figure of this machine's processors."""
    memory = round(psutil.virtual_memory().total / 2**30)
    show(name, value, unit, more, f"{os.cpu_count()} cores, {memory} GiB, {platform.system()}")


def of_gpu(name: str, value: float | None, unit: str, **more) -> None:
    """Prints a figure of the GPU that PyTorch uses."""
    import torch

    show(name, value, unit, more, f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")


def show(name: str, value: float | None, unit: str, more: dict, machine: str) -> None:
    figure = {"name": name, "value": value, "unit": unit, **more, "machine": machine, "date": str(date.today())}
    print(json.dumps(figure), flush=True)
