"""Tests of reading labelled text and of splitting it into disjoint parts."""

import json
import sys

import pytest

from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import LeftOut, split
from eflat_ext.lab.data.tables import read
from eflat_ext.lab.data.texts import InputError, Table


@pytest.fixture(scope="module")
def reviews():
    return movie_reviews()


# --- reading -----------------------------------------------------------------------------


def test_csv_tsv_and_jsonl_say_the_same(tmp_path):
    rows = [("a, b", "yes"), ('say "no"', "no"), ("línea\nbreak", "yes")]
    (tmp_path / "t.csv").write_text(
        '\ufefftext,label\n"a, b",yes\n"say ""no""",no\n"línea\nbreak",yes\n', encoding="utf-8"
    )
    (tmp_path / "t.tsv").write_text(
        'text\tlabel\na, b\tyes\n"say ""no"""\tno\n"línea\nbreak"\tyes\n', encoding="utf-8"
    )
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"id": 1, "text": t, "label": k}) for t, k in rows) + "\n\n"
    )
    expected = Table([t for t, _ in rows], [k for _, k in rows])
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        assert read(str(tmp_path / name)) == expected


def test_pairs_are_read_kept_together_and_told_apart(tmp_path):
    path = tmp_path / "t.tsv"
    rows = [(f"first {k // 2}", f"second {k % 2}", "yes" if k % 3 else "no") for k in range(40)]
    rows += [("FIRST  0", "Second 0", "yes"), ("first 0 second", "0", "no")]
    path.write_text("a\tb\ty\n" + "".join("\t".join(row) + "\n" for row in rows))
    table = read(str(path), "a", "y", "b")
    assert table == Table(*([row[k] for row in rows] for k in (0, 2, 1)))
    parts = split(table, validation_size=5, test_size=5)
    found = []
    for part in (parts.train, parts.validation, parts.test):
        labels = [parts.classes[k] for k in part.labels]
        found += zip(part.texts, part.pairs, labels, strict=True)
    # The one that differs in case and spacing alone is gone.
    assert sorted(found) == sorted(rows[:40] + rows[41:])
    with pytest.raises(InputError, match=r"holds single texts, but the .* pairs of texts"):
        split(table, read(str(path), "a", "y"))
    with pytest.raises(InputError, match="has no column 'c'; it has: a, b, y"):
        read(str(path), "a", "y", "c")
    path.write_text("a\tb\ty\nx\t \tyes\n")
    with pytest.raises(InputError, match="row 1: column 'b' is empty"):
        read(str(path), "a", "y", "b")


def test_texts_and_labels_are_as_they_are_written(tmp_path):
    """Numbers, dates and words for a missing value are not converted."""
    labels = ["01", "1", "1e3", "NA", "null", "2020-01-01"]
    table = Table(labels, labels)
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"{k},{k}\n" for k in labels))
    assert read(str(tmp_path / "t.csv")) == table
    rows = [{"text": label, "label": label} for label in labels]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(str(tmp_path / "t.jsonl")) == table


def test_labels_may_be_numbers_or_booleans(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"q": "a", "y": 1}\n{"q": "b", "y": false}\n{"q": "c", "y": 0.5}')
    assert read(str(path), "q", "y").labels == ["1", "False", "0.5"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", "", "holds no rows"),
        ("t.csv", "text,label\n", "holds no rows"),
        ("t.csv", "text,mood\na,1\n", "has no column 'label'; it has: text, mood"),
        ("t.csv", "text,label\na,1\n  ,0\n", "row 2: column 'text' is empty"),
        ("t.csv", "text,label\na,1\nb\n", "row 2: column 'label' is empty"),
        ("t.csv", 'text,label\n"a,1\n', "no valid CSV at line 2"),
        (
            "t.csv",
            "label,text\nneg,It was bad\nneg,The film, though long, was bad\n",
            "row 2 has 4 fields, the header 2: quote texts that hold a comma",
        ),
        ("t.csv", "text,label\na,1\nb,c,0\n", "row 2 has 3 fields, the header 2"),
        ("t.csv", "text,label\na,b,1\nc,d,0\n", "row 1 has 3 fields, the header 2"),
        (
            "t.tsv",
            "text\tlabel\na\tb\t1\n",
            "row 1 has 3 fields, the header 2: quote texts that hol",
        ),
        ("t.csv", "text,label,text\na,1,b\n", "has two columns 'text'"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2 is no valid JSON"),
        ("t.jsonl", "[1, 2]\n", "line 1 is no JSON object"),
        ("t.jsonl", '{"text": "a", "label": null}\n', "line 1: column 'label' is empty"),
        ("t.jsonl", '{"text": "a", "label": 1}\n\n{"label": 1}\n', "line 3: column 'text' is em"),
        ("t.csv", b"text,label\n\xff\xfe,1\n", "is not text in UTF-8"),
        ("t.parquet", "PAR1", "is of no known format"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read(str(path))
    assert sentence in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_without_a_name_may_be_several(tmp_path):
    (tmp_path / "t.csv").write_text("text,label,,\na,1,,\n")
    assert read(str(tmp_path / "t.csv")) == Table(["a"], ["1"])


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read nowhere\.csv: No such file"):
        read("nowhere.csv")
    with pytest.raises(InputError, match="is of no known format"):
        read(str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """Return a function that puts another one in the place of ``datasets.load_dataset``."""
    datasets = pytest.importorskip("datasets")
    return lambda load_dataset: monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def sentiments(*rows):
    """Return rows of texts and class numbers as a data set of the hub."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["negative", "positive"]))
    columns = dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict(columns, features)


def test_a_hub_name_goes_to_the_datasets_package(hub):
    def load_dataset(*arguments, **options):
        assert (arguments, options) == (("glue", "sst2"), {"split": "validation"})
        return sentiments(("good", 1), ("bad", 0))

    hub(load_dataset)
    assert read("glue:sst2@validation") == Table(["good", "bad"], ["positive", "negative"])


def test_trouble_with_the_hub_is_one_sentence(hub, monkeypatch):
    def hidden_labels(name, configuration, split):
        assert (name, configuration, split) == ("some/set", None, "train")
        return sentiments(("good", -1))

    def no_such_set(*_, **__):
        raise FileNotFoundError("no such set\nand much more")

    hub(hidden_labels)
    with pytest.raises(InputError, match="row 1: column 'label' is empty"):
        read("some/set")
    hub(no_such_set)
    with pytest.raises(InputError, match=r"cannot load the hub data set 'some/set': no such set$"):
        read("some/set")
    for name in ("movie-review", "Movie-Reviews", "moviereviews"):
        with pytest.raises(InputError, match="no such set; did you mean movie-reviews"):
            read(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"to read it; did you mean bbc-news\?"):
        read("bbc-new")
    with pytest.raises(InputError, match="install the package 'datasets'"):
        read("some/set")


# --- splitting ---------------------------------------------------------------------------


def keys(part):
    return {" ".join(text.split()).casefold() for text in part.texts}


def test_parts_are_disjoint_balanced_and_of_the_sizes_asked_for(reviews):
    parts = split(reviews, train_size=3000, validation_size=500, test_size=1500, seed=3)
    sizes = {"train": 3000, "validation": 500, "test": 1500}
    positive = reviews.labels.count("positive") / len(reviews)
    seen = set()
    for name, size in sizes.items():
        part = getattr(parts, name)
        assert len(part) == size == len(keys(part))
        assert not seen & keys(part)
        seen |= keys(part)
        assert abs(sum(part.labels) / size - positive) < 2 / size
    assert parts.classes == ["negative", "positive"]
    labels = dict(zip(reviews.texts, reviews.labels, strict=True))
    for text, label in zip(parts.test.texts, parts.test.labels, strict=True):
        assert labels[text] == parts.classes[label]


def test_default_sizes(reviews):
    parts = split(reviews)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (7263, 807, 2000)


def test_the_seed_decides(reviews):
    assert split(reviews, seed=1) == split(reviews, seed=1)
    assert split(reviews, seed=1).test.texts != split(reviews, seed=2).test.texts


def test_equal_texts_never_meet_in_two_parts():
    texts = [f"Sentence  {k % 40}" if k % 2 else f"sentence {k % 40} " for k in range(200)]
    parts = split(Table(texts, [str(k % 2) for k in range(200)]), seed=0)
    all_keys = [key for p in (parts.train, parts.validation, parts.test) for key in keys(p)]
    assert len(all_keys) == len(set(all_keys)) == 40


def test_what_is_left_out_is_counted_and_contradictions_are_named():
    table = Table(["a", "b", "A ", "c", " a", "d", "e", "b"], list("xyxyyxyy"))
    left_out = split(table, test_size=1, validation_size=0).left_out
    assert left_out == LeftOut(repeated=3, contradictory=1, example=(" a", "x", "y"))
    assert str(left_out) == (
        "rows left out for the text of an earlier row: 3; of these with another label than the "
        "earlier one: 1, such as ' a' with 'x' and 'y'"
    )
    # What is to be written may differ.
    free = split(table, test_size=1, validation_size=0, classify=False).left_out
    assert free == LeftOut(repeated=3)
    tested = split(table, Table(["B", "z"], ["x", "y"]), validation_size=0).left_out
    assert (tested.repeated, tested.in_test) == (2, 2)
    assert "rows left out for a text of the test data: 2" in str(tested)
    assert str(split(Table(list("abcdef"), list("xyxyxy")), test_size=1).left_out) == ""


def test_errors_name_what_is_left_out():
    same = Table(["t"] * 5 + ["T", "u"], list("bbbbbab"))
    with pytest.raises(
        InputError, match=r"label 'b' alone \(rows .*: 5; .* 1, such as 'T' with 'b'"
    ):
        split(same, test_size=1, validation_size=0)
    with pytest.raises(
        InputError, match=r"--train-size must be at most 2, .* earlier row: 5; .*\), got 6"
    ):
        split(same, train_size=6)


def test_a_test_set_of_its_own_stays_whole_and_apart():
    train = Table([f"t{k}" for k in range(20)], ["a", "b"] * 10)
    test = Table(["T3", "u1", "u1", "t5 "], ["a", "b", "b", "a"])
    parts = split(train, test)
    assert sorted(parts.test.texts) == sorted(test.texts)
    assert len(parts.train) + len(parts.validation) == 18
    assert not keys(parts.test) & (keys(parts.train) | keys(parts.validation))
    assert len(split(train, test, test_size=2).test) == 2


def test_numeric_labels_are_ordered_by_value():
    table = Table([f"t{k}" for k in range(60)], ["10", "9", "-1"] * 20)
    assert split(table).classes == ["-1", "9", "10"]


def test_too_few_classes_unseen_labels_and_sizes():
    table = Table([f"t{k}" for k in range(40)], ["a", "b"] * 20)
    with pytest.raises(InputError, match="has the label 'a' alone"):
        split(Table(["x", "y", "z"], ["a"] * 3))
    with pytest.raises(InputError, match="'c' occurs in the test data but not in the training"):
        split(table, Table(["new"], ["c"]))
    with pytest.raises(InputError, match=r"--test-size must be at most 40, .*, got 50"):
        split(table, test_size=50)
    with pytest.raises(InputError, match=r"--validation-size must be at most 32, .*, got 33"):
        split(table, validation_size=33)
    with pytest.raises(InputError, match=r"--train-size must be at most 29, .*, got 30"):
        split(table, train_size=30)
    for classify in (True, False):
        with pytest.raises(InputError, match="has no sentence: all its texts are in the test data"):
            split(table, table, classify=classify)
