"""The demo under FSDP2 without a GPU. accelerate shards on accelerators only; this makes it treat the CPU as one."""

import runpy

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
runpy.run_module("training.demo", run_name="__main__", alter_sys=True)
assert AcceleratorState().distributed_type is DistributedType.FSDP
