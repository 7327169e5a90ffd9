"""Entry point of a worker process."""

import logging
import os
import sys

from peft_dist.worker.process import main

status = main(sys.argv[1:])
logging.shutdown()
sys.stdout.flush()
sys.stderr.flush()
# Taking a model apart object by object takes seconds on a busy machine; the system does it at once.
os._exit(status)
