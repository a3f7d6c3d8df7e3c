"""The tasks as a table, their files read strictly, their sentences tokenised once.

A file is the course's format: tab-separated with a header, fields that hold a tab or a quote are quoted, a quote inside
is doubled. Columns are found by name, so their order and further columns do not matter. Nothing is
dropped in silence: malformed rows of a file with labels are counted and shown, and more than 1 % of
them stops the run. Of a file without labels no row is dropped, since the predictions must have
every id: an empty text is predicted as it is, and shown.

    python data/tasks.py FILE [TASK]        what a file holds: rows, labels, malformed rows, lengths in tokens
"""
import argparse
import csv
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import BertWordPieceTokenizer
from tokenizers.models import WordPiece

if not __package__:  # run as `python data/tasks.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download import InputError, fetch_encoder, read_json  # noqa: E402


DATA = Path(__file__).resolve().parent
csv.field_size_limit(2 ** 31 - 1)  # a long field is data, and cut to the encoder's positions later


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the table. `kind` fixes outputs, loss and metric; the labels lie in 0..top (None: as the file has it)."""
    name: str
    stem: str  # the files are stem-train.csv, stem-dev.csv and stem-test-student.csv
    text_columns: tuple
    label_column: str
    kind: str  # "classes": cross entropy, accuracy; "binary": one logit, accuracy; "similarity": squared error, Pearson
    top: int | None
    heading: str  # of the course's submission file

    @property
    def is_pair(self):
        return len(self.text_columns) == 2

    @property
    def num_outputs(self):
        return self.top + 1 if self.kind == "classes" else 1

    def filename(self, split):
        return f"{self.stem}-test-student.csv" if split == "test" else f"{self.stem}-{split}.csv"


PAIR = ("sentence1", "sentence2")
TASKS = {task.name: task for task in (
    Task("sst", "ids-sst", ("sentence",), "sentiment", "classes", 4, "Predicted_Sentiment"),
    Task("para", "quora", PAIR, "is_duplicate", "binary", 1, "Predicted_Is_Paraphrase"),
    Task("sts", "sts", PAIR, "similarity", "similarity", 5, "Predicted_Similiary"),  # spelt as the course spells it
    Task("cfimdb", "ids-cfimdb", ("sentence",), "sentiment", "classes", 1, "Predicted_Sentiment"),
)}
MOST_CLASSES = 1000  # of an auxiliary task


def auxiliary(name):
    """A task that is there to help the others: one sentence, classes 0, 1, ...; a file like sst's."""
    return Task(name, name, ("sentence",), "sentiment", "classes", None, "")


@dataclasses.dataclass
class Examples:
    """The rows of one file. `tokens` is filled by `tokenize`: a list of sequences a row, one or (bi-encoded pair) two,
    each (ids, length of its first segment)."""
    task: Task
    path: Path
    ids: list
    texts: list  # of tuples, one string a text column
    labels: np.ndarray | None  # (N,) float32; None for a test file
    malformed: list  # "line 12: ..." of every row that was left out
    tokens: list | None = None
    pooled: Any = None  # (N, sequences a row, H), what a frozen encoder makes of them; filled by evaluation.encode_once

    def __len__(self):
        return len(self.ids)

    def take(self, rows):  # those rows alone, in that order
        ids, texts, tokens = ([column[row] for row in rows] for column in (self.ids, self.texts, self.tokens))
        return dataclasses.replace(self, ids=ids, texts=texts, labels=self.labels[rows], tokens=tokens)


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
        labels.append(float(row[task.label_column]) if labelled else 0.0)

    malformed = shown if labelled else []
    report_rows(path, len(ids) + len(malformed), shown, labelled, skip_malformed)
    if not ids:
        raise InputError(f"{path}: no rows")
    if task.top is None:
        task = dataclasses.replace(task, top=int(max(labels)))
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
                         "mend them, or leave them out with --skip_malformed")
    print(f"{path}: left out {len(shown)} malformed of {total} rows: {reasons}")


def field_error(row, fields, header, labelled):
    """Why it is not known which field is which, or the row has no id; or None."""
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
    top = MOST_CLASSES - 1 if task.top is None else task.top
    if not 0 <= label <= top:  # also catches nan
        return f"{task.label_column} {text} is outside 0..{top}"
    if task.kind != "similarity" and label != int(label):
        return f"{task.label_column} {text} is not a class 0..{top}"
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


# What a folder may set, by its name in tokenizer_config.json: the name in the normalizer of
# tokenizer.json, and the values. strip_accents null: accents are stripped where text is lowercased.
SETTINGS = {"do_lower_case": ("lowercase", (True, False)),
            "strip_accents": ("strip_accents", (True, False, None)),
            "tokenize_chinese_chars": ("handle_chinese_chars", (True, False))}
# What the two files may state but not choose: the values that mean what is done here.
FIXED = {"tokenizer_class": ("BertTokenizer", "BertTokenizerFast", "TokenizersBackend",
                             "PreTrainedTokenizerFast", None),
         "do_basic_tokenize": (True,), "never_split": (None, []), "clean_text": (True,),
         "split_special_tokens": (False,), "wordpieces_prefix": ("##",), "unk_token": ("[UNK]",),
         "cls_token": ("[CLS]",), "sep_token": ("[SEP]",), "mask_token": ("[MASK]", None)}
FIXED_PARTS = {  # of tokenizer.json
    "model": {"type": ("WordPiece",), "unk_token": ("[UNK]",), "continuing_subword_prefix": ("##",),
              "max_input_chars_per_word": (100,)},
    "normalizer": {"type": ("BertNormalizer",), "clean_text": (True,)},
    "pre_tokenizer": {"type": ("BertPreTokenizer",)}}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(folder):
    """BERT's word pieces, of the vocabulary and the settings that stand in a folder. Raises
    InputError where they cannot be read, or ask for what BERT's word pieces are not.

    Ids equal those of transformers.BertTokenizer (version 5), which like this one is the tokenizers
    library. It differs from what was published in four ways. Two hold here as well, of BERT's first
    tokenizer in Python: where accents are kept, letters and accents that come apart are not
    composed (NFC), and a capital sigma that ends a word becomes the sigma of the middle. Two do
    not: it passes over the normalizer of tokenizer.json and takes its defaults for what
    tokenizer_config.json does not set, where this function follows the normalizer; and it passes
    over do_basic_tokenize and never_split, which this function rejects.
    """
    path, vocabulary = read_vocabulary(folder)
    for token in ("[CLS]", "[SEP]", "[UNK]"):
        if token not in vocabulary:
            raise InputError(f"{path}: no {token} in the vocabulary; is it BERT's?")
    settings = read_settings(folder)
    if "do_lower_case" not in settings:
        cased = [token for token in vocabulary if token.isalpha() and token != token.lower()]
        if cased:
            print(f"{path}: has words with capitals ({', '.join(cased[:3])}), but do_lower_case is "
                  "not set, so that text is lowercased; for a cased encoder put "
                  '{"do_lower_case": false} into tokenizer_config.json')
    return BertWordPieceTokenizer(vocabulary, lowercase=settings.get("do_lower_case", True),
                                  strip_accents=settings.get("strip_accents"),
                                  handle_chinese_chars=settings.get("tokenize_chinese_chars", True))


def read_vocabulary(folder):
    """(the file, {token: id}) of a folder's vocab.txt, or of its tokenizer.json where there is no
    vocab.txt. Raises InputError."""
    path = Path(folder) / "vocab.txt"
    if path.exists():
        try:
            path.read_text(encoding="utf-8")  # the library's own errors do not tell what is wrong
            return path, WordPiece.read_file(str(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__})") from None
    path = path.with_name("tokenizer.json")
    if not path.exists():
        raise InputError(f"{folder}: neither vocab.txt nor tokenizer.json is there")
    vocabulary = read_tokenizer_json(path)["model"].get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if not all(type(i) is int and 0 <= i < 2 ** 31 for i in ids) or len(set(ids)) < len(ids):
        raise InputError(f"{path}: its model's vocab is not word pieces with an id each, 0, 1, ...")
    return path, vocabulary


def read_tokenizer_json(path):
    """The object in a tokenizer.json. Its padding, truncation and [CLS] ... [SEP] are passed over,
    since `tokenize` has its own. Raises InputError where the rest is not BERT's."""
    fields = read_json(path)
    for part, fixed in FIXED_PARTS.items():
        if not isinstance(fields.get(part), dict):
            raise InputError(f"{path}: no {part} in it; is it BERT's?")
        check_fixed(f"{path}: {part}: ", fields[part], fixed)
    check_added(path, fields.get("added_tokens"))
    return fields


def read_settings(folder):
    """{name of SETTINGS: value} of what a folder sets, in tokenizer_config.json, which transformers
    follows, or else in the normalizer of tokenizer.json. Raises InputError."""
    config_path, json_path = Path(folder) / "tokenizer_config.json", Path(folder) / "tokenizer.json"
    config = read_json(config_path) if config_path.exists() else {}
    normalizer = read_tokenizer_json(json_path)["normalizer"] if json_path.exists() else {}
    check_fixed(f"{config_path}: ", config, FIXED)
    check_added(config_path, config.get("added_tokens_decoder"))
    settings = {}
    for name, (in_normalizer, values) in SETTINGS.items():
        for path, key, fields in ((config_path, name, config),
                                  (json_path, in_normalizer, normalizer)):
            if key not in fields:
                continue
            value = fields[key]
            if not any(value is allowed for allowed in values):  # 1 == True, but is no setting
                raise InputError(f"{path}: {key} is {json.dumps(value)}, and can be "
                                 f"{' or '.join(map(json.dumps, values))} only")
            if settings.setdefault(name, value) is not value:
                print(f"{path}: {key} is {json.dumps(value)}, and {name} in {config_path.name} is "
                      f"{json.dumps(settings[name])}; the latter is used")
    return settings


def check_fixed(where, fields, fixed):
    """Raises InputError for a setting that has another value than those that are done here."""
    for name, values in fixed.items():
        value = fields.get(name, values[0])
        if isinstance(value, dict):  # a token with its flags
            value = value.get("content")
        if value not in values:
            raise InputError(f"{where}{name} is {json.dumps(value)}, and this tokenizer has "
                             f"{json.dumps(values[0])} only")


def check_added(path, added):
    """Raises InputError for tokens that are cut out of a text before it is split into words. added:
    {id: token}, or a list of tokens."""
    added = list(added.values()) if isinstance(added, dict) else added or []
    contents = [token.get("content") if isinstance(token, dict) else token
                for token in (added if isinstance(added, list) else [added])]
    other = [token for token in contents if token not in SPECIAL]
    if other:
        raise InputError(f"{path}: adds {json.dumps(other[0], ensure_ascii=False)} to the word "
                         f"pieces, and this tokenizer knows {', '.join(SPECIAL)} only")


def fitting_tokenizer(folder, config, pairs):
    """load_tokenizer for an encoder. Raises InputError where the encoder is too small for the
    vocabulary or the task. config: its BertConfig. pairs: two sentences may be one sequence."""
    tokenizer = load_tokenizer(folder)
    most, least = max(tokenizer.get_vocab().values()) + 1, 5 if pairs else 3
    if most > config.vocab_size:
        raise InputError(f"{folder}: the encoder has {config.vocab_size} word embeddings "
                         f"(vocab_size), too few for its vocabulary of {most}")
    if pairs and config.type_vocab_size < 2:
        raise InputError(f"{folder}: the encoder has one token type (type_vocab_size), and a pair "
                         "that is read as one sequence has two")
    if config.max_position_embeddings < least:
        raise InputError(f"{folder}: the encoder has {config.max_position_embeddings} positions "
                         f"(max_position_embeddings), too few for "
                         f"{'[CLS] a [SEP] b [SEP]' if pairs else '[CLS] a [SEP]'}")
    return tokenizer


def tokenize(examples, tokenizer, max_length, cross):
    """Fill examples.tokens: [CLS] a [SEP] a text, or [CLS] a [SEP] b [SEP] for a pair if `cross`.

    What is longer than max_length tokens is cut (of a cross-encoded pair the longer side first), counted, and said.
    """
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    columns = [tokenizer.encode_batch(list(column), add_special_tokens=False) for column in zip(*examples.texts)]
    cut, examples.tokens = 0, []
    for encodings in zip(*columns):
        pieces = [encoding.ids for encoding in encodings]
        joined = [pieces] if cross else [[piece] for piece in pieces]  # the texts of each sequence
        cut += any(sum(map(len, texts)) + len(texts) + 1 > max_length for texts in joined)
        examples.tokens.append([join(texts, cls, sep, max_length) for texts in joined])
    if cut:
        print(f"{examples.path}: cut {cut} of {len(examples)} rows to {max_length} tokens")
    return examples


def join(texts, cls, sep, max_length):
    """([CLS] a [SEP] b [SEP] as int64, length of [CLS] a [SEP]), cut to max_length."""
    room = max_length - len(texts) - 1
    if len(texts) == 2:
        a, b = map(len, texts)
        keep_a = max(room - b, min(a, (room + 1) // 2))  # cut the longer side, then both alike
        texts = [texts[0][:keep_a], texts[1][:room - min(a, keep_a)]]
    else:
        texts = [texts[0][:room]]
    first = [cls, *texts[0], sep]
    return np.array(first + [i for text in texts[1:] for i in (*text, sep)], dtype=np.int64), len(first)


def task_names(text, flag="--tasks"):
    """"sst,para" as a list. Raises InputError for what the table has not, or a task named twice."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise InputError(f"argument {flag}: unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise InputError(f"argument {flag}: a task is named twice")
    return names


def locate(args, splits=("train", "dev", "test")):
    """{task: {split: path}} of a run's flags; test only where there is one. Raises InputError for a missing file.

    args: tasks, data_dir, and where the script has such flags score_also (tasks), aux ({name: file}) and TASK_SPLIT (a
    path or None).
    """
    names, aux = [*args.tasks, *getattr(args, "score_also", ())], getattr(args, "aux", {})
    given = {(task, split): getattr(args, f"{task}_{split}", None) for task in TASKS for split in splits}
    for (task, split), path in given.items():
        if path is not None and task not in names:
            raise InputError(f"--{task}_{split}: {task} is not among --tasks {','.join(args.tasks)}")
    given = {key: path for key, path in given.items() if key[0] in names}
    folder = args.data_dir or DATA
    needed = [DATA / TASKS[task].filename(split) for (task, split), path in given.items() if not path and split != "test"]
    if args.data_dir is None and not all(path.exists() for path in needed):
        folder = DATA / "demo"
        print(f"*** The real sets are not in {os.path.relpath(DATA)}: this run uses the small demo sets in "
              f"{os.path.relpath(folder)}, and its scores are\n*** no results. For the real ones: python data/download.py",
              flush=True)
    paths = {task: {} for task in names} | {name: {"train": Path(path)} for name, path in aux.items()}
    for (task, split), path in given.items():
        default = folder / TASKS[task].filename(split)
        if path is None and split == "test" and not default.exists():
            print(f"{default}: no such file, so no predictions for {task} test")
            continue
        paths[task][split] = path or default
        if not paths[task][split].is_file():
            raise InputError(f"{paths[task][split]}: no such file; give --data_dir, or --{task}_{split} FILE")
    for name, path in aux.items():
        if not Path(path).is_file():
            raise InputError(f"argument --aux: {path}: no such file")
    return paths


def load_data(paths, encoder_folder, config, cross, skip_malformed):
    """{task: {split: tokenised Examples}}. paths: {task: {split: path}}; a task that is not in the table is an auxiliary
    one. cross: the pair tasks to cross-encode. Raises InputError."""
    tokenizer = fitting_tokenizer(encoder_folder, config, pairs=bool(cross))
    data = {}
    for task, splits in paths.items():
        data[task] = {split: tokenize(read_examples(path, TASKS.get(task) or auxiliary(task), split != "test",
                                                    skip_malformed),
                                      tokenizer, config.max_position_embeddings, task in cross)
                      for split, path in splits.items()}
        print(f"{task}: " + ", ".join(f"{len(examples)} {split}" for split, examples in data[task].items()) + " rows")
    return data


def data_digest(data):
    """A fingerprint of tokens and labels of {task: {split: Examples}}: of what a run that goes on must find again."""
    total = hashlib.blake2b(digest_size=16)
    for task, splits in data.items():
        for split, examples in splits.items():
            total.update(f"{task} {split} {len(examples)}".encode())
            for row in examples.tokens:
                for ids, _ in row:
                    total.update(ids.tobytes())
            if examples.labels is not None:
                total.update(examples.labels.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a file of a task holds.")
    parser.add_argument("file", type=Path)
    parser.add_argument("task", choices=list(TASKS), nargs="?", help="default: the one whose files are named so")
    options = parser.parse_args()
    named = [name for name, task in TASKS.items() if options.file.name.startswith(task.stem)]
    if not options.task and not named:
        parser.error(f"which task is {options.file.name} of?")
    try:
        task = TASKS[options.task or named[0]]
        labelled = has_labels(options.file, task)
        examples = read_examples(options.file, task, labelled, skip_malformed=True)
        tokenize(examples, load_tokenizer(fetch_encoder()), 512, cross=True)
    except InputError as error:
        parser.error(str(error))
    lengths = np.array([len(ids) for row in examples.tokens for ids, _ in row])
    print(f"{examples.path}: {len(examples)} rows of task {examples.task.name}, {len(examples.malformed)} malformed; "
          f"tokens a sequence: median {np.median(lengths):.0f}, longest {lengths.max()}")
    if examples.labels is not None:
        print("labels:", dict(zip(*(x.tolist() for x in np.unique(examples.labels.round(), return_counts=True)))))
