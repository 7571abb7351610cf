"""What training and inference both stand on: the mesh, checkpoints, logs, and opening a finished run."""
