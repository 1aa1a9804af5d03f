"""Hot swaps under load, every fifth of them to a version that must not come into service.

    python benchmarks/swap_under_load.py                       # 50 swaps under 8 clients: a few minutes
    python benchmarks/swap_under_load.py --swaps 10 --clients 4

A Triton, a registry and four versions of their own: tiny models with the demo's sizes and random weights, exported,
built and staged as any version is. Half the clients ask over HTTP, half over gRPC, all without a pause, in a process of
their own. The time without swaps is measured before and after. Prints one JSON line per figure; exit 1 where a request
failed, a flawed version came into service or a good one did not.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import psutil
from tritonclient.grpc import InferenceServerClient

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tasks import config as configuration  # noqa: E402
from tasks import files  # noqa: E402
from tasks.data import sample_en, sample_ru  # noqa: E402
from tasks.errors import StepFailed  # noqa: E402
from tasks.promotion import registry  # noqa: E402
from tasks.run import find  # noqa: E402
from tasks.serving import build_engine, client, export_onnx, repository, stage, swap, triton  # noqa: E402
