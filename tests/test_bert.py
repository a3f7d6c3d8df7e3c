"""bert.py and support/weights.py: the encoder beside independent implementations, and the folders
that it reads and writes.

Dimensions: B sequences in the batch, L tokens in the longest, H hidden size.
"""
import contextlib
import dataclasses
import fnmatch
import io
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from unittest import SkipTest, mock

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file
from tokenizers.models import WordPiece
from torch import nn
from torch.nn import functional as F

import pretrain_mlm
from bert import BertConfig, BertModel, our_name, published_name
from data.download import DEFAULT_ENCODER, cache_folder, fetch_encoder
from data.tokenizer import load_tokenizer
from multitask_classifier import MultitaskBERT
from support.files import InputError
from tests.helpers import (FULL, TINY, as_tokenizer_json, copy_of_tiny, needs_full, quietly,
                           raises, random_batch, run, same, split_weights, trained, workspace)

# Computed with transformers.BertModel 5.23.0 on the default encoder, for the two sentences of
# `test_the_default_encoder_gives_the_stored_embeddings`: the first six values of each vector.
STORED_IDS = [[101, 1996, 2143, 2003, 1037, 4251, 10911, 1012, 102, 0, 0],
              [101, 6343, 2356, 2005, 2023, 8297, 1010, 2106, 2027, 1029, 102]]
STORED_CLS = [[-0.2285301, -0.0404145, 0.417334, -0.0190319, -0.154999, 0.0167786],
              [0.0205113, 0.0973974, 0.1900676, -0.0039369, 0.0941866, 0.1808437]]
STORED_MEAN = [[-0.0309636, 0.1109137, 0.0930861, 0.0387746, -0.2119545, 0.1756335],
               [-0.3196696, 0.2232597, 0.1744754, 0.0761012, -0.2033074, -0.2638388]]
STORED_POOLER = [[-0.0520373, -0.0431513, 0.0213192, 0.0768633, -0.0953051, 0.0144682],
                 [-0.0112392, 0.0450846, 0.0587121, 0.0795594, -0.1073437, -0.0098406]]


def transformers():
    """The library, for those checks that compare with it."""
    try:
        import transformers
    except ImportError:
        raise SkipTest("transformers is not installed") from None
    return transformers


def largest_gradient_difference(ours, theirs):
    """Of two {name: gradient}: the largest norm of a difference, relative to the largest gradient
    norm."""
    scale = max(gradient.norm() for gradient in theirs.values())
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / scale) for name in theirs)


def load_quietly(folder):
    """(the encoder of a folder, what was printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model = BertModel.from_pretrained(folder)
    return model, printed.getvalue()


def new_folder():
    return Path(tempfile.mkdtemp(dir=workspace()))


# ---------------------------------------------------------------- the encoder

TORCH_NAMES = {"self_attn.out_proj": "attention_dense", "linear1": "interm_dense",
               "linear2": "out_dense", "norm1": "attention_layer_norm", "norm2": "out_layer_norm"}


def in_torch_names(values):
    """{our name: tensor} of the layers -> {the name in nn.TransformerEncoder: tensor}."""
    result = {}
    for i in range(TINY.num_hidden_layers):
        for kind in ("weight", "bias"):
            qkv = [values[f"bert_layers.{i}.self_attention.{part}.{kind}"]
                   for part in ("query", "key", "value")]
            result[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
            for theirs, ours in TORCH_NAMES.items():
                result[f"layers.{i}.{theirs}.{kind}"] = values[f"bert_layers.{i}.{ours}.{kind}"]
    return result


def test_encoder_equals_torch_transformer_encoder():
    """Outputs and gradients, against torch's own post-norm encoder with the same weights."""
    model = BertModel(TINY).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1, so that each counts
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation=F.gelu,
                                       layer_norm_eps=1e-12, batch_first=True)
    peer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    peer.load_state_dict(in_torch_names(model.state_dict()))

    ids, mask, types = random_batch(TINY, [12, 3, 1, 12, 7])
    embedded = model.embed(ids, types).detach()
    expected = peer(embedded, src_key_padding_mask=mask == 0) * mask[..., None]
    ours = model(ids, mask, types)["last_hidden_state"]
    assert (ours - expected).abs().max() < 1e-5

    weights = torch.randn_like(ours)
    (expected * weights).sum().backward()
    (model.encode(embedded, mask) * weights).sum().backward()
    gradients = in_torch_names({name: p.grad for name, p in model.named_parameters()})
    references = {name: p.grad for name, p in peer.named_parameters()}
    assert largest_gradient_difference(gradients, references) < 1e-5


def compare_with_transformers(folder, lengths):
    """Outputs to 1e-5, gradients to 1e-5 of the largest gradient norm, on one folder and batch."""
    peer = transformers().BertModel.from_pretrained(folder).eval()
    model, _ = load_quietly(folder)
    ids, mask, types = random_batch(model.config, lengths)
    ours, theirs = model.eval()(ids, mask, types), peer(ids, mask, types)
    hidden = theirs.last_hidden_state * mask[..., None]
    assert (ours["last_hidden_state"] - hidden).abs().max() < 1e-5
    assert (ours["pooler_output"] - theirs.pooler_output).abs().max() < 1e-5

    weights, pooler_weights = torch.randn_like(hidden), torch.randn_like(theirs.pooler_output)
    for states, pooled in ((ours["last_hidden_state"], ours["pooler_output"]),
                           (hidden, theirs.pooler_output)):
        ((states * weights).sum() + (pooled * pooler_weights).sum()).backward()
    gradients = {published_name(name): p.grad for name, p in model.named_parameters()}
    references = {name: p.grad for name, p in peer.named_parameters()}
    assert largest_gradient_difference(gradients, references) < 1e-5


def test_tiny_encoder_equals_transformers():
    for lengths in ([9, 40, 3, 40], [1], [64, 64]):
        compare_with_transformers(workspace() / "tiny", lengths)


def test_full_encoders_equal_transformers():
    needs_full()
    compare_with_transformers(fetch_encoder(), [9, 40, 3, 40, 22])
    compare_with_transformers(fetch_encoder(), [512, 512])
    bert_tiny = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=512)
    for config in (bert_tiny, BertConfig()):
        folder = workspace() / f"bert-{config.hidden_size}"
        BertModel(config).save_pretrained(folder)
        for lengths in ([5, 33, 17], [1], [512]):
            compare_with_transformers(folder, lengths)


def test_the_default_encoder_gives_the_stored_embeddings():
    cached = (cache_folder() / DEFAULT_ENCODER / "model.safetensors").exists()
    if not FULL and not cached:
        raise SkipTest("the default encoder is not in the cache; with --full it is fetched")
    folder = fetch_encoder()
    sentences = ["The film is a quiet triumph.", "Nobody asked for this sequel, did they?"]
    encodings = load_tokenizer(folder).encode_batch(sentences)
    length = max(len(encoding.ids) for encoding in encodings)
    ids = torch.tensor([encoding.ids + [0] * (length - len(encoding.ids))
                        for encoding in encodings])  # (2, L)
    mask = (ids != 0).long()
    assert ids.tolist() == STORED_IDS

    with torch.no_grad():
        outputs = BertModel.from_pretrained(folder).eval()(ids, mask)
    hidden = outputs["last_hidden_state"]
    means = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    for ours, stored in ((hidden[:, 0], STORED_CLS), (means, STORED_MEAN),
                         (outputs["pooler_output"], STORED_POOLER)):
        assert (ours[:, :6] - torch.tensor(stored)).abs().max() < 1e-5


def test_a_sequence_does_not_depend_on_its_batch():
    model, lengths = BertModel(TINY).eval(), [6, 14, 6, 30, 1]
    batch = random_batch(TINY, lengths)
    together = model(*batch)
    for i, length in enumerate(lengths):
        for width in (length, 64):  # alone, and alone but padded further
            alone = model(*(F.pad(x[i:i + 1, :length], (0, width - length)) for x in batch))
            for ours, theirs in (
                    (alone["last_hidden_state"][0, :length],
                     together["last_hidden_state"][i, :length]),
                    (alone["pooler_output"][0], together["pooler_output"][i])):
                assert (ours - theirs).abs().max() < 1e-6


def test_embed_and_encode_make_up_forward():
    model = BertModel(TINY).eval()
    ids, mask, types = random_batch(TINY, [6, 14, 6])
    whole = model(ids, mask)["last_hidden_state"]
    assert (model.encode(model.embed(ids), mask) - whole).abs().max() < 1e-6
    assert (whole * (1 - mask)[..., None]).abs().max() == 0  # zeros on the padding

    # token types are 0 where none are given
    with_zeros = model(ids, mask, torch.zeros_like(ids))["last_hidden_state"]
    assert torch.equal(with_zeros, whole)
    assert not torch.equal(model(ids, mask, types)["last_hidden_state"], whole)


def test_a_batch_wider_than_the_positions_is_rejected():
    ids = torch.ones(1, 65, dtype=torch.long)
    raises(ValueError, "64 positions", BertModel(TINY), ids, torch.ones(1, 65))


# ---------------------------------------------------------------- config.json

def test_a_config_that_is_not_this_encoders_is_rejected_by_name():
    folder = copy_of_tiny()
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for name, value, part in (
            ("model_type", "gpt2", "model_type is 'gpt2'; this encoder supports only 'bert'"),
            ("hidden_act", "relu", "hidden_act is 'relu'"),
            ("position_embedding_type", "relative_key", "embedding_type is 'relative_key'"),
            ("is_decoder", True, "is_decoder is True; this encoder supports only False"),
            ("num_attention_heads", 5, "is no multiple of num_attention_heads 5"),
            ("hidden_size", "many", "hidden_size is 'many'"),
            ("num_hidden_layers", 0, "num_hidden_layers is 0"),
            ("vocab_size", 500.0, "vocab_size is 500.0"),
            ("hidden_dropout_prob", 1.0, "hidden_dropout_prob is 1.0"),
            ("layer_norm_eps", -1e-12, "layer_norm_eps is -1e-12")):
        path.write_text(json.dumps({**fields, name: value}))
        for read in (BertConfig.from_folder, BertModel.from_pretrained):
            raises(InputError, f"{path}: ", read, folder)
            raises(InputError, part, read, folder)

    for text in ("", "{", "[1]", "null", b"\xff"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        raises(InputError, f"{path}: cannot be read", BertModel.from_pretrained, folder)
    path.unlink()
    raises(InputError, f"{path}: cannot be read", BertModel.from_pretrained, folder)


def test_a_config_comes_back_and_may_say_what_is_done_anyway():
    folder = new_folder()
    config = dataclasses.replace(TINY, hidden_dropout_prob=0.0, layer_norm_eps=1e-5)
    config.save(folder)
    assert BertConfig.from_folder(folder) == config
    fields = json.loads((folder / "config.json").read_text())
    said = {"is_decoder": False, "position_embedding_type": "absolute", "use_cache": True}
    (folder / "config.json").write_text(json.dumps({**fields, **said}))
    assert BertConfig.from_folder(folder) == config


# ---------------------------------------------------------------- published checkpoints

def published_tensors(model):
    return {published_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def tensors_of_2018(published):
    """The same tensors under the names that TensorFlow's checkpoints had, with a prefix."""
    return {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in published.items()}


def load_tensors(tensors, pickled=False):
    """(the encoder of a folder with these weights, what was printed)."""
    folder = new_folder()
    TINY.save(folder)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return load_quietly(folder)


def test_checkpoints_of_all_ages_load():
    """Names of 2018 and of now, with and without a prefix and stored positions, in other precision;
    safetensors and pickle."""
    model = BertModel(TINY)
    published = published_tensors(model)
    assert len(published) == 39 and {our_name(name) for name in published} == {*model.state_dict()}

    old = tensors_of_2018(published)
    assert "bert.embeddings.LayerNorm.gamma" in old and our_name("bert.a.beta") == "a.bias"
    positions = torch.arange(64)[None]
    for tensors in (published, old, {**old, "bert.embeddings.position_ids": positions},
                    {name: tensor.double() for name, tensor in published.items()}):
        for pickled in (False, True):
            loaded, printed = load_tensors(tensors, pickled)
            assert same(loaded.state_dict(), model.state_dict()) and printed == "", printed


def test_missing_poolers_and_unused_tensors_are_reported():
    model = BertModel(TINY)
    published = published_tensors(model)
    loaded, printed = load_tensors({**tensors_of_2018(published),
                                    "cls.predictions.bias": torch.zeros(500)})
    assert same(loaded.state_dict(), model.state_dict())
    assert "left unused: cls.predictions.bias" in printed

    loaded, printed = load_tensors({name: tensor for name, tensor in published.items()
                                    if "pooler" not in name})
    assert "no pooler" in printed
    encoder = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    assert same({name: loaded.state_dict()[name] for name in encoder}, encoder)
    assert loaded.pooler_dense.weight.std() > 0.01 and not loaded.pooler_dense.bias.any()


def test_tensors_that_are_no_encoders_are_rejected_by_name():
    published = published_tensors(BertModel(TINY))
    norm, words = "embeddings.LayerNorm.weight", "embeddings.word_embeddings.weight"
    no_norm = {name: tensor for name, tensor in published.items() if name != norm}
    for tensors, part in (
            (no_norm, "no tensor for embed_layer_norm.weight"),
            ({norm: published[norm]}, "and 35 more; is it a BERT encoder?"),
            ({**published, words: torch.zeros(499, 16)}, "has shape (499, 16)"),
            ({**published, f"bert.{norm}": torch.ones(16)}, f"{norm}, with and without a prefix"),
            ({**published, "embeddings.position_ids": torch.arange(64)[None] + 1},
             "position_ids is not")):
        for pickled in (False, True):
            raises(InputError, part, load_tensors, tensors, pickled)


def test_an_encoder_that_was_saved_loads_to_the_same_bits():
    """Alone, and with a head beside it, whose tensors `ignore` names."""
    model, head = BertModel(TINY), {"heads.sst.bias": torch.ones(5)}
    alone, beside = new_folder(), new_folder()
    model.save_pretrained(alone)
    model.save_pretrained(beside, head=head)
    for folder in (alone, beside):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            loaded = BertModel.from_pretrained(folder, ignore=head)
        assert same(loaded.state_dict(), model.state_dict()) and loaded.config == TINY
        assert printed.getvalue() == ""
    assert load_file(alone / "model.safetensors").keys() == published_tensors(model).keys()
    assert "left unused: heads.sst.bias" in load_quietly(beside)[1]


def test_a_pickle_with_a_payload_is_not_run():
    folder = new_folder()
    TINY.save(folder)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"embeddings.LayerNorm.weight": Payload()}, file, protocol=2)
    raises(InputError, "cannot be read as named tensors", BertModel.from_pretrained, folder)
    assert not (folder / "owned").exists()


def test_weights_that_cannot_be_read_are_named():
    folder = copy_of_tiny()
    weights = (folder / "model.safetensors").read_bytes()
    for name, content in (("model.safetensors", weights[:-100]), ("model.safetensors", b""),
                          ("pytorch_model.bin", b""), ("pytorch_model.bin", b"weights")):
        (folder / "model.safetensors").unlink(missing_ok=True)
        path = folder / name
        path.write_bytes(content)
        raises(InputError, f"{path}: cannot be read as named tensors", BertModel.from_pretrained,
               folder)

    # pickles that can be read, but do not hold named tensors
    for content in ({"embeddings.LayerNorm.weight": 1}, {1: torch.ones(2)}, torch.ones(2), [1, 2]):
        torch.save(content, path)
        raises(InputError, f"{path}: cannot be read as named tensors", BertModel.from_pretrained,
               folder)
    path.unlink()
    raises(InputError, "neither model.safetensors nor pytorch_model.bin",
           BertModel.from_pretrained, folder)


# ---------------------------------------------------------------- weights in several files

def test_split_weights_load():
    """In the layout of transformers: an index names the file of each tensor."""
    folder = copy_of_tiny()
    assert len(split_weights(folder)) == 3 and not (folder / "model.safetensors").exists()
    whole = BertModel.from_pretrained(workspace() / "tiny").state_dict()
    assert same(BertModel.from_pretrained(folder).state_dict(), whole)


def test_split_weights_that_are_damaged_are_named():
    folder = copy_of_tiny()
    first, second, _ = split_weights(folder)
    index = folder / "model.safetensors.index.json"
    listed = index.read_text()
    for broken in ("[]", "{}", "{", '{"weight_map": {"a": "../model.safetensors"}}',
                   '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'):
        index.write_text(broken)
        raises(InputError, str(index), BertModel.from_pretrained, folder)
    index.write_text(listed)

    tensors = load_file(first)
    save_file({**tensors, **load_file(second)}, first)
    raises(InputError, "is in two of its files", BertModel.from_pretrained, folder)
    save_file(tensors, first)

    second.write_bytes(second.read_bytes()[:-10])
    raises(InputError, f"{second}: cannot be read", BertModel.from_pretrained, folder)
    second.unlink()
    raises(InputError, f"{second.name}, which holds", BertModel.from_pretrained, folder)


# ---------------------------------------------------------------- integer weights

def test_integer_weights_are_rejected_by_name():
    folder = copy_of_tiny()
    tensors = load_file(folder / "model.safetensors")
    for name, dtype in (("encoder.layer.0.output.dense.weight", torch.int8),
                        ("embeddings.LayerNorm.bias", torch.int64),
                        ("pooler.dense.bias", torch.bool)):
        save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
        raises(InputError, f"{name} holds {dtype}", BertModel.from_pretrained, folder)

    # a tensor that is not used may hold anything
    save_file({**tensors, "cls.counts": torch.ones(2).long()}, folder / "model.safetensors")
    assert "left unused: cls.counts" in load_quietly(folder)[1]


def test_integer_weights_of_a_head_are_rejected_by_name():
    status, printed, folder = run("--tasks", "sst", steps=1)
    assert status == 0, printed
    tensors, name = load_file(folder / "model.safetensors"), "heads.sst.linear.weight"
    save_file({**tensors, name: tensors[name].to(torch.int32)}, folder / "model.safetensors")
    raises(InputError, f"{name} holds torch.int32", MultitaskBERT.load, folder)


# ---------------------------------------------------------------- folders of other libraries

def test_transformers_opens_what_a_run_saves():
    AutoModel = transformers().AutoModel
    status, printed, folder = run("--pooling", "cls")
    assert status == 0, printed
    compare_with_transformers(folder, [4, 9])
    assert type(AutoModel.from_pretrained(folder)).__name__ == "BertModel"

    # it has no projected attention layers, and must not take the encoder for the whole model
    status, printed, folder = run("--pal", "--pal_size", 8)
    assert status == 0, printed
    try:
        AutoModel.from_pretrained(folder)
    except ValueError as error:
        assert "bert_with_pal" in str(error)
    else:
        raise AssertionError("the encoder was taken for the whole model")


def test_an_encoder_with_projected_attention_layers_is_not_taken_for_the_whole_model():
    status, printed, folder = run("--tasks", "sst", "--pal", "--pal_size", 8, steps=1)
    assert status == 0, printed
    raises(InputError, "model_type is 'bert_with_pal'", BertModel.from_pretrained, folder)
    assert len(MultitaskBERT.load(folder).pal) == 1


TEXT = "A caf\u00e9 film."


def cased_folders():
    """Two folders of the tiny encoder with a cased vocabulary with accents: with vocab.txt, and as
    transformers 5 and sentence-transformers 6 save it, with tokenizer.json and split weights."""
    plain, current = copy_of_tiny(), copy_of_tiny()
    for folder in (plain, current):
        path = folder / "vocab.txt"
        lines = path.read_text(encoding="utf-8").splitlines()[:-2]
        path.write_text("\n".join([*lines, "A", "caf\u00e9"]) + "\n", encoding="utf-8")
    (plain / "tokenizer_config.json").write_text(
        '{"do_lower_case": false, "strip_accents": false}')
    as_tokenizer_json(current, {"lowercase": False, "strip_accents": False}, max_length=8)
    split_weights(current)
    (current / "modules.json").write_text("[]")
    return plain, current


def test_folders_of_current_libraries_train_to_the_same_bits():
    """A run from such a folder is that from vocab.txt and whole weights, and so is one that starts
    from what the run leaves."""
    plain, current = cased_folders()
    folders = []
    for model in (plain, current):
        status, printed, folder = run("--model", model)
        assert status == 0, printed
        folders.append(folder)
    assert same(*(load_file(folder / "model.safetensors") for folder in folders))
    assert same(*(trained("--model", folder, steps=1) for folder in folders))

    # the vocabulary is left in the older layout, with the settings that the newer one holds
    left = WordPiece.read_file(str(folders[1] / "vocab.txt"))
    left.pop("", None)  # for the first of a word that is in the tiny vocabulary twice
    assert left == WordPiece.read_file(str(plain / "vocab.txt"))
    ids = load_tokenizer(plain).encode(TEXT).ids
    assert ids != load_tokenizer(workspace() / "tiny").encode(TEXT).ids
    for folder in (current, *folders):
        assert load_tokenizer(folder).encode(TEXT).ids == ids
    assert MultitaskBERT.load(folders[1]).tokenizer.encode(TEXT).ids == ids


def test_pretraining_from_a_folder_of_current_libraries_keeps_its_vocabulary():
    plain, current = cased_folders()
    out = workspace() / "runs" / "mlm-from-current"
    status, printed = quietly(
        pretrain_mlm.main, "--model", current, "--data_dir", workspace() / "data", "--out", out,
        "--epochs", 1, "--epoch_length", 1)
    assert status == 0, printed
    assert load_tokenizer(out).encode(TEXT).ids == load_tokenizer(plain).encode(TEXT).ids


def test_gaps_in_a_vocabulary_leave_the_other_ids_as_they_are():
    """Ids without a token, and tokens that no text can match."""
    _, current = cased_folders()
    path, folder = current / "tokenizer.json", current.with_name("gaps")
    fields = json.loads(path.read_text())
    fields["model"]["vocab"] = {"[CLS]": 1, "[SEP]": 3, "[UNK]": 4, "a": 7, "b c": 8, "d\n": 5,
                                "e": 9}
    path.write_text(json.dumps({**fields, "added_tokens": []}))
    BertModel(TINY).save_pretrained(folder, current)
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder).encode("a b c d e").ids == [1, 7, 4, 4, 4, 9, 3]


# ---------------------------------------------------------------- the hub's cache

def hub_cache(**changes):
    """A cache as the hub's client keeps it, with a tiny encoder "owner/NAME" for each NAME=change;
    change(folder) changes its folder."""
    cache = new_folder()
    for name, change in changes.items():
        snapshot = cache / f"models--owner--{name}" / "snapshots" / ("0" * 40)
        shutil.copytree(workspace() / "tiny", snapshot)
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("0" * 40)
        change(snapshot)
    return cache


@contextlib.contextmanager
def hub_client(cache):
    """The hub's own client on this cache, without the network. Yields the list of what it is asked:
    (patterns of the files, whether it may use the cache alone)."""
    asked, real = [], huggingface_hub.snapshot_download

    def snapshot_download(name, **kwargs):
        asked.append((kwargs["allow_patterns"], kwargs["local_files_only"]))
        return real(name, **{**kwargs, "local_files_only": True, "cache_dir": cache})

    with mock.patch.object(huggingface_hub, "snapshot_download", snapshot_download):
        yield asked


def test_encoders_of_all_layouts_come_from_the_hubs_cache():
    tiny = BertModel.from_pretrained(workspace() / "tiny").state_dict()
    vocabulary = load_tokenizer(workspace() / "tiny").get_vocab()
    cache = hub_cache(whole=lambda folder: None, json=as_tokenizer_json, split=split_weights)
    with hub_client(cache) as asked:
        for name in ("whole", "json", "split"):
            folder = fetch_encoder(f"owner/{name}")
            assert same(BertModel.from_pretrained(folder).state_dict(), tiny)
            assert load_tokenizer(folder).get_vocab() == vocabulary

    # each with one question, to the cache alone, for all files that such a folder may have
    assert len(asked) == 3 and all(offline for _, offline in asked)
    patterns, _ = asked[0]
    for file in ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json",
                 "model.safetensors", "model-00001-of-00002.safetensors",
                 "model.safetensors.index.json"):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file


def test_an_unfinished_download_is_asked_for_again():
    """A folder of the hub's cache that lacks a part of the weights, or the vocabulary."""
    cache = hub_cache(split=lambda folder: split_weights(folder)[1].unlink(),
                      words=lambda folder: (folder / "vocab.txt").unlink(),
                      weights=lambda folder: (folder / "model.safetensors").unlink())
    for name in ("split", "words", "weights"):
        with hub_client(cache) as asked:
            raises(InputError, "no weights or no vocabulary in it", fetch_encoder, f"owner/{name}")
        # for both kinds of weights the cache is asked first, and then the network
        assert [offline for _, offline in asked] == [True, True, False, False]
    with hub_client(cache):
        raises(InputError, "owner/nowhere: no such folder here", fetch_encoder, "owner/nowhere")
