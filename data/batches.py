"""Batches, and the schedules that order them: which tasks' batches make up a step, and how many
steps an epoch has.

Nothing here has a state to save. The examples of a batch are a function of (seed, task, how many
batches of the task came before), and the tasks of a step of (seed, epoch, step). So a run that
resumes needs no generator's state.

    python data/batches.py        the first steps of every schedule for sets of the course's sizes
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
from support.files import InputError  # noqa: E402


def seed_of(*key):
    """A seed for each key, for example (seed, epoch, step, task). Equal keys give equal seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------- batches

@dataclasses.dataclass
class Batch:
    """S padded sequences for B examples. S = B; or 2B where pairs are encoded separately, first all
    first sentences, then all second ones."""
    input_ids: torch.Tensor  # (S, L)
    attention_mask: torch.Tensor  # (S, L)
    token_type_ids: torch.Tensor  # (S, L)
    labels: torch.Tensor | None  # (B,)
    indices: np.ndarray  # (B,) into `examples`
    examples: object  # the task's Examples, to name them in a message
    pooled: torch.Tensor | None = None  # (S, H), where a frozen encoder has run already
    share: float = 1.0  # of the whole batch, where each process has a shard of it

    def describe(self):
        """Which examples these are, for a message."""
        ids = [self.examples.ids[i] for i in self.indices[:5]]
        more = ", ..." if len(self.indices) > len(ids) else ""
        source = self.examples.path.name if self.examples.path else "the training text"
        return f"{len(self.indices)} examples of {source} with the ids {', '.join(ids)}{more}"


def collate(examples, indices):
    """The padded batch of some tokenized examples."""
    sides = zip(*(examples.tokens[i] for i in indices))  # (a, b), (c, d) -> (a, c), (b, d)
    sequences = [sequence for side in sides for sequence in side]
    longest = max(len(ids) for ids, _ in sequences)
    input_ids, attention_mask, token_type_ids = np.zeros((3, len(sequences), longest), np.int64)
    for i, (ids, first_segment) in enumerate(sequences):
        input_ids[i, :len(ids)] = ids
        attention_mask[i, :len(ids)] = 1
        token_type_ids[i, first_segment:len(ids)] = 1  # 0 up to the first [SEP], 1 behind it

    labels = pooled = None
    if examples.labels is not None:
        labels = torch.from_numpy(examples.labels[indices])
    if examples.pooled is not None:
        pooled = examples.pooled[indices].transpose(0, 1).flatten(0, 1)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(attention_mask),
                 torch.from_numpy(token_type_ids), labels, indices, examples, pooled)


def collate_shard(examples, indices, rank, world):
    """This process's shard of a batch: every `world`-th example, from the `rank`-th on. None where
    there is none, in a batch of fewer examples than processes."""
    own = indices[rank::world]
    if len(own) == 0:
        return None
    batch = collate(examples, own)
    batch.share = len(own) / len(indices)
    return batch


def evaluation_batches(examples, indices, tokens=8192):
    """The given examples once, alike in length within a batch, with at most `tokens` real tokens
    per batch."""
    lengths = np.array([sum(len(ids) for ids, _ in examples.tokens[i]) for i in indices])
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(indices):
        total = np.cumsum(lengths[order[start:]])
        end = start + max(1, int(np.searchsorted(total, tokens, side="right")))
        yield collate(examples, indices[order[start:end]])
        start = end


class TaskBatches:
    """The batches of one task, without end: every pass over the set is shuffled anew.

    batch_size may be a fraction. Batches then differ by one example, and a pass still holds every
    example once.
    """

    def __init__(self, size, batch_size, seed, task):
        self.size, self.batch_size, self.key = size, Fraction(batch_size), (seed, task)
        self.batches_per_pass = math.ceil(size / self.batch_size)
        self.shuffled = (None, None)  # (pass, its order), to shuffle once per pass

    def indices(self, n):
        """The examples of the n-th batch of the run, n from 0."""
        pass_number, i = divmod(n, self.batches_per_pass)
        if self.shuffled[0] != pass_number:
            generator = np.random.default_rng(seed_of("shuffle", *self.key, pass_number))
            self.shuffled = pass_number, generator.permutation(self.size)
        return self.shuffled[1][int(i * self.batch_size):int((i + 1) * self.batch_size)]


# ---------------------------------------------------------------- schedules

# A schedule gives the tasks of each step of an epoch, a list of tuples. plan: the Schedule below.

def sequential(plan, epoch):
    """One batch of one task per step: all batches of the first task, then of the second, ...

    Report 2's "in-turn" training."""
    return [(task,) for task, count in plan.counts.items() for _ in range(count)]


def round_robin(plan, epoch):
    """One batch of every task per step; a set that ends before the epoch does starts over.

    The mean losses of the batches are added: all tasks weigh the same, whatever their sizes."""
    return [tuple(plan.sizes)] * plan.steps_per_epoch


def mixed(plan, epoch):
    """round_robin, but with one --batch_size B for all of K tasks, B x K examples per step are
    divided among them in proportion to their sets (see Schedule): all end together (report 5)."""
    return round_robin(plan, epoch)


def mtdnn(plan, epoch):
    """One batch of one task per step: the batches of all tasks, shuffled (Liu et al. 2019,
    algorithm 1)."""
    # shuffled passes over all batches, one after another; epoch e has the e-th piece of
    # steps_per_epoch steps
    union = sequential(plan, epoch)
    start, steps = epoch * plan.steps_per_epoch, []
    first, last = start // len(union), (start + plan.steps_per_epoch - 1) // len(union)
    for pass_number in range(first, last + 1):
        generator = np.random.default_rng(seed_of("mtdnn", plan.seed, pass_number))
        order = generator.permutation(len(union))
        steps += [union[i] for i in order]
    return steps[start % len(union):][:plan.steps_per_epoch]


def annealed(plan, epoch):
    """One batch of one task per step, drawn with a probability in proportion to N^a, where N is the
    size of its set (Stickland & Murray 2019, section 4.2)."""
    generator = np.random.default_rng(seed_of("annealed", plan.seed, epoch))
    drawn = generator.choice(len(plan.sizes), plan.steps_per_epoch, p=plan.probabilities(epoch))
    return [(list(plan.sizes)[i],) for i in drawn]


SCHEDULES = {"sequential": sequential, "round_robin": round_robin, "mixed": mixed,
             "mtdnn": mtdnn, "annealed": annealed}
ONE_TASK_PER_STEP = ("sequential", "mtdnn", "annealed")


class Schedule:
    """The steps of each epoch; a step is a list of (task, indices).

    name: one of SCHEDULES. sizes: {task: number of examples}, in the order of the tasks.
    batch_size: {task: examples}, or one number; with "mixed" one number B means B x K examples per
    step of K tasks, in proportion to the sets (more, where the smallest has too few for all steps).
    epochs: of the run. upsample: with "mtdnn", repeat each set until it is as large as the largest.

    steps of an epoch of K tasks, a pass over a set being so many batches:

    epoch_length   all tasks in a step               one task in a step
    "longest"      the most batches that a set has   the batches of all sets together
    "shortest"     the fewest                        K times the fewest (annealed: drawn;
                                                     otherwise the fewest of each task)
    a number       the number                        the number (sequential: in proportion to the
                                                     batches; mtdnn: cut from shuffled passes)

    Raises InputError where sequential leaves a task without a step.
    """

    def __init__(self, name, sizes, batch_size, epoch_length, seed, epochs=1, upsample=False):
        self.name, self.sizes, self.seed, self.epochs = name, sizes, seed, epochs
        if not isinstance(batch_size, dict):
            batch_size = dict.fromkeys(sizes, batch_size)
            if name == "mixed":
                total = math.ceil(sum(sizes.values()) / sum(batch_size.values()))
                steps = min(total, min(sizes.values()))
                batch_size = {task: Fraction(size, steps) for task, size in sizes.items()}
        self.batch_size = batch_size
        self.batches = {task: TaskBatches(size, batch_size[task], seed, task)
                        for task, size in sizes.items()}

        # batches of each task in an epoch
        self.counts = {task: batches.batches_per_pass for task, batches in self.batches.items()}
        if upsample:
            largest = max(sizes.values())
            self.counts = {task: math.ceil(largest * count / sizes[task])
                           for task, count in self.counts.items()}
        self._set_length(epoch_length)

    def _set_length(self, epoch_length):
        one_task, shortest = self.name in ONE_TASK_PER_STEP, min(self.counts.values())
        if one_task and epoch_length == "shortest":
            self.counts = dict.fromkeys(self.counts, shortest)
        elif self.name == "sequential" and epoch_length != "longest":
            self.counts = self._divided(epoch_length)

        if isinstance(epoch_length, int) and self.name != "sequential":
            self.steps_per_epoch = epoch_length
        elif one_task:  # the counts have been cut to epoch_length above
            self.steps_per_epoch = sum(self.counts.values())
        else:
            self.steps_per_epoch = max(self.counts.values())
            if epoch_length == "shortest":
                self.steps_per_epoch = shortest

    def _divided(self, steps):
        """`steps` divided among the tasks in proportion to their batches. {task: steps}"""
        ends = np.cumsum(list(self.counts.values())) * steps / sum(self.counts.values())
        shares = np.diff(np.rint(ends).astype(int), prepend=0).tolist()
        if 0 in shares:
            raise InputError(f"--epoch_length {steps}: a task is left without a step, since the "
                             f"steps are divided in proportion to {self.counts} batches; "
                             "give more steps")
        return dict(zip(self.counts, shares))

    def tasks(self, epoch):
        """The tasks of each step of epoch 0, 1, ...: a list of tuples."""
        return SCHEDULES[self.name](self, epoch)

    def probabilities(self, epoch):
        """Of the tasks in annealed sampling: N^a / sum N^a, where a = 1 - .8 e / (E - 1) in epoch e
        = 0, ..., E - 1: it falls from 1 to .2."""
        a = 1 - 0.8 * epoch / max(1, self.epochs - 1)
        weights = np.array(list(self.sizes.values()), dtype=float) ** a
        return weights / weights.sum()

    def epoch(self, epoch, first=0):
        """The steps of epoch 0, 1, ... from step `first` on. Every task continues where the epoch
        before left it."""
        done = Counter(task for earlier in range(epoch) for step in self.tasks(earlier)
                       for task in step)
        for step_number, step in enumerate(self.tasks(epoch)):
            if step_number >= first:
                yield [(task, self.batches[task].indices(done[task])) for task in step]
            done.update(step)


if __name__ == "__main__":
    sizes = {"sst": 8544, "para": 141506, "sts": 6040}
    for name in SCHEDULES:
        schedule = Schedule(name, sizes, 8, "longest", seed=11711)
        steps = [{task: len(indices) for task, indices in step} for step in schedule.epoch(0)]
        examples = {task: sum(step.get(task, 0) for step in steps) for task in sizes}
        print(f"{name}: {len(steps)} steps, the first two {steps[:2]}, "
              f"examples per epoch {examples}")
