"""Batches, and the schedules that order them: which tasks' batches make up a step, and how many steps an epoch has.

Nothing here keeps a state: the rows of a batch are a function of (seed, task, how many batches of the task came before),
and those of an epoch's steps of (seed, epoch, step). A run that goes on after an interruption needs no generator's state.

    python data/batches.py         the first steps of every schedule for sets of the course's sizes
"""
import dataclasses
import hashlib
import math
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as `python data/batches.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download import InputError  # noqa: E402

SCHEDULES = ("sequential", "round_robin", "mixed", "mtdnn", "annealed")
ONE_TASK_A_STEP = ("sequential", "mtdnn", "annealed")


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
    pooled: torch.Tensor | None = None  # (S, H), where a frozen encoder has run already


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
    pooled = None if examples.pooled is None else examples.pooled[rows].transpose(0, 1).flatten(0, 1)
    return Batch(*map(torch.from_numpy, (input_ids, attention_mask, token_type_ids)), labels, rows, pooled)


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
    mtdnn        one batch of one task a step: the batches of all tasks, shuffled (Liu et al. 2019, algorithm 1). With
                 `upsample` each set is repeated until it has as many rows as the largest (report 2)
    annealed     one batch of one task a step, drawn with a probability in proportion to N^a, N the rows of its set; a
                 falls from 1 in the first epoch to .2 in the last (Stickland & Murray 2019)

    sizes: {task: rows}, in the order of the tasks. batch_size: {task: rows}, or one number. epochs: of the run.
    epoch_length  all tasks a step (round_robin, mixed)      one task a step
    "longest"     the most batches that a task has           a whole pass over every set
    "shortest"    the fewest; others go on in the next one   as many batches of each task as the shortest has
    a number      that many                                  that many (sequential: shared out in proportion to the batches)

    With annealed "shortest" is that many in all. Raises InputError where sequential leaves a task without a step.
    """

    def __init__(self, name, sizes, batch_size, epoch_length, seed, epochs=1, upsample=False):
        if name == "mixed" and not isinstance(batch_size, dict):
            steps = min(math.ceil(sum(sizes.values()) / (batch_size * len(sizes))), min(sizes.values()))
            batch_size = {task: Fraction(size, steps) for task, size in sizes.items()}
        elif not isinstance(batch_size, dict):
            batch_size = dict.fromkeys(sizes, batch_size)
        self.name, self.sizes, self.batch_size, self.seed, self.epochs = name, sizes, batch_size, seed, epochs
        self.streams = {task: Stream(size, batch_size[task], seed, task) for task, size in sizes.items()}
        self.counts = {task: stream.batches for task, stream in self.streams.items()}  # batches of a pass
        if upsample:
            self.counts = {task: math.ceil(max(sizes.values()) * count / sizes[task]) for task, count in self.counts.items()}
        one_task, shortest = name in ONE_TASK_A_STEP, min(self.counts.values())
        if epoch_length == "shortest" and one_task:
            self.counts = dict.fromkeys(self.counts, shortest)
        elif name == "sequential" and epoch_length != "longest":
            total = sum(self.counts.values())
            ends = np.rint(np.cumsum(list(self.counts.values())) * epoch_length / total).astype(int)
            shares = dict(zip(self.counts, np.diff(ends, prepend=0).tolist()))
            if 0 in shares.values():
                raise InputError(f"--epoch_length {epoch_length}: a task is left without a step, since {self.counts} "
                                 "batches are shared out in proportion; give more steps")
            self.counts = shares
        if isinstance(epoch_length, int) and name != "sequential":
            self.steps_per_epoch = epoch_length
        elif one_task:  # its counts have been cut to epoch_length above
            self.steps_per_epoch = sum(self.counts.values())
        else:
            self.steps_per_epoch = shortest if epoch_length == "shortest" else max(self.counts.values())

    def tasks(self, epoch):
        """The tasks of each step of epoch 0, 1, ...: a list of tuples."""
        if self.name == "sequential":
            return [(task,) for task, count in self.counts.items() for _ in range(count)]
        if self.name == "annealed":
            generator = np.random.default_rng(seed_of("annealed", self.seed, epoch))
            drawn = generator.choice(len(self.sizes), self.steps_per_epoch, p=self.probabilities(epoch))
            return [(list(self.sizes)[i],) for i in drawn]
        if self.name == "mtdnn":  # pass after pass over all batches, cut into epochs
            union = [(task,) for task, count in self.counts.items() for _ in range(count)]
            start, steps = epoch * self.steps_per_epoch, []
            for n in range(start // len(union), (start + self.steps_per_epoch - 1) // len(union) + 1):
                order = np.random.default_rng(seed_of("mtdnn", self.seed, n)).permutation(len(union))
                steps += [union[i] for i in order]
            return steps[start % len(union):][:self.steps_per_epoch]
        return [tuple(self.streams)] * self.steps_per_epoch

    def probabilities(self, epoch):  # of the tasks, where they are annealed
        exponent = 1 - 0.8 * epoch / max(1, self.epochs - 1)
        weights = np.array(list(self.sizes.values()), dtype=float) ** exponent
        return weights / weights.sum()

    def epoch(self, epoch):
        """The steps of epoch 0, 1, ...; every task goes on where the epoch before left it."""
        done = Counter(task for earlier in range(epoch) for step in self.tasks(earlier) for task in step)
        for step in self.tasks(epoch):
            yield [(task, self.streams[task].rows(done[task])) for task in step]
            done.update(step)


if __name__ == "__main__":
    sizes = {"sst": 8544, "para": 141506, "sts": 6040}
    for name in SCHEDULES:
        schedule = Schedule(name, sizes, 8, "longest", seed=11711)
        steps = [{task: len(rows) for task, rows in step} for step in schedule.epoch(0)]
        rows = {task: sum(step.get(task, 0) for step in steps) for task in sizes}
        print(f"{name}: {len(steps)} steps, the first two {steps[:2]}, rows an epoch {rows}")
