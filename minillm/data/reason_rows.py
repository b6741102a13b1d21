"""Rows of answers with reasoning, in which the tags weigh more than other targets.

The four tags are a few targets among hundreds, but everything after them depends on them: a model that forgets
``</think>`` never stops thinking, and one that forgets ``<answer>`` gives no answer. So the loss of a tag counts
``tag_weight`` times:

    targets   -100 ... -100  <think>  2  +  3  =  5  </think>  <answer>  5  </answer>  <|im_end|>
    weights      1 ...    1       10  1  1  1  1  1        10        10  1         10           1
"""

import hashlib

import numpy as np

from minillm.data.chat import ChatRows
from minillm.data.reasoning import TAGS
from minillm.errors import UserError


class ReasonRows(ChatRows):
    """Rows of conversations whose last answer has the form ``<think>…</think><answer>…</answer>``.

    A row has the columns of ``ChatRows``, and ``weights`` (float32): ``tag_weight`` where the target is a tag, else 1.
    A record whose last answer has another form is a bad line. ``n_targets``, ``target_counts`` and ``target_bytes``
    count every target once. ``log_prob`` is None unless all weights are 1, because a weighted loss cannot be compared
    with it.

    Args:
        tag_weight: above 0. With 1 the loss is the mean over tokens; validation always uses 1.
        settings: those of ``ChatRows``.

    Raises:
        UserError: as ``ChatRows``; a tag is not a single token of the tokenizer; the weight is out of range.
    """

    kind = "reason"

    def __init__(self, path, tokenizer, *, tag_weight: float, **settings):
        if not 0 < tag_weight < float("inf"):
            raise UserError(f"--tag_weight {tag_weight}: must be positive and finite; 1 weighs all targets equally")
        missing_tags = [tag for tag in TAGS if not tokenizer.has_token(tag)]
        if missing_tags:
            raise UserError(
                f"{tokenizer.origin} has no single token for {', '.join(missing_tags)}, so the weights would apply to "
                "parts of other words: use a model with a tokenizer of train_tokenizer.py, or use train_sft.py, in "
                "which tags may be text"
            )
        super().__init__(path, tokenizer, **settings)
        self.tag_weight, self._tag_ids = tag_weight, [tokenizer.token_id(tag) for tag in TAGS]
        if tag_weight != 1:
            self.log_prob = None
        self.data_hash = hashlib.sha256(f"{self.data_hash} {tag_weight}".encode()).hexdigest()

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        columns = super().__getitem__(row)
        is_tag = np.isin(columns["targets"], self._tag_ids)
        return columns | {"weights": np.where(is_tag, self.tag_weight, 1).astype(np.float32)}
