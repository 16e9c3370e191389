"""EleutherAI's lm-eval with STAR patches: `python -m peft_star.lm_eval` takes what `lm_eval` takes.

    python -m peft_star.lm_eval --model hf --model_args pretrained=MODEL,peft=PATCH --tasks ...

lm-eval loads adapters by PEFT, which knows STAR once `peft_star` was imported; importing this module is that.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run lm-eval's command line; exit with 2 when it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"This needs {error.name}; pip install 'peft-star[lm-eval]'.", file=sys.stderr)
        raise SystemExit(2) from None
    cli_evaluate()


if __name__ == "__main__":
    main()
