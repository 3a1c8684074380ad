"""Tests of class lookup by name and of files of class names."""

import pytest

from engine.data.class_names import find_class, read_titles

TITLES = [
    "tench",
    "tiger shark",
    "white shark",
    "Cardigan",
    "cardigan",
    "crane, bird",
    "crane",
    "dog, puppy",
    "puppy dog",
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("0", 0),
        ("tench", 0),
        ("TENCH", 0),
        ("tiger_shark", 1),
        ("tig", 1),
        ("Cardigan", 3),
        ("cardigan", 4),
        ("crane", 6),
        ("CRANE", 6),
        ("bird", 5),
        ("puppy", 7),
    ],
)
def test_find_class_accepts_an_index_or_a_name(query, expected):
    assert find_class(query, TITLES, len(TITLES)) == expected


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("9", "0 to 8"),
        ("-1", "0 to 8"),
        ("CARDIGAN", r"2 classes match: Cardigan \(3\), cardigan \(4\)"),
        ("shark", "2 classes match: tiger shark"),
        ("tensh", "did you mean tench"),
    ],
)
def test_find_class_explains_unknown_and_ambiguous_queries(query, message):
    with pytest.raises(ValueError, match=message):
        find_class(query, TITLES, len(TITLES))
    assert find_class("7", ["3", "7"], 2) == 1, "a class name may be a number"
    with pytest.raises(ValueError, match="--labels"):
        find_class("tench", [], 9)


def test_titles_are_read_from_a_column_of_a_csv(tmp_path):
    (tmp_path / "names.csv").write_text("index,name\n0,bright\n1,dark\n2,none\n3\n")
    assert read_titles(str(tmp_path / "names.csv")) == ["bright", "dark", "none", ""]
