"""Folders of transformers without transformers: what is kept, what is refused, and files that mean harm."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import HOURGLASS, LARGE, MODEL, NO_DROPOUT

from common.errors import CheckpointError
from common.labels import SPECIAL_SYMBOLS
from wav2vec2.config import Config, CtcConfig
from wav2vec2.convert import huggingface, huggingface_config, native
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.load_any import load_any
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model

LABELS = (*SPECIAL_SYMBOLS, "|", "E", "T", "'")


def made(mode="finetune", model=MODEL, labels=LABELS, **sections) -> Contents:
    torch.manual_seed(0)
    if mode == "finetune":
        weights = Wav2Vec2Ctc(model, NO_DROPOUT, num_symbols=len(labels)).state_dict()
        torch.nn.init.normal_(weights["proj.bias"])
    else:
        weights, labels = Wav2Vec2Model(model, NO_DROPOUT).state_dict(), None
    return Contents("native", Config(mode=mode, model=model, **sections), weights, labels)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = {}
    for mode in ("pretrain", "finetune"):
        folders[mode] = tmp_path_factory.mktemp(mode) / "out"
        huggingface.write(folders[mode], made(mode))
    return folders


@pytest.fixture
def folder(written, tmp_path):
    """A fine-tuned folder to change."""
    return shutil.copytree(written["finetune"], tmp_path / "folder")


@pytest.fixture
def pretrained(written, tmp_path):
    return shutil.copytree(written["pretrain"], tmp_path / "pretrained")


def change(path, **values):
    """Change entries of a JSON file; ... removes them."""
    table = {**json.loads(path.read_text()), **values} if path.exists() else values
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not ...}))


def change_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def refused(folder, *words):
    """The error of reading a folder: one line that names it and says all the words."""
    with pytest.raises(CheckpointError) as caught:
        load_any(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert all(word in message for word in words), message


# ---- Round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        LARGE,
        replace(MODEL, encoder_embed_dim=16),
        replace(MODEL, encoder_embed_dim=16, feature_projection="always"),
        replace(LARGE, conv_pos=5, latent_dim=20, sample_rate=8000, conv_feature_layers="[(8,4,3)]+[(16,3,2)]"),
    ],
)
def test_there_and_back_is_the_identity(model, mode, tmp_path):
    contents = made(mode, model)
    huggingface.write(tmp_path / "theirs", contents)
    back = load_any(tmp_path / "theirs")
    assert (back.labels, back.config.model, back.config.mode) == (contents.labels, model, mode)
    assert back.weights.keys() == contents.weights.keys()
    assert all(torch.equal(tensor, contents.weights[name]) for name, tensor in back.weights.items())
    assert back.remarks == ()
    native.write(tmp_path / "ours.pt", back)
    again = load_any(tmp_path / "ours.pt")
    assert all(torch.equal(tensor, contents.weights[name]) for name, tensor in again.weights.items())


def test_only_a_projection_that_changes_nothing_is_none(folder):
    """Where the widths are equal, transformers has a projection all the same."""
    huggingface.write(folder / "equal", made(model=replace(MODEL, encoder_embed_dim=16)))
    assert load_any(folder / "equal").config.model.feature_projection == "needed"
    shutil.copy(folder / "equal/model.safetensors", folder / "original")
    for part, place in (("bias", 3), ("weight", (0, 1)), ("weight", (2, 2))):

        def edit(tensors, name=f"wav2vec2.feature_projection.projection.{part}", place=place):
            tensors[name][place] += 1e-3

        change_weights(folder / "equal", edit)
        contents = load_any(folder / "equal")
        assert contents.config.model.feature_projection == "always"
        assert contents.weights["w2v.post_extract_proj.weight"].shape == (16, 16)
        shutil.copy(folder / "original", folder / "equal/model.safetensors")


def test_a_fine_tuned_model_without_quantizer_is_the_same_model(tmp_path):
    """Its options of the quantizer need not fit each other."""
    contents = made(model=replace(MODEL, quantize_targets=False, final_dim=13))
    huggingface.write(tmp_path / "out", contents)
    assert load_any(tmp_path / "out").weights.keys() == contents.weights.keys()


def test_what_is_written_names_no_place_and_is_readable_by_all(tmp_path):
    before = os.umask(0o022)
    huggingface.write(tmp_path / ".out.partial", made())
    os.umask(before)
    files = {path.name: path for path in (tmp_path / ".out.partial").iterdir()}
    with safe_open(files["model.safetensors"], "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it older versions of transformers refuse the file
    assert {"config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"} <= files.keys()
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files.values())
    assert not any(b"partial" in path.read_bytes() or b"/tmp" in path.read_bytes() for path in files.values())


# ---- Refusals of the writer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (made(model=HOURGLASS), "Hourglass"),
        (made("pretrain", HOURGLASS), "Hourglass"),
        (made("pretrain", replace(MODEL, quantize_targets=False)), "have a quantizer, and this one has none"),
        (made(ctc=CtcConfig(blank_weight=2.0)), "--blank_weight 2.0"),
        (replace(made(), labels=None), "--dictionary"),
        (replace(made(), labels=(*LABELS, "Z")), "9 symbols"),
        (replace(made(), labels=(*LABELS[:-1], "E")), "a symbol twice"),
    ],
)
def test_what_transformers_does_not_have_is_refused_before_anything_is_written(contents, reason, tmp_path):
    with pytest.raises(CheckpointError, match="^--to huggingface: ") as caught:
        huggingface.write(tmp_path / "out", contents)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- Architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architectures": ["Wav2Vec2ForSequenceClassification"]}, ["SequenceClassification", "Wav2Vec2ForCTC"]),
        ({"architectures": "Wav2Vec2ForCTC"}, ["architecture"]),
        ({"architectures": [["Wav2Vec2ForCTC"]]}, ["architecture"]),
        ({"model_type": "hubert"}, ["model_type 'hubert'", "'wav2vec2'"]),
        ({"add_adapter": True}, ["add_adapter True", "False"]),
        ({"adapter_attn_dim": 16}, ["adapter_attn_dim 16"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act 'gelu_new'", "'gelu'"]),
        ({"feat_extract_activation": "relu"}, ["feat_extract_activation 'relu'"]),
        ({"layer_norm_eps": 1e-6}, ["layer_norm_eps 1e-06", "1e-05"]),
        ({"quantization_config": {"bits": 8}}, ["quantization_config"]),
        ({"feat_extract_norm": "batch"}, ["feat_extract_norm 'batch'", "group, layer"]),
        ({"conv_dim": [16] * 6}, ["conv_dim, conv_kernel, conv_stride", "6, 7, 7"]),
        ({"conv_kernel": 3}, ["conv_kernel", "not lists"]),
        ({"conv_dim": [], "conv_kernel": [], "conv_stride": []}, ["options that cannot be used"]),
        ({"num_attention_heads": 5}, ["options that cannot be used", "must divide"]),
        ({"hidden_size": 48}, ["weights are not those", "instead of"]),
        ({"feat_extract_norm": "layer"}, ["w2v.feature_extractor.blocks.3.norm.weight is missing"]),
        ({"num_hidden_layers": 1}, ["encoder.layers.1.attention.k_proj.weight has no place"]),
        ({"num_hidden_layers": 3}, ["encoder.layers.2.fc1.weight is missing"]),
        ({"vocab_size": 32}, ["vocab_size 32", "8 rows"]),
    ],
)
def test_other_architectures_are_refused_by_name(folder, options, words):
    change(folder / "config.json", **options)
    refused(folder, *words)


def test_the_weights_tell_the_class_where_it_is_not_named(folder, pretrained):
    for path, mode in ((folder, "finetune"), (pretrained, "pretrain")):
        change(path / "config.json", architectures=...)
        assert load_any(path).config.mode == mode


def test_a_fine_tuned_folder_without_output_layer_is_refused(folder):
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "without the matrix lm_head.weight")


def test_options_of_training_without_counterpart_are_told(folder):
    change(folder / "config.json", mask_time_min_masks=7)
    (remark,) = load_any(folder).remarks
    assert "mask_time_min_masks 7" in remark


def test_audio_is_what_the_feature_extractor_says_or_transformers_default(folder):
    assert load_any(folder).config.model.normalize is False
    audio = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    contents = load_any(folder)
    assert (contents.config.model.normalize, contents.config.model.sample_rate) == (True, 16000)
    assert [remark.split()[0] for remark in contents.remarks] == ["do_normalize", "sampling_rate"]
    # newer versions of transformers have one file for the processor
    nested = {"feature_extractor": {**audio, "sampling_rate": 8000}, "processor_class": "Wav2Vec2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    contents = load_any(folder)
    assert (contents.config.model.normalize, contents.config.model.sample_rate, contents.remarks) == (False, 8000, ())


# ---- Weights -------------------------------------------------------------------------------------------------------


def test_weights_without_a_place_are_listed(folder):
    def edit(tensors):
        tensors["wav2vec2.adapter.proj.weight"] = torch.zeros(3)
        tensors["wav2vec2.encoder.layers.0.extra"] = torch.zeros(3)

    change_weights(folder, edit)
    refused(folder, "wav2vec2.adapter.proj.weight has no place", "wav2vec2.encoder.layers.0.extra has no place")


def test_weights_that_are_missing_are_listed(folder):
    def edit(tensors):
        del tensors["wav2vec2.encoder.layers.1.attention.v_proj.bias"]

    change_weights(folder, edit)
    refused(folder, "wav2vec2.encoder.layers.1.attention.v_proj.bias is missing")
    change_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1.attention." in name])
    refused(folder, "w2v.encoder.layers.1.self_attn.qkv_proj.bias is missing")


def test_a_part_of_the_heads_is_refused_and_none_is_a_trunk(pretrained):
    change_weights(pretrained, lambda tensors: tensors.pop("quantizer.codevectors"))
    refused(pretrained, "quantizer.vars is missing")
    heads = ("quantizer", "project_")
    change_weights(pretrained, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(heads)])
    assert "quantizer and projections of pre-training" in load_any(pretrained).missing


def test_one_weight_in_two_spellings_is_refused(folder):
    def edit(tensors):
        name = "wav2vec2.encoder.pos_conv_embed.conv"
        tensors[f"{name}.parametrizations.weight.original0"] = tensors[f"{name}.weight_g"] + 1

    change_weights(folder, edit)
    refused(folder, "original0 is there in another spelling too")


def test_weights_that_are_whole_numbers_are_refused(folder):
    change_weights(folder, lambda tensors: tensors.update({"lm_head.bias": torch.zeros(8, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="model.safetensors: .*floating-point numbers: lm_head.bias"):
        load_any(folder)


def test_the_tensors_do_not_hang_on_the_file(folder):
    contents = load_any(folder)
    before = {name: tensor.clone() for name, tensor in contents.weights.items()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in contents.weights.items())


def split(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name, place in places.items() if place == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_a_shard_outside_the_folder_is_not_read(folder, tmp_path):
    places = split(folder)
    assert load_any(folder).labels == LABELS
    shutil.copy(folder / "model-00002-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    name = next(iter(places))
    outside = tmp_path / "model-00002-of-00002.safetensors"
    for place in (f"../{outside.name}", str(outside), "..", "", ".", "config.json\0", "sub/model.safetensors"):
        change(folder / "model.safetensors.index.json", weight_map={**places, name: place})
        refused(folder, "no file of weights beside it")


def test_shards_that_do_not_fit_their_index_are_refused(folder):
    places = split(folder)
    index = folder / "model.safetensors.index.json"
    change(index, weight_map={**places, "more": next(iter(places.values()))})
    refused(folder, "do not have: more")
    change(index, weight_map={**places, "more": "model-00003-of-00002.safetensors"})
    refused(folder, "model-00003-of-00002.safetensors", "no such file")
    for table in (["a"], {"a": 1}, None):
        change(index, weight_map=table)
        refused(folder, "weight_map")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    change(index, weight_map=places)
    refused(folder, "weights of another file again")


def test_damaged_weights_are_one_line(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (
        b"",
        b"\0" * 8,
        content[:7],
        content[:-1],
        content[: len(content) // 2],
        b"\xff" * 64,
        b"version 1",
    ):
        path.write_bytes(damaged)
        refused(folder, "model.safetensors", "truncated, damaged")
    path.unlink()
    refused(folder, "neither model.safetensors nor pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, "pytorch_model.bin")
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    refused(folder, "not a table of weights")
    path.mkdir()
    refused(folder, "not a table of weights")


# ---- Tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff\xfe{", b'{"a": ' * 30000, b'{"a": ' + b"9" * 5000])
def test_malformed_tables_are_one_line(name, content, folder):
    (folder / name).write_bytes(content)
    refused(folder, name)


def test_large_tables_are_not_read(folder):
    with (folder / "vocab.json").open("r+b") as file:
        file.truncate(17 * 2**20)
    refused(folder, "vocab.json", "larger than 16 MiB")


STRANGE = (None, "x", -1, 2**19, 10**30, -1e300, True, [1], {"content": 3})


def outcomes(folder, file, names):
    """Read the folder with every strange value in turn: it is read, or it is a CheckpointError of one line."""
    original = (folder / file).read_bytes()
    read, messages = 0, []
    for name in names:
        for value in STRANGE:
            change(folder / file, **{name: value})
            try:
                load_any(folder)
                read += 1
            except CheckpointError as error:
                messages.append(str(error))
            (folder / file).write_bytes(original)
    assert [text for text in messages if not text.startswith(str(folder)) or "\n" in text] == []
    return read


def test_strange_options_are_one_line_and_cost_no_memory(folder):
    """Sizes of 2^19 and more would take terabytes, and as many layers for ever, if anything were made of them."""
    options = json.loads((folder / "config.json").read_text())
    begin = time.monotonic()
    read = outcomes(folder, "config.json", options)
    assert 0 < read < len(options) * len(STRANGE) / 2
    assert time.monotonic() - begin < 60


def test_strange_shapes_of_convolutions_are_one_line(folder):
    original = (folder / "config.json").read_bytes()
    for name in ("conv_dim", "conv_kernel", "conv_stride"):
        for values in (*([value] * 7 for value in (*STRANGE, 2**20, 2**62, 0)), [2] * 100000):
            change(folder / "config.json", **{name: values})
            if name != "conv_stride" or values[0] not in (2**19, 2**20):  # no weight tells the stride
                refused(folder)
            (folder / "config.json").write_bytes(original)


def test_strange_tokenizers_and_feature_extractors_are_one_line(folder):
    names = ("pad_token", "bos_token", "word_delimiter_token", "added_tokens_decoder", "do_lower_case")
    outcomes(folder, "tokenizer_config.json", names)
    outcomes(folder, "special_tokens_map.json", names[:2])
    outcomes(folder, "vocab.json", ("E", "<pad>", "new"))
    outcomes(folder, "preprocessor_config.json", ("do_normalize", "sampling_rate"))
    for key in ("4", "-1", "x", "9" * 5000, "²"):
        for token in ({"content": "new"}, {"content": 3}, "new", None):
            change(folder / "tokenizer_config.json", added_tokens_decoder={key: token})
            refused(folder, "tokenizer_config.json")


# ---- Symbols -------------------------------------------------------------------------------------------------------


def test_official_folders_have_our_rows(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert sorted(vocabulary, key=vocabulary.get) == ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "'"]
    rows = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(rows, made().weights["proj.weight"])
    # older folders have nothing but the vocabulary
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    contents = load_any(folder)
    assert contents.labels == LABELS
    assert torch.equal(contents.weights["proj.weight"], rows)


def spell(folder, symbols, pad_token_id=0, **names):
    change(folder / "config.json", pad_token_id=pad_token_id)
    (folder / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(symbols)}))
    change(folder / "tokenizer_config.json", **names)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("symbols", "pad", "names", "labels", "sources"),
    [
        # all special symbols at the end, in any order
        (["|", "e", "t", "'", "</s>", "<unk>", "<s>", "<pad>"], 7, {}, ["|", "e", "t", "'"], [7, 6, 4, 5, 0, 1, 2, 3]),
        # other names; the tokenizer's may be tables
        (
            ["[PAD]", "a", "[UNK]", "b", " ", "[BOS]", "[EOS]", "c"],
            0,
            {
                "pad_token": {"content": "[PAD]", "special": True},
                "unk_token": "[UNK]",
                "bos_token": "[BOS]",
                "eos_token": "[EOS]",
                "word_delimiter_token": " ",
            },
            ["a", "b", "|", "c"],
            [0, 5, 6, 2, 1, 3, 4, 7],
        ),
        # nothing but a blank, which only config.json tells
        (
            ["a", "b", "c", "d", "e", "f", "g", "_"],
            7,
            {"pad_token": ...},
            [*"abcdefg"],
            [7, None, None, None, *range(7)],
        ),
        # config.json leaves it to the tokenizer
        (["a", "b", "c", "d", "e", "f", "g", "_"], None, {"pad_token": "_"}, [*"abcdefg"], [7, *[None] * 3, *range(7)]),
        # the tokenizer has no sentence boundaries, the vocabulary has
        (
            ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c"],
            0,
            {"bos_token": None, "eos_token": None},
            ["|", "a", "b", "c"],
            list(range(8)),
        ),
    ],
)
def test_rows_follow_their_symbols(symbols, pad, names, labels, sources, folder):
    before = load_file(folder / "model.safetensors")
    spell(folder, symbols, pad, **names)
    contents = load_any(folder)
    assert contents.labels == (*SPECIAL_SYMBOLS, *labels)
    weight, bias = contents.weights["proj.weight"], contents.weights["proj.bias"]
    for row, source in enumerate(sources):
        expected = torch.zeros(24) if source is None else before["lm_head.weight"][source]
        assert torch.equal(weight[row], expected)
        assert bias[row] == (-1e4 if source is None else before["lm_head.bias"][source])
    # made-up rows stay when such a model is written
    huggingface.write(folder / "again", contents)
    again = load_any(folder / "again")
    assert (again.labels, again.num_symbols) == (contents.labels, contents.num_symbols)
    assert torch.equal(again.weights["proj.bias"], bias)


def test_added_tokens_name_rows_behind_the_vocabulary(folder):
    spell(folder, ["a", "b", "c", "d", "|", "[PAD]"], 5, pad_token="[PAD]")
    refused(folder, "rows 6, 7 of its output layer have no symbol")
    change(folder / "added_tokens.json", **{"<s>": 6, "</s>": 7, "beyond": 8})
    contents = load_any(folder)
    assert contents.labels == (*SPECIAL_SYMBOLS, "a", "b", "c", "d", "|")
    assert any("no rows for the symbols 'beyond'" in remark for remark in contents.remarks)
    (folder / "added_tokens.json").unlink()
    decoder = {str(row): {"content": symbol} for row, symbol in ((5, "[PAD]"), (6, "<s>"), (7, "</s>"))}
    change(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert load_any(folder).labels == contents.labels


@pytest.mark.parametrize(
    ("symbols", "pad", "names", "words"),
    [
        (["<pad>", "a", "b", "c", "d", "e"], 0, {}, ["rows 6, 7", "no symbol"]),
        ([*"abcdefgh"], 0, {"pad_token": "h"}, ["row 0 ('a')", "'h'", "correct the wrong one"]),
        ([*"abcdefg", "<pad>"], 0, {"pad_token": ...}, ["row 0 ('a')", "'<pad>'"]),
        ([*"abcdefgh"], 0, {}, ["row 0 ('a')", "'<pad>'"]),
        ([*"abcdefg", "<pad>"], 8, {}, ["pad_token_id 8", "not a row", "8"]),
        ([*"abcdefg", "<pad>"], "7", {}, ["pad_token_id '7'", "not a row"]),
        (["<pad>", "a b", *"abcdef"], 0, {}, ["white space"]),
        ([*"abcdefgh"], None, {}, ["pad_token_id None"]),
        (["<pad>", " ", "|", *"abcde"], 0, {"word_delimiter_token": " "}, ["'|' would name two rows"]),
        (["[PAD]", "<pad>", *"abcdef"], 0, {"pad_token": "[PAD]"}, ["'<pad>' would name two rows"]),
        (["<pad>", "[UNK]", "<unk>", *"abcde"], 0, {"unk_token": "[UNK]"}, ["'<unk>' would name two rows"]),
    ],
)
def test_vocabularies_that_cannot_be_told_are_refused(symbols, pad, names, words, folder):
    spell(folder, symbols, pad, **names)
    refused(folder, *words)


def test_two_symbols_of_one_row_are_refused(folder):
    change(folder / "vocab.json", new=5)
    refused(folder, "row 5 is both", "'E'", "'new'")
    change(folder / "vocab.json", new={"eng": 5})
    refused(folder, "vocab.json: is not a table of symbols and their rows: 'new'")


@pytest.mark.parametrize(
    "settings", [{"do_lower_case": True}, {"replace_word_delimiter_char": ""}, {"tokenizer_class": "Wav2Vec2PhonemeX"}]
)
def test_other_ways_to_make_text_are_told(settings, folder):
    change(folder / "tokenizer_config.json", **settings)
    (remark,) = load_any(folder).remarks
    assert remark.startswith(next(iter(settings)))


def test_without_a_vocabulary_the_blank_comes_first_and_nothing_is_named(folder):
    (folder / "vocab.json").unlink()
    contents = load_any(folder)
    rows = load_file(folder / "model.safetensors")["lm_head.bias"]
    assert (contents.labels, contents.remarks) == (None, ())
    assert torch.equal(contents.weights["proj.bias"], rows)
    change(folder / "config.json", pad_token_id=6)
    change(folder / "tokenizer_config.json", pad_token=...)
    contents = load_any(folder)
    assert torch.equal(contents.weights["proj.bias"], rows[[6, 0, 1, 2, 3, 4, 5, 7]])
    assert contents.labels is None
    assert "row 6" in contents.remarks[0]


def test_the_files_of_a_folder_stand_for_it(folder):
    for name in ("config.json", "model.safetensors"):
        assert huggingface.folder_of(folder / name) == folder
    for name in ("model.pt", "model_best.safetensors", "vocab.json", "wav2vec2_best.pt"):
        assert huggingface.folder_of(folder / name) is None
    (folder / "config.json").unlink()
    assert huggingface.folder_of(folder) is None


def test_numbers_of_an_official_model_are_read_as_what_they_are():
    """The published config.json of the Base model, as far as it tells the architecture."""
    official = {
        "architectures": ["Wav2Vec2ForCTC"],
        "model_type": "wav2vec2",
        "conv_dim": [512] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "hidden_dropout_prob": 0.1,
        "feat_extract_dropout": 0.0,
        "gradient_checkpointing": False,
        "layer_norm_eps": 1e-05,
        "transformers_version": "4.7.0.dev0",
    }
    config, _ = huggingface_config.to_config(
        "here", "finetune", official, {"do_normalize": True, "sampling_rate": 16000}
    )
    ours = Config(mode="finetune").model
    assert config.model == replace(ours, normalize=True)
