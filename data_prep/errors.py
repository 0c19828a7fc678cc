"""The one error of this room that is meant for users."""


class DataError(ValueError):
    """A corpus, tokenizer or dataset that cannot be used: the message names the place and the next action."""
