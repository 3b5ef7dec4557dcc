"""The public face of weight files; how they are read and written stands in support/weights.py.

    import checkpoint
    model, transform = checkpoint.load("cn-clip-vit-b-16")       # released weights by name, any file, any folder
    checkpoint.export(model, "own.pt", format="cn-clip")         # or "huggingface"

    python checkpoint.py cn-clip-vit-b-16                        # download it, check it, say what it is
    python checkpoint.py runs/own/best.pt --export own-hf --format huggingface
"""
from support import system
from support.exports import PEER_NAMES, export
from support.formats import Layout, config_of, empty_model, name_of
from support.weights import NAMES, fingerprint, load, load_into, main, model_of, read, read_towers, save, seen_by

__all__ = ["NAMES", "PEER_NAMES", "Layout", "config_of", "empty_model", "export", "fingerprint", "load", "load_into", "main", "model_of",
           "name_of", "read", "read_towers", "save", "seen_by"]

if __name__ == "__main__":
    system.run(main)
