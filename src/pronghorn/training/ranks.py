"""Several processes that train one run together: started by torchrun or accelerate launch, joined over gloo.

The first of them writes the run folder. All of them read the same rows, each trains on its own share of
every step
and evaluates its own share of the split. With one process, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from pronghorn.errors import NotSupportedError

IGNORED_LABEL = -100
_PATIENCE = timedelta(
    days=1
)  # the others wait while the first one tokenises; a launcher ends them if it dies


def join() -> None:
    """Join the processes that a launcher started; more than one only on the CPU.

    Raises:
        NotSupportedError: several processes or several devices, and GPUs.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted > 1 and torch.cuda.is_available():
        raise NotSupportedError(
            f"WORLD_SIZE is {wanted}: training on several GPUs is not supported yet",
            fix="start one process, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    if torch.cuda.device_count() > 1:
        raise NotSupportedError(
            f"{torch.cuda.device_count()} GPUs are visible: training on several is not supported yet",
            fix="make one visible, e.g. CUDA_VISIBLE_DEVICES=0",
        )
    if wanted > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_PATIENCE)


def count() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes the run folder."""
    return number() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        distributed.barrier()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block, then the others; what it cached is there for them."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def total(values: Sequence[float]) -> list[float]:
    """Sums over all processes, in float64; each must ask for them at the same point."""
    if count() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(summed)
    return [float(value) for value in summed]


def leave() -> None:
    """End the process, if it is one of several: gloo's threads abort some that end by themselves."""
    if count() == 1:
        return
    wait()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Filled(Dataset[Any]):
    """Rows, and behind them one on which nothing trains, with which the last step of an epoch is filled
    up."""

    def __init__(self, rows: Any, pad: int) -> None:
        self.rows = rows
        self.blank = {"input_ids": [pad], "labels": [IGNORED_LABEL]}
        if "lengths" in rows.column_names:
            self.blank["lengths"] = [1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.blank if index == len(self.rows) else self.rows[index]


class SharedOrder(Sampler[int]):
    """The order of one process, filled up with blank rows until every process has equally many batches.

    Accelerate deals out batches in turn, so that a step has the rows it would have on one process. It
    would fill up
    with rows from the beginning, which would train twice.
    """

    def __init__(self, rows: int, seed: int, batch: int) -> None:
        self.rows = rows
        self.seed = seed
        self.step = batch * count()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has its own order, as in accelerate's own sampler."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.epoch + self.seed)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from [self.rows] * (len(self) - self.rows)


def own_share(rows: Any, batch: int, collator: Any) -> DataLoader[Any]:
    """Batches of this process's share of an evaluation split, no row of it twice."""
    return DataLoader(rows.shard(count(), number(), contiguous=True), batch_size=batch, collate_fn=collator)
