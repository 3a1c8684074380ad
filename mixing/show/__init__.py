"""Draw what methods make of a few pictures: python -m mixing.show. Not installed, because it needs engine/."""
