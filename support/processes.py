"""The processes of one run: their devices, what they exchange, and the precision they compute in.

    device, rank, world_size = start_processes()                # under torchrun: joins the others
    autocast, name = precision_of("auto", device)

loss.py shows what the loss exchanges, train.py (`GradientSum`) how gradients are summed.
"""
import functools
import os
import signal
import time
import uuid
import warnings

import torch
import torch.distributed as dist

from support import system
from support.system import BadInput


def start_processes():
    """-> (device, rank, world_size) of this process.

    Under torchrun it joins the process group: NCCL for tensors on GPUs (one per process), gloo for
    those on the CPU.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if local_size <= gpus else torch.device("cpu")
    if gpus and device.type == "cpu" and rank == 0:
        print(f"{local_size} processes but {gpus} GPU: running on the CPU. "
              f"Use --nproc_per_node {gpus} to run on the GPU.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank:
        warnings.simplefilter("ignore")                     # the first process warns for all
    if world_size > 1:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # If torchrun itself is killed, its processes save and stop.
            system.end_with(os.getppid(), signal.SIGTERM)
        store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = fresh_store(store, rank, world_size)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device, rank, world_size


def fresh_store(store, rank, world_size, minutes=30):
    """A part of torchrun's store that only living processes share.

    After a restart the store still holds addresses of dead processes, and nodes count restarts
    differently (pytorch issue 135712). So process 0 draws a new name, and each other process asks
    for it under a key of its own. BadInput when some process is missing after `minutes`.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question {rank}", name)
        name = store.get(f"answer {name}").decode()         # waits for it
        store.add(f"{name} heard", 1)
    deadline = time.monotonic() + 60 * minutes
    while rank == 0 and store.add(f"{name} heard", 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"question {other}"]):
                store.set(f"answer {store.get(f'question {other}').decode()}", name)
        if time.monotonic() > deadline:
            raise BadInput(f"not all of the {world_size} processes of this run came "
                           f"within {minutes} minutes")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


# ---- together: each function works without torch.distributed, too


def rank_and_world():
    """(rank, world_size) of this process: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather_objects(thing):
    """The list of what each process passes, in rank order."""
    things = [thing]
    if dist.is_initialized():
        things *= dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def all_reduce_max(number):
    """The maximum over all processes of a whole number."""
    number = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def barrier():
    """Return when every process has called it."""
    if dist.is_initialized():
        dist.barrier()


# ---- precision


def precision_of(name, device, evaluating=False):
    """"auto", "fp32", "bf16" or "fp16" -> (autocast context for the towers, the precision's name).

    "auto" is the fastest safe one: for training bf16, which has the range of fp32; for evaluation
    on a GPU fp16, as fast and eight times as exact. (Evaluation refuses fp16 that overflows.)
    """
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
        if bf16_is_fast(device) and not (evaluating and name == "fp16"):
            name = "bf16"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=name != "fp32"), name


def bf16_is_fast(device):
    """Whether the hardware has bfloat16: NVIDIA from Ampere on, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # Private functions of torch, which another version may lack: bool() is False.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)
