"""`python -m peft_star` is the command `peft-star`."""

from .cli import main

if __name__ == "__main__":
    main()
