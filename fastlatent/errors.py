"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: one sentence that says what, where and what was wanted. Command lines print it and exit with code 2."""
