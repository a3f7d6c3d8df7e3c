"""The tasks as a table, and their files.

A file has the course's format: tab-separated with a header; fields that hold a tab or a quote are
quoted, and a quote inside is doubled. Columns are found by name, so their order and further columns
do not matter. Nothing is dropped silently: the malformed rows of a file with labels are counted and
shown, and more than 1 % of them stops the run. Of a file without labels no row is dropped, since
the predictions must have every id: an empty text is predicted as it is, and reported.

    python data/tasks.py FILE [TASK]        what a file holds: rows, labels, lengths in tokens
"""
import argparse
import csv
import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as `python data/tasks.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download import fetch_encoder  # noqa: E402
from data.tokenizer import fitting_tokenizer, load_tokenizer, tokenize  # noqa: E402
from support.files import InputError  # noqa: E402

DATA = Path(__file__).resolve().parent
csv.field_size_limit(2 ** 31 - 1)  # a long field is data; it is truncated as tokens, later


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of the table. `kind` determines outputs, loss and metric."""
    name: str
    stem: str  # of its files: stem-train.csv, stem-dev.csv, stem-test-student.csv
    text_columns: tuple
    label_column: str
    # classification: cross entropy, accuracy. binary: one logit, accuracy. regression: squared
    # error, Pearson
    kind: str
    max_label: int | None  # labels are 0..max_label; None: read from the file
    header: str  # of the course's submission file
    label_names: tuple = ()  # of a classification, for people; () where they have numbers alone

    @property
    def class_names(self):
        return self.label_names or tuple(str(i) for i in range(self.max_label + 1))

    @property
    def is_pair(self):
        return len(self.text_columns) == 2

    @property
    def num_outputs(self):
        return self.max_label + 1 if self.kind == "classification" else 1

    def filename(self, split):
        return f"{self.stem}-{'test-student' if split == 'test' else split}.csv"


PAIR = ("sentence1", "sentence2")
TASKS = {task.name: task for task in (
    Task("sst", "ids-sst", ("sentence",), "sentiment", "classification", 4, "Predicted_Sentiment",
         ("very negative", "negative", "neutral", "positive", "very positive")),
    Task("para", "quora", PAIR, "is_duplicate", "binary", 1, "Predicted_Is_Paraphrase"),
    Task("sts", "sts", PAIR, "similarity", "regression", 5, "Predicted_Similiary"),  # the course's
    Task("cfimdb", "ids-cfimdb", ("sentence",), "sentiment", "classification", 1,
         "Predicted_Sentiment", ("negative", "positive")),
)}
MAX_CLASSES = 1000  # of an auxiliary task


def auxiliary(name):
    """A task that only helps the others: one sentence, classes 0, 1, ...; a file like sst's."""
    return Task(name, name, ("sentence",), "sentiment", "classification", None, "")


@dataclasses.dataclass
class Examples:
    """The examples of one file."""
    task: Task
    path: Path
    ids: list
    texts: list  # of tuples, one string per text column
    labels: np.ndarray | None  # (N,) float32; None for a test file
    malformed: list  # "line 12: ..." of every row that was left out
    # filled by `tokenize`: per example one sequence, or two for a pair encoded separately; each is
    # (ids, length of its first segment)
    tokens: list | None = None
    # filled by evaluation.encode_once: (N, sequences per example, H), from a frozen encoder
    pooled: Any = None

    def __len__(self):
        return len(self.ids)

    def take(self, indices):
        """Only those examples, in that order."""
        ids, texts, tokens = ([column[i] for i in indices]
                              for column in (self.ids, self.texts, self.tokens))
        return dataclasses.replace(self, ids=ids, texts=texts, tokens=tokens,
                                   labels=self.labels[indices])


# ---------------------------------------------------------------- reading a file

def read_rows(path):
    """(line where it starts, fields) of every row, the header first.

    A blank line is no row. Raises InputError: no such file, not UTF-8, an open quote.
    """
    line, lines_with_nul = 1, set()

    def without_nul(file):
        # csv takes NUL bytes only from Python 3.11 on, so U+FFFD stands in while it reads
        for number, text in enumerate(file, start=1):
            if "\0" in text:
                lines_with_nul.add(number)
            yield text.replace("\0", "\ufffd")

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(without_nul(file), delimiter="\t", strict=True)
            for fields in reader:
                if reader.line_num > line and any("\t" in field for field in fields):
                    raise InputError(f"{path}: the quote opened in line {line} runs over several "
                                     "rows; close it or double it")
                if not lines_with_nul.isdisjoint(range(line, reader.line_num + 1)):
                    fields = [field.replace("\ufffd", "\0") for field in fields]
                if fields or line == 1:
                    yield line, fields
                line = reader.line_num + 1
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        # the reader decodes in blocks, so its own error says where in a block, not in the file
        found = first_bad_byte(path.read_bytes())
        raise InputError(f"{path}: {found}; save the file as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}: the row that starts in line {line} is not tab-separated text as "
                         f"the csv format has it ({error}); is a quote left open, or not doubled?"
                         ) from None
    if line == 1:
        raise InputError(f"{path}: the file is empty")


def read_examples(path, task, labelled=True, skip_malformed=False):
    """Read one file of `task`. Raises InputError: no such file or column, an open quote, no row, or

    with labels     more than 1 % of the rows malformed (unless skip_malformed); they are left out
    without labels  a row of unknown fields or without id; all others are kept, to predict every id
    """
    path = Path(path)
    rows = read_rows(path)
    _, header = next(rows)
    check_header(path, header, task, labelled)

    # with labels a flawed row is left out; without labels it is kept, if it has an id
    ids, texts, labels, shown = [], [], [], []
    for line, fields in rows:
        row = dict(zip(header, fields))
        unassigned = field_error(row, fields, header, labelled)
        if unassigned and not labelled:
            raise InputError(f"{path}: line {line}: {unassigned}; every id of a file without "
                             "labels gets a prediction, so fix this row")

        reason = unassigned or text_error(row, fields, header, task)
        if labelled and not reason:
            reason = label_error(row, task)
        if reason:
            shown.append(f"line {line}: {reason}")
        if reason and labelled:
            continue

        ids.append(row["id"].strip())
        texts.append(tuple(row[column].strip() for column in task.text_columns))
        labels.append(float(row[task.label_column].strip()) if labelled else 0.0)

    malformed = shown if labelled else []
    report_rows(path, len(ids) + len(malformed), shown, labelled, skip_malformed)
    if not ids:
        raise InputError(f"{path}: no rows")
    if task.max_label is None:
        task = dataclasses.replace(task, max_label=int(max(labels)))
    labels = np.array(labels, dtype=np.float32) if labelled else None
    return Examples(task, path, ids, texts, labels, malformed)


def check_header(path, header, task, labelled):
    """Raises InputError for a column that is not there, or a name that two columns have."""
    wanted = ["id", *task.text_columns] + ([task.label_column] if labelled else [])
    for name in wanted:
        if name not in header:
            found = ", ".join(filter(None, header))
            raise InputError(f"{path}: no column {name!r} in its header ({found}); "
                             f"task {task.name} reads the columns {', '.join(wanted)}")
    for name in filter(None, header):  # columns of row numbers have no name
        if header.count(name) > 1:
            raise InputError(f"{path}: {header.count(name)} columns of its header are named "
                             f"{name!r}; rename or remove all but one")


def report_rows(path, total, shown, labelled, skip_malformed):
    """Print which rows were left out or, without labels, kept with a flaw.

    Raises InputError where too many would be left out.
    """
    if not shown:
        return
    reasons = "; ".join(shown[:3]) + ("; ..." if len(shown) > 3 else "")
    if not labelled:
        print(f"{path}: {len(shown)} of {total} rows are predicted as they are: {reasons}")
        return
    if len(shown) > 0.01 * total and not skip_malformed:
        raise InputError(f"{path}: {len(shown)} of {total} rows are malformed: {reasons}; "
                         "fix them, or leave them out with --skip_malformed")
    print(f"{path}: left out {len(shown)} malformed of {total} rows: {reasons}")


def field_error(row, fields, header, labelled):
    """Why the fields cannot be matched to the columns, or that the row has no id; or None."""
    # without labels no row is dropped for tabs at its end, which leave no doubt
    surplus = fields[len(header):]
    if len(fields) < len(header) or (surplus and (labelled or any(surplus))):
        return f"{len(fields)} fields where the header has {len(header)}"
    return None if row["id"].strip() else "id is empty"


def text_error(row, fields, header, task):
    """What is wrong with the id or text of a row whose fields are known, or None."""
    for column in ("id", *task.text_columns):
        if not row[column].strip():
            return f"{column} is empty"
        if "\0" in row[column]:  # which the tokenizer drops
            return f"{column} holds a NUL byte"
    return "more tabs at its end" if len(fields) > len(header) else None


def label_error(row, task):
    """What is wrong with the label of a row, or None."""
    text = row[task.label_column].strip()
    try:
        label = float(text)
    except ValueError:
        return f"{task.label_column} {text[:20]!r} is no number"
    max_label = MAX_CLASSES - 1 if task.max_label is None else task.max_label
    if not 0 <= label <= max_label:  # also catches nan
        return f"{task.label_column} {text} is outside 0..{max_label}"
    if task.kind != "regression" and label != int(label):
        return f"{task.label_column} {text} is not a class 0..{max_label}"
    return None


def has_labels(path, task):
    """Whether a file has labels: by its name, where that is a course file's, else by its header."""
    for known in TASKS.values():
        for split in ("train", "dev", "test"):
            if path.name == known.filename(split):
                return split != "test"
    _, header = next(read_rows(path))
    return task.label_column in header


def first_bad_byte(raw):
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return f"line {line}: byte {raw[error.start]:#04x} is not UTF-8"


# ---------------------------------------------------------------- the data of a run

def task_names(text, flag="--tasks"):
    """"sst,para" as a list. Raises InputError for an unknown task, or one named twice."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise InputError(f"argument {flag}: unknown task {name!r}; the tasks are "
                             f"{', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise InputError(f"argument {flag}: a task is named twice")
    return names


def find_data_files(args, splits=("train", "dev", "test")):
    """{task: {split: path}} of a run's flags; test only where there is such a file. Raises
    InputError for a missing file.

    args: tasks, data_dir, and where the script has such flags score_also (tasks), aux ({name:
    file}) and TASK_SPLIT (a path or None).
    """
    names, aux = [*args.tasks, *getattr(args, "score_also", ())], getattr(args, "aux", {})
    given = {(task, split): getattr(args, f"{task}_{split}", None)
             for task in TASKS if task in names for split in splits}
    folder = args.data_dir or default_folder(given)

    # a file that was named, or the one with the course's name; only a test file may be missing
    paths = {task: {} for task in names}
    for (task, split), path in given.items():
        default = folder / TASKS[task].filename(split)
        if path is None and split == "test" and not default.exists():
            print(f"{default}: no such file, so no predictions for {task} test")
            continue
        paths[task][split] = path or default
        if not paths[task][split].is_file():
            flag = f"{task}_{split}"
            single = f", or it with --{flag} FILE" if hasattr(args, flag) else ""
            raise InputError(f"{paths[task][split]}: no such file; give the folder that has it "
                             f"with --data_dir{single}")
    for name, path in aux.items():
        paths[name] = {"train": Path(path)}
        if not Path(path).is_file():
            raise InputError(f"argument --aux: {path}: no such file")
    return paths


def default_folder(given):
    """data/ where all files are there that are needed and not given, else data/demo/, which is
    reported. given: {(task, split): path or None}"""
    needed = [DATA / TASKS[task].filename(split) for (task, split), path in given.items()
              if path is None and split != "test"]
    missing = [path.name for path in needed if not path.exists()]
    if not missing:
        return DATA
    folder = DATA / "demo"
    more = f" and {len(missing) - 1} more files are" if len(missing) > 1 else " is"
    print(f"*** {missing[0]}{more} not in {os.path.relpath(DATA)}: this run uses the demo sets in "
          f"{os.path.relpath(folder)},\n*** which are too small for meaningful scores. "
          "For the real sets: python data/download.py", flush=True)
    return folder


def load_data(paths, encoder_folder, config, cross, skip_malformed):
    """{task: {split: tokenized Examples}}. Raises InputError.

    paths: {task: {split: path}}; a task that is not in the table is an auxiliary one. cross: the
    pair tasks to cross-encode.
    """
    tokenizer = fitting_tokenizer(encoder_folder, config, pairs=bool(cross))
    data = {}
    for name, splits in paths.items():
        task, data[name] = TASKS.get(name) or auxiliary(name), {}
        for split, path in splits.items():
            examples = read_examples(path, task, split != "test", skip_malformed)
            data[name][split] = tokenize(examples, tokenizer, config.max_position_embeddings,
                                         name in cross)
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in data[name].items())
        print(f"{name}: {sizes} examples")
    return data


def data_digest(data):
    """A fingerprint of tokens and labels of {task: {split: Examples}}, which a resumed run must
    find unchanged."""
    total = hashlib.blake2b(digest_size=16)
    for task, splits in data.items():
        for split, examples in splits.items():
            total.update(f"{task} {split} {len(examples)}".encode())
            for sequences in examples.tokens:
                for ids, _ in sequences:
                    total.update(ids.tobytes())
            if examples.labels is not None:
                total.update(examples.labels.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a file of a task holds.")
    parser.add_argument("file", type=Path)
    parser.add_argument("task", choices=list(TASKS), nargs="?",
                        help="default: the one whose files have such a name")
    options = parser.parse_args()
    named = [name for name, task in TASKS.items() if options.file.name.startswith(task.stem)]
    if not options.task and not named:
        parser.error(f"{options.file}: name its task too, as in: python data/tasks.py FILE sst")
    try:
        task = TASKS[options.task or named[0]]
        labelled = has_labels(options.file, task)
        examples = read_examples(options.file, task, labelled, skip_malformed=True)
        tokenize(examples, load_tokenizer(fetch_encoder()), 512, cross=True)
    except InputError as error:
        parser.error(str(error))

    lengths = np.array([len(ids) for sequences in examples.tokens for ids, _ in sequences])
    print(f"{examples.path}: {len(examples)} rows of task {examples.task.name}, "
          f"{len(examples.malformed)} malformed; tokens per sequence: median "
          f"{np.median(lengths):.0f}, longest {lengths.max()}")
    if examples.labels is not None:
        values, counts = np.unique(examples.labels.round(), return_counts=True)
        print("labels:", dict(zip(values.tolist(), counts.tolist())))
