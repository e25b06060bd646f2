"""Reading a torch file: whole and plain, or refused in one line, whatever is in it; never executed, never expensive."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import hostile_files
import pytest
import torch
from hostile_files import Call, Named, long1, old_of, pickled, records_of, tensor, text, write_records, zip_of

from common import torch_file
from common.errors import CheckpointError, one_line, shown
from common.torch_file import DamagedError, PickledCodeError

DAMAGED = "is truncated, damaged or not a checkpoint .*; use another checkpoint"
LAYOUTS = pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
ONES = {"0": struct.pack("<6f", *[1.0] * 6)}


def make_content():
    """What a checkpoint may hold."""
    weights = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), bias=torch.full((3,), 7.0))
    return {
        "mode": "pretrain",
        "config": {"conv": [[512, 10, 5]], "dropout": 0.1, "name": None, "flag": True, "last": -(2**63)},
        "model": weights,
        "labels": ["<s>", "é"],
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.ones(2, dtype=torch.bfloat16)}}},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "types": [torch.ones(2, dtype=getattr(torch, name)) for name in ("bool", "int16", "int64", "half", "double")],
        "view": weights["weight"][:, 1],
        "nothing": torch.ones(0, 3),
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.pt"
    torch.save(make_content(), path)
    return path


def refused(path, message, kind=CheckpointError, read=torch_file.read):
    error = hostile_files.outcome(path, read)
    assert isinstance(error, kind), error
    with pytest.raises(kind, match=message):
        raise error
    assert len(str(error)) < 250 + len(str(path))


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert (type(found), found) == (type(expected), expected)


# ---- What is read ---------------------------------------------------------------------------------------------------


@LAYOUTS
def test_plain_content_comes_back_in_both_layouts(tmp_path, old):
    torch.save(make_content(), tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    same(torch_file.read(tmp_path / "a.pt"), make_content())


def test_the_state_of_a_module_comes_back(tmp_path):
    """Its table has the attribute `_metadata`."""
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    same(dict(torch_file.read(tmp_path / "a.pt")), dict(state))


def test_what_was_written_is_read(tmp_path):
    torch_file.write(tmp_path / "a.pt", make_content())
    same(torch_file.read(tmp_path / "a.pt"), make_content())


def test_an_older_file_is_not_tried_as_a_tar_archive(tmp_path, monkeypatch):
    """torch does that with files of its older format; tarfile of some Python versions can be made to run for ever."""
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("tarfile is used"))
    torch.save(make_content(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    same(torch_file.read(tmp_path / "a.pt"), make_content())


def test_checksums_of_torch_are_those_of_zip(saved):
    """The check of damaged bytes rests on torch writing real checksums."""
    with zipfile.ZipFile(io.BytesIO(saved.read_bytes())) as archive:
        records = [record for record in archive.infolist() if record.file_size]
        assert all(zlib.crc32(archive.read(record)) == record.CRC for record in records)


# ---- The file -------------------------------------------------------------------------------------------------------


def test_missing_empty_and_other_things_than_files(tmp_path):
    refused(tmp_path / "none.pt", "there is no such file")
    refused(tmp_path, "is no regular file; name a checkpoint file")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "is empty; use another", DamagedError)
    refused(tmp_path / "empty.pt" / "below.pt", "no such file")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "no regular file")


@pytest.mark.parametrize("content", [b"x", b"hello world" * 50, bytes(1000), b"PK\x03\x04", b"PK\x03\x04" + bytes(999)])
def test_garbage_is_no_checkpoint(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", DAMAGED, DamagedError)


@LAYOUTS
def test_every_truncation_is_refused(tmp_path, old):
    path = tmp_path / "a.pt"
    torch.save(make_content(), path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    for length in [*range(1, 100), *range(100, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "is truncated, damaged|is a pickle that")


def test_damaged_bytes_never_give_other_numbers(saved):
    whole = saved.read_bytes()
    expected = make_content()
    draw = random.Random(0)
    harmless = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        try:
            content = torch_file.read(saved)
        except CheckpointError:
            continue
        harmless += 1  # a date or the padding between two records
        same(content, expected)
    assert harmless < 250


# ---- The archive ----------------------------------------------------------------------------------------------------


def test_a_small_file_cannot_become_a_large_load(saved):
    records = records_of(saved)
    big = {name: data + bytes(2**24) if "/data/" in name else data for name, data in records.items()}
    write_records(saved, big, zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 2**20
    refused(saved, "compressed records")


def test_overlapping_records_are_refused(saved):
    """One stored megabyte that the archive's table lists many times."""
    write_records(saved, {"a/data.pkl": bytes(2**20)})
    with zipfile.ZipFile(saved, "a") as archive:
        original = archive.infolist()[0]
        for number in range(20):
            twin = zipfile.ZipInfo(f"a/data/{number}")
            for attribute in ("CRC", "file_size", "compress_size", "header_offset"):
                setattr(twin, attribute, getattr(original, attribute))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    refused(saved, "its records overlap|is truncated, damaged")


def test_a_record_that_is_smaller_than_its_tensor_is_refused(saved):
    records = records_of(saved)
    for name in [name for name in records if "/data/" in name and records[name]]:
        write_records(saved, {**records, name: records[name][:-4]})
        refused(saved, "is truncated, damaged")


def test_a_twin_whose_name_differs_in_case_is_refused(tmp_path):
    """torch's reader takes one for the other, so that another pickle would be read than the one that was looked at."""
    bomb = pickled(b"cbuiltins\nbytearray\nJ\x00\x00\x00\x08\x85R")
    records = {"a/version": b"3\n", "a/DATA.PKL": bomb, "a/data.pkl": pickled(b"}")}
    write_records(tmp_path / "a.pt", records)
    refused(tmp_path / "a.pt", "two of its records have the same name")
    del records["a/data.pkl"]
    write_records(tmp_path / "a.pt", {**records, "a/more_data.pkl": pickled(b"}")})
    refused(tmp_path / "a.pt", "is truncated, damaged .*has no table of contents|pickled code")


@pytest.mark.parametrize(
    ("name", "twin", "stored"),
    [
        ("a/data.pkl", "a/data.pkl-more", b"a/data.pkl\x00more"),  # Python sees nothing of what follows the null
        ("é/data.pkl", "--/data.pkl", "é/data.pkl".encode()),  # without the mark of UTF-8, of which torch knows nothing
    ],
)
def test_a_twin_that_python_and_torch_spell_differently_is_refused(tmp_path, name, twin, stored):
    bomb = pickled(b"cbuiltins\nbytearray\nJ\x00\x00\x00\x08\x85R")
    for first, second in ((bomb, pickled(b"}")), (pickled(b"}"), bomb)):
        write_records(tmp_path / "a.pt", {f"{name[0]}/version": b"3\n", name: first, twin: second})
        whole = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(whole.replace(twin.encode(), stored))
        found = hostile_files.outcome(tmp_path / "a.pt", torch_file.read)
        assert isinstance(found, CheckpointError) if first == bomb else found == {} or isinstance(found, DamagedError)


def test_a_second_name_of_a_record_does_not_count(tmp_path):
    """Newer versions of Python call a record by the name in UTF-8 that its extra field tells, torch does not."""
    records = {"a/b": b"a/data.pkl", "a/data.pkl": b"a/b"}
    for contents in ((b"cbuiltins\nbytearray\nJ\x00\x00\x00\x08\x85R", b"}"), (b"}", b"cos\nsystem\n")):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/version", "3\n")
            for (name, other), content in zip(records.items(), contents, strict=True):
                record = zipfile.ZipInfo(name)
                field = struct.pack("<BL", 1, zlib.crc32(name.encode())) + other
                record.extra = struct.pack("<HH", 0x7075, len(field)) + field
                archive.writestr(record, pickled(content))
        if contents[1] == b"}":
            assert hostile_files.outcome(tmp_path / "a.pt", torch_file.read) == {}
        else:
            refused(tmp_path / "a.pt", "pickled code .*os.system", PickledCodeError)


def directory_of(content):
    """Bytes and directory of an archive with one pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", content)
    data = stream.getvalue()
    length, offset = struct.unpack("<LL", data[-10:-2])
    return data[:offset], data[offset : offset + length]


def test_two_directories_are_refused(tmp_path):
    """Python takes the directory that stands before the end, torch the one at the place that the end tells."""
    bodies, directories = zip(directory_of(pickled(b"}")), directory_of(pickled(b"]")), strict=True)
    data = bodies[0] + bodies[1] + directories[1] + directories[0]
    place = len(bodies[0] + bodies[1])
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directories[0]), place, 0)
    (tmp_path / "a.pt").write_bytes(data + end)
    refused(tmp_path / "a.pt", "its directory is not at its end")


@pytest.mark.parametrize("changed", ["comment", "gap", "prefix"])
def test_nothing_stands_around_the_records(saved, changed):
    whole = saved.read_bytes()
    changes = {
        "comment": whole[:-2] + b"\x01\x00x",
        "gap": whole[:-22] + b"x" + whole[-22:],
        "prefix": b"PK\x03\x04" + whole,
    }
    saved.write_bytes(changes[changed])
    refused(saved, "is truncated, damaged")


def test_a_directory_without_end_is_refused(tmp_path):
    write_records(tmp_path / "a.pt", {f"a/{number:060d}": b"" for number in range(40_000)})
    refused(tmp_path / "a.pt", "its directory is too long")


def test_torchscript_is_told_apart(tmp_path, recwarn):
    write_records(tmp_path / "a.pt", {"a/data.pkl": pickled(b"}"), "a/constants.pkl": b"", "a/version": b"3\n"})
    refused(tmp_path / "a.pt", "is a program for TorchScript")
    assert not recwarn.list


# ---- Pickled code ---------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "payload",
    [
        lambda mark: Payload(os.system, f"touch {mark}"),
        lambda mark: Payload(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Payload(Path.touch, mark),
        lambda mark: Payload(bytearray, 10**12),
    ],
)
def test_pickled_code_is_never_executed(tmp_path, payload, protocol):
    mark = tmp_path / "executed"
    path = tmp_path / "a.pt"
    torch.save({"format": "wav2vec2", "model": payload(mark)}, path, pickle_protocol=protocol)
    refused(path, "holds pickled code .* never executed", PickledCodeError)
    torch.save({"model": payload(mark)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    refused(path, "holds pickled code .* never executed" if protocol == 2 else "is a pickle that torch.save")
    path.write_bytes(pickle.dumps(payload(mark), protocol=protocol))
    refused(path, "is a pickle that torch.save")
    assert not mark.exists()


@LAYOUTS
@pytest.mark.parametrize(
    "name",
    [
        *("builtins.getattr", "builtins.eval", "builtins.bytearray", "builtins.set", "collections.Counter"),
        *("torch.load", "torch.hub.load", "torch.serialization.load", "torch.storage._load_from_bytes"),
        *("torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.Size", "torch.Tensor", "torch.device"),
        *("torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_sparse_tensor"),
        *("torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter", "torch.nn.Linear"),
        *("numpy.load", "numpy.core.multiarray._reconstruct", "functools.partial", "os.system", "posix.system"),
        *("argparse.Namespace", "fairseq.data.Dictionary", "a b.c", "x.x" * 1000, "torch.float32.x", "torch..load"),
    ],
)
def test_every_other_name_ends_the_reading(tmp_path, name, old):
    module, _, attribute = name.rpartition(".")
    for content in (Named(module, attribute), Call(Named(module, attribute), 1)):
        hostile_files.save({"model": content}, tmp_path / "a.pt", old=old)
        refused(tmp_path / "a.pt", r"holds pickled code \('.*'\), which is never executed", PickledCodeError)


def test_names_of_python_2_are_known_by_those_of_python_3(tmp_path):
    asked = []
    hostile_files.save([Named("__builtin__", "long"), Named("copy_reg", "_reconstructor")], tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "pickled code", read=lambda path: torch_file.read(path, asked.append))
    assert asked == ["builtins.int", "copyreg._reconstructor"]


def test_a_name_with_a_stand_in_is_replaced_and_nothing_else(tmp_path):
    class Inert:
        def __init__(self, *arguments):
            self.arguments = arguments

    def stand_ins(name):
        return Inert if name == "other.Thing" else None

    path, known = tmp_path / "a.pt", torch.serialization.get_safe_globals()
    hostile_files.save({"model": [Call(Named("other", "Thing"), "x")]}, path)
    (found,) = torch_file.read(path, stand_ins)["model"]
    assert found.arguments == ("x",)
    assert set(torch.serialization.get_safe_globals()) == set(known)  # in force for this file alone
    hostile_files.save([Call(Named("other", "Thing"), "x"), Call(Named("os", "system"), "x")], path)
    refused(path, "'os.system'", read=lambda path: torch_file.read(path, stand_ins))


# ---- Tables of contents that cost much ------------------------------------------------------------------------------

LAUGHS = b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(60))
TABLES = {
    "empty": (b"", "is truncated, damaged"),
    "nothing behind": (b"\x80\x02." + bytes(2**24), "too long|is truncated"),
    "nested lists": (pickled(b"]" * 200_000 + b"a" * 199_999), "nested without end"),
    "nested tuples": (pickled(b")" + b"\x85" * 500_000), "nested without end"),
    "nested tuples as a key": (pickled(b"})" + b"\x85" * 500_000 + b"Ns"), "nested without end"),
    "tuples as keys": (
        pickled(b"}(" + b"".join(b"M%c%c\x85N" % (i // 256, i % 256) for i in range(9000)) + b"u"),
        "a tuple",
    ),
    "keys of one hash": (
        pickled(b"}(" + b"".join(long1(i * (2**61 - 1), 10) + b"N" for i in range(1, 200_000)) + b"u"),
        "a number that no program needs",
    ),
    "a list in itself": (pickled(b"]q\x00(" + b"h\x00" * 100_000 + b"e"), "without end"),
    "lists of lists": (pickled(LAUGHS), "repeated without end"),
    "a long text many times": (
        pickled(text("x" * 10**6) + b"q\x00](" + b"h\x00" * 10**5 + b"e"),
        "repeated without end",
    ),
    "many tables": (pickled(b"](" + b"}" * 1_100_000 + b"e"), "too long"),
    "many sets": (pickled(b"](" + b"\x8f" * 900_000 + b"e"), "pickled code"),
    "marks": (pickled(b"(" * 900_000), "is truncated, damaged"),
    "many names": (pickled(b"](" + b"".join(b"cfairseq\nA%d\n" % i for i in range(50_000)) + b"e"), "too long"),
    "long number": (pickled(long1(1 << 2000, 255)), "a number that no program needs"),
    "longer number": (pickled(b"\x8b" + (2**21).to_bytes(4, "little") + b"\x7f" * 2**21), "pickled code|is truncated"),
    "number claims": (pickled(b"\x8b\xff\xff\xff\x7f"), "is truncated"),
    "text claims": (pickled(b"X\xff\xff\xff\x7fabc"), "is truncated"),
    "text claims more": (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"abc.", "pickled code|is truncated"),
    "memo claims": (pickled(b"Nr\xff\xff\xff\xff"), ""),
    "digits": (pickled(b"I" + b"9" * 2**20 + b"\n"), "is truncated|pickled code"),
    "encoded text": (
        pickled(b"c_codecs\nencode\n" + text("".join(map(chr, range(256, 50_000)))) + text("punycode") + b"\x86R"),
        "pickled code .'_codecs.encode'",
    ),
    "storages of its own": (
        pickled(b"ctorch\nFloatStorage\nJ\x00\x00\x00\x70\x85R"),
        "pickled code .'torch.FloatStorage'",
    ),
    "a table of pairs": (
        pickled(b"ccollections\nOrderedDict\n]](K\x01K\x02ea\x85R"),
        "pickled code .'collections.OrderedDict'",
    ),
    "hidden methods": (pickled(b"ccollections\nOrderedDict\n)R}" + text("get") + b"Nsb"), "has attributes"),
    "other references": (pickled(b"(" + text("module") + text("/etc/passwd") + b"NK\x00NtQ"), "something else"),
    "a call of a result": (pickled(b"ccollections\nOrderedDict\n)R)R"), "pickled code .'a call without a name'"),
    "an empty stack": (pickled(b"R"), "is truncated"),
    "no end": (b"\x80\x02}", "is truncated"),
}


@LAYOUTS
@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_of_contents_takes_neither_long_nor_much(tmp_path, name, old):
    content, message = TABLES[name]
    path = tmp_path / "a.pt"
    (old_of if old else zip_of)(path, content)
    if message:
        refused(path, message)
    else:
        assert hostile_files.outcome(path, torch_file.read) is None


# ---- Tensors that are larger than what the file holds of them -------------------------------------------------------

HUGE = b"\x8a\x05\x00\x00\x00\x00\x02"  # 2**33
TENSORS = {
    "claim": {"shape": HUGE + b"\x85", "stride": b"K\x01\x85", "elements": HUGE},
    "claim behind a small shape": {"shape": b"K\x06\x85", "stride": b"K\x01\x85", "elements": HUGE},
    "shape": {"shape": HUGE + b"\x85", "stride": b"K\x01\x85"},
    "overflow": {"shape": HUGE * 3 + b"\x87", "stride": b"K\x00K\x00K\x00\x87"},
    "expanded": {"shape": HUGE + b"\x85", "stride": b"K\x00\x85"},
    "overlapping": {"shape": b"K\x03K\x03\x86", "stride": b"K\x01K\x01\x86"},
    "negative stride": {"shape": b"K\x02\x85", "stride": b"J\xff\xff\xff\xff\x85", "offset": b"K\x03"},
    "negative shape": {"shape": b"J\xff\xff\xff\xff\x85", "stride": b"K\x01\x85"},
    "negative offset": {"shape": b"K\x02\x85", "stride": b"K\x01\x85", "offset": b"J\xff\xff\xff\xff"},
    "offset behind the end": {"shape": b"K\x02\x85", "stride": b"K\x01\x85", "offset": b"K\x05"},
    "negative claim": {"shape": b"K\x06\x85", "stride": b"K\x01\x85", "elements": b"J\xff\xff\xff\xff"},
    "claim of text": {"shape": b"K\x06\x85", "stride": b"K\x01\x85", "elements": text("6")},
    "no number": {"shape": b"G\x7f\xf8\x00\x00\x00\x00\x00\x00\x85", "stride": b"K\x01\x85"},
    "text": {"shape": text("6") + b"\x85", "stride": b"K\x01\x85"},
    "none": {"shape": b"N", "stride": b"N"},
}


@LAYOUTS
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_no_larger_than_what_the_file_holds(tmp_path, name, old):
    path = tmp_path / "a.pt"
    (old_of if old else zip_of)(path, pickled(tensor(old=old, **TENSORS[name])), ONES)
    refused(path, "is truncated, damaged", DamagedError)


@LAYOUTS
def test_an_honest_tensor_by_hand_is_read(tmp_path, old):
    """The files of the tests above differ from this one in one point each."""
    path = tmp_path / "a.pt"
    (old_of if old else zip_of)(path, pickled(tensor(b"K\x02K\x03\x86", b"K\x03K\x01\x86", old=old)), ONES)
    assert torch.equal(torch_file.read(path), torch.ones(2, 3))


def test_memory_that_nothing_is_read_into_is_refused(tmp_path):
    """In the older layout a storage that its list leaves out would show what the process had there before."""
    content = pickled(tensor(b"K\x06\x85", b"K\x01\x85", old=True))
    for listed, storages in ((None, {}), ([], ONES), (["0", "1"], ONES)):
        old_of(tmp_path / "a.pt", content, storages, listed)
        refused(tmp_path / "a.pt", "is truncated, damaged")


# ---- Words of others in messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["a\nb", "\x1b[31mred\x07", "\ud800", "x" * 10**6, "\u2028", " \t "])
def test_text_of_unknown_origin_is_one_short_printable_line(content):
    for line in (one_line(content), shown(content), shown([content] * 10), shown({content: [[[[content]]]]})):
        assert line.isprintable()
        assert len(line) <= 200
        line.encode()


def test_honest_text_is_shown_as_it_is():
    assert one_line("a b é") == "a b é"
    assert shown("it's") == '"it\'s"'
    assert shown([1, (2.5, None)]) == "[1, (2.5, None)]"


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_the_system():
    with pytest.raises(OSError, match="No space left on device"):
        torch_file.write(Path("/dev/full"), {"weight": torch.ones(100_000)})


def test_ctrl_c_while_writing_stays_what_it_is(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 77006656 vs 77006544")  # as torch's writer does when it is closed

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch_file.write(tmp_path / "a.pt", {})
