"""Checks of data/tokenizer.py: vocabularies, settings, token ids, sequences, and encoders that are
too small for them."""
import dataclasses
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

import pretrain_mlm
from bert import BertModel, published_name
from data.tasks import TASKS, read_examples
from data.tokenizer import (SPECIAL, build_sequence, copy_vocabulary, load_tokenizer,
                            read_vocabulary, tokenize)
from multitask_classifier import MultitaskBERT
from support.files import InputError
from tests.helpers import (PROJECT, TINY, as_tokenizer_json, captured, copy_of_tiny, quietly,
                           raises, run, workspace, write_file)


def vocabulary_folder(words, config=None, normalizer=None):
    """A folder with a vocabulary, in tokenizer.json if there is a normalizer, and its settings."""
    folder = Path(tempfile.mkdtemp(dir=workspace()))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    if normalizer is not None:
        as_tokenizer_json(folder, normalizer)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- token ids and settings

def test_token_ids_equal_those_of_transformers_under_each_setting():
    """tests/tokens.json holds 40 strings of ten languages, 6 settings, and the ids that
    transformers.BertTokenizer gave them, with its version and the call."""
    stored = json.loads((PROJECT / "tests" / "tokens.json").read_text(encoding="utf-8"))
    words = " ".join(stored["vocabulary"]).split()
    assert len(stored["strings"]) == 40 and len(stored["settings"]) == len(stored["ids"]) == 6
    assert len({str(ids) for ids in stored["ids"]}) == 6, "each setting has an effect"

    for settings, ids in zip(stored["settings"], stored["ids"]):
        normalizer = {"lowercase": settings.get("do_lower_case", True),
                      "strip_accents": settings.get("strip_accents"),
                      "handle_chinese_chars": settings.get("tokenize_chinese_chars", True)}
        folders = [vocabulary_folder(words, settings),
                   vocabulary_folder(words, normalizer=normalizer),
                   vocabulary_folder(words, settings, normalizer)]
        for folder in folders:
            tokenizer = load_tokenizer(folder)
            encodings = tokenizer.encode_batch(stored["strings"], add_special_tokens=False)
            assert [encoding.ids for encoding in encodings] == ids, (settings, folder)

        try:
            from transformers import BertTokenizer
        except ImportError:
            continue  # the stored ids are what it gave
        theirs = BertTokenizer.from_pretrained(folders[0])
        assert theirs(stored["strings"], add_special_tokens=False).input_ids == ids


WORDS = [*SPECIAL, "film", "##s", "a"]


def test_settings_that_are_not_berts_are_rejected_by_name():
    cases = [
        ({"do_lower_case": None}, "do_lower_case is null, and can be true or false only"),
        ({"do_lower_case": "false"}, 'do_lower_case is "false", and can be true or false only'),
        ({"do_lower_case": 0}, "do_lower_case is 0"),
        ({"strip_accents": "no"}, 'strip_accents is "no"'),
        ({"strip_accents": 1}, "strip_accents is 1, and can be true or false or null only"),
        ({"tokenize_chinese_chars": None}, "tokenize_chinese_chars is null"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, 'tokenizer_class is "BertJapanese'),
        ({"do_basic_tokenize": False}, "do_basic_tokenize is false"),
        ({"never_split": ["film"]}, 'never_split is ["film"]'),
        ({"unk_token": "<unk>"}, 'unk_token is "<unk>"'),
        ({"cls_token": {"content": "<s>", "lstrip": False}}, 'cls_token is "<s>"'),
        ({"added_tokens_decoder": {"9": {"content": "<user>"}}}, 'adds "<user>" to the word'),
        ([], "cannot be read as a JSON object")]
    for config, part in cases:
        raises(InputError, "tokenizer_config.json: " + part, load_tokenizer,
               vocabulary_folder(WORDS, config))


def test_settings_that_change_nothing_are_accepted():
    config = {"do_lower_case": True, "strip_accents": None, "never_split": None,
              "do_basic_tokenize": True, "tokenizer_class": "BertTokenizer", "model_max_length": 8,
              "cls_token": {"content": "[CLS]", "lstrip": False},
              "added_tokens_decoder": {"4": {"content": "[MASK]"}}}
    assert load_tokenizer(vocabulary_folder(WORDS, config)).encode("Films").ids == [2, 5, 6, 3]


def test_a_tokenizer_json_that_is_not_berts_is_rejected_by_name():
    folder = vocabulary_folder(WORDS, normalizer={"lowercase": False})
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    normalizer, model, added = (fields[name] for name in ("normalizer", "model", "added_tokens"))
    user = {**added[0], "id": 8, "content": "<user>"}
    cases = [
        ({"normalizer": None}, "no normalizer in it"),
        ({"normalizer": {"type": "Lowercase"}}, 'normalizer: type is "Lowercase"'),
        ({"normalizer": {**normalizer, "clean_text": False}}, "clean_text is false"),
        ({"normalizer": {**normalizer, "lowercase": "yes"}}, 'lowercase is "yes"'),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 'pre_tokenizer: type is "Whitespace"'),
        ({"model": {**model, "type": "Unigram"}}, 'model: type is "Unigram"'),
        ({"model": {**model, "continuing_subword_prefix": "@"}}, 'subword_prefix is "@"'),
        ({"model": {**model, "vocab": {"[CLS]": -1}}}, "not word pieces with an id each"),
        ({"model": {**model, "vocab": {"[CLS]": 0, "a": 0}}}, "not word pieces with an id each"),
        ({"model": {**model, "vocab": [["a", 0.5]]}}, "not word pieces with an id each"),
        ({"model": {**model, "vocab": {"[CLS]": 0}}}, "no [SEP] in the vocabulary"),
        ({"added_tokens": [*added, user]}, 'adds "<user>"')]
    for change, part in cases:
        path.write_text(json.dumps({**fields, **change}))
        raises(InputError, f"{path}: ", load_tokenizer, folder)
        raises(InputError, part, load_tokenizer, folder)


def test_tokenizer_config_json_wins_over_the_normalizer_as_in_transformers():
    folder = vocabulary_folder(WORDS, normalizer={"lowercase": False})
    assert load_tokenizer(folder).encode("Film film").ids == [2, 1, 5, 3]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    tokenizer, printed = captured(load_tokenizer, folder)
    assert tokenizer.encode("Film film").ids == [2, 5, 5, 3]
    assert "lowercase is false, and do_lower_case in tokenizer_config.json is" in printed


# ---------------------------------------------------------------- vocabularies

def test_a_vocabulary_that_cannot_be_used_is_rejected_by_name():
    folder = vocabulary_folder(WORDS)
    for text, part in ((b"[PAD]\n\xff\n", "vocab.txt: cannot be read (UnicodeDecodeError)"),
                       (b"[PAD]\n[UNK]\n[CLS]\n", "vocab.txt: no [SEP] in the vocabulary"),
                       (b"", "vocab.txt: no [CLS] in the vocabulary")):
        (folder / "vocab.txt").write_bytes(text)
        raises(InputError, part, load_tokenizer, folder)
    (folder / "vocab.txt").unlink()
    raises(InputError, "neither vocab.txt nor tokenizer.json is there", load_tokenizer, folder)


def test_a_cased_vocabulary_without_a_setting_is_warned_about():
    cased, uncased = ([*SPECIAL, "[unused1]", "##S", *words]
                      for words in (("Haus", "haus"), ("haus", "\u00df")))
    cases = [(cased, None, None, True),
             (cased, {"strip_accents": False}, None, True),
             (cased, {"do_lower_case": True}, None, False),
             (cased, {"do_lower_case": False}, None, False),
             (cased, None, {"lowercase": False}, False),
             (uncased, None, None, False)]
    for words, config, normalizer, warned in cases:
        _, printed = captured(load_tokenizer, vocabulary_folder(words, config, normalizer))
        if warned:
            assert "words with capitals (Haus), but do_lower_case is not set" in printed
        else:
            assert printed == ""


def test_a_copied_vocabulary_keeps_its_settings_and_ids():
    """Also one that has a tokenizer.json only, whose copy has both."""
    text = "Films a film"
    for normalizer in (None, {"lowercase": False}):
        source = vocabulary_folder([*WORDS, "Film"], {"do_lower_case": False}, normalizer)
        copy = Path(tempfile.mkdtemp(dir=workspace()))
        copy_vocabulary(source, copy)
        ids = load_tokenizer(source).encode(text).ids
        assert ids == [2, 8, 6, 7, 5, 3] == load_tokenizer(copy).encode(text).ids

        # the vocab.txt alone is enough
        (copy / "tokenizer.json").unlink(missing_ok=True)
        assert load_tokenizer(copy).encode(text).ids == ids
        assert read_vocabulary(copy)[1] == read_vocabulary(source)[1]


def test_ids_without_a_word_leave_the_ids_of_the_others_as_they_are():
    """So do words that no text can match: with a space or a line break in them."""
    source = vocabulary_folder(WORDS, normalizer={})
    path = source / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"] = {"[CLS]": 1, "[SEP]": 3, "[UNK]": 4, "a": 7, "b c": 8, "d\n": 5,
                                "e": 9}
    path.write_text(json.dumps({**fields, "added_tokens": []}))

    copy = Path(tempfile.mkdtemp(dir=workspace()))
    copy_vocabulary(source, copy)
    (copy / "tokenizer.json").unlink()
    for folder in (source, copy):
        assert load_tokenizer(folder).encode("a b c d e").ids == [1, 7, 4, 4, 4, 9, 3]


# ---------------------------------------------------------------- sequences

def sts_examples(*pairs):
    """Examples of sts with these texts."""
    rows = "".join(f"{i}\tx{i}\t{a}\t{b}\t1\n" for i, (a, b) in enumerate(pairs))
    path = write_file("a.csv", "\tid\tsentence1\tsentence2\tsimilarity\n" + rows)
    return read_examples(path, TASKS["sts"])


def tiny_tokenizer():
    """(the tiny encoder's tokenizer, its id of [CLS], its id of [SEP])."""
    tokenizer = load_tokenizer(workspace() / "tiny")
    return tokenizer, tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")


def test_pairs_are_one_sequence_or_two_and_truncation_is_reported():
    tokenizer, cls, sep = tiny_tokenizer()
    pair = ("The cat a a a a", "the dog")
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in pair)

    def tokens(max_length, cross):
        examples = sts_examples(pair, ("the", "the cat"))
        examples, printed = captured(tokenize, examples, tokenizer, max_length, cross)
        return [(ids.tolist(), first) for ids, first in examples.tokens[0]], printed

    whole = ([cls, *a, sep, *b, sep], len(a) + 2)
    assert tokens(64, cross=True) == ([whole], "")
    assert tokens(64, cross=False) == ([([cls, *side, sep], len(side) + 2) for side in (a, b)], "")

    # what just fits is not truncated
    assert tokens(len(whole[0]), cross=True) == ([whole], "")
    assert "truncated 1 of 2 rows" in tokens(len(whole[0]) - 1, cross=True)[1]

    # the longer side is
    limit = 2 * len(b) + 3
    sequences, printed = tokens(limit, cross=True)
    assert sequences == [([cls, *a[:len(b)], sep, *b, sep], len(b) + 2)]
    assert f"truncated 1 of 2 rows to {limit} tokens" in printed


def test_the_longer_side_of_a_pair_is_truncated_token_by_token():
    """As published: while the pair is too long, the longer side loses its last token."""
    cls, sep = 101, 102
    for length_a, length_b, max_length in itertools.product(range(8), range(8), range(5, 20)):
        texts = list(range(length_a)), list(range(10, 10 + length_b))
        a, b = map(list, texts)
        while len(a) + len(b) + 3 > max_length:
            (a if len(a) > len(b) else b).pop()
        ids, first = build_sequence(texts, cls, sep, max_length)
        assert ids.tolist() == [cls, *a, sep, *b, sep] and first == len(a) + 2

        ids, first = build_sequence(texts[:1], cls, sep, max_length)
        assert ids.tolist() == [cls, *texts[0][:max_length - 2], sep] and first == len(ids)


def test_a_text_without_tokens_is_encoded_as_cls_and_sep():
    tokenizer, cls, sep = tiny_tokenizer()
    path = write_file("a.csv", "\tid\tsentence1\tsentence2\n0\tx\t\t\n1\ty\t\0\t\0\n")
    examples, _ = captured(read_examples, path, TASKS["sts"], labelled=False)
    for sequences in tokenize(examples, tokenizer, 64, cross=True).tokens:
        assert [(ids.tolist(), first) for ids, first in sequences] == [([cls, sep, sep], 2)]
    for sequences in tokenize(examples, tokenizer, 64, cross=False).tokens:
        assert [(ids.tolist(), first) for ids, first in sequences] == [([cls, sep], 2)] * 2


# ---------------------------------------------------------------- encoders that are too small

def pretrain(*flags):
    """pretrain_mlm.py on the tiny encoder and the cut demo sets. Returns (exit status, what was
    printed)."""
    root = workspace()
    return quietly(pretrain_mlm.main, "--model", root / "tiny", "--data_dir", root / "data",
                   "--out", root / "runs" / f"mlm-{time.time_ns()}", *flags)


def assert_rejected(part, script, *flags):
    """The script ends with status 2 and a message that has `part`."""
    status, printed, *_ = script(*flags)
    assert status == 2 and part in printed and "Traceback" not in printed, printed


def test_an_encoder_must_fit_its_vocabulary_in_every_script():
    few_words = copy_of_tiny(vocab_size=499)  # the tiny vocabulary has 500 word pieces
    for script, *flags in ((run,), (pretrain,), (pretrain, "--fill", "a [MASK]")):
        assert_rejected("499 word embeddings", script, "--model", few_words, *flags)


def test_an_encoder_must_fit_its_task_in_every_script():
    one_type = copy_of_tiny(type_vocab_size=1)
    assert_rejected("one token type", run, "--model", one_type, "--pair_head", "cross")
    assert_rejected("one token type", pretrain, "--model", one_type)

    for positions, of_run, of_pretraining in (
            (4, ["--pair_head", "cross"], ["--tasks", "sts"]),
            (2, ["--tasks", "sst"], ["--tasks", "sst"])):
        small = copy_of_tiny(max_position_embeddings=positions)
        part = f"{positions} positions (max_position_embeddings), too few for [CLS] a [SEP]"
        assert_rejected(part, run, "--model", small, *of_run)
        assert_rejected(part, pretrain, "--model", small, *of_pretraining)
    assert_rejected("2 positions", pretrain, "--model", small, "--fill", "[MASK]")


def test_the_smallest_encoder_that_fits_its_task_trains():
    one_type = copy_of_tiny(type_vocab_size=1)
    three, five = (copy_of_tiny(max_position_embeddings=n) for n in (3, 5))
    for folder, head in ((one_type, "uv"), (three, "uv"), (five, "cross")):
        status, printed, _ = run("--model", folder, "--pair_head", head, steps=1)
        assert status == 0, printed
    out = one_type.with_name("pretrained")
    for flags in (["--model", one_type, "--tasks", "sst", "--epochs", 1, "--epoch_length", 1,
                   "--out", out], ["--model", out, "--fill", "a [MASK]"]):
        status, printed = pretrain(*flags)
        assert status == 0, printed


def test_a_run_whose_encoder_no_longer_fits_is_rejected():
    status, printed, folder = run("--tasks", "sts", "--pair_head", "cross", steps=1)
    assert status == 0, printed
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    MultitaskBERT.load(folder)

    for field, value in (("vocab_size", 499), ("type_vocab_size", 1),
                         ("max_position_embeddings", 4)):
        changed = shutil.copytree(folder, folder.with_name(f"{folder.name}-{field}"))
        smaller = BertModel(dataclasses.replace(TINY, **{field: value})).state_dict()
        smaller = {f"bert.{published_name(name)}": tensor for name, tensor in smaller.items()}
        save_file({**tensors, **smaller}, changed / "model.safetensors")
        (changed / "config.json").write_text(json.dumps({**config, field: value}))
        raises(InputError, field, MultitaskBERT.load, changed)
