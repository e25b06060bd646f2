"""Folders of transformers against transformers itself: the same numbers and the same text, in both directions."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from tiny_model import LARGE, MODEL, NO_DROPOUT  # noqa: E402

from common.data.audio import normalize  # noqa: E402
from common.data.masking import SpanMasking, span_mask  # noqa: E402
from common.labels import SPECIAL_SYMBOLS, Dictionary  # noqa: E402
from wav2vec2 import decoding  # noqa: E402
from wav2vec2.config import Config, MaskConfig  # noqa: E402
from wav2vec2.convert import huggingface, huggingface_config  # noqa: E402
from wav2vec2.convert.contents import Contents  # noqa: E402
from wav2vec2.convert.load_any import load_any  # noqa: E402
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model  # noqa: E402

BASE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 10,
    "codevector_dim": 12,
    "proj_codevector_dim": 12,
    "vocab_size": 9,
}
BIG = {**BASE, "feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
ARCHITECTURES = {
    "base": BASE,
    "large": BIG,
    "equal widths": {**BASE, "hidden_size": 16},
    "odd kernel, other targets": {
        **BIG,
        "num_conv_pos_embeddings": 7,
        "codevector_dim": 20,
        "num_codevector_groups": 4,
    },
    "pre-LN, group norm": {**BASE, "do_stable_layer_norm": True, "conv_bias": True},
    "post-LN, layer norms": {**BASE, "feat_extract_norm": "layer", "num_attention_heads": 1},
}
OURS = {
    "base": MODEL,
    "large": LARGE,
    "equal widths, no projection": replace(MODEL, encoder_embed_dim=16),
    "equal widths, projection": replace(MODEL, encoder_embed_dim=16, feature_projection="always"),
    "odd kernel, other targets": replace(LARGE, conv_pos=7, latent_dim=20, latent_groups=4),
    "pre-LN, group norm": replace(MODEL, layer_norm_first=True, conv_bias=True, normalize=True, sample_rate=8000),
}
CLASSES = ("Wav2Vec2Model", "Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC")
LABELS = (*SPECIAL_SYMBOLS, "|", "E", "T", "A", "O'", ".")
SIZES = [(1, 4000), (2, 5520), (3, 3333)]  # 12, 17 and 10 frames
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest entry


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


@torch.no_grad()
def shaken(model, seed=0):
    """With every parameter moved, so that none is where its initialisation would put it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def their_model(kind="Wav2Vec2ForCTC", options=BASE, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return shaken(getattr(transformers, kind)(transformers.Wav2Vec2Config(**options)).to(dtype), seed)


def our_model(contents: Contents):
    """Our model with exactly the weights of the contents, in their type."""
    model_config, weights = contents.config.model, contents.weights
    if contents.config.mode == "finetune":
        model = Wav2Vec2Ctc(model_config, NO_DROPOUT, num_symbols=contents.num_symbols)
    else:
        has_heads = any(name.startswith("quantizer") for name in weights)
        model = Wav2Vec2Model(model_config, NO_DROPOUT, pretraining=has_heads)
    model.to(next(iter(weights.values())).dtype).load_state_dict(dict(weights))
    return model.eval()


def our_contents(mode: str, model=MODEL, dtype=torch.float32, seed=0, **sections) -> Contents:
    torch.manual_seed(seed)
    made = Wav2Vec2Model(model, NO_DROPOUT)
    labels = None
    if mode == "finetune":
        made, labels = Wav2Vec2Ctc(model, NO_DROPOUT, num_symbols=len(LABELS)), LABELS
    weights = {name: tensor.detach() for name, tensor in shaken(made.to(dtype), seed).state_dict().items()}
    return Contents("native", Config(mode=mode, model=model, **sections), weights, labels)


def waveform(rows: int, samples: int, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Recorded:
    """The outputs of every transformer layer and of the quantizer's projection, while a model runs."""

    def __init__(self, model, trunk):
        self.layers: list[Tensor] = []
        self.code_logits: list[Tensor] = []
        self.handles = [layer.register_forward_hook(self._layer) for layer in trunk.encoder.layers]
        if hasattr(model, "quantizer"):
            self.handles.append(model.quantizer.weight_proj.register_forward_hook(self._codes))

    def _layer(self, module, inputs, output):
        self.layers.append(output[0] if isinstance(output, tuple) else output)

    def _codes(self, module, inputs, output):
        self.code_logits.append(output)

    def close(self):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def their_numbers(model, audio_BS, mask_BT=None, lengths=None) -> dict[str, Tensor]:
    trunk = getattr(model, "wav2vec2", model)
    attention = None if lengths is None else (torch.arange(audio_BS.shape[1]) < torch.tensor(lengths)[:, None]).long()
    recorded = Recorded(model, trunk)
    # the mask is given to the trunk: Wav2Vec2ForCTC itself does not take one
    inner = trunk(audio_BS, attention_mask=attention, mask_time_indices=mask_BT)
    layers = list(recorded.layers)
    found = {"last": inner.last_hidden_state, "features": inner.extract_features}
    found |= {f"layer {i}": layer for i, layer in enumerate(layers)}
    if hasattr(model, "lm_head"):
        found["logits"] = model.lm_head(inner.last_hidden_state)
        if mask_BT is None:
            assert torch.equal(found["logits"], model(audio_BS, attention_mask=attention).logits)
    if hasattr(model, "quantizer"):
        outer = model(audio_BS, attention_mask=attention, mask_time_indices=mask_BT)
        (logits,) = recorded.code_logits
        groups = model.quantizer.num_groups
        found["codes"] = logits.unflatten(-1, (groups, -1)).argmax(-1).flatten(0, -2)
        found["projected"], found["targets"] = outer.projected_states, outer.projected_quantized_states
    recorded.close()
    return found


@torch.no_grad()
def our_numbers(model, audio_BS, mask_BT=None, lengths=None) -> dict[str, Tensor]:
    trunk = getattr(model, "w2v", model)
    recorded = Recorded(torch.nn.Identity(), trunk)
    lengths_B = None if lengths is None else torch.tensor(lengths)
    encoded = trunk(audio_BS, lengths_B, mask_BT=mask_BT)
    recorded.close()
    found = {"last": encoded.x, "features": encoded.features_BTC}
    found |= {f"layer {i}": layer for i, layer in enumerate(recorded.layers)}
    if hasattr(model, "proj"):
        found["logits"] = model.proj(encoded.x)
    if hasattr(model, "quantizer"):
        targets_RF, quantized = model.quantize(encoded.features_BTC.flatten(0, 1))
        found["codes"] = quantized.codes_RG
        found["projected"] = model.final_proj(encoded.x)
        found["targets"] = targets_RF.view_as(found["projected"])
    return found


def assert_same(theirs: dict[str, Tensor], ours: dict[str, Tensor], valid_BT=None):
    """Codes are equal, everything else is within rounding; with `valid_BT` only those frames count."""
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert got.dtype == expected.dtype
        if name == "codes":
            keep = slice(None) if valid_BT is None else valid_BT.flatten()
            assert torch.equal(expected[keep], got[keep])
            assert len(expected[keep].unique()) > 1
            continue
        if valid_BT is not None:
            expected, got = expected[valid_BT], got[valid_BT]
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[got.dtype] * float(expected.abs().max()))


def check_models(theirs, ours, dtype=torch.float32):
    for seed, (rows, samples) in enumerate(SIZES):
        audio_BS = waveform(rows, samples, dtype, seed)
        assert_same(their_numbers(theirs, audio_BS), our_numbers(ours, audio_BS))
    frames = getattr(ours, "w2v", ours).num_frames(samples)
    mask_BT = torch.arange(rows * frames).view(rows, frames) % 3 == 0
    assert_same(their_numbers(theirs, audio_BS, mask_BT), our_numbers(ours, audio_BS, mask_BT))


def saved_vocabulary(folder: Path, symbols, **names):
    """A tokenizer, saved by transformers, with symbols in order of their rows."""
    (folder / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(symbols)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---- The same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_folder_of_transformers_gives_the_same_numbers_here(name, kind, dtype, tmp_path):
    theirs = their_model(kind, ARCHITECTURES[name], dtype)
    theirs.save_pretrained(tmp_path)
    contents = load_any(tmp_path)
    assert (contents.source, contents.config.mode) == ("huggingface", "finetune" if "CTC" in kind else "pretrain")
    assert {tensor.dtype for tensor in contents.weights.values()} == {dtype}
    check_models(theirs, our_model(contents), dtype)


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_folder_written_here_gives_the_same_numbers_in_transformers(name, mode, dtype, tmp_path):
    contents = our_contents(mode, OURS[name], dtype)
    theirs = written_and_loaded(contents, tmp_path / "out")
    assert theirs.dtype == dtype
    if mode == "pretrain":  # transformers itself holds the codebook in float32, whatever it is asked for
        theirs.quantizer.codevectors.data = load_file(tmp_path / "out/model.safetensors")["quantizer.codevectors"]
    check_models(theirs, our_model(contents), dtype)


def written_and_loaded(contents, folder):
    huggingface.write(folder, contents)
    classes = {"pretrain": transformers.Wav2Vec2ForPreTraining, "finetune": transformers.Wav2Vec2ForCTC}
    kind = classes[contents.config.mode]
    if "final_proj.weight" not in contents.weights and contents.config.mode == "pretrain":
        kind = transformers.Wav2Vec2Model
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


def test_a_trunk_alone_is_written_as_one(tmp_path):
    contents = our_contents("pretrain")
    heads = ("quantizer", "project_q", "final_proj")
    trunk = {name: tensor for name, tensor in contents.weights.items() if not name.startswith(heads)}
    theirs = written_and_loaded(replace(contents, weights=trunk), tmp_path / "out")
    again = load_any(tmp_path / "out")
    assert_identical(again.weights, trunk)
    check_models(theirs, our_model(again))


@pytest.mark.parametrize("name", ["base", "large"])
def test_padded_rows_are_the_same(name, tmp_path):
    """Both leave padding to the group norm here: it counts for transformers, and for us without norm_lengths."""
    theirs = their_model("Wav2Vec2ForPreTraining", ARCHITECTURES[name])
    theirs.save_pretrained(tmp_path)
    ours = our_model(load_any(tmp_path))
    lengths, audio_BS = [4400, 2900, 3000], waveform(3, 4400)
    for row, length in zip(audio_BS, lengths, strict=True):
        row[length:] = 0
    valid_BT = torch.arange(ours.num_frames(4400)) < torch.tensor([[ours.num_frames(n)] for n in lengths])
    mask_BT = torch.zeros_like(valid_BT)
    mask_BT[:, 2:5] = True
    for mask in (None, mask_BT):
        theirs_found = their_numbers(theirs, audio_BS, mask, lengths)
        assert_same(theirs_found, our_numbers(ours, audio_BS, mask, lengths), valid_BT)


# ---- Files ---------------------------------------------------------------------------------------------------------


def assert_identical(some, others):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def old_spelling(state):
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = dict(state)
    for long, short in names.items():
        renamed = {name.replace(long, short): tensor for name, tensor in renamed.items()}
    assert renamed.keys() != state.keys()
    return renamed


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_other_files_and_older_spellings_hold_the_same(kind, tmp_path):
    theirs = their_model("Wav2Vec2ForPreTraining", BIG)
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    expected = load_any(tmp_path / "plain")
    folder = tmp_path / "sharded"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    if kind == "bin":
        for shard in shards:
            name = f"pytorch_{shard.stem}.bin"
            torch.save(load_file(shard), folder / name)
            shard.unlink()
        index = (folder / "model.safetensors.index.json").rename(folder / "pytorch_model.bin.index.json")
        index.write_text(index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
    assert_identical(load_any(folder).weights, expected.weights)

    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(old_spelling(theirs.state_dict()), single / "pytorch_model.bin")
    for path in (single, single / "pytorch_model.bin", single / "config.json"):
        assert_identical(load_any(path).weights, expected.weights)
        assert load_any(path).config == expected.config


def test_half_precision_stays_what_it_is(tmp_path):
    their_model(dtype=torch.float16).save_pretrained(tmp_path / "theirs")
    saved_vocabulary(tmp_path / "theirs", ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAO"])
    contents = load_any(tmp_path / "theirs")
    assert {tensor.dtype for tensor in contents.weights.values()} == {torch.float16}
    huggingface.write(tmp_path / "ours", contents)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    both = [load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours")]
    assert_identical(old_spelling(both[0]), both[1])
    model = transformers.AutoModelForCTC.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.float16


def test_mixed_types_are_loaded_in_the_widest(tmp_path):
    contents = our_contents("finetune", dtype=torch.float16)
    contents.weights["w2v.layer_norm.weight"] = contents.weights["w2v.layer_norm.weight"].float() * (1 + 1e-5)
    model = written_and_loaded(contents, tmp_path / "out")
    assert model.dtype == torch.float32
    assert_identical(load_any(tmp_path / "out").weights, contents.weights)
    loaded = model.wav2vec2.feature_projection.layer_norm.weight
    assert torch.equal(loaded, contents.weights["w2v.layer_norm.weight"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_read_and_written_again_is_the_same_model_to_transformers(name, tmp_path):
    theirs = their_model("Wav2Vec2ForPreTraining", ARCHITECTURES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    again = written_and_loaded(load_any(tmp_path / "theirs"), tmp_path / "ours")
    assert_identical(again.state_dict(), theirs.state_dict())
    options, other = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    # those of the class itself, not of versions and of heads that neither side has
    differing = {name for name in other if name != "torch_dtype" and other[name] != options[name]}
    assert differing == {"ctc_zero_infinity"}


def test_options_are_kept_both_ways(tmp_path):
    mask = MaskConfig(mask_prob=0.3, mask_length=5, mask_channel_prob=0.2, mask_channel_length=3)
    contents = our_contents("pretrain", replace(LARGE, latent_dim=20), mask=mask)
    dropouts = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "dropout_input")
    dropout = {name: (i + 1) / 16 for i, name in enumerate((*dropouts, "dropout_features", "final_dropout"))}
    objective = replace(contents.config.objective, num_negatives=7, logit_temp=0.2, loss_weights=(0.7, 10.0))
    config = replace(contents.config, dropout=replace(contents.config.dropout, **dropout), objective=objective)
    model = written_and_loaded(replace(contents, config=config), tmp_path / "out").config
    assert load_any(tmp_path / "out").config == config
    assert (model.mask_time_prob, model.mask_time_length, model.apply_spec_augment) == (0.3, 5, True)
    assert (model.mask_feature_prob, model.mask_feature_length) == (0.2, 3)
    found = [model.hidden_dropout, model.attention_dropout, model.activation_dropout, model.layerdrop]
    found += [model.feat_proj_dropout, model.feat_quantizer_dropout, model.final_dropout]
    assert found == list(dropout.values())
    assert (model.num_negatives, model.contrastive_logits_temperature, model.diversity_loss_weight) == (7, 0.2, 0.7)


def test_options_that_a_folder_does_not_tell_are_those_of_transformers():
    theirs = transformers.Wav2Vec2Config()
    plain = json.loads(json.dumps(theirs.to_dict()))
    expected, _ = huggingface_config.to_config(
        "here", "finetune", plain, {"do_normalize": True, "sampling_rate": 16000}
    )
    found, remarks = huggingface_config.to_config("here", "finetune", {}, {})
    assert found == expected
    assert len(remarks) == 2
    audio = transformers.Wav2Vec2FeatureExtractor()
    assert (found.model.normalize, found.model.sample_rate) == (audio.do_normalize, audio.sampling_rate)


@pytest.mark.parametrize(("time", "channels"), [(0.0, 0.0), (0.0, 0.5), (0.4, 0.0)])
def test_the_mask_embedding_is_there_whether_masks_are_on_or_off(time, channels, tmp_path):
    contents = our_contents("finetune", mask=MaskConfig(mask_prob=time, mask_channel_prob=channels))
    model = written_and_loaded(contents, tmp_path / "out")
    assert torch.equal(model.wav2vec2.masked_spec_embed, contents.weights["w2v.mask_emb"])
    found = load_any(tmp_path / "out").config.mask
    assert (found.mask_prob, found.mask_channel_prob) == (time, channels)
    assert model.config.apply_spec_augment == (time + channels > 0)


def test_a_model_without_mask_embedding_has_none_in_transformers_either(tmp_path):
    off = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    their_model("Wav2Vec2ForPreTraining", {**BASE, **off}).save_pretrained(tmp_path / "theirs")
    contents = load_any(tmp_path / "theirs")
    assert "mask_emb" not in contents.weights
    assert "mask embedding" in contents.missing
    written_and_loaded(contents, tmp_path / "ours")
    # ... nor where our configuration would mask
    config = replace(contents.config, mask=MaskConfig())
    written_and_loaded(replace(contents, config=config), tmp_path / "again")


def test_their_share_of_masked_frames_is_ours():
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    np.random.seed(0)  # noqa: NPY002 - theirs draws from the global generator
    theirs = np.mean([_compute_mask_indices((8, 400), 0.65, 10, min_masks=2).mean() for _ in range(30)])
    masking = SpanMasking(prob=0.65, length=10, require_same_masks=False)
    rng = np.random.default_rng(0)
    ours = np.mean([span_mask([400] * 8, 400, masking, rng).mean() for _ in range(30)])
    assert ours == pytest.approx(theirs, abs=0.01)  # of about a half: overlaps count once


# ---- Text ----------------------------------------------------------------------------------------------------------


def transcribed(folder: Path, audio: np.ndarray, **parts) -> str:
    """What a user of transformers gets."""
    recognise = transformers.pipeline("automatic-speech-recognition", model=str(folder), **parts)
    return recognise(audio)["text"]


def our_text(contents: Contents, audio: np.ndarray) -> str:
    wave = normalize(audio) if contents.config.model.normalize else audio
    with torch.no_grad():
        logits_BTK, _ = our_model(contents)(torch.from_numpy(wave)[None])
    ids, _ = decoding.greedy(logits_BTK, [logits_BTK.shape[1]])
    return Dictionary.from_symbols(contents.labels).decode(ids[0])


def talkative(contents: Contents) -> Contents:
    """With an output layer that gives every symbol its turn, but never a special one."""
    audio_BS = waveform(1, 60000)
    trunk = our_model(contents).w2v
    with torch.no_grad():
        frames_TD = trunk(audio_BS).x[0]
    weight = contents.weights["proj.weight"]
    weight = weight / (frames_TD @ weight.T).std(0)[:, None]
    bias = -(frames_TD @ weight.T).mean(0)
    bias[1:4] = -1e3
    return replace(contents, weights={**contents.weights, "proj.weight": weight, "proj.bias": bias})


@pytest.mark.parametrize("name", ["base", "large"])
def test_a_pipeline_gives_our_text(name, tmp_path):
    contents = talkative(our_contents("finetune", OURS[name]))
    huggingface.write(tmp_path / "out", contents)
    audio = waveform(1, 60000)[0].numpy()
    text = our_text(contents, audio)
    assert len(text) > 20
    assert {" ", "O", "'"} <= set(text)
    assert " ." in text  # which clean_up_tokenization_spaces would change
    assert transcribed(tmp_path / "out", audio) == text
    assert our_text(load_any(tmp_path / "out"), audio) == text


@pytest.mark.parametrize("name", ["base", "large"])
def test_their_processor_prepares_audio_as_we_do(name, tmp_path):
    contents = our_contents("finetune", OURS[name])
    huggingface.write(tmp_path / "out", contents)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, transformers.Wav2Vec2Processor)
    audio = (0.2 * waveform(1, 4000)[0] + 0.3).numpy()
    found = processor(audio, sampling_rate=16000)
    expected = normalize(audio) if contents.config.model.normalize else audio
    # theirs adds 1e-7 to the variance, the original implementation and we 1e-5
    tolerance = 2e-4 if contents.config.model.normalize else 0
    np.testing.assert_allclose(found["input_values"][0], expected, rtol=tolerance, atol=tolerance / 100)
    assert ("attention_mask" in found) == (contents.config.model.extractor_mode == "layer_norm")
    tokenizer = processor.tokenizer
    assert len(tokenizer) == len(LABELS)
    assert tokenizer("TEA TEA").input_ids == [6, 5, 7, 4, 6, 5, 7]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_a_folder_of_the_community_gives_the_same_text_and_probabilities(tmp_path):
    """Special symbols at the end, two of them added, another word delimiter, lower-case letters."""
    symbols = ["a", "b", "-", "c", "é", "[UNK]", "[PAD]"]
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "word_delimiter_token": "-"}
    tokenizer = saved_vocabulary(tmp_path, symbols, **names)
    theirs = their_model(options={**BASE, "vocab_size": 9, "pad_token_id": 6})
    with torch.no_grad():
        theirs.lm_head.weight *= 10
        theirs.lm_head.bias[[5, 7, 8]] = -1e3
    theirs.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    assert "<s>" in json.loads((tmp_path / "added_tokens.json").read_text())

    contents = load_any(tmp_path)
    assert contents.labels == (*SPECIAL_SYMBOLS, "a", "b", "|", "c", "é")
    audio_BS = waveform(1, 60000)
    with torch.no_grad():
        expected = theirs(audio_BS).logits.log_softmax(-1)
        found = our_model(contents)(audio_BS)[0].log_softmax(-1)
    order = [6, 7, 8, 5, 0, 1, 2, 3, 4]
    torch.testing.assert_close(found, expected[..., order], rtol=1e-5, atol=1e-4)
    text = our_text(contents, audio_BS[0].numpy())
    assert {" ", "é"} <= set(text)
    # the tokenizer itself: version 5 of transformers forgets another word delimiter when it loads one
    assert transcribed(tmp_path, audio_BS[0].numpy(), tokenizer=tokenizer) == text

    huggingface.write(tmp_path / "again", contents)
    assert transcribed(tmp_path / "again", audio_BS[0].numpy()) == text
    again = load_any(tmp_path / "again")
    assert again.labels == contents.labels
    assert_identical(again.weights, contents.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_rows_that_are_made_up_change_no_probability(dtype, tmp_path):
    symbols = ["|", "x", "y", "[PAD]"]
    saved_vocabulary(tmp_path, symbols, pad_token="[PAD]", bos_token=None, eos_token=None, unk_token=None)
    theirs = their_model(options={**BASE, "vocab_size": 4, "pad_token_id": 3}, dtype=dtype)
    theirs.save_pretrained(tmp_path)
    contents = load_any(tmp_path)
    assert contents.labels == (*SPECIAL_SYMBOLS, "|", "x", "y")
    assert_identical(
        {"rows": contents.weights["proj.weight"][[0, 4, 5, 6]], "bias": contents.weights["proj.bias"][[0, 4, 5, 6]]},
        {"rows": theirs.lm_head.weight[[3, 0, 1, 2]], "bias": theirs.lm_head.bias[[3, 0, 1, 2]]},
    )
    frames_TD = 5 * torch.randn(50, BASE["hidden_size"], generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        logits_TK = frames_TD @ contents.weights["proj.weight"].T + contents.weights["proj.bias"]
    found = logits_TK.log_softmax(-1)
    assert torch.equal(found[:, [0, 4, 5, 6]], logits_TK[:, [0, 4, 5, 6]].log_softmax(-1))
    assert found[:, 1:4].max() < -9000
