"""A checkpoint of any program, whatever was done to it, is read or refused in one line; it never runs or costs much.

Every test makes a file out of an honest one of fairseq, NVIDIA or this toolkit, and load_any() reads it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import copy
import os
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import pytest
import torch
from hostile_files import Call, Named, pickled, records_of, text, write_records
from tiny_contents import adam, finetuned, pretrained

from common import checkpoint
from common.errors import UserError
from common.torch_file import PickledCodeError
from wav2vec2.config import ModelConfig
from wav2vec2.convert import fairseq, native, nvidia
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.load_any import load_any

TINY = ModelConfig(
    conv_feature_layers="[(4,3,2)]*2",
    encoder_layers=1,
    encoder_embed_dim=8,
    encoder_ffn_embed_dim=8,
    encoder_attention_heads=2,
    conv_pos=4,
    conv_pos_groups=2,
    final_dim=4,
    latent_vars=3,
    latent_groups=2,
)
SCALER = {"scale": 2.0, **dict.fromkeys(("num_skipped", "since_overflow", "since_change", "overflows_since_change"), 0)}
KINDS: dict[str, Callable[[Contents], dict[str, Any]]] = {
    "fairseq": lambda contents: fairseq.to_content(contents, "data"),
    "nvidia": nvidia.to_content,
    "native": lambda contents: checkpoint.file_content(native.to_state(contents)),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_MODE = pytest.mark.parametrize("make", [pretrained, finetuned])
EACH_LAYOUT = pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])


@cache
def contents_of(make: Callable[..., Contents]) -> Contents:
    contents = make(TINY, step=4, best=2.5, loader={"epoch": 3, "position": 0})
    averaged = {name: tensor + 1 for name, tensor in contents.weights.items()}
    return replace(contents, optimizer=adam(dict(contents.weights), 4), averaged=averaged, scaler=SCALER)


@cache
def honest(kind: str, make: Callable[..., Contents] = pretrained) -> dict[str, Any]:
    return KINDS[kind](contents_of(make))


def read(path: Path) -> Contents | UserError:
    """Contents or an error of one line, soon and with little memory; any other exception is one of the test."""
    found = hostile_files.outcome(path, load_any)
    assert isinstance(found, (Contents, UserError))
    return found


def refused(path: Path, message: str, kind: type[UserError] = UserError) -> None:
    found = read(path)
    assert isinstance(found, kind), found
    with pytest.raises(kind, match=message):
        raise found


def changed(node: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at one place."""
    if not place:
        return value
    node = list(node) if isinstance(node, tuple) else copy.copy(node)
    if isinstance(node, argparse.Namespace):
        setattr(node, place[0], value)
    else:
        node[place[0]] = changed(node[place[0]], place[1:], value) if len(place) > 1 else value
    return node


@EACH_LAYOUT
@EACH_MODE
@EACH_KIND
def test_the_honest_file_is_read(tmp_path, kind, make, old):
    """Without this one, everything below could be refused for another reason than the one that counts."""
    hostile_files.save(honest(kind, make), tmp_path / "a.pt", old=old)
    found = read(tmp_path / "a.pt")
    expected = contents_of(make)
    assert isinstance(found, Contents)
    assert (found.source, found.config.mode, found.step, found.best) == (kind, expected.config.mode, 4, 2.5)
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor)
        assert torch.equal(found.averaged[name], tensor + 1)
        assert torch.equal(found.optimizer[name]["exp_avg"], expected.optimizer[name]["exp_avg"])
    assert (found.scaler, found.epoch) == (SCALER, 3)


# ---- Code -----------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@EACH_LAYOUT
@EACH_KIND
def test_pickled_code_is_never_executed(tmp_path, kind, old, protocol):
    mark, path = tmp_path / "executed", tmp_path / "a.pt"
    content = honest(kind)
    places = {
        "fairseq": [("cfg", "model"), ("model",), ("extra_state", "x"), ("x",)],
        "nvidia": [("args", "mode"), ("optimizer", "x"), ("train_state",), ("x",)],
        "native": [("config", "model"), ("format",), ("loader",), ("x",)],
    }
    calls = [Payload(os.system, f"touch {mark}"), Payload(eval, f"open({str(mark)!r}, 'w')"), Payload(Path.touch, mark)]
    message = "holds pickled code .* never executed" if protocol == 2 or not old else "is a pickle that torch.save"
    for place in places[kind]:
        for call in calls:
            torch.save(
                changed(content, place, call),
                path,
                pickle_protocol=protocol,
                _use_new_zipfile_serialization=not old,
            )
            refused(path, message)
    assert not mark.exists()


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A class of fairseq that does harm in every way that a class can, and could be imported when the file is read."""
    mark = tmp_path / "executed"

    class Evil:
        armed = False

        def __new__(cls, *_: Any) -> Any:
            if cls.armed:
                mark.touch()
            return super().__new__(cls)

        def __reduce__(self) -> Any:
            return Evil, ("argument",), {"state": 1}

        def __setstate__(self, state: Any) -> None:
            mark.touch()

        def __del__(self) -> None:
            if self.armed:
                mark.touch()

        def __eq__(self, other: object) -> bool:
            mark.touch()
            return True

        def __hash__(self) -> int:
            return 0

    module = types.ModuleType("fairseq.evil")
    module.Evil = Evil
    Evil.__module__, Evil.__qualname__ = "fairseq.evil", "Evil"
    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.evil", module)
    return Evil, mark


@EACH_LAYOUT
@EACH_KIND
def test_a_class_of_an_allowed_package_is_not_made(tmp_path, kind, old, evil):
    harm, mark = evil
    for place in (("x",), ("model",), ("optimizer",), ("cfg",), ("args",)):
        torch.save(
            changed(honest(kind), place, [harm(), {"inner": harm()}]),
            tmp_path / "a.pt",
            _use_new_zipfile_serialization=not old,
        )
        harm.armed = True
        read(tmp_path / "a.pt")
        harm.armed = False
    assert not mark.exists()


INERT = [  # stand-ins take their places
    *(
        "fairseq.evil.Evil",
        "fairseq.../../os.system",
        "fairseq.x.__import__",
        "omegaconf.OmegaConf.register_new_resolver",
    ),
    *("typing.get_type_hints", "typing.sys", "builtins.object", "builtins.dict", "argparse.Namespace"),
]
REFUSED = [
    *("torch.hub.load", "torch.load", "torch.serialization.add_safe_globals", "torch.storage._load_from_bytes"),
    *("torch.jit.load", "torch.package.PackageImporter", "torch.utils.cpp_extension.load", "torch.Size"),
    *("collections.Counter", "collections.defaultdict.x", "builtins.getattr", "builtins.__import__", "builtins.exec"),
    *("builtins.type", "builtins.bytearray", "builtins.range", "builtins.globals", "os.system", "nt.system"),
    *("subprocess.Popen", "shutil.rmtree", "runpy.run_path", "importlib.import_module", "pickle.loads", "pty.spawn"),
    *("numpy.core.multiarray._reconstruct", "numpy.load", "numpy.ndarray", "numpy.testing._private.utils.runstring"),
    *("functools.partial", "operator.attrgetter", "copyreg._reconstructor", "codecs.encode", "_codecs.decode"),
    *("hydra._internal.instantiate._instantiate2.instantiate", "fairseqx.A", "omegaconfig.A", "argparse.FileType"),
    "wav2vec2.convert.stand_ins.codecs.encode",
]


@EACH_LAYOUT
@pytest.mark.parametrize("name", [*INERT, *REFUSED])
def test_names_are_refused_or_stand_for_nothing(tmp_path, name, old):
    path, mark = tmp_path / "a.pt", tmp_path / "executed"
    module, _, attribute = name.rpartition(".")
    for call in (
        Call(Named(module, attribute), f"touch {mark}"),
        Call(Named(module, attribute), str(mark), state={"__class__": Named(module, attribute), "x": str(mark)}),
        Named(module, attribute),
    ):
        hostile_files.save({**honest("fairseq"), "x": call}, path, old=old)
        if name in REFUSED:
            refused(path, "holds pickled code", PickledCodeError)
        else:
            assert isinstance(read(path), Contents)
    assert not mark.exists()


@pytest.mark.parametrize("codec", ["punycode", "zip", "hex", "idna", "unicode_escape", "rot13", "../x", "utf-8"])
def test_text_is_encoded_by_one_codec_alone(tmp_path, codec):
    content = "".join(map(chr, range(256, 30_000)))
    hostile_files.save({**honest("nvidia"), "x": Call(Named("_codecs", "encode"), content, codec)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"holds pickled code \('_codecs.encode'\)")


NUMPY = Named("numpy.core.multiarray", "scalar")


def numpy_type(code: Any, state: Any = None) -> Call:
    return Call(Named("numpy", "dtype"), code, False, True, state=state or (3, "<", None, None, None, -1, -1, 0))


def data(content: bytes) -> Call:
    """Bytes, as protocol 2 spells them."""
    return Call(Named("_codecs", "encode"), content.decode("latin1"), "latin1")


def test_numbers_of_numpy_are_numbers(tmp_path):
    for value in (np.float64(0.125), np.float32(0.125), np.int64(3), np.bool_(True), np.uint8(7)):
        torch.save(changed(honest("nvidia"), ("train_state", "best_val_loss"), value), tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        assert isinstance(found, Contents)
        assert found.best == float(value)
    big_endian = Call(NUMPY, numpy_type("f8", (3, ">", None, None, None, -1, -1, 0)), data(b"\x3f\xc0" + bytes(6)))
    hostile_files.save(changed(honest("nvidia"), ("train_state", "best_val_loss"), big_endian), tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").best == 0.125


@pytest.mark.parametrize(
    "scalar",
    [
        *(
            Call(NUMPY, numpy_type(code), data(bytes(16)))
            for code in ("O", "O8", "V8", "U8", "S1", "M8", "m8", "c8", "b8")
        ),
        *(
            Call(NUMPY, numpy_type(code), data(bytes(16)))
            for code in ("f16", "f3", "", "i99999999", "f8,f8", 8, None, [1])
        ),
        Call(NUMPY, numpy_type("f8"), data(b"123")),
        Call(NUMPY, numpy_type("f8"), "12345678"),
        Call(NUMPY, numpy_type("f8")),
        Call(NUMPY, "f8", data(bytes(8))),
        Call(NUMPY),
        Call(NUMPY, numpy_type("f8", (3, ["<"])), [1.0]),
        Call(Named("numpy", "dtype")),
    ],
)
def test_odd_numbers_of_numpy_do_no_harm(tmp_path, scalar):
    hostile_files.save(changed(honest("nvidia"), ("train_state", "best_val_loss"), scalar), tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert isinstance(found, UserError) or found.best is None


# ---- Settings -------------------------------------------------------------------------------------------------------

CONV = [
    *("[(512,10,5)]*10**9", "[(1,2,3)]*100*100*100*100", "[(512,10,5)]*1000000000", "[(1,1,1)]+" * 10**5 + "[(1,1,1)]"),
    *("(" * 10**6, "[" * 10**6, "[(1,2,3)" + ")" * 10**5, "-" * 10**5 + "1", "lambda: 1", "__import__('os').abort()"),
    *("[(9" + "9" * 5000 + ",1,1)]", "[(99999999,3,2)]", "[(1e9,1,1)]", "[(-4,3,2)]", "[(4,3,2)]*-1", "[(True,3,2)]"),
    *("[(٤,3,2)]*2", "[(4,3,2)]\n*2", "", " ", "[]", "[(4,3,2)]*0", "f'{open}'", "[(4,3,2) for _ in range(9**9)]"),
    *("\ud800", "\0", "#" * 10**6, '"' * 10**6, "[(100000,100000,1)]*100", "x" * 10**6, "[(4,3,2)]*2 " + " " * 10**6),
]
HOURGLASS = [
    *(
        "[100,(300,2),100]",
        "[9999,(9999,2),9999]",
        "[1,(1,9999),1]",
        "[0,(1,0),0]",
        "[999999999,(1,2),1]",
        "[١,(1,2),1]",
        "[1,(1,2),1]\n",
    ),
    *("(" * 10**6, "[1,(1,2),1]" * 10**5, " " * 10**6, "__import__('os').abort()", "[-1,(1,2),1]", "\ud800\x1b[31m"),
]
SETTINGS: dict[str, list[Any]] = {
    "conv_feature_layers": [*CONV, [[4, 3, 2]], None, 7],
    "hourglass_transformer": [*HOURGLASS, [1, [1, 2], 1], True],
    "encoder_layers": [500, 10**9, 10**18, 2**63, -1, 0, 1.0, "1", None, True, [1], {"a": 1}, float("nan")],
    "encoder_embed_dim": [10**9, 2**62, 0, -8, "8", [8], 100_000],
    "encoder_ffn_embed_dim": [10**12, -1],
    "encoder_attention_heads": [0, 10**12, 3, -2],
    "conv_pos": [10**12, 0, 100_000],
    "conv_pos_groups": [10**12, 0, 3],
    "latent_vars": [10**12, 0, -5],
    "latent_groups": [10**12, 3],
    "latent_dim": [10**12, 2**63, -1, "x"],
    "final_dim": [10**12, 100_000, -1],
    "latent_temp": [
        "[1e999,1,1]",
        "(" * 10**6,
        "[" + "1," * 10**6 + "]",
        "[nan,1,1]",
        "(2,0.5",
        [[1]],
        3,
        {},
        ["x"] * 3,
    ],
    "loss_weights": ["[1e999,1]", "__import__('os')", [float("nan")], {"a": 1}, [1] * 10**5, "[1,2,3]", "", "[]"],
    "adam_betas": ["(1", [2**63, 1], None, "(0.9,0.98,0.1)"],
    "activation_fn": ["relu", ["gelu"], {"gelu": 1}, "gelu" * 10**5, "\n\n"],
    "mask_prob": [float("inf"), "0.5", -1, 2, [0.5]],
    "dropout": [1e308, float("nan"), None, "\x1b[31m"],
    "quantize_targets": [None, "false", 2, [], False],
    "lr": [[], ["x"], [[1]], float("inf"), "${optimizer.lr}", "${a.b}", "${" + "a." * 10**5 + "b}"],
    "max_update": [2**63, -1, "x", float("inf")],
    "sample_rate": [0, -1, 1e9, "16000"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_hostile_settings_are_refused_before_a_model_is_built_from_them(tmp_path, name):
    places = {"fairseq": ("cfg", "model"), "nvidia": ("args",), "native": ("config",)}
    for value in SETTINGS[name]:
        for kind, place in places.items():
            content = honest(kind)
            if kind == "native":
                place = next(((*place, key) for key, section in content["config"].items() if name in section), place)
            hostile_files.save(changed(content, (*place, name), value), tmp_path / "a.pt")
            found = read(tmp_path / "a.pt")
            if isinstance(found, Contents):  # it was of no consequence, or meant what is there
                assert found.weights.keys() == contents_of(pretrained).weights.keys()
                assert found.config.model == TINY


@pytest.mark.parametrize("kind", ["fairseq", "nvidia"])
@pytest.mark.parametrize(
    "name", ["loss_weights", "latent_temp", "final_dim", "adam_betas", "lr", "hourglass_transformer"]
)
def test_an_option_that_a_file_leaves_out_is_no_fault(tmp_path, kind, name):
    place = ("cfg", "model") if kind == "fairseq" else ("args",)
    content = honest(kind)
    hostile_files.save(changed(content, (*place, name), None), tmp_path / "a.pt")
    if name == "final_dim":  # is then the width of the transformer, and the weights say otherwise
        refused(tmp_path / "a.pt", "final_proj.weight")
    else:
        assert isinstance(read(tmp_path / "a.pt"), Contents)


@pytest.mark.parametrize("value", ["${a.b}", "${model.a}", "${model}", "${" + "model." * 10**4 + "a}", "${}", "${..}"])
def test_references_of_settings_do_not_run_in_circles(tmp_path, value):
    content = honest("fairseq")
    model = {**content["cfg"]["model"], "a": "${model.b}", "b": "${model.a}", "encoder_layers": value}
    hostile_files.save(changed(content, ("cfg", "model"), model), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "encoder_layers")


def holding(inner: Any, name: str = "omegaconf.dictconfig.DictConfig") -> Call:
    module, _, attribute = name.rpartition(".")
    return Call(Named(module, attribute), state={"_content": inner, "_val": inner, "_parent": None})


def test_containers_of_omegaconf_may_be_nested_and_shared_within_reason(tmp_path):
    path = tmp_path / "a.pt"
    content = honest("fairseq")
    section: Any = content["cfg"]["model"]
    for _ in range(20):
        section = holding(section)
    hostile_files.save(changed(content, ("cfg", "model"), section), path)
    assert isinstance(read(path), Contents)
    node: Any = {"a": 1}
    for _ in range(30):
        node = holding([node] * 10, "omegaconf.listconfig.ListConfig")
    for place in (("cfg", "x"), ("task_state",), ("args",)):
        hostile_files.save(changed(content, place, node), path)
        if place == ("args",):  # nobody looks at it beside cfg
            assert isinstance(read(path), Contents)
        else:
            refused(path, "nested or repeated without end")


def test_nodes_in_nodes_without_end_are_refused(tmp_path):
    """Deeper than Python could walk by calling itself."""
    names = text("class") + b"comegaconf.nodes\nAnyNode\nq\x01" + text("_val") + b"q\x02N"
    nodes = b"h\x01)R}h\x02" * 50_000 + b"N" + b"sb" * 50_000
    hostile_files.zip_of(tmp_path / "a.pt", pickled(b"}(" + names + text("model") + b"}" + text("cfg") + nodes + b"u"))
    refused(tmp_path / "a.pt", "nested or repeated without end")


def test_a_namespace_that_holds_itself_is_refused(tmp_path):
    for flat in (False, True):
        args = argparse.Namespace(arch="wav2vec2", conv_feature_layers=TINY.conv_feature_layers)
        args.own = args if not flat else [args]
        hostile_files.save({"args": args, "model": honest("fairseq")["model"]}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "nested or repeated without end")


@pytest.mark.parametrize("value", [None, [], "text", 7, torch.ones(3), [{"model": 1}], Named("fairseq.x", "Y")])
def test_settings_that_are_no_table_are_refused(tmp_path, value):
    content = honest("fairseq")
    for entry in ({"cfg": value}, {"args": value, "cfg": None}, {"cfg": {"model": value}}):
        hostile_files.save({**content, **entry}, tmp_path / "a.pt")
        assert isinstance(read(tmp_path / "a.pt"), UserError)


# ---- Weights, optimizer states, symbols -----------------------------------------------------------------------------

WEIGHTS: dict[str, Any] = {
    "list": lambda weights: list(weights.items()),
    "no tensors": lambda weights: dict.fromkeys(weights, 1.0),
    "numbers": lambda weights: {name: tensor.flatten()[0] for name, tensor in weights.items()},
    "transposed": lambda weights: {
        name: tensor.T if tensor.ndim == 2 else tensor[None] for name, tensor in weights.items()
    },
    "whole numbers": lambda weights: {name: tensor.long() for name, tensor in weights.items()},
    "empty": lambda weights: {name: torch.ones(10**12, 0) for name in weights},
    "expanded": lambda weights: {name: torch.ones(1).expand(tensor.shape) for name, tensor in weights.items()},
    "names": lambda weights: {f"{name}\n\x1b[31m": tensor for name, tensor in weights.items()},
    "long names": lambda weights: {name + "x" * 10**4: tensor for name, tensor in weights.items()},
    "numbered": lambda weights: dict(enumerate(weights.values())),
    "other layers": lambda weights: {name.replace(".0.", ".99999999999999999999."): t for name, t in weights.items()},
    "many": lambda weights: {**weights, **{f"{number}": torch.ones(1) for number in range(2000)}},
    "none": lambda weights: {},
}


@pytest.mark.parametrize("name", WEIGHTS)
@EACH_KIND
def test_weights_that_are_none_are_refused(tmp_path, kind, name):
    entries = {"fairseq": [("model",), ("extra_state", "ema")], "nvidia": [("model",), ("ema_model",)]}
    for place in entries.get(kind, [("model",), ("ema",)]):
        for make in (pretrained, finetuned):
            content = honest(kind, make)
            weights = content[place[0]] if len(place) == 1 else content[place[0]][place[1]]
            hostile_files.save(changed(content, place, WEIGHTS[name](weights)), tmp_path / "a.pt")
            found = read(tmp_path / "a.pt")
            if isinstance(found, Contents):
                assert found.averaged is None or place != ("model",)


OPTIMIZERS: dict[str, Any] = {
    "one vector": lambda n: {"state": {0: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n), "step": 1}}},
    "half a vector": lambda n: {"state": {0: {"exp_avg": torch.ones(n), "step": 1}}},
    "two vectors": lambda n: {"state": {0: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n - 1), "step": 1}}},
    "whole numbers": lambda n: {"state": {0: {m: torch.ones(n, dtype=torch.long) for m in ("exp_avg", "exp_avg_sq")}}},
    "scales": lambda n: {"state": {0: {"exp_avg": torch.ones(n), "exp_avg_scale": torch.ones(n, 1), "step": 1}}},
    "steps": lambda n: {"state": {0: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n), "step": torch.ones(3)}}},
    "infinite": lambda n: {"state": {0: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n), "step": float("inf")}}},
    "groups": lambda n: {
        "state": {0: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n)}},
        "param_groups": {"a": 1},
    },
    "numbers": lambda n: {"state": dict.fromkeys(range(9), 1)},
    "strange keys": lambda n: {"state": {"a": {}, -1: {}, 10**9: {}, None: {}, 1.5: {}}},
    "tensor": lambda n: {"state": torch.ones(3)},
    "list": lambda n: {"state": [{"exp_avg": torch.ones(n)}]},
    "empty": lambda n: {"state": {number: {} for number in range(9)}},
    "scaler": lambda n: {"loss_scale": torch.ones(3), "state": None},
    "negative scaler": lambda n: {"loss_scale": -1.0},
    "own tensor": lambda n: torch.ones(3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@EACH_KIND
def test_optimizer_states_of_nonsense_do_no_harm(tmp_path, kind, name):
    content = honest(kind)
    total = sum(tensor.numel() for tensor in content["model"].values())
    key = "last_optimizer_state" if kind == "fairseq" else "optimizer"
    hostile_files.save({**content, key: OPTIMIZERS[name](total)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    if isinstance(found, Contents):
        for parameter, entry in (found.optimizer or {}).items():
            assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == found.weights[parameter].shape
            assert isinstance(entry["step"], int)


SYMBOLS: list[Any] = [
    *(
        7,
        "text",
        [],
        {"a": 1},
        torch.ones(9),
        [1] * 9,
        [[]] * 9,
        ["a"] * 9,
        ["<s>", "<pad>", "</s>", "<unk>", *"aabcd"],
    ),
    *(["<s>", "<pad>", "</s>", "<unk>", *"abcde"][::-1], ["<s>", "<pad>", "</s>", "<unk>", "a b", "\n", "", " ", "x"]),
    *(["<s>", "<pad>", "</s>", "<unk>", *"abcd"], ["x" * 10**6] * 9, ["<s>", "<pad>", "</s>", "<unk>", *[None] * 5]),
]


@pytest.mark.parametrize("number", range(len(SYMBOLS)))
@EACH_KIND
def test_dictionaries_of_nonsense_never_become_symbols(tmp_path, kind, number):
    symbols = SYMBOLS[number]
    content = honest(kind, finetuned)
    if kind == "nvidia":
        lines = "".join(f"{symbol} 1\n" for symbol in symbols[4:]) if isinstance(symbols, list) else symbols
        hostile_files.save({**content, "output_labels": lines}, tmp_path / "a.pt")
    else:
        hostile_files.save({**content, "labels": symbols}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    if isinstance(found, Contents):
        assert found.labels is None or len(set(found.labels)) == found.num_symbols
    if kind == "fairseq":
        dictionary = Call(
            Named("fairseq.data.dictionary", "Dictionary"), state={"symbols": symbols, "indices": symbols}
        )
        hostile_files.save(
            {**content, "labels": None, "task_state": {"target_dictionary": dictionary}}, tmp_path / "a.pt"
        )
        found = read(tmp_path / "a.pt")
        assert isinstance(found, UserError) or found.labels is None


# ---- Anything, anywhere ---------------------------------------------------------------------------------------------

LAUGHS: list[Any] = []
for _ in range(40):
    LAUGHS = [LAUGHS] * 10
CIRCLE: dict[str, Any] = {}
CIRCLE["own"] = CIRCLE
NONSENSE = [
    *(None, [], {}, "text", "", 7, 0, -3, -1.5, float("nan"), float("inf"), 1e300, 2**63, True, b"bytes"),
    *(torch.arange(6.0), torch.tensor(2.5), torch.tensor([1, 2]), torch.tensor(3), torch.ones(0), torch.ones(2) > 0),
    *((1, 2), [None], {"a": 1}, {1: {}}, {0: {}}, "x" * 10**5, "a\nb\x1b[31m", ["a"] * 5, [[1]], "\ud800", "${a.b}"),
    *(LAUGHS, CIRCLE, Call(Named("fairseq.x", "Y"), 1, state={"a": 1}), Named("fairseq.z", "Q"), [float("nan")] * 3),
]


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested tables and at the start of lists."""
    for key, value in node.items() if isinstance(node, dict) else list(enumerate(node))[:2]:
        yield (*place, key)
        if isinstance(value, (dict, list, tuple)):
            yield from places(value, (*place, key))


@EACH_MODE
@EACH_KIND
def test_nonsense_anywhere_is_read_or_refused(tmp_path, kind, make):
    content, draw = honest(kind, make), random.Random(f"{kind} {make.__name__}")
    everywhere = list(places(content))
    first = [place for place in everywhere if len(place) == 1]
    for place in [*first, *draw.choices(everywhere, k=25)]:
        hostile_files.save(changed(content, place, draw.choice(NONSENSE)), tmp_path / "a.pt")
        read(tmp_path / "a.pt")


OPCODES = b"(.0]})NRbcieosutqrhjJKMGXU\x81\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95Q"


def mutated(content: bytes, draw: random.Random, other: bytes) -> bytes:
    """A pickle with other bits or opcodes, with pieces left out, doubled or of another pickle, or without its end."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 3, 10])):
        start = draw.randrange(len(data))
        piece = slice(start, start + draw.randrange(1, 40))
        match draw.randrange(6):
            case 0:
                data[start] ^= 1 << draw.randrange(8)
            case 1:
                data[start] = draw.choice(OPCODES)
            case 2:
                data[piece] = data[start : start + 1]
            case 3:
                data[start:start] = data[piece]
            case 4:
                data[piece] = other[draw.randrange(len(other)) :][: len(data[piece])]
            case 5:
                data = data[: start + 1]
    return bytes(data)


@EACH_KIND
def test_mutated_pickles_are_read_or_refused(tmp_path, kind):
    """The archive around them is sound, so that nothing but the pickle is at fault."""
    path, draw = tmp_path / "a.pt", random.Random(kind)
    all_records = []
    for each in KINDS:
        hostile_files.save(honest(each, finetuned), path)
        all_records.append(records_of(path))
    hostile_files.save(honest(kind, finetuned), path)
    records = records_of(path)
    (name,) = [name for name in records if name.endswith("/data.pkl")]
    donors = [data for each in all_records for key, data in each.items() if key.endswith("/data.pkl")]
    found = []
    for _ in range(100):
        write_records(path, {**records, name: mutated(records[name], draw, draw.choice(donors))})
        found.append(read(path))
    assert sum(isinstance(each, UserError) for each in found) > 5


@EACH_KIND
def test_mutated_older_files_are_read_or_refused(tmp_path, kind):
    """They have no checksums: whatever is changed arrives."""
    path, draw = tmp_path / "a.pt", random.Random(kind)
    hostile_files.save(honest(kind), path, old=True)
    whole = path.read_bytes()
    length = whole.rindex(pickle.dumps([], 2)[:3])
    for _ in range(100):
        path.write_bytes(mutated(whole[:length], draw, whole) + whole[length:])
        read(path)
