"""Batches, and the schedules that order them: which tasks' batches make up a step, and how many steps an epoch has.

Nothing here keeps a state: the rows of a batch are a function of (seed, task, how many batches of the task came before),
and those of an epoch's steps of (seed, epoch, step). A run that goes on after an interruption needs no generator's state.

    python data/batches.py         the first steps of every schedule for sets of the course's sizes
"""
import dataclasses
import hashlib
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as `python data/batches.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download import InputError  # noqa: E402

SCHEDULES = ("sequential", "round_robin", "mixed")


def seed_of(*key):
    """A seed that is a function of what it is for, (seed, epoch, step, task) say: equal keys, equal seeds; no others."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


@dataclasses.dataclass
class Batch:
    """S sequences for B rows: S = B, or 2B where pairs are encoded apart (first all first sentences, then all second)."""
    input_ids: torch.Tensor  # (S, L)
    attention_mask: torch.Tensor  # (S, L)
    token_type_ids: torch.Tensor  # (S, L)
    labels: torch.Tensor | None  # (B,)
    rows: np.ndarray  # (B,) indices into the task's examples


def collate(examples, rows):
    """The padded batch of some rows of tokenised examples."""
    sequences = [sequence for side in zip(*(examples.tokens[row] for row in rows)) for sequence in side]
    longest = max(len(ids) for ids, _ in sequences)
    input_ids, attention_mask, token_type_ids = np.zeros((3, len(sequences), longest), dtype=np.int64)
    for i, (ids, first_segment) in enumerate(sequences):
        input_ids[i, :len(ids)] = ids
        attention_mask[i, :len(ids)] = 1
        token_type_ids[i, first_segment:len(ids)] = 1
    labels = None if examples.labels is None else torch.from_numpy(examples.labels[rows])
    return Batch(*map(torch.from_numpy, (input_ids, attention_mask, token_type_ids)), labels, rows)


def evaluation_batches(examples, rows, tokens=8192):
    """The given rows once, neighbours alike in length, at most `tokens` real tokens a batch (or one row)."""
    lengths = np.array([sum(len(ids) for ids, _ in examples.tokens[row]) for row in rows])
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(rows):
        total = np.cumsum(lengths[order[start:]])
        end = start + max(1, int(np.searchsorted(total, tokens, side="right")))
        yield collate(examples, rows[order[start:end]])
        start = end


class Stream:
    """The rows of one task, batch after batch; every pass over the set has an order and so batches of its own.

    batch_size may be a fraction: batches then differ by one row, and the pass still holds every row once.
    """

    def __init__(self, size, batch_size, seed, task):
        self.size, self.batch_size, self.key = size, Fraction(batch_size), (seed, task)
        self.batches = math.ceil(size / self.batch_size)  # of one pass
        self.shuffled = (None, None)  # (pass, its order), to shuffle once a pass

    def rows(self, n):
        """The n-th batch of the run, n from 0."""
        passes, i = divmod(n, self.batches)
        if self.shuffled[0] != passes:
            generator = np.random.default_rng(seed_of("shuffle", *self.key, passes))
            self.shuffled = passes, generator.permutation(self.size)
        return self.shuffled[1][int(i * self.batch_size):int((i + 1) * self.batch_size)]


class Schedule:
    """The steps of an epoch; a step is a list of (task, rows).

    sequential   one batch of one task a step: all batches of the first task, then of the second, ...
    round_robin  one batch of every task a step; the set with the most batches sets the epoch and the others start over
    mixed        round_robin with batch sizes in proportion to the sets, so that all end together: B x K rows a step for
                 one batch size B and K tasks, or more where the smallest set has too few rows for one in every step.
                 With a batch size for each task those are taken as they are.

    sizes: {task: rows}, in the order of the tasks. batch_size: {task: rows}, or one number.
    epoch_length: "longest"; "shortest" (the set with the fewest batches sets the epoch, the others go on from where they
    stopped in the next one; sequential: that many batches of each task); or a number of steps (sequential: shared out
    among the tasks in proportion to their batches; InputError where a task is left without any).
    """

    def __init__(self, name, sizes, batch_size, epoch_length, seed):
        if name == "mixed" and not isinstance(batch_size, dict):
            steps = min(math.ceil(sum(sizes.values()) / (batch_size * len(sizes))), min(sizes.values()))
            batch_size = {task: Fraction(size, steps) for task, size in sizes.items()}
        elif not isinstance(batch_size, dict):
            batch_size = dict.fromkeys(sizes, batch_size)
        self.name, self.batch_size = name, batch_size
        self.streams = {task: Stream(size, batch_size[task], seed, task) for task, size in sizes.items()}
        passes = {task: stream.batches for task, stream in self.streams.items()}
        if name == "sequential":
            if epoch_length == "longest":
                self.counts = passes
            elif epoch_length == "shortest":
                self.counts = dict.fromkeys(passes, min(passes.values()))
            else:
                ends = np.rint(np.cumsum(list(passes.values())) * epoch_length / sum(passes.values())).astype(int)
                self.counts = dict(zip(passes, np.diff(ends, prepend=0).tolist()))
                for task, count in self.counts.items():
                    if count == 0:
                        raise InputError(f"--epoch_length {epoch_length} leaves {task} without a step: {passes} batches "
                                         "are shared out in proportion; give more steps")
            self.steps_per_epoch = sum(self.counts.values())
        else:
            self.steps_per_epoch = {"longest": max(passes.values()), "shortest": min(passes.values())}.get(
                epoch_length, epoch_length)

    def epoch(self, epoch):
        """The steps of epoch 0, 1, ..."""
        if self.name == "sequential":
            for task, count in self.counts.items():
                for n in range(epoch * count, (epoch + 1) * count):
                    yield [(task, self.streams[task].rows(n))]
        else:
            for n in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
                yield [(task, stream.rows(n)) for task, stream in self.streams.items()]


if __name__ == "__main__":
    sizes = {"sst": 8544, "para": 141506, "sts": 6040}
    for name in SCHEDULES:
        schedule = Schedule(name, sizes, 8, "longest", seed=11711)
        steps = [{task: len(rows) for task, rows in step} for step in schedule.epoch(0)]
        rows = {task: sum(step.get(task, 0) for step in steps) for task in sizes}
        print(f"{name}: {len(steps)} steps, the first two {steps[:2]}, rows an epoch {rows}")
