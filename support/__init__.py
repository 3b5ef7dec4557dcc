"""What the five files of the paper call, and a student need not open.

Each module imports only modules above it:

system           errors of one line, whole files or none, locks, helper processes, a script's main
processes        the processes of one run, their devices, the precision
images           an image file -> pixels
captions         caption files: csv and jsonl
classes          a folder of images for each class
shards           tar shards: the layout for more pairs than memory holds
shard_writer     any split -> tar shards
weight_files     .pt, .bin, .safetensors, TorchScript -> tensors
formats          names, sizes and checks of tensors, ours and other projects'
exports          our weights -> files for other projects
weights          checkpoints: load, save, read, export
features         embeddings kept on disk
settings         flags, recipes, every setting of a run, remarks on them
tables           published rows, intervals, aligned columns
meter            speed and memory of a training run
run              the folder of a training run: its log, snapshots, resuming
report           pages for a browser
painter          painted images, for a first try without a download
"""
import os

# Waiting OpenMP threads sleep instead of spinning: training is several times faster where other
# programs share the cores. OpenMP reads this once, so every script imports support before torch.
OMP_WAIT_POLICY = os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
