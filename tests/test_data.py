"""Checks of data/: reading files, batches, schedules, downloads, and the choice of the demo sets.
"""
import contextlib
import http.server
import io
import itertools
import math
import random
import shutil
import tempfile
import threading
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import multitask_classifier
from data import download, phrases, tasks
from data.batches import (SCHEDULES, Schedule, TaskBatches, collate, collate_shard,
                          evaluation_batches, seed_of)
from data.tasks import TASKS, find_data_files, has_labels, read_examples
from data.tokenizer import load_tokenizer, tokenize
from support.files import InputError
from support.flags import check_training_flags, parse_flags
from tests.helpers import (DEMO, captured, raises, run, three_task_model, workspace,
                           write_file)

SIZES = {"sst": 50, "para": 203, "sts": 31}  # 7, 26 and 4 batches of 8
SST_HEADER = "\tid\tsentence\tsentiment\n"


def sst_rows(count):
    """Rows of an sst file: ids x0, x1, ..., texts " film 0", ..., labels 0 to 4 in turn."""
    return "".join(f"{i}\tx{i}\t film {i}\t{i % 5}\n" for i in range(count))


def read_sst(text, **kwargs):
    """(Examples, what was printed) of an sst file of this text."""
    return captured(read_examples, write_file("a.csv", text), TASKS["sst"], **kwargs)


# ---------------------------------------------------------------- the demo sets

def test_the_demo_sets_are_whole():
    least = {"sst": (160, 40, 40), "para": (160, 40, 40), "sts": (160, 40, 40),
             "cfimdb": (20, 1, 1)}
    for name, counts in least.items():
        split_of = {}
        for split, count in zip(("train", "dev", "test"), counts):
            path = DEMO / TASKS[name].filename(split)
            examples = read_examples(path, TASKS[name], labelled=split != "test")
            assert len(examples) >= count and not examples.malformed
            assert len(set(examples.ids)) == len(examples)

            # no text of one split is in another
            for text in itertools.chain(*examples.texts):
                found = split_of.setdefault(text.lower(), split)
                assert found == split, f"in {found} and {split}: {text}"
    assert len(read_examples(DEMO / "stars-train.csv", TASKS["sst"])) == 20


def test_the_classes_of_the_demo_sets_are_balanced():
    for name in ("sst", "para", "cfimdb"):
        for split in ("train", "dev"):
            examples = read_examples(DEMO / TASKS[name].filename(split), TASKS[name])
            counts = np.bincount(examples.labels.astype(int), minlength=TASKS[name].max_label + 1)
            assert counts.min() >= 0.9 * len(examples) / len(counts), (name, split, counts)


def find_files(*argv):
    """({task: {split: path}}, what was printed) for flags of multitask_classifier.py."""
    args = parse_flags(multitask_classifier.get_parser, check_training_flags,
                       list(map(str, argv)), "--name")
    return captured(find_data_files, args)


def test_the_demo_sets_are_used_only_where_no_files_were_asked_for():
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    demo = folder / "demo"
    shutil.copytree(DEMO, demo)
    with mock.patch.object(tasks, "DATA", folder):
        paths, printed = find_files()
        assert "ids-sst-train.csv and 5 more files are not in" in printed, printed
        assert "download.py" in printed
        assert paths["sst"]["train"] == demo / "ids-sst-train.csv"

        # a folder or a file that was asked for is not replaced by the demo
        raises(InputError, "ids-sst-train.csv: no such file", find_files, "--data_dir", folder)
        raises(InputError, "x.csv: no such file", find_files, "--sst_train", folder / "x.csv")
        raises(InputError, "cfimdb is not among --tasks", find_files,
               "--cfimdb_dev", demo / "ids-cfimdb-dev.csv")


def test_the_real_sets_are_used_where_they_are_and_test_files_may_be_missing():
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    demo = folder / "demo"
    shutil.copytree(DEMO, demo)
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*test*"), dirs_exist_ok=True)
    with mock.patch.object(tasks, "DATA", folder):
        paths, printed = find_files("--sst_dev", demo / "ids-sst-dev.csv")
    assert "are not in" not in printed and "no predictions for sts test" in printed
    assert paths["sts"] == {split: folder / f"sts-{split}.csv" for split in ("train", "dev")}
    assert paths["sst"]["dev"] == demo / "ids-sst-dev.csv"


# ---------------------------------------------------------------- reading a file

def test_malformed_rows_are_counted_and_named():
    # 2 of 202 are within 1 %
    text = SST_HEADER + sst_rows(200) + "200\tx\tgood\t7\n201\ty\tgood\tbad\n"
    examples, printed = read_sst(text)
    assert len(examples) == 200 and len(examples.malformed) == 2
    assert examples.labels[6] == 1 and examples.texts[3] == ("film 3",)
    assert ("left out 2 malformed of 202 rows: line 202: sentiment 7 is outside 0..4; "
            "line 203: sentiment 'bad'" in printed)

    # 4 of 24 are not
    text = (SST_HEADER + sst_rows(20)
            + "20\tx\tgood\n21\ty\t \t1\n22\tz\tgood\t1.5\n23\tz\tgood\tnan\n")
    raises(InputError, "4 of 24 rows are malformed: line 22: 3 fields where the header has 4",
           read_sst, text)
    examples, printed = read_sst(text, skip_malformed=True)
    assert len(examples) == 20 and "left out 4 malformed of 24 rows" in printed


def test_unusable_files_are_rejected_by_name():
    whole = SST_HEADER + sst_rows(9)
    opened = whole.replace(" film 3", '"film 3')
    cases = [(whole.replace("sentiment", "label"), "no column 'sentiment'"),
             ("", "the file is empty"),
             (SST_HEADER, "no rows"),
             (SST_HEADER.encode() + b"0\tx\t\xff\t1\n", "line 2: byte 0xff is not UTF-8"),
             (opened, "row that starts in line 5"),
             (whole.replace(" film 3", '"film" 3'), "row that starts in line 5"),
             (opened.replace("film 6\t1", 'film 6"\t1'), "quote opened in line 5")]
    for text, part in cases:
        raises(InputError, part, read_sst, text)
        raises(InputError, "a.csv: ", read_sst, text)
    raises(InputError, "no such file", read_examples, Path("nowhere.csv"), TASKS["sst"])


def test_byte_order_mark_line_ends_and_blank_lines_do_not_matter():
    text = SST_HEADER + sst_rows(9)
    plain, _ = read_sst(text)
    for variant in ("\ufeff" + text, text.replace("\n", "\r\n"), text.rstrip("\n"), text + "\n\n"):
        examples, _ = read_sst(variant)
        assert examples.ids == plain.ids and examples.texts == plain.texts
        assert np.array_equal(examples.labels, plain.labels)

    # the mark is no part of the first column's name
    assert read_sst("\ufeffid\tsentence\tsentiment\nx\tA film.\t1\n")[0].ids == ["x"]


def test_columns_are_found_by_name_and_quotes_are_removed():
    quoted, _ = read_sst('sentiment\tid\tmore\tsentence\n'
                         '3\tx\t-\t"He said ""no"",\nthen left."\n')
    assert quoted.texts == [('He said "no",\nthen left.',)] and quoted.labels.tolist() == [3]

    # columns of row numbers have no name, and there may be several
    numbered, _ = read_sst("\t" + SST_HEADER + "9\t0\tx\tA film.\t1\n")
    assert numbered.texts == [("A film.",)]

    path = write_file("b.csv", "0\t\tid\tsentence\n1\t0.0\tx\tA film.\n")
    unlabelled = read_examples(path, TASKS["cfimdb"], labelled=False)
    assert unlabelled.ids == ["x"] and unlabelled.labels is None


def test_white_space_around_a_label_does_not_matter():
    labels = ["3", " 3 ", "3\u3000", "3.\x1f", "\x1c3"]  # float() alone rejects the last two
    rows = "".join(f"{i}\tx{i}\tA film.\t{label}\n" for i, label in enumerate(labels))
    assert read_sst(SST_HEADER + rows)[0].labels.tolist() == [3] * len(labels)


def test_a_column_name_must_not_occur_twice():
    for name in ("id", "sentence", "sentiment", "note"):
        text = f"\tid\tsentence\tsentiment\tnote\t{name}\n0\tx\tA film.\t1\t2\t3\n"
        raises(InputError, f"2 columns of its header are named {name!r}", read_sst, text)


def test_a_row_is_named_by_the_line_where_it_starts():
    """Also below blank lines and a row of several lines."""
    text = SST_HEADER + '\n0\tx\t"A\nlong\n""film""."\t1\n\n1\ty\tA film.\t9\n'
    raises(InputError, "1 of 2 rows are malformed: line 7: sentiment 9 is outside", read_sst, text)


def test_a_row_without_id_is_malformed():
    text = SST_HEADER + "0\tx\tA film.\t1\n1\t  \tA film.\t1\n"
    raises(InputError, "1 of 2 rows are malformed: line 3: id is empty", read_sst, text)
    assert read_sst(text, skip_malformed=True)[0].ids == ["x"]


def unlabelled_file(task, rows):
    """A test file of a task. rows: of id and texts."""
    header = "\t".join(["", "id", *task.text_columns])
    lines = ["\t".join([str(i), *row]) for i, row in enumerate(rows)]
    return write_file(task.filename("test"), "\n".join([header, *lines]) + "\n")


def test_every_id_of_a_file_without_labels_is_kept():
    for task in TASKS.values():
        text = ["How are you?", "Who?"][:len(task.text_columns)]
        rows = [["a", *text],
                ["b", *text[:-1], ""],
                ["c", *[" "] * len(text)],
                ["d", *text[:-1], "W\0ho?"],
                ["e\0", *text],
                ["f", *text, "", ""]]
        examples, printed = captured(read_examples, unlabelled_file(task, rows), task,
                                     labelled=False)
        assert examples.ids == ["a", "b", "c", "d", "e\0", "f"] and not examples.malformed
        assert examples.texts[2] == ("",) * len(text) and examples.texts[5] == tuple(text)
        assert "5 of 6 rows are predicted as they are: line 3: " in printed


def test_ambiguous_rows_of_a_file_without_labels_are_rejected():
    """Where it is not known which field is which, or whose the prediction is, nothing is guessed,
    not even with --skip_malformed."""
    for task in TASKS.values():
        text = ["How are you?", "Who?"][:len(task.text_columns)]
        cases = [(["", *text], "line 4: id is empty"),
                 (["g", *text[:-1]], "line 4: "),  # too few fields
                 (["g", *text, "", "Why?"], "line 4: ")]  # too many
        for (row, part), skip in itertools.product(cases, (False, True)):
            path = unlabelled_file(task, [["a", *text], ["b", *text], row])
            raises(InputError, part, read_examples, path, task, labelled=False,
                   skip_malformed=skip)


def test_a_file_is_without_labels_by_its_whole_name_or_its_header():
    for task in TASKS.values():
        texts = "\t".join(task.text_columns)
        bare, labelled = f"\tid\t{texts}\n", f"\tid\t{texts}\t{task.label_column}\n"

        # the course's names decide
        assert not has_labels(write_file(task.filename("test"), labelled), task)
        assert has_labels(write_file(task.filename("dev"), bare), task)  # and is then rejected

        # for any other name the header does
        for name in (f"{task.stem}-latest.csv", f"{task.stem}-test-mine.csv", "contest.csv"):
            assert has_labels(write_file(name, labelled), task)
            assert not has_labels(write_file(name, bare), task)


def test_a_long_field_is_read_whole_and_its_truncation_is_reported():
    words = "a film " * 30000
    path = write_file("a.csv", SST_HEADER + f"0\tx\t{words}\t1\n1\ty\tA film.\t2\n")
    examples = read_examples(path, TASKS["sst"])
    assert len(examples.texts[0][0]) == 209999 and examples.labels.tolist() == [1, 2]

    tokenizer = load_tokenizer(workspace() / "tiny")
    examples, printed = captured(tokenize, examples, tokenizer, 64, cross=True)
    assert len(examples.tokens[0][0][0]) == 64 and "truncated 1 of 2 rows to 64 tokens" in printed


def test_an_open_quote_is_found_however_long_the_file_is():
    rows = "".join(f"{i}\tx{i}\tA film.\t1\n" for i in range(20000))
    never_closed, closed_far_below = "", '9\tx\tA film."\t1\n'
    for end in (never_closed, closed_far_below):
        text = SST_HEADER + '0\tx\t"A film.\t1\n' + rows + end
        for part in ("quote", " in line 2"):
            raises(InputError, part, read_sst, text, skip_malformed=True)


def count_rows(text):
    """The number of rows below the header, from the places where quotes open and close alone. A
    blank line is no row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n") + "\n"
    count, quoted, before, blank = 0, False, "\n", True
    for character in text:
        # a quote opens at the start of a field, and closes anywhere; a doubled one closes and opens
        if character == '"' and (quoted or before in "\t\n"):
            quoted = not quoted
            before = character if quoted else "\t"
        else:
            before = character

        if character == "\n" and not quoted:
            count, blank = count + (not blank), True
        else:
            blank = False
    return count - 1


HOSTILE = [b'"', b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xc3\xa9", b'""', b"'", b",",
           b"-", b" ", b"9", b"\xef\xbb\xbf"]


def mutate(raw):
    """One random change of a bytearray: hostile bytes inserted, a byte replaced, or a stretch
    deleted or doubled."""
    at, kind = random.randrange(len(raw)), random.randrange(5)
    if kind < 2:
        raw[at:at] = random.choice(HOSTILE)
    elif kind == 2:
        raw[at] = random.randrange(256)
    elif kind == 3:
        del raw[at:at + random.choice((1, 1, 5, 300))]
    else:
        raw[at:at] = raw[at:at + random.randrange(200)]


def test_two_thousand_mutated_files_lose_no_row():
    originals = [(TASKS[name], (DEMO / TASKS[name].filename("train")).read_bytes().split(b"\n"))
                 for name in ("sst", "para", "sts")]
    path, read, rejected = workspace() / "mutated.csv", 0, 0
    for n in range(2000):
        task, lines = originals[n % 3]
        raw = bytearray(b"\n".join([lines[0], *random.sample(lines[1:121], 40)]))
        for _ in range(random.randrange(1, 4)):
            mutate(raw)
        path.write_bytes(raw)

        try:
            examples, _ = captured(read_examples, path, task, skip_malformed=random.random() < 0.7)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            rejected += 1
            continue
        expected = count_rows(raw.decode("utf-8-sig"))
        assert len(examples) + len(examples.malformed) == expected, bytes(raw)
        assert len(examples.ids) == len(examples.texts) == len(examples.labels)
        read += 1
    assert read > 500 and rejected > 200, (read, rejected)


def test_every_id_of_the_test_files_is_predicted():
    """With texts that are empty, encoded together and separately, by an encoder that trains or
    does not."""
    texts = {"sst": [[""], ["A film."], ["\0"], ["a\0 film"]],
             "para": [["Why?", ""], ["", "Why?"], ["", ""], ["Why?", "Who?"], ["\0", ""]],
             "sts": [["A man.", "", ""], ["", ""], ["\0", "\0"], ["A man.", "A dog."]]}
    flags = []
    for name, rows in texts.items():
        path = unlabelled_file(TASKS[name], [[f"id{i}", *row] for i, row in enumerate(rows)])
        flags += [f"--{name}_test", path]

    for option, head, pooling in (("finetune", "cross", "mean"), ("finetune", "cosine", "mean"),
                                  ("pretrain", "cross", "cls"), ("pretrain", "uv_diff", "mean")):
        status, printed, folder = run("--pair_head", head, "--pooling", pooling, *flags,
                                      option=option)
        assert status == 0, printed
        assert "line 2: sentence is empty" in printed
        assert "line 4: sentence holds a NUL byte" in printed
        for name, rows in texts.items():
            lines = (folder / "predictions" / f"{name}-test-output.csv").read_text().splitlines()
            predicted = dict(line.split(" , ") for line in lines[1:])
            assert list(predicted) == [f"id{i}" for i in range(len(rows))], (name, lines)
            assert all(math.isfinite(float(value)) for value in predicted.values())
        # of sts, which is the last: no text, both times
        assert abs(float(predicted["id1"]) - float(predicted["id2"])) < 1e-5


# ---------------------------------------------------------------- batches

def test_a_batch_is_padded_and_has_the_second_segment_as_token_type_1():
    examples = three_task_model()[1]["para"]
    chosen = np.array([3, 0, 7])
    batch = collate(examples, chosen)
    assert batch.labels.tolist() == [examples.labels[i] for i in chosen]

    longest = max(len(examples.tokens[i][0][0]) for i in chosen)
    assert batch.input_ids.shape == (3, longest)
    for i, ids, mask, types in zip(chosen, batch.input_ids, batch.attention_mask,
                                   batch.token_type_ids):
        (expected, first), = examples.tokens[i]
        padding = [0] * (longest - len(expected))
        assert ids.tolist() == expected.tolist() + padding
        assert mask.tolist() == [1] * len(expected) + padding
        assert types.tolist() == [0] * first + [1] * (len(expected) - first) + padding


def test_pairs_that_are_encoded_separately_are_all_first_then_all_second_sentences():
    examples = three_task_model(pair_head={"para": "cosine"})[1]["para"]
    batch = collate(examples, np.array([4, 2]))
    sequences = [examples.tokens[i][side][0].tolist() for side in (0, 1) for i in (4, 2)]
    found = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)]
    assert found == sequences and not batch.token_type_ids.any() and len(batch.labels) == 2


def test_the_shards_of_a_batch_hold_every_example_once():
    examples = three_task_model()[1]["para"]
    indices = np.array([9, 4, 1, 7, 12])
    for world in (1, 2, 3, 5, 7):
        shards = [collate_shard(examples, indices, rank, world) for rank in range(world)]
        assert [shard is None for shard in shards] == [rank >= 5 for rank in range(world)]
        shards = shards[:5]
        assert sorted(i for shard in shards for i in shard.indices) == sorted(indices)
        for shard in shards:
            assert shard.share == len(shard.indices) / 5
            assert torch.equal(shard.labels, torch.tensor(examples.labels[shard.indices]))


def test_evaluation_batches_hold_every_example_once():
    examples = three_task_model()[1]["para"]
    for tokens in (1, 50, 10 ** 6):
        batches = list(evaluation_batches(examples, np.arange(len(examples)), tokens))
        indices = np.concatenate([batch.indices for batch in batches])
        assert sorted(indices.tolist()) == list(range(len(examples)))
        for batch in batches:
            assert len(batch.indices) == 1 or batch.attention_mask.sum() <= tokens


def test_the_batches_of_a_task_are_a_function_of_their_number():
    forward = [TaskBatches(10, 3, 1, "sst").indices(n).tolist() for n in range(12)]
    batches = TaskBatches(10, 3, 1, "sst")
    assert [batches.indices(n).tolist() for n in reversed(range(12))] == forward[::-1]
    assert [len(batch) for batch in forward[:4]] == [3, 3, 3, 1]
    assert [TaskBatches(10, 3, 1, "para").indices(n).tolist() for n in range(12)] != forward
    assert [TaskBatches(10, 3, 2, "sst").indices(n).tolist() for n in range(12)] != forward


def test_every_pass_over_a_set_holds_every_example_once():
    for size, batch_size in ((10, 3), (12, 3), (1, 8), (31, Fraction(31, 12)), (7, Fraction(3, 2))):
        batches = TaskBatches(size, batch_size, 1, "sst")
        passes = []
        for number in range(3):
            start = number * batches.batches_per_pass
            of_pass = [batches.indices(start + i) for i in range(batches.batches_per_pass)]
            assert all(abs(len(batch) - batch_size) < 1 for batch in of_pass[:-1])
            passes.append(np.concatenate(of_pass).tolist())
            assert sorted(passes[-1]) == list(range(size))
        assert size == 1 or passes[0] != passes[1] != passes[2]


def test_different_keys_give_different_seeds():
    assert seed_of(1, 2, "sst") != seed_of(12, "sst")
    assert seed_of(1, 2, "sst") == seed_of(1, 2, "sst")
    assert 0 <= seed_of("x") < 2 ** 63


# ---------------------------------------------------------------- schedules

def steps_of(name, batch_size=8, epoch_length="longest", epoch=0, seed=1, **kwargs):
    """The steps of one epoch over SIZES, each a list of (task, indices)."""
    return list(Schedule(name, SIZES, batch_size, epoch_length, seed, **kwargs).epoch(epoch))


def tasks_of(steps):
    """The tasks of each step."""
    return [[task for task, _ in step] for step in steps]


def indices_of(steps, task):
    """All indices of a task in some steps, in order."""
    return [i for step in steps for name, indices in step if name == task
            for i in indices.tolist()]


def sizes_of(steps):
    """The tasks and sizes of the batches of each step."""
    return [[(task, len(indices)) for task, indices in step] for step in steps]


def plain(steps):
    """Steps with lists for arrays, which can be compared."""
    return [[(task, indices.tolist()) for task, indices in step] for step in steps]


def covers(steps, times=1):
    """Every example of every task is in the steps, equally often."""
    return all(sorted(indices_of(steps, task)) == sorted([*range(size)] * times)
               for task, size in SIZES.items())


def test_sequential_has_the_tasks_one_after_the_other():
    steps = steps_of("sequential")
    assert tasks_of(steps) == [["sst"]] * 7 + [["para"]] * 26 + [["sts"]] * 4 and covers(steps)

    # shorter epochs are divided in proportion to the batches, or have as many of each task
    steps = steps_of("sequential", epoch_length=10)
    assert tasks_of(steps) == [["sst"]] * 2 + [["para"]] * 7 + [["sts"]]
    steps = steps_of("sequential", epoch_length="shortest")
    assert tasks_of(steps) == [["sst"]] * 4 + [["para"]] * 4 + [["sts"]] * 4
    raises(InputError, "left without a step", steps_of, "sequential", epoch_length=2)


def test_round_robin_has_every_task_in_every_step():
    steps = steps_of("round_robin")
    assert tasks_of(steps) == [list(SIZES)] * 26
    assert sorted(indices_of(steps, "para")) == list(range(203))

    # the smaller sets start over
    assert len(indices_of(steps, "sts")) == 6 * 31 + 2 * 8
    for part in (steps[:7], steps[7:14]):
        assert sorted(indices_of(part, "sst")) == list(range(50))

    assert len(steps_of("round_robin", epoch_length="shortest")) == 4
    assert len(steps_of("round_robin", epoch_length=9)) == 9
    steps = steps_of("round_robin", batch_size={"sst": 2, "para": 24, "sts": 2})
    assert sizes_of(steps)[0] == [("sst", 2), ("para", 24), ("sts", 2)] and len(steps) == 25


def test_mixed_has_batches_in_proportion_to_the_sets():
    steps = steps_of("mixed")
    assert tasks_of(steps) == [list(SIZES)] * 12 and covers(steps)
    assert all(abs(size - SIZES[task] / 12) < 1 for step in sizes_of(steps) for task, size in step)

    # no more steps than the smallest set has examples
    few = list(Schedule("mixed", {"a": 3, "b": 100}, 2, "longest", 1).epoch(0))
    assert len(few) == 3 and all(size >= 1 for step in sizes_of(few) for _, size in step)


def mtdnn_epochs(count, epoch_length="longest", seed=1):
    """The first epochs, each a list of steps."""
    schedule = Schedule("mtdnn", SIZES, 8, epoch_length, seed)
    return [list(schedule.epoch(epoch)) for epoch in range(count)]


def test_mtdnn_shuffles_the_batches_of_all_tasks():
    epochs = mtdnn_epochs(2)
    for steps in epochs:
        assert len(steps) == 37 and all(len(step) == 1 for step in steps) and covers(steps)
    orders = [tasks_of(steps) for steps in epochs]
    assert orders[0] != orders[1] and orders[0] != tasks_of(steps_of("sequential"))
    assert tasks_of(mtdnn_epochs(1, seed=2)[0]) not in orders


def test_mtdnn_epochs_of_any_length_are_cut_from_the_same_passes():
    whole, parts = sum(mtdnn_epochs(2), []), sum(mtdnn_epochs(7, epoch_length=10), [])
    assert plain(parts) == plain(whole[:70])  # no batch is left out or comes twice
    long = sum(mtdnn_epochs(1, epoch_length=74), [])  # two passes in one epoch
    assert plain(long) == plain(whole)
    assert [len(steps) for steps in mtdnn_epochs(2, "shortest")] == [12, 12]


def test_upsampling_repeats_every_set_until_it_is_as_large_as_the_largest():
    steps = steps_of("mtdnn", upsample=True)
    for task in SIZES:  # to a batch
        assert 203 <= len(indices_of(steps, task)) < 203 + 8


def test_annealed_sampling_has_the_published_probabilities():
    sizes = {"para": 283010, "sst": 8544, "sts": 6040}
    schedule = Schedule("annealed", sizes, 8, 20000, 1, epochs=10)
    for epoch, expected in ((0, (0.951, 0.029, 0.020)), (9, (0.510, 0.253, 0.236))):
        assert np.abs(schedule.probabilities(epoch) - expected).max() < 6e-4
        drawn = Counter(task for task, in schedule.tasks(epoch))
        shares = np.array([drawn[task] / 20000 for task in sizes])
        assert np.abs(shares - expected).max() < 0.015

    # the exponent is 1 where there is one epoch, and falls in equal steps where there are more
    one = Schedule("annealed", sizes, 8, 10, 1, epochs=1)
    assert np.abs(one.probabilities(0) - (0.951, 0.029, 0.020)).max() < 6e-4
    weights = np.array(list(sizes.values())) ** 0.6
    three = Schedule("annealed", sizes, 8, 10, 1, epochs=3)
    assert np.allclose(three.probabilities(1), weights / weights.sum())


def test_annealed_sampling_draws_anew_per_epoch_and_seed():
    first, other = (Schedule("annealed", {"a": 20, "b": 20}, 5, 30, seed, epochs=4)
                    for seed in (1, 2))
    assert first.tasks(0) != first.tasks(1) and first.tasks(0) != other.tasks(0)


def test_the_batches_of_a_task_continue_over_the_epochs():
    """Each task's batches are its own first, second, ..., whatever the other tasks do."""
    sizes = {"a": 30, "b": 20}
    for name in SCHEDULES:
        schedule = Schedule(name, sizes, 5, 15, 1, epochs=4)
        steps = [step for epoch in range(4) for step in schedule.epoch(epoch)]
        for task in sizes:
            found = [indices for step in plain(steps) for other, indices in step if other == task]
            expected = [schedule.batches[task].indices(n).tolist() for n in range(len(found))]
            assert len(found) > 10 and found == expected, name


def test_other_epochs_and_seeds_compose_other_batches():
    def batches(name, **kwargs):
        return {frozenset(indices.tolist()) for step in steps_of(name, **kwargs)
                for _, indices in step}

    for name in SCHEDULES:
        first = batches(name)
        assert first == batches(name), name
        for other in (batches(name, epoch=1), batches(name, seed=2)):
            assert len(first & other) < 0.2 * len(first), name


def test_an_epoch_from_a_later_step_on_is_the_tail_of_the_whole_epoch():
    """What a resumed run trains on, which has a schedule of its own."""
    plans = [(name, {}) for name in SCHEDULES] + [("mtdnn", {"upsample": True})]
    for (name, kwargs), length in itertools.product(plans, ("longest", "shortest", 9)):
        for epoch in (0, 1, 4):
            whole = plain(Schedule(name, SIZES, 8, length, 1, epochs=5, **kwargs).epoch(epoch))
            for first in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
                resumed = Schedule(name, SIZES, 8, length, 1, epochs=5, **kwargs)
                assert plain(resumed.epoch(epoch, first=first)) == whole[first:], (name, first)


# ---------------------------------------------------------------- downloads

def test_git_blob_ids_are_gits():
    assert download.git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert download.git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    names = {task.filename(split) for task in TASKS.values()
             for split in ("train", "dev", "test")}
    assert set(download.GIT_BLOBS) == names and len(set(download.GIT_BLOBS.values())) == 12


BODY = (SST_HEADER + sst_rows(5000)).encode()


@contextlib.contextmanager
def serving(ends=(), lengths=True, ranges=True):
    """A web server on this machine that has BODY under every name. Yields (its address, a list of
    where each request started).

    ends: where the first answers break off; later ones are whole. lengths: whether it sends
    Content-Length. ranges: whether it can start elsewhere than at the first byte.
    """
    requests, ends = [], list(ends)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            requests.append(start)
            if start == len(BODY):
                self.send_error(416)
                return
            start = start if ranges else 0
            self.send_response(206 if start else 200)
            if lengths:
                self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            self.wfile.write(BODY[start:ends.pop(0) if ends else None])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()


def fetch(base, path, blob):
    """(the failures, what was printed) of downloading a set of one file, whose id is `blob`."""
    with mock.patch.object(download, "GIT_BLOBS", {path.name: blob}), \
            contextlib.redirect_stderr(io.StringIO()):  # the bar
        return captured(download.download_sets, base, path.parent)


def test_a_download_that_cannot_begin_says_why():
    path = Path(tempfile.mkdtemp(dir=workspace())) / "a.csv"
    failed, _ = fetch("no-address", path, "blob")
    assert len(failed) == 1 and "no-address/a.csv" in failed[0], failed
    path.touch()
    raises(InputError, "cannot be made", download.download_sets, "base", path / "folder")


def test_an_interrupted_download_is_resumed():
    path, own = Path(tempfile.mkdtemp(dir=workspace())) / "a.csv", download.git_blob(BODY)
    with serving(ends=[30000, 50000]) as (base, requests):
        for end in (30000, 50000):
            failed, _ = fetch(base, path, own)
            assert len(failed) == 1 and f"after {end} of {len(BODY)}" in failed[0]
            assert not path.exists()

        failed, printed = fetch(base, path, own)
        assert failed == [] and path.read_bytes() == BODY and requests == [0, 30000, 50000]
        assert f"{len(BODY)} bytes, the course's own file" in printed

        # what is there is not fetched again
        assert fetch(base, path, own)[0] == [] and len(requests) == 3


def test_a_download_is_whole_where_the_server_cannot_resume_or_has_nothing_left_to_send():
    folder, own = Path(tempfile.mkdtemp(dir=workspace())), download.git_blob(BODY)
    for name, have, ranges in (("a.csv", 30000, False), ("b.csv", len(BODY), True)):
        (folder / f"{name}.part").write_bytes(BODY[:have])
        with serving(ranges=ranges) as (base, requests):
            failed, printed = fetch(base, folder / name, own)
        assert failed == [] and requests == [have] and (folder / name).read_bytes() == BODY
        assert "the course's own file" in printed and not (folder / f"{name}.part").exists()


def test_a_file_of_other_bytes_is_kept_and_reported():
    path = Path(tempfile.mkdtemp(dir=workspace())) / "a.csv"
    own, other = download.git_blob(BODY), download.git_blob(BODY[:-1])
    with serving() as (base, requests):
        for _ in range(2):  # whether it was fetched or was there before
            failed, printed = fetch(base, path, other)
            assert failed == [] and path.read_bytes() == BODY and len(requests) == 1
            assert printed.count("\n") == 1 and own in printed and other in printed
            assert "cut short" not in printed


def test_a_file_of_unknown_length_is_known_to_be_whole_by_its_id_alone():
    folder, own = Path(tempfile.mkdtemp(dir=workspace())), download.git_blob(BODY)
    with serving(lengths=False) as (base, _):
        failed, printed = fetch(base, folder / "a.csv", own)
        assert failed == [] and "the course's own file" in printed and "not" not in printed

    with serving(ends=[30000], lengths=False) as (base, _):
        failed, printed = fetch(base, folder / "b.csv", own)
        assert failed == [] and "30000 bytes" in printed and "may be cut short" in printed
        (folder / "b.csv").unlink()
        assert "cut short" not in fetch(base, folder / "b.csv", own)[1]


# ---------------------------------------------------------------- the treebank's phrases

def test_the_phrases_of_a_tree_are_those_of_its_nodes():
    assert phrases.phrases_of("(3 (2 It) (3 (2 's) (3 good)))") == [
        ("It", "2"), ("'s", "2"), ("good", "3"), ("'s good", "3"), ("It 's good", "3")]


def test_phrases_are_written_for_training_without_sentences_of_dev_and_test():
    trees = {"train": '(1 (2 (2 a) (3 "film")) (2 it))\n(2 (2 it) (0 sags))\n', "dev": "(0 Sags)\n",
             "test": "(1 (2 It) (0 sags))\n"}
    treebank = write_file("treebank.zip", "")
    with zipfile.ZipFile(treebank, "w") as archive:
        for split, text in trees.items():
            archive.writestr(f"trees/{split}.txt", text)
    captured(phrases.main, ["--treebank", str(treebank), "--to", str(treebank.parent)])

    path = treebank.parent / phrases.NAME
    examples, _ = captured(read_examples, path, TASKS["sst"])
    found = {text: label for (text,), label in zip(examples.texts, examples.labels)}
    assert found == {"a": 2, '"film"': 3, 'a "film"': 2, "it": 2, 'a "film" it': 1}
    assert len(examples) == len(found) and has_labels(path, TASKS["sst"])


def test_a_file_that_is_not_the_treebank_gets_one_line():
    for wrong in (write_file("treebank.zip", "no archive"), workspace() / "missing.zip"):
        raises(InputError, str(wrong), phrases.main,
               ["--treebank", str(wrong), "--to", str(workspace())])
