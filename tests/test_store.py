"""data/store.py: records, opening, damage."""

import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import pictures
from helpers import ROOT, damage

from data import encode, store
from data.manifest import CODECS, file_entry
from utils import UserError


@pytest.fixture
def copy(store, tmp_path):
    """A store to damage."""
    return shutil.copytree(store.path, tmp_path / "copy")


def opened(folder):
    file = (folder / "data.mdb").stat()
    return store._environment(folder, file.st_size, file.st_mtime)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_records_bytes_are_the_documented_ones():
    """magic, label, height, width, channels, codec, 0, the pixels' CRC-32 and length, the CRC-32 of all that, then the
    pixels: data/README.md."""
    pixels = pictures(1, (72, 72, 3))[0]
    value = store.encode_record(pixels.tobytes(), 7, pixels.shape, "raw")
    assert struct.unpack("<4siHHBBHIII", value[:28]) == (
        b"ALX1", 7, 72, 72, 3, 0, 0, zlib.crc32(pixels.tobytes()), 15552, zlib.crc32(value[:24]),
    )
    assert value[28:] == pixels.tobytes()
    picture, label = store.decode_record(value, check=True)
    assert label == 7
    assert np.array_equal(picture, pixels)


def test_a_flipped_bit_is_found():
    value = bytearray(store.encode_record(bytes(12), 0, (2, 2, 3), "raw"))
    value[30] ^= 4
    with pytest.raises(ValueError, match="checksum"):
        store.decode_record(bytes(value), check=True)
    for short in (value[:10], value[:-1], b"ALX9" + value[4:]):
        with pytest.raises(ValueError, match="record"):
            store.decode_record(bytes(short), check=True)


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
@pytest.mark.parametrize("check", [True, False])
def test_each_flipped_bit_of_a_header_is_found(codec, check):
    """Label bits above all, which would pass as another class; also where raw pixels are not checked."""
    value = store.encode_record(encode.payload(pictures(1, (16, 16, 3))[0], codec), 5, (16, 16, 3), codec)
    assert store.decode_record(value, check)[1] == 5
    for bit in range(8 * 28):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="the record's header is damaged"):
            store.decode_record(bytes(flipped), check)


def test_reading_across_shards_keeps_the_order(grey_store):
    """Three shards: any order of indices, repeated ones too."""
    records = grey_store.split("train")
    images, labels = records.read(np.arange(len(records)))
    assert np.array_equal(labels, np.arange(96) % 4)
    rows = np.array([95, 0, 40, 31, 32, 33, 40, 64])
    some, some_labels = records.read(rows, check=True)
    assert np.array_equal(some, images[rows])
    assert np.array_equal(some_labels, labels[rows])


@pytest.mark.parametrize("build", [1, 2])
def test_map_grows_while_writing(tmp_path, monkeypatch, build):
    """A first map far too small: every record is there afterwards."""
    monkeypatch.setattr(store, "FIRST_MAP", 1 << 16)
    monkeypatch.setattr(store, "COMMIT_BYTES", 100_000 * build)
    writer = store.ShardWriter(tmp_path / "shard")
    records = [store.encode_record(bytes([n]) * 15552, n, (72, 72, 3), "raw") for n in range(100)]
    for number, record in enumerate(records):
        writer.put(number, record)
    writer.close()
    with opened(tmp_path / "shard").begin() as transaction:
        assert [transaction.get(store.record_key(n)) for n in range(100)] == records


def test_a_shard_out_of_order_is_refused(tmp_path):
    """With assertions off, too; nothing of it is written."""
    script = """if True:
        import sys
        from pathlib import Path
        from data import store
        writer = store.ShardWriter(Path(sys.argv[1]))
        for number in (1, 0):
            writer.put(number, b"record")
        writer.close()"""
    command = [sys.executable, "-O", "-c", script, tmp_path / "shard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line == f"RuntimeError: {tmp_path / 'shard'}: record 0 does not come after the one before it"
    with opened(tmp_path / "shard").begin() as transaction:
        assert transaction.stat()["entries"] == 0


def test_file_format_is_that_of_lmdb_09(store):
    """Data format 1 (bytes 20 to 23 of the first meta page): readers built on LMDB 0.9 open it."""
    content = (store.path / "train-00000" / "data.mdb").read_bytes()[:24]
    assert struct.unpack("<I", content[16:20])[0] == 0xBEEFC0DE
    assert struct.unpack("<I", content[20:24])[0] == 1


@pytest.mark.parametrize("number", [1, 2, 4])
def test_another_format_is_refused(copy, number):
    """Older or newer: one line that says what is and what to do."""
    edit_manifest(copy, format=number)
    newer = "update the code, or " if number == 4 else ""
    with pytest.raises(UserError) as caught:
        store.Store(copy)
    assert str(caught.value) == (
        f"{copy} has store format {number}, this code reads format 3; {newer}remove the store and pack it again"
    )


def test_a_changed_number_in_a_manifest_is_refused(copy):
    """By its checksum; without that, as in stores of before, it is taken as it is."""
    manifest = json.loads((copy / "manifest.json").read_text())
    shorter = manifest["shards"] | {"test": [manifest["shards"]["test"][0] | {"count": 20}]}
    edit_manifest(copy, shards=shorter)
    with pytest.raises(UserError, match="invalid checksum"):
        store.Store(copy)
    del manifest["checksum"]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"shards": shorter}))
    assert store.Store(copy).counts["test"] == 20


def test_a_flipped_bit_in_the_mean_or_in_names_is_refused(copy):
    """It would change all pictures a little, or a name in --predictions, and nobody would notice."""
    name = copy / "test-names.txt"
    name.write_text("".join(f"{n}.jpg\n" for n in range(30)))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["checksum"]
    (copy / "manifest.json").write_text(json.dumps(
        manifest | {"files": manifest["files"] | {name.name: file_entry(name)}}
    ))
    assert store.Store(copy).names("test")[7] == "7.jpg"
    name.write_text(name.read_text().replace("7", "6"))
    with pytest.raises(UserError, match=r"test-names.txt is damaged \(wrong SHA-256\)"):
        store.Store(copy).names("test")
    mean = bytearray((copy / "mean.npy").read_bytes())
    mean[5000] ^= 1
    (copy / "mean.npy").write_bytes(mean)
    with pytest.raises(UserError, match=r"mean.npy is damaged \(wrong SHA-256\)"):
        store.Store(copy)


def test_what_a_manifest_lacks_is_named(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    for key in set(manifest) - {"format", "checksum"}:
        (copy / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        with pytest.raises(UserError, match=f"lacks {key}; pack the store again"):
            store.Store(copy)


@pytest.mark.parametrize("cut", [1, 4096, 10**6])
def test_a_truncated_store_is_refused_before_it_is_mapped(copy, cut):
    file = copy / "train-00000" / "data.mdb"
    with open(file, "r+b") as handle:
        handle.truncate(max(0, file.stat().st_size - cut))
    with pytest.raises(UserError, match=r"instead of .*the store is damaged"):
        store.Store(copy)


def test_missing_files_and_foreign_folders_are_named(copy, tmp_path):
    (copy / "val-00000" / "data.mdb").unlink()
    with pytest.raises(UserError, match=r"val-00000.data.mdb is missing"):
        store.Store(copy)
    with pytest.raises(UserError, match=r"python -m data.pack"):
        store.Store(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        store.Store(tmp_path / "nowhere")
    (tmp_path / "my photos").mkdir()
    with pytest.raises(UserError, match=r"python -m data.pack '.*/my photos' --out STORE"):
        store.Store(tmp_path / "my photos")
    for text in ("{", '{"format": Infinity}'):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            store.Store(copy)


def test_a_damaged_mean_is_named(copy):
    mean = (copy / "mean.npy").read_bytes()
    (copy / "mean.npy").write_bytes(b"X" + mean[1:])
    with pytest.raises(UserError, match=r"mean.npy is damaged"):
        store.Store(copy)


def test_a_damaged_record_is_named(copy):
    """One bit of a picture: reading with the check says which picture and what to do."""
    file = copy / "train-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    records = store.Store(copy).split("train")
    value = records.read(np.array([5]))[0][0].tobytes()
    content[bytes(content).index(value) + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"picture 5 \(train-00000, key 5\): .*checksum.*--verify"):
        store.Store(copy).split("train").read(np.arange(10), check=True)


def test_a_damaged_label_is_named_while_streaming(copy):
    """Class 1 became class 0, one bit away."""
    file = copy / "train-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    picture = store.Store(copy).split("train").read(np.array([5]))[0][0]
    label = bytes(content).index(picture.tobytes()) - 28 + 4
    assert content[label] == 1
    content[label] = 0
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"picture 5 \(train-00000, key 5\): the record's header .*--verify"):
        store.Store(copy).split("train").read(np.arange(10))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("part", "value"), [(2, 65535), (4, 1), (5, 7)], ids=["height", "channels", "codec"])
def test_a_header_that_fits_its_checksum_but_not_the_picture_is_refused(codec, part, value):
    """As no packing writes it: another shape than the bytes have, an unknown codec."""
    picture = pictures(1, (16, 16, 3))[0]
    sound = store.encode_record(encode.payload(picture, codec), 5, picture.shape, codec)
    fields = list(store.HEADER.unpack_from(sound))
    fields[part] = value
    header = store.HEADER.pack(*fields)
    forged = header + store.HEADER_CRC.pack(zlib.crc32(header)) + sound[len(header) + store.HEADER_CRC.size :]
    with pytest.raises(ValueError, match=r"header is damaged|not their right number|shape is .* instead of"):
        store.decode_record(forged, True, np.empty(picture.shape, np.uint8))


def test_a_jpeg_records_checksum_is_always_compared():
    value = bytearray(store.encode_record(b"\xff\xd8 not a picture", 0, (2, 2, 3), "jpeg"))
    with pytest.raises(ValueError, match="no JPEG"):
        store.decode_record(bytes(value), check=False)
    value[-1] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        store.decode_record(bytes(value), check=False)


TRUNCATED = """if True:
    import os, sys
    import numpy as np
    from data.store import Store
    from utils import run_script

    def main(argv):
        records = Store(argv[0]).split("train")
        records.read(np.arange(2))
        os.truncate(os.path.join(argv[0], "train-00000/data.mdb"), 40960)
        if argv[1] == "in a read":  # after the look at its size
            records.expected = [(40960, os.stat(os.path.join(argv[0], "train-00000/data.mdb")).st_mtime)]
        records.read(np.arange(96))

    run_script(main)"""


@pytest.mark.parametrize(("when", "message"), [
    ("in a read", "copy failed while it was read: its files were cut short"), ("between reads", "was changed while it"),
])
def test_a_store_that_is_cut_short_while_it_is_read_is_one_line(copy, when, message):
    """Linux sends SIGBUS where a mapped file has no such page any more."""
    done = subprocess.run([sys.executable, "-c", TRUNCATED, copy, when], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


NO_CORE = "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "  # "core" would lie in the checkout


def test_other_crashes_stay_crashes(copy):
    """The handlers that read a store let a SIGSEGV that is none of its own go where it went before."""
    code = "import sys, ctypes, resource, numpy as np; from data.store import Store; " + NO_CORE
    code += f"Store({str(copy)!r}).split('train').read(np.arange(2)); ctypes.string_at(1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -11
    assert "failed while it was read" not in done.stderr


def test_a_fork_of_a_process_that_has_read_can_still_crash(copy):
    """Its reads find handlers there already, and let an abort() between them be one."""
    code = "import sys, os, ctypes, resource, numpy as np; from data.store import Store; " + NO_CORE
    code += f"r = Store({str(copy)!r}).split('train'); r.read(np.arange(2)); pid = os.fork(); "
    code += "r.read(np.arange(2)); pid or ctypes.CDLL(None).abort(); "
    code += "pid and print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "-6\n")


def test_verifying_names_a_record_of_another_codec(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["checksum"]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"codec": "jpeg"}))
    with pytest.raises(UserError, match=r"key 0\): the record's codec is raw instead of jpeg"):
        store.Store(copy).split("train").check(np.arange(3))


def test_damaged_records_are_replaced_where_that_is_wanted(copy):
    """By the next sound one of the shard, with its label; the last by the first."""
    images, labels = store.Store(copy).split("train").read(np.arange(96))
    damage(copy, "train", 5, 6, 95)
    bad = {}
    found, found_labels = store.Store(copy).split("train").read(np.arange(96), check=True, bad=bad)
    by = np.arange(96)
    by[[5, 6, 95]] = 7, 7, 0
    assert sorted(bad) == [5, 6, 95]
    assert "checksum" in bad[6]
    assert np.array_equal(found, images[by])
    assert np.array_equal(found_labels, labels[by])


@pytest.mark.parametrize(("part", "value"), [
    ("classes", []), ("classes", [3]), ("image_size", 10**9), ("image_size", True), ("channels", 2), ("codec", "bmp"),
    ("files", {"mean.npy": {"bytes": 3, "sha256": ""}, "../mean.npy": {"bytes": 3, "sha256": ""}}), ("files", 3),
    ("shards", {"train": [{"folder": "..", "first": 0, "count": 1}]}), ("shards", {"train": [{"first": 0}]}),
    ("shards", {"train": [{"folder": "train-00000", "first": 0, "count": 10**12}]}), ("shards", []),
    ("channel_mean", [1]), ("channel_mean", [float("nan")] * 3), ("pca", {"eigenvalues": "x"}), ("wnids", ["n1"]),
    ("pca", None), ("unlabelled", "test"), ("name", 3), ("skipped", None),
])
def test_what_cannot_be_right_in_a_manifest_is_named(copy, part, value):
    edit_manifest(copy, **{part: value})
    with pytest.raises(UserError, match=rf"invalid {part}"):
        store.Store(copy)


def test_a_manifest_as_deep_as_a_well_is_damaged(copy):
    (copy / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        store.Store(copy)


def test_a_mean_that_claims_to_be_huge_takes_no_memory(copy):
    with open(copy / "mean.npy", "r+b") as file:
        header = file.read(128).replace(b"(72, 72, 3)", b"(9999999, 72, 99)", 1)
        file.seek(0)
        file.write(header[:128])
    with pytest.raises(UserError, match=r"mean.npy is damaged"):
        store.Store(copy)


def test_an_unknown_split_is_named(store):
    with pytest.raises(UserError, match="'evaluation', only train, val, test"):
        store.split("evaluation")
