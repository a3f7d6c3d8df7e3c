"""Query a trained model: what a run makes of sentences.

    python support/predict.py RUN "A quiet film."                          its sentiment
    python support/predict.py RUN "How old are you?" "What is your age?"   and of the pair:
                                        whether both mean the same, and how similar they are
    python support/predict.py RUN --input FILE                             per line; - for stdin

From Python: predict_sentences(MultitaskBERT.load(RUN), [("A quiet film.",), ("One", "another")]).
"""
import contextlib
import itertools
import json
import sys
from pathlib import Path

from scipy.special import expit, softmax

if not __package__:  # run as `python support/predict.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.tasks import Examples, first_bad_byte  # noqa: E402
from data.tokenizer import tokenize  # noqa: E402
from multitask_classifier import MultitaskBERT  # noqa: E402
from support.devices import get_device, process_environment  # noqa: E402
from support.evaluation import predict  # noqa: E402
from support.files import InputError  # noqa: E402
from support.flags import Parser, is_text  # noqa: E402
from support.run import exit_status  # noqa: E402


# ---------------------------------------------------------------- rows of sentences

def index_in_list(i):
    return f"rows[{i}]"


def check_rows(rows, where=index_in_list):
    """The rows as tuples of one or two strings, stripped. where(i) names row i in a message.

    Raises InputError where `rows` is not a list of tuples (or lists) of one or two strings of text.
    """
    try:
        # a string is a sequence too, of letters
        rows = None if isinstance(rows, (str, bytes)) else list(rows)
    except TypeError:
        rows = None
    if rows is None:
        raise InputError("the rows are not a list of tuples of one or two sentences")

    for i, row in enumerate(rows):
        if not isinstance(row, (tuple, list)):
            raise InputError(f"{where(i)}: a row is a tuple of one or two sentences, "
                             f"not of type {type(row).__name__}")
        if not 1 <= len(row) <= 2:
            raise InputError(f"{where(i)}: {len(row)} sentences, where one or two are "
                             "expected; at a terminal put quotes around each, in a file one tab "
                             "between two")
        for sentence in row:
            reason = sentence_error(sentence)
            if reason:
                raise InputError(f"{where(i)}: a sentence {reason}")
    return [tuple(sentence.strip() for sentence in row) for row in rows]


def sentence_error(sentence):
    """What is wrong with a sentence, or None."""
    if not isinstance(sentence, str):
        return f"must be a string, not of type {type(sentence).__name__}"
    if not sentence.strip():
        return "is empty"
    if "\0" in sentence:
        return "holds a NUL byte"
    if not is_text(sentence):
        return f"is not valid text ({sentence[:40]!a}); give it as UTF-8"
    return None


def read_input(path):
    """(rows, where) for `predict_sentences`: one or two sentences per line, a tab between two.

    path: "-" for standard input. Raises InputError.
    """
    source = "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise InputError("standard input: is closed; pipe sentences into it, or give --input FILE")
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{source}: cannot be read ({reason})") from None

    # lines end at line feeds alone, not at every line separator of Unicode
    try:
        text = raw.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError(f"{source}: {first_bad_byte(raw)}; save it as UTF-8") from None
    if not raw:
        raise InputError(f"{source}: no line of text")
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    return rows, lambda i: f"{source}: line {i + 1}"


# ---------------------------------------------------------------- predictions

def predict_sentences(model, rows, where=index_in_list):
    """What a model predicts for rows of one or two sentences: a dict {task: prediction} per row.

    model: of MultitaskBERT.load. Tasks of one sentence (sst, cfimdb, auxiliary): {class: its
    probability}, of the first sentence. para: the probability that the two mean the same; sts:
    their similarity, 0 to 5. Raises InputError, which names the row, as `check_rows` does, and for
    a single sentence where the model has tasks of pairs only.
    """
    rows = check_rows(rows, where)
    shortest = min(len(task.text_columns) for task in model.tasks.values())
    for i, row in enumerate(rows):
        if len(row) < shortest:
            raise InputError(f"{where(i)}: this run has tasks of pairs only "
                             f"({', '.join(model.tasks)}); give two sentences")

    predictions = [{} for _ in rows]
    for name, task in model.tasks.items():
        fitting = [i for i, row in enumerate(rows) if len(row) >= len(task.text_columns)]
        if not fitting:
            continue
        texts = [rows[i][:len(task.text_columns)] for i in fitting]
        examples = Examples(task, "the input", fitting, texts, None, [])
        tokenize(examples, model.tokenizer, model.bert.config.max_position_embeddings,
                 model.pair_head.get(name) == "cross")

        outputs = predict(model, name, examples)
        if task.kind == "classification":
            values = softmax(outputs, axis=1)
        elif task.kind == "binary":
            values = expit(outputs[:, 0])
        else:
            values = outputs[:, 0].clip(0, task.max_label)
        for i, value in zip(fitting, values.astype(float).round(4).tolist()):
            if task.kind == "classification":
                value = dict(zip(task.class_names, value))
            predictions[i][name] = value
    return predictions


def describe(row, prediction):
    """For a reader: the sentences, and a line per class, probability or similarity, with a bar."""
    lines = ["  |  ".join(row)]
    for name, value in prediction.items():
        if isinstance(value, dict):
            lines += [f"  {name}, of the first sentence:"] if len(row) > 1 else []
            lines += [f"  {name:8} {label:16} {bar(p)} {p:.3f}" for label, p in value.items()]
        elif name == "para":
            lines.append(f"  {name:8} {'same meaning':16} {bar(value)} {value:.3f}")
        else:
            lines.append(f"  {name:8} {'similarity':16} {bar(value / 5)} {value:.2f} of 5")
    return "\n".join(lines)


def bar(share):
    """20 characters for a number between 0 and 1."""
    return ("#" * round(20 * share)).ljust(20, ".")


# ---------------------------------------------------------------- the command

def get_parser():
    parser = Parser(
        usage="%(prog)s RUN SENTENCE [SENTENCE] | %(prog)s RUN --input FILE",
        description="What a run makes of a sentence (its sentiment) or of two (also whether they "
                    "mean the same, and their similarity). JSON lines where the output is no "
                    "terminal.",
        epilog="Only the flags above are flags. Every other word is RUN (the first) or a sentence, "
               "also where it begins with a dash; after -- every word is.")
    parser.add_argument("--input", metavar="FILE",
                        help="a sentence per line, or two with a tab between; - for standard input")
    parser.add_argument("--use_gpu", action="store_true",
                        help="run on CUDA, or on MPS of an Apple machine")
    return parser


def parse(argv):
    """(flags, [run, sentences...]). argparse would take each word that begins with a dash for a
    flag, so it is given the flags alone."""
    flags, words, rest = [], [], iter(argv)
    for word in rest:
        if word == "--":
            words.extend(rest)
        elif word == "--input":
            flags.append("=".join([word, *itertools.islice(rest, 1)]))  # FILE may begin with a dash
        elif word.partition("=")[0] in ("--input", "--use_gpu", "-h", "--help"):
            flags.append(word)
        else:
            words.append(word)

    args = get_parser().parse_args(flags)
    if not words:
        raise InputError("give the folder of a run, and sentences or --input FILE")
    if (len(words) > 1) == (args.input is not None):
        raise InputError("after the run give one or two sentences, or --input FILE "
                         "(- for standard input)")
    return args, words


def main(argv=None):
    # under torchrun the first process alone answers
    rank, _, _ = process_environment()
    if rank > 0:
        return
    args, (run, *sentences) = parse(sys.argv[1:] if argv is None else list(argv))
    device = get_device(args.use_gpu, amp=False)
    rows, where = [sentences], lambda i: "the command line"
    if args.input is not None:
        rows, where = read_input(args.input)
    rows = check_rows(rows, where)

    # what is printed on the way is no answer
    with contextlib.redirect_stdout(sys.stderr):
        predictions = predict_sentences(MultitaskBERT.load(run).to(device), rows, where)
    for row, prediction in zip(rows, predictions):
        if sys.stdout.isatty():
            print(describe(row, prediction))
        else:
            print(json.dumps({"text": row, **prediction}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
