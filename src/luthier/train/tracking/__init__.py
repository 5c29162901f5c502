"""Where the figures of a run go besides its own log: MLflow, Weights & Biases, TensorBoard, trackio.

The run must not feel them. Each tracker lives in a process of its own (`child.py`), fed through a bounded queue by a thread
(`channel.py`): what is slow, down, or raises, prints, hangs at exit or wants a say in signals is not in the process that trains.
A tracker implements `base.Tracker`, four methods. Loads no torch, and a tracker's package only in its own process.

Not here: what is logged (loop.py), and the log that is always written (runfolder.py).
"""
