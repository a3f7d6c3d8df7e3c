"""Bad input ends with status 2 and one line that says what is wrong: flags, files, folders, the
environment. One table of cases per topic."""
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import multitask_classifier
import pretrain_mlm
from data.download import cache_folder
from data.tasks import TASKS
from support import flags, predict
from tests.helpers import copy_of_tiny, quietly, run, workspace, write_file


def check_rejected(*cases):
    """Each case is (part, flag, ...): a run with these flags ends with status 2 and one line, the
    last, which names the program and holds `part`."""
    program = f"{Path(sys.argv[0]).name}: "
    for part, *words in cases:
        status, printed, _ = run(*words)
        assert status == 2 and "Traceback" not in printed, (words, status, printed)
        last = printed.splitlines()[-1]
        assert last.startswith(program) and part in last, (words, printed)
        assert printed.count(program) == 1, (words, printed)


# ---------------------------------------------------------------- flags

def test_bad_tasks_are_rejected():
    root = workspace()
    check_rejected(
        ("unknown task 'imdb'", "--tasks", "sst,imdb"),
        ("named twice", "--tasks", "sst,sst"),
        ("sst is among --tasks", "--score_also", "sst"),
        ("argument --score_also: unknown task 'yelp'", "--score_also", "yelp"),
        ("is not NAME=FILE", "--aux", "stars"),
        ("is not NAME=FILE", "--aux", "stars="),
        ("is not NAME=FILE", "--aux", "=x.csv"),
        ("one of stars is given twice", "--aux", "stars=x.csv", "--aux", "stars=y.csv"),
        ("'sst' is a task already", "--aux", "sst=x.csv"),
        ("'a-b' is not a plain name", "--aux", "a-b=x.csv"),
        ("'train' is not a plain name", "--aux", "train=x.csv"),
        ("gone.csv: no such file", "--aux", f"stars={root}/gone.csv"),
        ("gone.csv: no such file", "--aux", f"a={root}/gone.csv,b={root}/gone.csv"),
        ("no column 'sentence'", "--aux", f"stars={root / 'data' / 'sts-train.csv'}"),
        ("para=0: not a fraction above 0 and up to 1", "--limit", "para=0"),
        ("not a fraction above 0 and up to 1", "--limit", "1.5"),
        ("not a fraction above 0 and up to 1 of one of sst, para, sts", "--limit", "yelp=.5"))


def test_bad_numbers_are_rejected():
    check_rejected(
        ("argument --lr", "--lr", "-1"),
        ("argument --lr", "--lr", "nan"),
        ("argument --hidden_dropout_prob", "--hidden_dropout_prob", "1"),
        ("argument --epochs", "--epochs", "0"),
        ("argument --seed", "--seed", str(2 ** 70)),
        ("argument --save_every", "--save_every", "-1"),
        ("argument --batch_size", "--batch_size", "0"),
        ("argument --batch_size", "--batch_size", "sst=2,para=x,sts=2"),
        ("is not one more NAME=value", "--batch_size", "sst=2,sst=3,para=2,sts=2"),
        ("'yelp' is none of the tasks", "--batch_size", "sst=2,yelp=3"),
        ("unrecognized arguments: --nonsense", "--nonsense"),
        ("invalid choice: 'freeze'", "--option", "freeze"))


def test_a_bad_schedule_is_rejected():
    not_steps = "not longest, shortest or a number"
    check_rejected(
        ("invalid choice: 'alternating'", "--schedule", "alternating"),
        (not_steps, "--epoch_length", "long"),
        (not_steps, "--epoch_length", "0"),
        (not_steps, "--epoch_length", "\u00b2"),  # a digit for str.isdigit, but not for int
        (not_steps, "--schedule", "annealed", "--epoch_length", str(10 ** 12)),
        ("left without a step", "--schedule", "sequential", "--epoch_length", "2"),
        ("--upsample without --schedule mtdnn", "--upsample"),
        ("needs steps of one task", "--optimizer_per_task"),
        ("needs steps of one task", "--optimizer_per_task", "--schedule", "mtdnn",
         "--accumulate", "2"))


def test_bad_heads_are_rejected():
    check_rejected(
        ("unknown head 'concat'", "--pair_head", "concat"),
        ("'sst' is none of the tasks it applies to here (para, sts)", "--pair_head",
         "sst=uv,para=uv,sts=uv"),
        ("no value for sts", "--pair_head", "para=uv"),
        ("no pair task", "--tasks", "sst", "--pair_head", "uv"),
        ("sst is not among --tasks", "--sst_loss", "oll1", "--tasks", "para,sts"),
        ("invalid choice: 'oll3'", "--sst_loss", "oll3"))
    # the course has no pairs with classes, but one may add some
    inference = dataclasses.replace(TASKS["para"], kind="classification", max_label=2)
    with mock.patch.dict(TASKS, para=inference):
        check_rejected(("cannot tell classes apart", "--pair_head", "para=cosine,sts=uv"))


def test_bad_surgery_is_rejected():
    once = "does not name each of sst, para, sts once"
    check_rejected(
        ("--pcgrad with one task", "--pcgrad", "--tasks", "sst"),
        ("--pcgrad with one group", "--pcgrad", "sst+para+sts"),
        (once, "--gradvac", "sst,para"),
        (once, "--pcgrad", ""),
        ("one or the other", "--pcgrad", "--gradvac"),
        ("there is no surgery", "--surgery_scope", "tensor"),
        ("--log_gradients with --option pretrain", "--log_gradients", "--option", "pretrain"),
        ("batches follow each other", "--pcgrad", "--schedule", "sequential", "--accumulate", "4"),
        ("a step has one task", "--pcgrad", "--schedule", "mtdnn"))


def test_bad_settings_of_smart_proximal_and_pal_are_rejected():
    lost = "would be lost in rounding"
    check_rejected(
        ("unrecognized arguments: --smart_radius 1", "--smart", "--smart_radius", "1"),
        ("argument --smart_eps: 'small' is not a number", "--smart", "--smart_eps", "small"),
        ("argument --smart_weight: '-1' is not a number", "--smart", "--smart_weight", "-1"),
        ("argument --smart_steps: '0' is not a whole number", "--smart", "--smart_steps", "0"),
        ("the ascent could not start", "--smart", "--smart_sigma", "0"),
        ("argument --smart_norm: invalid choice: '1'", "--smart", "--smart_norm", "1"),
        ("argument --smart_tasks: 'yelp' is not among --tasks sst,para,sts", "--smart",
         "--smart_tasks", "sst,yelp"),
        ("argument --smart_tasks: '' is not among", "--smart", "--smart_tasks", "sst,"),
        ("argument --smart_tasks: '' is not among", "--smart", "--smart_tasks", ""),
        ("argument --smart_tasks: a task is named twice", "--smart", "--smart_tasks", "sst,sst"),
        (lost, "--smart", "--amp"),
        (lost, "--smart", "--smart_eps", "1", "--amp"),
        (lost, "--smart", "--smart_eps", ".009", "--smart_step_size", "1", "--amp"),
        ("argument --proximal_beta: '1' is not a number of at least 0 and below 1", "--proximal",
         "--proximal_beta", "1"),
        ("argument --proximal_mu: '-1' is not a number", "--proximal", "--proximal_mu", "-1"),
        ("argument --pal_g: invalid choice: 'relu'", "--pal", "--pal_g", "relu"),
        ("argument --pal_size: '0' is not a whole number", "--pal", "--pal_size", "0"),
        ("below 10000", "--pal", "--pal_size", "4000000000"),
        ("is no multiple of the encoder's 4 attention heads", "--pal", "--pal_size", "10"))


def test_a_setting_without_its_switch_is_rejected():
    # also a 0, and also the value that is the default anyway
    given = {"smart_weight": "0", "smart_eps": "1e-5", "smart_sigma": "1", "smart_step_size": "0",
             "smart_steps": "1", "smart_norm": "inf", "smart_tasks": "sst", "proximal_mu": "0",
             "proximal_beta": "0", "pal_size": "8", "pal_g": "attention"}
    assert given.keys() == {f"{switch}_{name}" for switch, settings in flags.SETTINGS.items()
                            for name in settings}, "each setting that there is"
    for name, value in given.items():
        switch = name.partition("_")[0]
        others = [f"--{other}" for other in flags.SETTINGS if other != switch]
        for more in ([], others):
            check_rejected((f"--{name} without --{switch}", f"--{name}", value, *more))

        # it is the switch that was missing
        args = flags.parse_flags(multitask_classifier.get_parser, flags.check_training_flags,
                                 [f"--{switch}", f"--{name}", value], "--name")
        assert getattr(args, name) is not None


# ---------------------------------------------------------------- files and folders

def test_bad_files_are_rejected():
    root = workspace()
    sst, para, sts = ("\tid\tsentence\tsentiment\n", "\tid\tsentence1\tsentence2\tis_duplicate\n",
                      "\tid\tsentence1\tsentence2\tsimilarity\n")
    for part, flag, text in (
            ("the file is empty", "--sst_train", ""),
            ("no rows", "--sst_train", sst),
            ("x.csv: 1 of 1 rows are malformed: line 2: sentiment 9", "--sst_train",
             f"{sst}0\tx\tgood\t9\n"),
            ("is not UTF-8", "--sst_train", bytes(range(256)) * 4),
            ("is not UTF-8", "--sst_train", sst.encode("utf-16")),
            ("no column 'id'", "--sst_train", "id,sentence,sentiment\nx,good,1\n"),
            ("x.csv: 1 of 1 rows are malformed: line 2: sentence holds a NUL byte", "--sst_train",
             f"{sst}0\tx\tgo\0od\t1\n"),
            ("sentence is empty", "--sst_train", f"{sst}0\tx\t   \t1\n"),
            ("is a quote left open", "--sst_train",
             f'{sst}0\tx\t"good\t1\n1\ty\tbad\t0\n'),
            ("is_duplicate 0.5 is not a class 0..1", "--para_dev", f"{para}0\tx\ta\tb\t0.5\n"),
            ("similarity 6 is outside 0..5", "--sts_dev", f"{sts}0\tx\ta\tb\t6\n")):
        check_rejected((part, flag, write_file("x.csv", text)))

    check_rejected(
        ("gone.csv: no such file", "--sst_test", root / "gone.csv"),
        ("no such file", "--sst_train", root),
        ("no column 'sentence1'", "--sts_train", root / "data" / "ids-sst-train.csv"),
        ("not a file in an existing folder", "--sst_dev_out", root),
        ("--para_dev_out: para is not among --tasks sst", "--tasks", "sst", "--para_dev_out",
         root / "a.csv"),
        ("is the file of other predictions too", "--sst_dev_out", root / "a.csv",
         "--sts_dev_out", root / "a.csv"),
        ("is a data file that the run reads", "--sst_dev_out", root / "data" / "ids-sst-dev.csv"),
        ("'text' is not a plain name", "--aux", f"text={root / 'data' / 'stars-train.csv'}"),
        ("not a file in an existing folder", "--sst_dev_out", root / "nowhere" / "a.csv"))


def test_a_missing_file_is_an_error_unless_it_is_a_test_file():
    root = workspace()
    data = shutil.copytree(root / "data", root / "data with files missing")
    (data / "sts-dev.csv").rename(data / "elsewhere")
    check_rejected(("sts-dev.csv: no such file", "--data_dir", data))

    # without a test file there is nothing to predict, which is printed
    (data / "elsewhere").rename(data / "sts-dev.csv")
    (data / "sts-test-student.csv").unlink()
    status, printed, folder = run("--data_dir", data)
    assert status == 0 and "so no predictions for sts test" in printed, printed
    assert (folder / "predictions" / "sts-dev-output.csv").exists()
    assert not (folder / "predictions" / "sts-test-output.csv").exists()


def with_config(**fields):
    """The tiny encoder's folder with other fields in its config.json; the weights stay."""
    folder = copy_of_tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def without(name):
    """The tiny encoder's folder without one of its files."""
    folder = copy_of_tiny()
    (folder / name).unlink()
    return folder


def test_bad_encoders_are_rejected():
    other_vocabulary, long_vocabulary, cut = copy_of_tiny(), copy_of_tiny(), copy_of_tiny()
    (other_vocabulary / "vocab.txt").write_text("<s>\n</s>\nhello\n")
    with open(long_vocabulary / "vocab.txt", "a") as file:
        file.write("".join(f"word{i}\n" for i in range(2000)))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])

    for part, folder in (
            ("no such folder", workspace() / "nowhere" / "at" / "all"),
            ("config.json: cannot be read", without("config.json")),
            ("model_type is 'gpt2'", with_config(model_type="gpt2")),
            ("hidden_size is 'many'", with_config(hidden_size="many")),
            ("hidden_dropout_prob is 1.0", with_config(hidden_dropout_prob=1.0)),
            ("is no multiple of num_attention_heads", with_config(num_attention_heads=5)),
            ("has shape (32,), config.json asks for (33,)", with_config(intermediate_size=33)),
            ("neither vocab.txt nor tokenizer.json", without("vocab.txt")),
            ("no [CLS] in the vocabulary", other_vocabulary),
            ("too few for its vocabulary of ", long_vocabulary),
            ("neither model.safetensors nor pytorch_model.bin", without("model.safetensors")),
            ("is damaged", cut)):
        check_rejected((part, "--model", folder))


def test_bad_run_folders_are_rejected():
    root = workspace()
    taken = run()[2]
    before = {path: path.stat().st_mtime_ns for path in taken.rglob("*")}
    check_rejected(
        ("argument --name: empty", "--name", ""),
        ("a run of this name exists", "--name", taken),
        ("tiny: exists already; choose another name", "--name", root / "tiny"),
        ("this folder cannot be made", "--name", root / "tiny" / "vocab.txt" / "x"),
        ("no run to resume", "--resume", root / "tiny"),
        ("--init_from runs/tpyo: no such folder", "--init_from", "runs/tpyo"),
        ("not a run of multitask_classifier.py", "--init_from", root / "tiny"),
        ("has another shape", "--init_from", taken, "--pair_head", "uv"))
    after = {path: path.stat().st_mtime_ns for path in taken.rglob("*")}
    assert after == before, "the run that was there is untouched"


def test_bad_input_leaves_no_run_folder():
    """The command can be given again, corrected, with the same --name."""
    for flags_now in (["--tasks", "imdb"], ["--sst_train", "gone.csv"], ["--model", "/nowhere"],
                      ["--pal", "--pal_size", "10"],
                      ["--schedule", "sequential", "--epoch_length", "2"]):
        status, printed, folder = run(*flags_now)
        assert status == 2 and not folder.exists(), (flags_now, printed)
        assert not list(folder.parent.glob(f"{folder.name}*")), flags_now


# ---------------------------------------------------------------- the environment

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1"}


def test_a_partly_set_environment_of_torchrun_is_rejected():
    root, (_, _, folder) = workspace(), run()
    common = "--model", root / "tiny", "--data_dir", root / "data"
    scripts = ((predict.main, (folder, "A quiet film.")), (multitask_classifier.main, common),
               (pretrain_mlm.main, (*common, "--out", root / "none")))

    cases = [(name, value) for name in TORCHRUN for value in (None, "")]
    cases += [(name, value) for name in TORCHRUN if name != "MASTER_ADDR"
              for value in ("two", "-1", "1.5", "9" * 5000)]
    for name, value in [*cases, ("WORLD_SIZE", "0"), ("RANK", "2"), ("MASTER_PORT", "65536")]:
        with mock.patch.dict(os.environ, TORCHRUN):
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
            for main, words in scripts:
                status, printed = quietly(main, *words)
                assert status == 2 and printed.count("\n") == 1, (name, value, printed)
                assert f"variable {name} is" in printed, (name, value, printed)

    # a single process needs no other variable
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "1"}):
        assert quietly(predict.main, folder, "A quiet film.")[0] == 0


def test_without_a_home_directory_the_cache_needs_a_name():
    root = workspace()
    # no HOME, and no entry in passwd
    with mock.patch.dict(os.environ), mock.patch("pwd.getpwuid", side_effect=KeyError):
        for name in ("HOME", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        for main, words in ((multitask_classifier.main, ("--data_dir", root / "data")),
                            (pretrain_mlm.main, ("--fill", "[MASK]"))):
            status, printed = quietly(main, *words)
            assert status == 2 and printed.count("\n") == 1, printed
            assert "XDG_CACHE_HOME" in printed, printed
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        assert cache_folder() == root / "cache" / "multitask-bert"
