"""The public face of weight files. How they are read and written: support/weights.py.

    import checkpoint
    model, transform = checkpoint.load("cn-clip-vit-b-16")      # or any released file or folder
    checkpoint.export(model, "own.pt", format="cn-clip")        # or "huggingface"

    python checkpoint.py cn-clip-vit-b-16                       # download it, check it, describe it
    python checkpoint.py runs/own/best.pt --export own-hf --format huggingface
"""
from support import system
from support.exports import PEER_NAMES, export
from support.formats import Layout, config_of, empty_model, name_of
from support.weights import (NAMES, fingerprint, load, load_into, main, model_of, read,
                             read_towers, save, trained_on, vision_facts)

__all__ = ["NAMES", "PEER_NAMES", "Layout", "config_of", "empty_model", "export", "fingerprint",
           "load", "load_into", "main", "model_of", "name_of", "read", "read_towers", "save",
           "trained_on", "vision_facts"]

if __name__ == "__main__":
    system.run(main)
