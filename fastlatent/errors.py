"""The two exceptions whose messages are meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: one sentence that says what, where and what was wanted. Command lines print it and exit with code 2."""


class Failed(Exception):
    """What was asked for can be done and was begun, and came to nothing: one sentence that says why. Command lines print it and
    exit with code 1."""
