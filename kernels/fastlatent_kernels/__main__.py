"""`python -m fastlatent_kernels`: what each op would use here, and why not its other backends."""

from __future__ import annotations

import os
import sys

from fastlatent_kernels.dispatch import OPS
from fastlatent_kernels.overview import Choice, choices


def main() -> None:
    print(f"{'op':<22}{'device':<8}{'dtype':<10}backend")
    for choice in choices():
        print(f"{choice.op:<22}{choice.device:<8}{choice.dtype:<10}{choice.backend:<11}{_reason(choice)}".rstrip())
        for backend, reason in choice.refusals.items():
            print(f"{'':<40}not {backend}: {reason}")
        for backend, reason in choice.passed_over.items():
            if backend != choice.backend:  # one named for all ops is used all the same
                print(f"{'':<40}passed over {backend}: {reason}")


def _reason(choice: Choice) -> str:
    """Why this backend and no other."""
    if choice.backend in choice.measured:
        return choice.measured[choice.backend]
    if choice.backend in OPS[choice.op].order:
        return "first in the order of the op; not measured on such a device"
    return ""


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is still in the buffer would be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
