"""Downloads against a local server that breaks connections, knows ranges or not, and holds good and bad archives."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from common.errors import ConfigError, DataError
from utils import download_librispeech, download_pretrained, downloader

CONTENT = bytes(range(256)) * 2000


class Server:
    """Serves `files` below /; `cut` bytes at most per answer, `ranges` off answers with the whole file."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.cut, self.ranges, self.failures = None, True, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        if self.failures:
            request.send_error(self.failures.pop(0))
            return
        body = self.files.get(request.path.lstrip("/"))
        if body is None:
            request.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start and start >= len(body):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(body)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        request.wfile.write(body[start:][: self.cut])
        request.wfile.flush()
        request.close_connection = True


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(downloader.time, "sleep", lambda _: None)


def md5(content):
    return hashlib.md5(content).hexdigest()


def make_tar(members, mode="w:gz"):
    """An archive of {name: content or (type, link target)}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
    return buffer.getvalue()


def librispeech(subset):
    clip = f"LibriSpeech/{subset}/1/2/1-2-0000.flac"
    return make_tar(
        {
            "LibriSpeech": (tarfile.DIRTYPE, ""),
            "LibriSpeech/SPEAKERS.TXT": b"; ID\n",
            clip: b"fLaC" + subset.encode(),
            f"LibriSpeech/{subset}/1/2/1-2.trans.txt": b"1-2-0000 HELLO\n",
        }
    )


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.files["x.bin"], server.cut = CONTENT, 100_000
    downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", md5=md5(CONTENT))
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    starts = [wanted for _, wanted in server.requests]
    assert starts == [None, *(f"bytes={start}-" for start in range(100_000, len(CONTENT), 100_000))]
    assert not list(tmp_path.glob("*.part"))


def test_another_run_goes_on_where_a_killed_one_stopped(server, tmp_path):
    server.files["x.bin"] = CONTENT
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:12345])
    downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", md5=md5(CONTENT))
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert server.requests == [("/x.bin", "bytes=12345-")]


def test_a_part_that_is_whole_already_is_not_fetched_again(server, tmp_path):
    server.files["x.bin"] = CONTENT
    (tmp_path / "x.bin.part").write_bytes(CONTENT)
    downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", md5=md5(CONTENT))
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    server.files["x.bin"] = CONTENT
    (tmp_path / "x.bin.part").write_bytes(CONTENT + b"more")
    downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", md5=md5(CONTENT))
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path):
    server.files["x.bin"], server.ranges = CONTENT, False
    (tmp_path / "x.bin.part").write_bytes(b"something else")
    downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_passing_server_errors_are_retried_and_lasting_ones_end(server, tmp_path):
    server.files["x.bin"], server.failures = CONTENT, [503, 500, 429]
    downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", attempts=4)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    server.failures = [503] * 9
    with pytest.raises(DataError, match="503.*run again"):
        downloader.download(f"{server.url}/x.bin", tmp_path / "y.bin", attempts=3)
    assert len(server.failures) == 6
    server.failures = []
    with pytest.raises(DataError, match="404"):
        downloader.download(f"{server.url}/none.bin", tmp_path / "z.bin", attempts=3)
    assert not (tmp_path / "z.bin").exists()


def test_a_connection_that_always_breaks_at_the_same_byte_ends(server, tmp_path):
    server.files["x.bin"], server.cut, server.ranges = CONTENT, 1000, False
    with pytest.raises(DataError, match="closed early"):
        downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", attempts=3)
    assert not (tmp_path / "x.bin").exists()


def test_nobody_at_the_other_end_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="check the network"):
        downloader.download("http://127.0.0.1:9/x.bin", tmp_path / "x.bin", attempts=2)


def test_a_wrong_checksum_deletes_the_download(server, tmp_path):
    server.files["x.bin"] = CONTENT
    with pytest.raises(DataError, match="md5 is .*deleted"):
        downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin", md5="0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_it_is_filled(server, tmp_path, monkeypatch):
    server.files["x.bin"] = CONTENT
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(DataError, match="make room"):
        downloader.download(f"{server.url}/x.bin", tmp_path / "x.bin")


@pytest.mark.parametrize(
    "members",
    [
        {"../evil.txt": b"x"},
        {"a/../../evil.txt": b"x"},
        {"/tmp/evil.txt": b"x"},
        {"a/link": (tarfile.SYMTYPE, "../../..")},
        {"a/hard": (tarfile.LNKTYPE, "../../evil.txt")},
        {"a/device": (tarfile.CHRTYPE, "")},
        {"..\\evil.txt": b"x"},
    ],
    ids=["parent", "parent inside", "absolute", "symbolic link", "hard link", "device", "backslash"],
)
def test_an_archive_that_leads_outside_is_refused(tmp_path, members):
    archive = tmp_path / "in" / "x.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(make_tar(members))
    with pytest.raises(DataError, match="do not trust"):
        downloader.unpack(archive, tmp_path / "in" / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]


def test_a_damaged_archive_is_one_clear_error(tmp_path):
    archive = tmp_path / "x.tar.gz"
    for content in (librispeech("dev-clean")[:200], b"no archive at all", b""):
        archive.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            downloader.unpack(archive, tmp_path / "out")


@pytest.fixture
def mirror(server):
    for subset in ("dev-clean", "test-other"):
        server.files[f"{subset}.tar.gz"] = librispeech(subset)
    lines = [f"{md5(content)}  {name}\n" for name, content in server.files.items()]
    server.files["md5sum.txt"] = "".join(lines).encode()
    server.files["librispeech_finetuning.tgz"] = make_tar({"librispeech_finetuning/1h/0/clean/a.flac": b"fLaC"})
    return server


def fetch(server, target, *subsets):
    flags = ["--base_url", f"{server.url}/", "--librilight_url", server.url]
    download_librispeech.main([str(target), *flags, "--subsets", *subsets])


def test_subsets_arrive_unpacked_in_place_and_are_fetched_once(mirror, tmp_path):
    mirror.cut = 150
    target = tmp_path / "LibriSpeech"
    fetch(mirror, target, "dev-clean", "librispeech_finetuning")
    assert (target / "dev-clean/1/2/1-2-0000.flac").read_bytes() == b"fLaCdev-clean"
    assert (target / "librispeech_finetuning/1h/0/clean/a.flac").is_file()
    assert {path.name for path in target.iterdir()} == {"dev-clean", "librispeech_finetuning", "SPEAKERS.TXT"}
    mirror.cut = None
    asked = len(mirror.requests)
    fetch(mirror, target, "dev-clean", "test-other", "librispeech_finetuning")
    assert [path for path, _ in mirror.requests[asked:]] == ["/md5sum.txt", "/test-other.tar.gz"]
    assert (target / "test-other").is_dir()
    asked = len(mirror.requests)
    fetch(mirror, target, "dev-clean", "test-other", "librispeech_finetuning")
    assert len(mirror.requests) == asked


def test_an_archive_against_its_checksum_is_not_unpacked(mirror, tmp_path):
    mirror.files["dev-clean.tar.gz"] = librispeech("other")
    with pytest.raises(DataError, match="md5"):
        fetch(mirror, tmp_path / "L", "dev-clean")
    assert list((tmp_path / "L").iterdir()) == []


def test_without_a_published_list_the_size_is_checked(mirror, tmp_path, capsys):
    del mirror.files["md5sum.txt"]
    fetch(mirror, tmp_path, "dev-clean")
    assert (tmp_path / "dev-clean").is_dir()
    assert "size only" in capsys.readouterr().err


def test_another_archive_under_a_subsets_name_is_refused(mirror, tmp_path):
    del mirror.files["md5sum.txt"]
    mirror.files["dev-clean.tar.gz"] = librispeech("dev-other")
    with pytest.raises(DataError, match="no folder dev-clean"):
        fetch(mirror, tmp_path, "dev-clean")
    assert not (tmp_path / "dev-clean").exists()


def test_an_unpacking_that_was_killed_starts_again(mirror, tmp_path):
    (tmp_path / ".dev-clean.partial" / "LibriSpeech" / "dev-clean" / "half").mkdir(parents=True)
    (tmp_path / "dev-clean.tar.gz").write_bytes(mirror.files["dev-clean.tar.gz"])
    fetch(mirror, tmp_path, "dev-clean")
    assert [path for path, _ in mirror.requests] == ["/md5sum.txt"]
    assert not (tmp_path / "dev-clean" / "half").exists()


def test_unknown_subsets_and_addresses_are_usage_errors(tmp_path):
    with pytest.raises(ConfigError, match="--subsets dev-clena: not known; choose from"):
        download_librispeech.main([str(tmp_path), "--subsets", "dev-clena"])
    with pytest.raises(ConfigError, match="http"):
        download_librispeech.main([str(tmp_path), "--base_url", "www.openslr.org"])


def test_pretrained_files_are_fetched_once_by_their_published_names(server, tmp_path, capsys):
    server.files["wav2vec_small.pt"] = b"PK\x03\x04" + CONTENT
    server.files["dict.ltr.txt"] = b"| 1\n"
    for _ in range(2):
        download_pretrained.main([str(tmp_path), "wav2vec_small", "dict.ltr.txt", "--base_url", server.url])
    assert len(server.requests) == 2
    assert (tmp_path / "wav2vec_small.pt").read_bytes() == server.files["wav2vec_small.pt"]
    download_pretrained.main(["--list"])
    assert "libri960_big.pt" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not a published name"):
        download_pretrained.main([str(tmp_path), "wav2vec_tiny", "--base_url", server.url])


def test_a_page_in_place_of_a_checkpoint_is_not_kept(server, tmp_path):
    server.files["libri960_big.pt"] = b"<html>please log in</html>"
    with pytest.raises(DataError, match="no checkpoint"):
        download_pretrained.main([str(tmp_path), "libri960_big.pt", "--base_url", server.url])
    assert list(tmp_path.iterdir()) == []
