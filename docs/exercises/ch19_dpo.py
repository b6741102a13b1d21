"""Chapter 19, exercise 1. 第 19 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch19.py
"""


def dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Return the DPO loss of every pair, (P,), also where the margin is hundreds of nats.

    返回每一对的 DPO 损失 (P,)；间隔达到几百奈特时也要正确。

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: (P,), log-probabilities of whole answers.
    """
    raise NotImplementedError
