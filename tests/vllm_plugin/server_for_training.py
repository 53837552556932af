"""
vLLM's server with weight transfer through a file instead of NCCL, which needs GPUs.

Everything else is vLLM's: its layerwise reload loads the weights into the running engine, in several parts.
"""

import os
import runpy
import time
from pathlib import Path

from safetensors.torch import load_file
from vllm import _custom_ops
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


class FileWeightTransferEngine(NCCLWeightTransferEngine):
    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info):
        file = Path(os.environ["WEIGHTS_FILE"])
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:  # the update is announced before the file is written
            time.sleep(0.1)
        weights = load_file(file)
        file.unlink()
        assert [[*weights[name].shape] for name in update_info.names] == update_info.shapes
        for start in range(0, len(update_info.names), 20):
            self.model.load_weights([(name, weights[name]) for name in update_info.names[start : start + 20]])


# oneDNN keeps copies of the weights that do not follow a later load
_custom_ops._supports_onednn = False
WeightTransferEngineFactory.register_engine("file", FileWeightTransferEngine)

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
