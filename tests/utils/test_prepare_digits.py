"""Connected digits from recordings that stand in for the Free Spoken Digit Dataset."""

from collections import Counter

import numpy as np
import pytest
import soundfile

from common.errors import ConfigError, DataError
from utils import prepare_digits

NAMES = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Each digit is a tone of its own: 300 Hz x (digit + 2); a few recordings are too long."""
    root = tmp_path_factory.mktemp("fsdd")
    (root / "recordings").mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        for digit in range(10):
            for index in range({"lucas": 8, "yweweler": 1}.get(name, 18)):
                long = (digit, index) == (3, 16)
                time = np.arange(14000 if long else int(rng.integers(1600, 4000))) / 8000
                wave = 0.3 * np.sin(2 * np.pi * 300 * (digit + 2) * time) + 0.05
                soundfile.write(root / "recordings" / f"{digit}_{name}_{index}.wav", wave, 8000)
    (root / "README.md").write_text("not audio")
    return root


@pytest.fixture(scope="module")
def corpus(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    prepare_digits.main([str(dataset), str(out), "--train_minutes", "3", "--test_minutes", "0.4"])
    return out


def sources(corpus):
    rows = [line.split("\t") for line in (corpus / "sources.tsv").read_text().splitlines()[1:]]
    return {row[0]: (row[1], int(row[2]), row[3].split()) for row in rows}


def test_no_recording_is_in_two_subsets_and_the_unseen_speaker_in_one(corpus):
    used = {}
    for subset, _, recordings in sources(corpus).values():
        used.setdefault(subset, []).extend(recordings)
    assert set(used) == {"train", "dev", "test", "test-unseen-speaker"}
    indices = {subset: {int(name.split("_")[2]) for name in names} for subset, names in used.items()}
    assert indices["train"] == {15, 16, 17}
    assert indices["dev"] == {5, 6, 7, 8, 9}
    assert indices["test"] == {0, 1, 2, 3, 4}
    assert {name.split("_")[1] for name in used["test-unseen-speaker"]} == {"lucas"}
    assert {name.split("_")[1] for name in used["train"]} == {"george", "jackson", "nicolas", "theo"}
    assert max(Counter(used["test-unseen-speaker"]).values()) == 1
    assert not [name for name in used["train"] if name.startswith("3_") and name.endswith("_16")]
    counts = Counter(name for name in used["train"] if "george" in name).values()
    assert max(counts) - min(counts) <= 1


def test_transcripts_say_the_digits_that_were_joined(corpus):
    lines = [line for path in corpus.rglob("*.trans.txt") for line in path.read_text().splitlines()]
    texts = dict(line.split(" ", 1) for line in lines)
    table = sources(corpus)
    assert set(texts) == set(table) == {path.stem for path in corpus.rglob("*.flac")}
    for utterance, (_, _, recordings) in table.items():
        assert texts[utterance].lower().split() == [prepare_digits.WORDS[int(name[0])] for name in recordings]
        assert 2 <= len(recordings) <= 6


def test_the_audio_holds_the_tones_of_its_digits_in_order(corpus):
    for path in sorted(corpus.rglob("*.flac"))[::7]:
        wave, rate = soundfile.read(path)
        assert rate == 16000
        assert 0.02 < np.abs(wave).max() < 1
        window = 400
        frames = wave[: len(wave) // window * window].reshape(-1, window)
        energy = np.square(frames).mean(axis=1)
        peaks = np.abs(np.fft.rfft(frames * np.hanning(window), 4096)).argmax(axis=1) * rate / 4096
        heard, silent = [], True
        for frequency, loud in zip(peaks, energy > 0.25 * np.median(energy[energy > 0.1 * energy.max()]), strict=True):
            if loud and silent:
                heard.append(round(frequency / 300) - 2)
            silent = not loud
        assert heard == [int(name[0]) for name in sources(corpus)[path.stem][2]]


def test_gaps_are_quiet_but_no_digital_silence(corpus):
    for path in sorted(corpus.rglob("*.flac"))[::5]:
        start = soundfile.read(path, frames=700)[0]
        assert 0 < np.abs(start).max() < 0.05


def test_durations_are_those_asked_for(corpus):
    minutes = Counter()
    for subset, samples, _ in sources(corpus).values():
        minutes[subset] += samples / 16000 / 60
    assert minutes["train"] == pytest.approx(3, rel=0.1)
    assert minutes["test-unseen-speaker"] == pytest.approx(0.4, rel=0.2)


def test_the_same_seed_gives_the_same_corpus(corpus, dataset, tmp_path):
    prepare_digits.main(
        [str(dataset / "recordings"), str(tmp_path / "b"), "--train_minutes", "3", "--test_minutes", "0.4"]
    )
    assert (corpus / "sources.tsv").read_bytes() == (tmp_path / "b" / "sources.tsv").read_bytes()
    for path in sorted(corpus.rglob("*.flac"))[::10]:
        np.testing.assert_array_equal(
            soundfile.read(path)[0], soundfile.read(tmp_path / "b" / path.relative_to(corpus))[0]
        )


def test_mistakes_name_their_remedy(dataset, tmp_path):
    with pytest.raises(DataError, match="give a checkout of https"):
        prepare_digits.main([str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="choose from george, jackson"):
        prepare_digits.main([str(dataset), str(tmp_path / "out"), "--speakers", "georg"])
    with pytest.raises(ConfigError, match="take it out"):
        prepare_digits.main([str(dataset), str(tmp_path / "out"), "--unseen_speaker", "theo"])
    (tmp_path / "bad").mkdir()
    for index in range(6):
        for name in NAMES:
            soundfile.write(tmp_path / "bad" / f"1_{name}_{index}.wav", np.zeros(2000), 16000)
    with pytest.raises(DataError, match=r"recordings for train|not 8000 Hz"):
        prepare_digits.main([str(tmp_path / "bad"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
