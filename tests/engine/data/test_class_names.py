"""Words that name a class, and files that name them all."""

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
    ("word", "found"),
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
def test_a_class_is_told_by_its_index_or_name(word, found):
    assert find_class(word, TITLES, len(TITLES)) == found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("9", "0 to 8"),
        ("-1", "0 to 8"),
        ("CARDIGAN", r"2 classes match: Cardigan \(3\), cardigan \(4\)"),
        ("shark", "2 classes match: tiger shark"),
        ("tensh", "did you mean tench"),
    ],
)
def test_a_class_that_cannot_be_told_is_explained(word, message):
    with pytest.raises(ValueError, match=message):
        find_class(word, TITLES, len(TITLES))
    assert find_class("7", ["3", "7"], 2) == 1, "digits may be names"
    with pytest.raises(ValueError, match="--labels"):
        find_class("tench", [], 9)


def test_titles_are_read_from_a_column_of_a_csv(tmp_path):
    (tmp_path / "names.csv").write_text("index,name\n0,bright\n1,dark\n2,none\n3\n")
    assert read_titles(str(tmp_path / "names.csv")) == ["bright", "dark", "none", ""]
