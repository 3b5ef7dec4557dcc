"""Programs that stand on the paper: python -m tools.demo, search, prepare, classify, bench."""
