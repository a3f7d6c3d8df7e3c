"""support/predict.py: querying a trained model; and the streams that all scripts print to."""
import contextlib
import functools
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

import multitask_classifier
import pretrain_mlm
from data.batches import collate
from data.tasks import TASKS, Examples
from data.tokenizer import tokenize
from multitask_classifier import MultitaskBERT
from support import predict
from support.files import InputError
from support.run import exit_status
from tests.helpers import KINDS, inside, quietly, raises, run, workspace, write_file

FIRST, SECOND = "A quiet film.", "A loud film \U0001f3ac \u05e9\u05dc\u05d5\u05dd"


@functools.cache
def queried():
    """(folder, model) of a short run of the three tasks."""
    status, printed, folder = run("--pair_head", "para=cross,sts=cosine")
    assert status == 0, printed
    return folder, MultitaskBERT.load(folder)


@functools.cache
def pairs_alone():
    """The folder of a short run without a task of single sentences."""
    return run("--tasks", "para,sts")[2]


def answered(*words):
    """(exit status, what was printed) of the command."""
    status, printed = quietly(predict.main, *words)
    assert "Traceback" not in printed
    return status, printed


# ---------------------------------------------------------------- predictions

def test_a_row_has_the_predictions_of_the_tasks_that_it_fits():
    _, model = queried()
    rows = [(FIRST,), (FIRST, SECOND), [SECOND], ("word " * 30000,)]
    predictions = predict.predict_sentences(model, rows)
    assert [sorted(prediction) for prediction in predictions] == [
        ["sst"], ["para", "sst", "sts"], ["sst"], ["sst"]]
    assert all(abs(sum(prediction["sst"].values()) - 1) < 1e-3 for prediction in predictions)
    assert list(predictions[0]["sst"]) == ["very negative", "negative", "neutral", "positive",
                                           "very positive"]
    assert predictions[0]["sst"] == predictions[1]["sst"], "of the first sentence"
    assert 0 <= predictions[1]["para"] <= 1 and 0 <= predictions[1]["sts"] <= 5
    assert predict.predict_sentences(model, []) == []


def test_predictions_are_the_models_outputs():
    """Probabilities of sst's classes and of a paraphrase; a similarity clipped to 0..5."""
    status, printed, folder = run("--pair_head", "cross")
    assert status == 0, printed
    sentence, other = FIRST, "A loud one, at last."
    for bias, clipped in ((9.0, 5.0), (-9.0, 0.0), (2.25, None)):
        # heads whose outputs differ clearly from 0, and a similarity above, below, within the scale
        model = MultitaskBERT.load(folder)
        generator = torch.Generator().manual_seed(21)
        for head in model.heads.values():
            nn.init.normal_(head.linear.weight, generator=generator)
        nn.init.constant_(model.heads["sts"].linear.bias, bias)
        nn.init.normal_(model.heads["sts"].linear.weight, std=0.1, generator=generator)
        model.save(folder, folder)
        status, printed = answered(folder, sentence, other)
        found, logits = json.loads(printed.splitlines()[-1]), {}

        for task in KINDS:
            texts = [(sentence, other)[:len(TASKS[task].text_columns)]]
            examples = Examples(TASKS[task], None, ["x"], texts, None, [])
            batch = collate(tokenize(examples, model.tokenizer, 64, cross=True), np.arange(1))
            logits[task] = model.logits(task, batch)[0].detach()
        classes = logits["sst"].softmax(dim=-1).numpy()
        assert np.abs(np.array(list(found["sst"].values())) - classes).max() < 1e-4
        assert abs(found["para"] - logits["para"].sigmoid()) < 1e-4 < abs(found["para"] - 0.5)
        similarity = logits["sts"] if clipped is None else clipped
        assert abs(found["sts"] - similarity) < 1e-4


def test_a_reader_gets_words_numbers_and_bars():
    prediction = {"sst": {"negative": 0.25, "positive": 0.75}, "para": 0.5, "sts": 4.0}
    assert predict.describe(("One.", "Two."), prediction).splitlines() == [
        "One.  |  Two.",
        "  sst, of the first sentence:",
        "  sst      negative         #####............... 0.250",
        "  sst      positive         ###############..... 0.750",
        "  para     same meaning     ##########.......... 0.500",
        "  sts      similarity       ################.... 4.00 of 5"]


def test_command_line_file_and_standard_input_give_the_same_predictions():
    folder, model = queried()
    alone, pair, second = predict.predict_sentences(model, [(FIRST,), (FIRST, SECOND), (SECOND,)])
    status, printed = answered(folder, FIRST, SECOND)
    assert status == 0 and json.loads(printed) == {"text": [FIRST, SECOND], **pair}

    # a file with a byte order mark and line ends of Windows
    path = write_file("input.txt", f"\ufeff{FIRST}\t{SECOND}\r\n{SECOND}")
    status, printed = answered(folder, "--input", path)
    assert status == 0 and list(map(json.loads, printed.splitlines())) == [
        {"text": [FIRST, SECOND], **pair}, {"text": [SECOND], **second}]
    with mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(FIRST.encode()))):
        status, printed = answered(folder, "--input", "-")
    assert status == 0 and json.loads(printed) == {"text": [FIRST], **alone}

    # lines end at line feeds alone
    path = write_file("input.txt", "one \u2028 line\x0c\nand another")
    status, printed = answered(folder, "--input", path)
    assert status == 0 and printed.count("\n") == 2


def test_a_long_sentence_is_truncated_and_reported():
    folder, _ = queried()
    status, printed = answered(folder, "word " * 3000)
    assert status == 0 and "truncated 1 of 1 rows" in printed
    assert json.loads(printed.splitlines()[-1])["sst"]


# ---------------------------------------------------------------- bad input

def test_errors_in_an_input_file_name_the_line():
    folder, _ = queried()
    for content, part in ((b"good\n\nbad", "line 2: a sentence is empty"),
                          (b"a\tb\tc", "line 1: 3 sentences"),
                          (b"a\0b", "line 1: a sentence holds a NUL byte"),
                          (b"good\nb\xff", "line 2: byte 0xff"), (b"", "no line of text")):
        status, printed = answered(folder, "--input", write_file("input.txt", content))
        assert status == 2 and part in printed and printed.count("\n") == 1, printed


def test_bad_commands_are_rejected():
    folder, _ = queried()
    path = write_file("input.txt", FIRST)
    without_epoch = path.parent / "run"
    without_epoch.mkdir()
    shutil.copy(folder / "args.json", without_epoch)
    for part, *words in (
            ("has tasks of pairs only", pairs_alone(), "a"),
            ("give the folder of a run",),
            ("give one or two sentences", folder),
            ("give one or two sentences", folder, "a", "--input", path),
            ("3 sentences", folder, "a", "b", "c"),
            ("is empty", folder, " "),
            ("not a run", workspace() / "tiny", "a"),
            ("nowhere: no such folder", workspace() / "nowhere", "a"),
            ("has no model yet; go on with --resume", without_epoch, "a"),
            ("cannot be read", folder, "--input", ""),
            ("cannot be read", folder, "--input", "/nowhere"),
            ("cannot be read", folder, "--input", "a\0b")):
        status, printed = answered(*words)
        assert status == 2 and part in printed and printed.count("\n") == 1, (words, printed)


def test_python_input_is_validated_as_terminal_input_is():
    _, model = queried()

    # a bad row is named
    for bad, part in ((FIRST, "not of type str"), (("a", "b", "c"), "3 sentences"),
                      ((), "0 sentences"), (None, "not of type NoneType"),
                      (math.nan, "not of type float"), (b"bytes", "not of type bytes"),
                      ({"a": "b"}, "not of type dict"), (("a", None), "not of type NoneType"),
                      ((math.nan,), "not of type float"), ((b"bytes", "a"), "not of type bytes"),
                      ((("a",),), "not of type tuple"), (("a", " \t"), "is empty"),
                      (("a\0",), "holds a NUL byte"), (("caf\udce9",), "is not valid text")):
        rows = [("a",), ("a", "b"), bad]
        for message in ("rows[2]: ", part):
            raises(InputError, message, predict.predict_sentences, model, rows)
    raises(InputError, "rows[1]: this run has tasks of pairs only", predict.predict_sentences,
           MultitaskBERT.load(pairs_alone()), [(FIRST, SECOND), (FIRST,)])

    # what is no list of rows
    for rows, part in ((FIRST, "the rows are not"), (b"bytes", "the rows are not"),
                       (None, "the rows are not"), (math.nan, "the rows are not"),
                       (np.array(1.0), "the rows are not"), ({FIRST: SECOND}, "rows[0]: a row is")):
        raises(InputError, part, predict.predict_sentences, model, rows)


def test_a_sentence_is_never_parsed_as_a_flag():
    folder, _ = queried()
    path = write_file("--dashes.txt", f"{FIRST}\n--really?\n")
    lines = [[FIRST], ["--really?"]]
    with inside(path.parent):
        for texts, *words in (
                ([["-5 out of 10"]], folder, "-5 out of 10"),
                ([["--really?"]], folder, "--really?"),
                ([["-5", "-h?"]], folder, "-5", "-h?"),
                ([["--use_gpus", "-"]], folder, "--use_gpus", "-"),
                ([["a=b", "--a=b"]], folder, "a=b", "--a=b"),
                ([["@x"]], folder, "@x"),
                ([["--help"]], "--", folder, "--help"),
                ([["--input", "--"]], folder, "--", "--input", "--"),
                (lines, folder, "--input", path), (lines, folder, f"--input={path}"),
                (lines, "--input", path, folder), (lines, folder, "--input", path.name),
                (lines, f"--input={path.name}", "--", folder)):
            status, printed = answered(*words)
            assert status == 0, (words, printed)
            found = [json.loads(line)["text"] for line in printed.splitlines()]
            assert found == texts, (words, printed)


def test_the_flags_of_the_command_are_flags():
    folder, _ = queried()
    for part, *words in (("expected one argument", folder, "--input"),
                         ("--use_gpu", folder, "--use_gpu=1", "a")):
        status, printed = answered(*words)
        assert status == 2 and part in printed and printed.count("\n") == 1, printed

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            predict.main(["--help"])
            raise AssertionError("no help")
        except SystemExit as end:
            assert end.code == 0
    assert "Only the flags above are flags" in " ".join(printed.getvalue().split())


def test_under_torchrun_the_first_process_alone_answers():
    folder, _ = queried()
    for rank, lines in (("0", 1), ("1", 0)):
        environment = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        with mock.patch.dict(os.environ, environment):
            status, printed = answered(folder, FIRST)
            assert status == 0 and printed.count("\n") == lines, printed
            status, printed = answered(folder, " ")
            assert status == 2 * lines and printed.count("\n") == lines, "one error, too"


# ---------------------------------------------------------------- streams

def printed_in(encoding, main, *words, terminal=False):
    """(exit status, the bytes on standard output, those on standard error) of a script whose
    streams have this encoding and are strict about it."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    streams[0].isatty = lambda: terminal
    with mock.patch.multiple(sys, stdout=streams[0], stderr=streams[1]):
        status = exit_status(main, list(map(str, words)))
        for stream in streams:
            stream.flush()
    return status, *(stream.buffer.getvalue() for stream in streams)


def test_predictions_can_be_printed_to_any_stream():
    folder, model = queried()
    prediction = predict.predict_sentences(model, [(FIRST, SECOND)])[0]
    for encoding in ("ascii", "cp1252", "utf-8"):
        status, out, _ = printed_in(encoding, predict.main, folder, FIRST, SECOND)
        assert status == 0
        assert json.loads(out.decode("ascii")) == {"text": [FIRST, SECOND], **prediction}

        status, out, _ = printed_in(encoding, predict.main, folder, SECOND, terminal=True)
        assert status == 0 and b"A loud film" in out and b"very negative" in out
        status, _, err = printed_in(encoding, predict.main, folder, "caf\udce9 \u2603")
        assert status == 2 and b"is not valid text" in err and err.count(b"\n") == 1


def test_what_training_prints_can_be_printed_to_any_stream():
    root = workspace()
    common = ["--model", root / "tiny", "--data_dir", root / "data", "--epochs", 1,
              "--epoch_length", 1]
    for main, flag in ((multitask_classifier.main, "--name"), (pretrain_mlm.main, "--out")):
        name = root / "runs" / f"\u05e9\u05dc{flag}"
        status, out, _ = printed_in("ascii", main, *common, flag, name)
        assert status == 0 and b"\\u05e9\\u05dc" in b"".join(out.splitlines()[-2:]), out

    fill = ["--model", name, "--fill"]
    status, out, _ = printed_in("cp1252", pretrain_mlm.main, *fill, "a \u2603 [MASK]")
    assert status == 0 and b"\\u2603" in out
    name = root / "runs" / "\udce9"
    for main, words in ((pretrain_mlm.main, [*fill, "\udce9 [MASK]"]),
                        (multitask_classifier.main, [*common, "--name", name])):
        status, _, err = printed_in("ascii", main, *words)
        assert status == 2 and b"is not valid text" in err and err.count(b"\n") == 1, err


def test_closed_streams_end_in_no_traceback():
    folder, _ = queried()
    with mock.patch.object(sys, "stdin", None):
        status, printed = answered(folder, "--input", "-")
    assert status == 2 and printed.count("\n") == 1 and "standard input: is closed" in printed

    # as Python finds them after >&- 2>&-
    pretrained = str(workspace() / "runs" / "closed-streams")
    status, printed = quietly(pretrain_mlm.main, "--model", workspace() / "tiny", "--data_dir",
                              workspace() / "data", "--epochs", 1, "--epoch_length", 1, "--out",
                              pretrained)
    assert status == 0, printed
    fill = ["--model", pretrained, "--fill", "[MASK]"]
    for expected, main, words in ((0, predict.main, [str(folder), FIRST]),
                                  (2, predict.main, [str(folder), " "]),
                                  (0, pretrain_mlm.main, fill)):
        with mock.patch.multiple(sys, stdout=None, stderr=None):
            assert exit_status(main, words) == expected


def test_a_broken_pipe_and_a_full_disk_behind_standard_output_are_one_line():
    folder, _ = queried()
    reader, broken_pipe = os.pipe()
    os.close(reader)
    for writer in (broken_pipe, os.open("/dev/full", os.O_WRONLY)):
        with open(writer, "w") as out, contextlib.redirect_stderr(io.StringIO()) as err:
            with mock.patch.object(sys, "stdout", out):
                status = exit_status(predict.main, [str(folder), FIRST])
            out.flush()  # as the interpreter does at its end, which must succeed
        err = err.getvalue()
        assert status == 1 and err.count("\n") == 1, err
        assert err.startswith(f"{Path(sys.argv[0]).name}: "), err
