"""`deepspeed pipeline/train.py --config RECIPE --deepspeed_config FILE [--section.key VALUE …]`"""

import os
import sys

if not __package__:  # run as a script: Python put pipeline/, not the repository, on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipeline.training.main import console

if __name__ == "__main__":
    sys.exit(console())
