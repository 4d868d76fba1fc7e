"""A plugin of pytest: the ops on the CPU run the CUDA kernels' source. `run.py` starts pytest with it.

python -m cuda_on_host.plugin FILE ARGUMENTS         any other program, with the same kernels
python -m cuda_on_host.plugin -m MODULE ARGUMENTS
"""

import os
import runpy
import sys

import torch
from hypothesis import settings

import droppath_ext  # noqa: F401

BUILD = os.environ["CUDA_ON_HOST_BUILD"]

torch.ops.load_library(os.environ["CUDA_ON_HOST_LIBRARY"])
OPS = torch.ops.cuda_on_host


def configure(multiprocessors=3):
    """So few by default that blocks which walk over their input take several steps."""
    OPS.configure(multiprocessors, BUILD == "reversed", 0x7F if BUILD == "pattern" else -1)


configure()

# Fewer examples where each takes long.
settings.register_profile("cuda_on_host", max_examples={"address": 50, "thread": 30}.get(BUILD, 100))
settings.load_profile("cuda_on_host")

if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
