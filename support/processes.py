"""The processes of one run, the device of each, and the precision that it computes in.

    device, rank, world = start_processes()                     # joins the others, when torchrun has started this process
    autocast, name = precision_of("auto", device)
    for batch in own_batches(len(split), 128): …                # this process's share of the work
    whole = from_shares(batches, rows, whole)                   # … and what all have computed

What the loss sends between processes stands in loss.py, what the gradients do in train.py (`GradientSum`).
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


# ---------------------------------------------------------------------------------------------------------------- together


def start_processes():
    """-> (device, rank, world): what this process computes on, its number, how many there are.

    Under torchrun it joins the process group: NCCL for tensors on GPUs (one per process), gloo for those on the CPU.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank, local_world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if local_world <= gpus else torch.device("cpu")
    if gpus and device.type == "cpu" and rank == 0:
        print(f"{local_world} processes but {gpus} GPU: running on the CPU. Use --nproc_per_node {gpus} to run on the GPU.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank:
        warnings.simplefilter("ignore")                                         # the first process warns for all
    if world > 1:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # should torchrun itself be killed, its processes save and stop
            system.end_with(os.getppid(), signal.SIGTERM)
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = fresh_store(store, rank, world)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device, rank, world


def fresh_store(store, rank, world, minutes=30):
    """A part of torchrun's store that only living processes share. BadInput when they have not all come after `minutes`.

    The store outlives the processes: after a restart it still holds the addresses of those that died, and the counts of restarts
    differ from node to node (pytorch issue 135712). So process 0 draws a name, and answers everybody's question under that
    question, which no dead process ever asked.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question {rank}", name)
        name = store.get(f"answer {name}").decode()                             # waits for it
        store.add(f"{name} heard", 1)
    deadline = time.time() + 60 * minutes
    while rank == 0 and store.add(f"{name} heard", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"question {other}"]):
                store.set(f"answer {store.get(f'question {other}').decode()}", name)
        if time.time() > deadline:
            raise BadInput(f"not all of the {world} processes of this run came within {minutes} minutes")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def rank_and_world():
    """This process's number, and how many there are: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all(thing):
    """What each process passes here, in rank order: a list of any objects."""
    things = [thing]
    if dist.is_initialized():
        things *= dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def largest(number):
    """The largest of all processes' whole numbers."""
    number = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def wait_for_all():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def own_batches(count, batch_size):
    """This process's batches of 0 … count - 1, as ranges. On any number of processes they are the same batches, so results round alike."""
    rank, world = rank_and_world()
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return batches[rank::world]


def from_shares(batches, rows, whole):
    """Fill `whole` with the rows that each process has computed for its own batches -> whole, the same on every process.

    batches: ranges, as own_batches gives them; rows: for each its rows of `whole`, a tensor or an array.
    """
    for some_batches, some_rows in from_all((batches, rows)):
        for batch, x in zip(some_batches, some_rows):
            whole[batch.start : batch.stop] = x
    return whole


# ---------------------------------------------------------------------------------------------------------------- precision


def precision_of(name, device, evaluating=False):
    """"auto", "fp32", "bf16" or "fp16" -> (a context for the towers' forward pass, the name that auto came to).

    auto is the fastest that is safe. For training bf16, whose range is that of fp32. For evaluation on a GPU fp16: as fast, and
    eight times nearer to fp32; should it overflow, the embeddings are not finite and refused.
    """
    if name == "auto":
        if evaluating and device.type == "cuda":
            name = "fp16"
        elif bf16_is_fast(device):
            name = "bf16"
        else:
            name = "fp16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=name != "fp32"), name


def bf16_is_fast(device):
    """Whether this hardware multiplies bfloat16 matrices natively: NVIDIA from Ampere on; CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # private functions of torch: another version may not have them
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return any(probe() for probe in probes if probe)
