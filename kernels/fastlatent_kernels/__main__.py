"""`python -m fastlatent_kernels`: what each op would use here, and why not its other backends."""

from __future__ import annotations

from fastlatent_kernels.overview import choices


def main() -> None:
    print(f"{'op':<22}{'device':<8}{'dtype':<10}backend")
    for choice in choices():
        print(f"{choice.op:<22}{choice.device:<8}{choice.dtype:<10}{choice.backend}")
        for backend, reason in choice.refusals.items():
            print(f"{'':<40}not {backend}: {reason}")
        for backend, reason in choice.passed_over.items():
            if backend != choice.backend:  # one named for all ops is used all the same
                print(f"{'':<40}passed over {backend}: {reason}")


if __name__ == "__main__":
    main()
