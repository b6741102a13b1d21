"""Lets a model's vocabulary grow with its tokenizer: the rows of ``--add_tokens``, and the tokens of an adapter."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from minillm.errors import UserError
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer, add_tokens, load_tokenizer


@torch.no_grad()
def grow_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """Give the tokens that were added to a tokenizer their rows in embedding and output layer.

    A new row is the mean of the rows of the old tokens, so that a new token is at first as likely as an average one.
    Embeddings are often padded to a round number; then the first free rows are used, whatever numbers they had.

    Raises:
        UserError: the model's files name one of the new ids for something else.
    """
    if tokenizer.grown_from is None:
        return
    n_known, n_tokens = tokenizer.grown_from.vocab_size, tokenizer.vocab_size
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    taken = [i for i in (*ends, config.bos_token_id, *tokenizer.generation_ends) if i is not None and i >= n_known]
    if taken:
        raise UserError(
            f"--add_tokens: the model's configuration uses the id {taken[0]}, and its tokenizer has only {n_known} "
            "tokens: give --tokenizer_path the complete tokenizer"
        )
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    for layer in [model.model.embed_tokens, *([] if is_tied else [model.lm_head])]:
        old = layer.weight
        new = torch.empty(max(n_tokens, len(old)), old.shape[1], dtype=old.dtype, device=old.device)
        new[: len(old)] = old
        new[n_known:n_tokens] = old[:n_known].to(torch.promote_types(old.dtype, torch.float32)).mean(dim=0)
        layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    n_rows = len(model.model.embed_tokens.weight)
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = n_rows
    model.config = dataclasses.replace(config, vocab_size=n_rows)
    model.tie_weights()


def grow_for_adapters(model: Transformer, tokenizer: Tokenizer, adapters: list[tuple[Path, float]]) -> Tokenizer:
    """Return the tokenizer of adapters that were trained with ``--add_tokens``, and give the model its rows.

    Without such adapters the tokenizer is returned, and the model is unchanged.

    Args:
        tokenizer: of the model.
        adapters: path and weight of each.

    Raises:
        UserError: an adapter's tokenizer is not that of the model with further tokens, or two differ.
    """
    found = {}
    for path, _ in adapters:
        if path.is_dir() and (path / "tokenizer.json").is_file():
            theirs = load_tokenizer(path)
            found[theirs.encoding_hash] = (path, theirs)
    if not found:
        return tokenizer
    if len(found) > 1 or len(adapters) > 1:
        names = ", ".join(str(path) for path, _ in adapters)
        raise UserError(f"only adapters without added tokens can be mixed: {names}; give one of them alone")
    ((path, theirs),) = found.values()
    new_ids = range(tokenizer.vocab_size, theirs.vocab_size)
    names = [theirs.token_bytes(token_id).decode("utf-8", errors="replace") for token_id in new_ids]
    grown = add_tokens(tokenizer, names)
    if grown.content_hash != theirs.content_hash:
        raise UserError(
            f"the tokenizer in {path} is not that of {tokenizer.origin} with added tokens: give the model that the "
            "adapter was made for"
        )
    if grown is not tokenizer:
        theirs.grown_from = tokenizer
        grow_vocabulary(model, theirs)
    return theirs
