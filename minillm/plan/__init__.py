"""The planner: what a training run takes in parameters, FLOPs, bytes and hours, before anything is allocated.

``python -m minillm.plan --preset base --max_seq_len 2048 --batch_size 8``
"""
