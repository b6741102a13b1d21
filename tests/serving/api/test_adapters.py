"""Adapters are models of their own name, in the same batch as the model itself."""

import asyncio
import copy

import openai
import pytest
import torch

from minillm.inference import complete
from minillm.lora import apply_lora, lora_parameters, save_lora
from minillm.tokenizer import encode_chat
from tests.serving.api.conftest import KEY

ASK = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def adapters(model, engine, tmp_path_factory):
    """Two random adapters in the engine; by name, a model that has each."""
    models = {"tiny": model}
    for seed, name in enumerate(("cooking", "law")):
        torch.manual_seed(seed)
        adapted = copy.deepcopy(model)
        apply_lora(adapted, rank=4, alpha=8)
        with torch.no_grad():
            for parameter in lora_parameters(adapted):
                parameter.normal_(std=0.4)
        path = tmp_path_factory.mktemp(name)
        save_lora(adapted, path)
        engine.add_adapter(name, path)
        models[name] = adapted.eval()
    yield models
    for name in ("cooking", "law"):
        engine.remove_adapter(name)


def test_each_name_gets_the_answers_of_its_model(adapters, address, tokenizer):
    ids = encode_chat(tokenizer, ASK, add_generation_prompt=True)[0]
    options = {"max_new_tokens": 25, "temperature": 0, "eos_token_id": tokenizer.end_ids, "tokenizer": tokenizer}
    expected = {name: complete(model, [ids], **options)[0].text for name, model in adapters.items()}
    assert len(set(expected.values())) == 3

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
            names = list(adapters) * 4
            asked = [client.chat.completions.create(model=n, messages=ASK, temperature=0, max_tokens=25) for n in names]
            return names, await asyncio.gather(*asked)

    for name, answer in zip(*asyncio.run(ask_all()), strict=True):
        assert answer.model == name
        assert answer.choices[0].message.content == expected[name]


def test_they_are_listed_with_their_model(adapters, client):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "cooking", "law"]
    assert cards["law"].parent == "tiny"
    assert not hasattr(cards["tiny"], "parent")
