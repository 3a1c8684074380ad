"""Precedence of typed, saved, recipe and default options, and which of them may change on a resume."""

import pytest

from engine.config.resume_rules import OptionRules, check_changed_options, merge_options
from engine.errors import UserError

DEFAULTS = {"recipe": "auto", "lr": None, "epochs": None, "size": 32, "crop": None, "name": None, "device": "auto"}
RULES = OptionRules(architecture={"size"}, replaces={"size": {"crop"}})


def get_recipe(given: dict) -> dict:
    return {"recipe": given.get("recipe", "short"), "lr": 0.1, "epochs": 200 if given.get("recipe") == "long" else 3}


def merge(typed: dict, saved: dict) -> dict:
    return merge_options(typed, saved, DEFAULTS, rules=RULES, recipe=get_recipe)


def test_typed_options_win_over_saved_over_recipe_over_default():
    assert merge({}, {}) == {**DEFAULTS, "recipe": "short", "lr": 0.1, "epochs": 3}
    merged = merge({"epochs": 5}, {"lr": 0.5, "epochs": 9, "of_another_version": 1})
    assert merged == {**DEFAULTS, "recipe": "short", "lr": 0.5, "epochs": 5}


def test_auto_means_the_saved_recipe():
    assert merge({"recipe": "auto"}, {"recipe": "long"})["epochs"] == 200
    assert merge({"recipe": "auto"}, {})["recipe"] == "short"
    assert merge({"recipe": "long"}, {"recipe": "short"})["epochs"] == 200


def test_per_call_and_replaced_options_are_not_taken_from_the_saved_run():
    saved = {"name": "run", "crop": 28}
    assert merge({}, saved)["name"] is None and merge({}, saved)["crop"] == 28
    assert merge({"size": 64}, saved)["crop"] is None
    assert merge({"size": 64}, {**saved, "size": 32})["crop"] is None
    assert merge({"size": 32}, {**saved, "size": 32})["crop"] == 28


def test_changed_options_are_refused_with_both_values_unless_forced():
    saved = {"lr": 0.1, "size": 32, "device": "cuda"}
    check_changed_options({"lr": 0.1, "size": 32, "device": "cpu"}, saved, rules=RULES)
    with pytest.raises(UserError, match=r"\n  --lr    0.1  ->  0.2\n  --size  32  ->  64\nleave these options out"):
        check_changed_options({"lr": 0.2, "size": 64}, saved, rules=RULES)
    check_changed_options({"lr": 0.2}, saved, rules=RULES, force=True)
    with pytest.raises(UserError, match="--size: the saved state would not fit"):
        check_changed_options({"lr": 0.2, "size": 64}, saved, rules=RULES, force=True)


def test_the_remedy_for_an_unreadable_file_is_allowed_on_a_resume():
    check_changed_options({"on_bad_image": "skip"}, {"on_bad_image": "stop"}, rules=OptionRules())
