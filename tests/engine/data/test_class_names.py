"""Tests of class lookup by name and of files of class names."""

import pytest

from engine.data.class_names import find_class, read_class_list, read_titles
from engine.errors import UserError

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
        ("tensh", r"no class has this name; the nearest are tench \(0\)\n"),
        ("pupy", r"the nearest are dog, puppy \(7\)"),
        ("tiger sharks", r"the nearest are tiger shark \(1\), white shark \(2\)\n"),
        ("xyz", r"the first classes are tench \(0\), tiger shark \(1\), white shark \(2\)\n"),
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
    file = str(tmp_path / "names.csv")
    assert read_titles(file, "labels", 4, "mine") == ["bright", "dark", "none", ""]
    with pytest.raises(UserError, match="--labels .*names.csv: 4 names, but mine has 1 class\nwrite one name per line"):
        read_titles(file, "labels", 1, "mine")


def test_a_csv_may_have_a_byte_order_mark_spaces_and_capitals(tmp_path):
    (tmp_path / "names.csv").write_bytes("\ufeffClass_Index, WNID\r\n0, n01 \r\n\r\n1, n02\r\n".encode())
    assert read_class_list(str(tmp_path / "names.csv")) == ["n01", "n02"]


@pytest.mark.parametrize("column", ["index", "class_index"])
def test_rows_out_of_order_are_refused(tmp_path, column):
    file = tmp_path / "names.csv"
    file.write_text(f"{column},name\n" + "".join(f"{k},c{k}\n" for k in range(1, 12)))
    assert read_titles(str(file), "labels", 11, "mine") == [f"c{k}" for k in range(1, 12)]
    file.write_text(f"{column},name\n1,bright\n0,dark\n")
    with pytest.raises(UserError, match=f"names.csv: the rows are not in the order of the column {column}; sort them"):
        read_titles(str(file), "labels", 2, "mine")


def test_a_class_without_a_name_is_refused(tmp_path):
    (tmp_path / "names.csv").write_text("wnid,name\nn01,bright\n,dark\n")
    with pytest.raises(UserError, match=r"--class_list .*names.csv: class 1 has no name"):
        read_class_list(str(tmp_path / "names.csv"))
