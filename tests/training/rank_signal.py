"""Run by test_ranks.py in each of two processes: trains, and the second one gets SIGTERM in step 3."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from pronghorn.training.run import train
from tests.training.test_resume import SignalAt

if __name__ == "__main__":
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    train(config, callbacks=[SignalAt(3)] if os.environ["RANK"] == "1" else [])
