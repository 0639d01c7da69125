"""Runs one upstream server; started with the interpreter of that release's environment: upstream_server.py OPTIONS.

The releases up to 0.4.5 initialise CUDA although nothing that the HTTP API needs asks for it. Without a device that one
call is left out; all the rest is upstream's own code.
"""

from __future__ import annotations

import runpy

import torch

if not torch.cuda.is_available():
    torch.cuda.init = lambda: None

runpy.run_module("lmcache.v1.multiprocess.http_server", run_name="__main__", alter_sys=True)
