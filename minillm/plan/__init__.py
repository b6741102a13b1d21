"""The planner: parameters, FLOPs, memory and hours of a training run, computed before anything is allocated.

``python -m minillm.plan --preset base --max_seq_len 2048 --batch_size 8``
"""
