"""Checkpoints of a training stage: copied in memory, written in the background, good once their manifest verifies.

The format is our own, measured against what there is (tests/benchmarks/saves.py; all weights of a 135M model with
their moments, 1.6 GB, one process of ZeRO-2, two busy cores; medians). A save of ours holds training up for 0.29 s,
DeepSpeed's for 3.3 s and torch's DCP for 5.2 s. DCP also keeps its metadata as a pickle, which no reader here opens,
and neither notices a flipped bit. DeepSpeed's fragment API gathers whole tensors on every rank: 0.34 s for the weights
alone, a third of the state. So `shards` takes views of what each rank holds; they cost nothing, and loading writes to
them.
"""
