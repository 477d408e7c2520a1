"""The trainer: started with a step folder, it trains or merges, and leaves checkpoints, metrics and an artifact."""

import logging
import sys

# Where the package `kernels` is installed, bitsandbytes and transformers fetch compiled code with it while they train.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
# A person who runs a verb need not know that `kernels` is missing, on CPUs with AVX512-BF16, nor that there is no GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# A filter and no level, which DeepSpeed sets itself when it is imported.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
