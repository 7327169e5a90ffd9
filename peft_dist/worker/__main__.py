"""Entry point of a worker process."""

import sys

from peft_dist.worker.process import main

sys.exit(main(sys.argv[1:]))
