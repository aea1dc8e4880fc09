"""`python -m fastlatent.models`: fetch the quickstart model ahead of its first use and print its folder."""

import sys

from fastlatent.errors import UserError
from fastlatent.models.smollm2 import fetch

if __name__ == "__main__":
    try:
        print(fetch())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
