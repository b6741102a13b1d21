"""Generates a few texts with a newly trained model, for its summary page."""

from collections.abc import Iterator
from itertools import islice

import torch

from minillm.data import DataFiles, Record, read_records
from minillm.errors import UserError
from minillm.inference.generate import generate
from minillm.tokenizer.chat import encode_chat

MAX_NEW_TOKENS = 64


def sample_completions(model, tokenizer, files: DataFiles | list[str], *, n_samples: int = 4) -> list[tuple[str, str]]:
    """Return ``(beginning, continuation)`` for the first quarter of the first ``n_samples`` texts of ``files``."""
    beginnings = []
    for record in islice(_usable(files), n_samples):
        ids = tokenizer.encode(record.text)
        beginnings.append(ids[: max(1, min(len(ids) // 4, 32))])
    answers = _generate(model, tokenizer, [tokenizer.open_document(ids) for ids in beginnings])
    return [(tokenizer.decode(ids), answer) for ids, answer in zip(beginnings, answers, strict=True)]


def sample_answers(model, tokenizer, files: DataFiles | list[str], *, n_samples: int = 6) -> list[tuple[str, str]]:
    """Return ``(question, answer)`` for the first user turn of the first ``n_samples`` conversations of ``files``.

    Conversations without a user turn, or with one that is too long for the model, are skipped.
    """
    questions, prompts = [], []
    for record in islice(_usable(files), n_samples):
        question = next((m for m in record.messages if m["role"] == "user"), None)
        if question is not None:
            try:
                ids = encode_chat(tokenizer, [question], tools=record.tools, add_generation_prompt=True)[0]
            except UserError:  # training has rejected it too, and reported the reason
                continue
            if len(ids) < model.config.max_position_embeddings:  # room for an answer
                questions.append(question)
                prompts.append(ids)
    answers = _generate(model, tokenizer, prompts)
    return [(question["content"], answer) for question, answer in zip(questions, answers, strict=True)]


def _usable(files: DataFiles | list[str]) -> Iterator[Record]:
    """Return the first file's usable records; its bad lines were already reported when the data was read."""
    source = DataFiles.of(files)
    records = read_records(source.files[0], on_reject=lambda *bad: None, columns=source.columns)
    return filter(source.takes, records)


def _generate(model, tokenizer, prompts: list[list[int]]) -> list[str]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    new_ids = generate(
        model,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.7,
        top_p=0.9,
        eos_token_id=tokenizer.end_ids,
        generator=generator,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in new_ids]
