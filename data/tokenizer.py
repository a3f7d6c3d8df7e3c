"""BERT's word pieces: a folder's vocabulary and settings, and sentences to token ids.

The tokenizers library does the splitting. This file reads what a folder asks of it, and rejects by
name what BERT's word pieces cannot do.
"""
import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer
from tokenizers.models import WordPiece

from data.download import TOKENIZER_FILES, read_json
from support.files import InputError, write_atomically

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

    Ids equal those of transformers.BertTokenizer (version 5), which uses the same library, where
    both read the same settings. What they read differs:

        the normalizer of tokenizer.json  followed here, ignored there
        do_basic_tokenize, never_split    rejected here, ignored there
    """
    path, vocabulary = read_vocabulary(folder)
    for token in ("[CLS]", "[SEP]", "[UNK]"):
        if token not in vocabulary:
            raise InputError(f"{path}: no {token} in the vocabulary; is it BERT's?")

    # a guess that would silently cost a cased encoder its capitals
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

    # what transformers 5 and sentence-transformers 6 save
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

    # where both files set one, tokenizer_config.json wins, and the other is reported
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
    """Fill examples.tokens: [CLS] a [SEP] for each text, or [CLS] a [SEP] b [SEP] for a pair where
    `cross`. Sequences longer than max_length tokens are truncated, counted and reported."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    columns = [tokenizer.encode_batch(list(column), add_special_tokens=False)
               for column in zip(*examples.texts)]

    # a cross-encoded pair is one sequence of two texts, otherwise each text is a sequence
    truncated, examples.tokens = 0, []
    for encodings in zip(*columns):
        pieces = [encoding.ids for encoding in encodings]
        sequences = [pieces] if cross else [[piece] for piece in pieces]  # the texts of each
        truncated += any(sum(map(len, texts)) + len(texts) + 1 > max_length for texts in sequences)
        examples.tokens.append([build_sequence(texts, cls, sep, max_length) for texts in sequences])
    if truncated:
        print(f"{examples.path}: truncated {truncated} of {len(examples.texts)} rows to "
              f"{max_length} tokens")
    return examples


def build_sequence(texts, cls, sep, max_length):
    """[CLS] a [SEP], or for two texts [CLS] a [SEP] b [SEP]; truncated to max_length.

    Returns the ids (int64) and the length of [CLS] a [SEP], the first segment. Its tokens have
    token type 0, those of b [SEP] token type 1; `collate` in batches.py sets the types from it.
    """
    room = max_length - len(texts) - 1
    if len(texts) == 2:
        # truncate the longer side; where both are too long, both to one length
        a, b = map(len, texts)
        keep_a = max(room - b, min(a, (room + 1) // 2))
        texts = [texts[0][:keep_a], texts[1][:room - min(a, keep_a)]]
    else:
        texts = [texts[0][:room]]
    first = [cls, *texts[0], sep]
    second = [i for text in texts[1:] for i in (*text, sep)]
    return np.array(first + second, dtype=np.int64), len(first)


def copy_vocabulary(source, folder):
    """Copy a folder's vocabulary and tokenizer settings. A vocab.txt is written where the source
    has only a tokenizer.json."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            write_atomically(folder / name, lambda path: shutil.copyfile(source / name, path))
    if not (source / "vocab.txt").exists():
        lines = vocabulary_lines(read_vocabulary(source)[1])
        write_atomically(folder / "vocab.txt",
                         lambda path: path.write_text(lines, encoding="utf-8", newline="\n"))


def vocabulary_lines(vocabulary):
    """The text of a vocab.txt of {token: id}: the token of id 0, of id 1, ..., a line each.

    An id without a token has an empty line, which no text matches; so has a token that no text can
    match, since there is a space or a line break in it.
    """
    lines = [""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        lines[i] = token if token.split() == [token] else ""
    return "".join(line + "\n" for line in lines)
