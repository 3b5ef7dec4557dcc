"""Programs that stand on the paper: python -m tools.demo, search, prepare, classify, bench."""
import support  # before torch: see support/__init__.py

__all__ = ["support"]
