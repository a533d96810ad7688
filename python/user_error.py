"""The one exception that commands turn into a sentence."""


class UserError(Exception):
    """What the user can put right; the message is one sentence that says how."""
