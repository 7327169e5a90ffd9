"""``python -m peft_dist`` is ``peft-dist``."""

from peft_dist.cli import main

if __name__ == "__main__":
    main()
