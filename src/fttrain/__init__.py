"""The trainer: started with a step folder, it trains or merges, and leaves checkpoints, metrics and an artifact."""

import sys

# Where the package `kernels` is installed, bitsandbytes and transformers fetch compiled code with it while they train.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
