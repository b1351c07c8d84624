"""Training under Ray Train; the only place under `train` that imports Ray."""
