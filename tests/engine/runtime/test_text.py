"""Tests of the wording of counts and names."""

from pathlib import Path

from engine.runtime.text import get_distinct_names


def test_names_that_several_paths_share_get_as_many_folders_as_necessary():
    paths = [Path(path) for path in ("x/a/dog.jpg", "y/a/dog.jpg", "x/b/dog.jpg", "cat.jpg", "cat.jpg")]
    assert get_distinct_names([path.stem for path in paths], paths) == [
        "x/a/dog.jpg",
        "y/a/dog.jpg",
        "b/dog.jpg",
        "cat",
        "cat",
    ], "the same path keeps one name"
    assert get_distinct_names([], []) == []
