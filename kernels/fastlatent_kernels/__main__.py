"""`python -m fastlatent_kernels`: what each op would use here, and the reason of every refusal."""

from __future__ import annotations

from fastlatent_kernels.overview import choices


def main() -> None:
    print(f"{'op':<20}{'device':<8}{'dtype':<10}backend")
    for choice in choices():
        print(f"{choice.op:<20}{choice.device:<8}{choice.dtype:<10}{choice.backend}")
        for backend, reason in choice.refusals.items():
            print(f"{'':<38}not {backend}: {reason}")


if __name__ == "__main__":
    main()
